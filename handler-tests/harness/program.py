"""Runs the binary under test (and other programs), with an environment of its own and its output in files."""
from __future__ import annotations

import atexit
import os
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from pathlib import Path

import httpx

REPOSITORY = Path(__file__).resolve().parents[2]
# Whatever else the machine sets must not reach the binary: a setting in the shell of whoever runs the tests would change their outcome.
INHERITED = ("PATH", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
STARTS_WITHIN = 120
STOPS_WITHIN = 60


def binary() -> str:
    return os.environ["WORKER_CANDLE_BIN"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(condition, what: str, within: float = 60):
    """Waits until `condition()` is truthy, and returns it."""
    end = time.monotonic() + within
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"waited {within} s in vain for {what}")
        time.sleep(0.05)


class Program:
    """A program that runs until it is stopped. Its stdout and stderr go to files, so that neither can block it."""

    running: list[Program] = []

    def __init__(self, command: list[str], env: dict[str, str] | None = None, cwd: str | Path | None = None, name: str = "program"):
        self.name = name
        self.folder = Path(tempfile.mkdtemp(prefix="worker-candle-test-"))
        # Logs are read after the program has ended, so the folder goes with the last test.
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        (self.folder / "home").mkdir()
        environment = {key: os.environ[key] for key in INHERITED if key in os.environ}
        environment.update({"HOME": str(self.folder / "home"), "RUST_BACKTRACE": "1"})
        environment.update(env or {})
        self.stdout_path, self.stderr_path = self.folder / "stdout", self.folder / "stderr"
        with open(self.stdout_path, "wb") as stdout, open(self.stderr_path, "wb") as stderr:
            self.process = subprocess.Popen(
                command,
                env=environment,
                cwd=cwd or self.folder / "home",
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        self.marks = (0, 0)
        Program.running.append(self)

    def mark(self) -> None:
        """What is said from here on is `log_since_mark`."""
        self.marks = (len(self.stdout), len(self.stderr))

    @property
    def log_since_mark(self) -> str:
        return self.stdout[self.marks[0] :] + self.stderr[self.marks[1] :]

    @property
    def stdout(self) -> str:
        return self.stdout_path.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self.stderr_path.read_text(errors="replace")

    @property
    def log(self) -> str:
        return f"--- {self.name}: stdout\n{self.stdout}\n--- {self.name}: stderr\n{self.stderr}"

    def alive(self) -> bool:
        return self.process.poll() is None

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, within: float = STOPS_WITHIN) -> int:
        """The exit code."""
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end within {within} s\n{self.log}") from None

    def kill(self) -> None:
        if self.alive():
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self in Program.running:
            Program.running.remove(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()


class Server(Program):
    """`serve`, `gateway` or `http` of the binary, on a free port. `tls`: what trusts its certificate, where it has one."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None, ready: bool = True, port: int | None = None, tls: ssl.SSLContext | None = None):
        self.port = port or free_port()
        self.tls = tls
        self.base = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        command = [binary(), *arguments, "--host", "127.0.0.1", "--port", str(self.port)]
        super().__init__(command, env, name=" ".join(["worker-candle", *arguments]))
        if ready:
            self.wait_ready()

    @property
    def endpoint(self) -> str:
        """The local RunPod endpoint that `serve` attaches its worker to."""
        return f"{self.base}/v2/local"

    def doors(self) -> dict[str, str]:
        """Base URLs of the OpenAI API: straight into the engine, and as jobs through the queue."""
        return {"direct": f"{self.base}/v1", "queue": f"{self.endpoint}/openai/v1"}

    def ping(self) -> int | None:
        """The readiness probe's status; None while nothing listens."""
        try:
            return httpx.get(f"{self.base}/ping", timeout=10, verify=self.tls or True).status_code
        except httpx.TransportError:
            return None

    def wait_ready(self) -> None:
        def ready():
            assert self.alive(), f"{self.name} ended with {self.process.returncode}\n{self.log}"
            return self.ping() == 200

        wait_for(ready, f"{self.name} to be ready", STARTS_WITHIN)


def run(*arguments: str, env: dict[str, str] | None = None, cwd: str | Path | None = None, within: float = STARTS_WITHIN) -> Program:
    """Runs the binary to its end."""
    program = Program([binary(), *arguments], env, cwd, name=" ".join(["worker-candle", *arguments]))
    try:
        program.wait(within)
    finally:
        program.kill()
    return program
