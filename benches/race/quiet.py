"""How much of the machine other processes take while one thing is measured, and waiting until they take little. Linux; elsewhere nothing is known."""
import os
import resource
import time
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
CORES = os.cpu_count() or 1
WAIT = 60  # seconds at most before one measurement


def machine():
    """Seconds that all cores together were busy since the start, time taken by other guests of the host included."""
    user, nice, system, _, _, irq, softirq, steal = (int(part) for part in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICKS


def group(pgid):
    """Seconds of CPU time of a process group that is running."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == pgid:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS


def ours(pgid):
    """Seconds of CPU time of this program, of its children that have ended, and of a server's group."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used) + (group(pgid) if pgid else 0)


class Watch:
    """After the block, `share` is what others took of the machine while it ran, 0 to 1; `None` where it cannot be known."""

    def __init__(self, pgid=None):
        self.pgid, self.share = pgid, None

    def __enter__(self):
        try:
            self.begin = (time.monotonic(), machine(), ours(self.pgid))
        except (OSError, ValueError):
            self.begin = None
        return self

    def __exit__(self, *_):
        if self.begin:
            elapsed, busy, own = (now - then for now, then in zip((time.monotonic(), machine(), ours(self.pgid)), self.begin))
            self.share = min(1.0, max(0.0, (busy - own) / (elapsed * CORES)))


def wait(share):
    """Waits until others take at most `share` of the machine, a minute at most."""
    until = time.monotonic() + WAIT
    while time.monotonic() < until:
        with Watch() as watch:
            time.sleep(0.5)
        if watch.share is None or watch.share <= share:
            return
