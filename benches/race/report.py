"""The rows of the race, their goals, and the table."""
import platform
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

WEIGHTS = ["bf16", "8bit", "4bit"]
AGAINST = {"bf16": "bf16", "8bit": "Q8_0", "4bit": "Q4_K_M"}
FLAGS = ["avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16"]


@dataclass(frozen=True)
class Row:
    key: str
    name: str
    unit: str
    rival: str
    goals: dict
    lower: bool = False  # a smaller number is the better one


def same(goal):
    return {weights: goal for weights in WEIGHTS}


ROWS = [
    Row("decode-128", "decode, 1 sequence, depth 128", "tok/s", "llama-bench", {"bf16": 1.0, "8bit": 1.0, "4bit": 0.9}),
    Row("decode-4096", "decode, 1 sequence, depth 4,096", "tok/s", "llama-bench", {"bf16": 1.2, "8bit": 1.2, "4bit": 1.1}),
    Row("prefill-512", "prefill, 512 tokens", "tok/s", "llama-bench", {"bf16": 1.0, "8bit": 1.8, "4bit": 1.8}),
    Row("prefill-4096", "prefill, 4,096 tokens", "tok/s", "llama-bench", {"bf16": 1.0, "8bit": 1.8, "4bit": 1.8}),
    Row("batch-16", "16 sequences, 128 in / 64 out, decode", "tok/s", "llama-batched-bench", {"bf16": 1.2, "8bit": 3.0, "4bit": 1.3}),
    Row("ttft", "TTFT p95 of a short chat while 4,096 tokens prefill", "ms", "llama-server", same(0.5), True),
    Row("second-turn", "second turn of a 2,000-token chat, TTFT", "ms", "its first turn", same(0.1), True),
    Row("memory", "peak memory", "MiB", "weights + KV pool", {"bf16": 1.15}, True),
]
THROUGHPUT = [row.key for row in ROWS if row.unit == "tok/s"]


@dataclass
class Cell:
    """Every sample of one row with one form of the weights, by side, in the order of the rounds."""

    sides: dict = field(default_factory=dict)
    disturbed: dict = field(default_factory=dict)
    missing: dict = field(default_factory=dict)

    def add(self, side, value, disturbed):
        """`disturbed`: what other processes took of the machine meanwhile, 0 to 1."""
        self.sides.setdefault(side, []).append(value)
        self.disturbed.setdefault(side, []).append(disturbed)

    def best(self, side, row):
        values = self.sides.get(side)
        return (min if row.lower else max)(values) if values else None

    def median(self, side):
        values = self.sides.get(side)
        return statistics.median(values) if values else None


def summary(row, weights, cell, tolerance):
    """One line of the result, as an object."""
    ours, against, http = (cell.best(side, row) for side in ("ours", "against", "ours_http"))
    ratio = ours / against if ours and against else None
    goal = row.goals[weights]
    reached = None if ratio is None else ratio <= goal if row.lower else ratio >= goal
    line = {"row": row.key, "name": row.name, "weights": weights, "unit": row.unit, "rival": row.rival, "goal": goal, "ratio": ratio, "reached": reached,
            "ratio_of_medians": cell.median("ours") / cell.median("against") if ratio is not None else None,
            "http_agrees": None if ours is None or http is None else abs(http / ours - 1) <= tolerance, "not_available": cell.missing}
    for side, values in cell.sides.items():
        line[side] = {"best": cell.best(side, row), "median": cell.median(side), "samples": values, "disturbed": [round(share, 3) for share in cell.disturbed[side]]}
    return line


def table(lines, tolerance):
    """Plain text: best of the rounds, the median in brackets."""
    head = ["row", "weights", "ours", "ours, HTTP", "agree", "against", "ratio", "goal", "reached", "transformers bf16 / f32"]
    rows = [head] + [cells(line) for line in lines]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    text = ["  ".join(part.ljust(width) for part, width in zip(row, widths)).rstrip() for row in rows]
    missing = sorted({f"{line['row']} {line['weights']}, {side}: not available: {reason}" for line in lines for side, reason in line["not_available"].items()})
    notes = ["", "Best of the rounds (median). ratio: of the bests (of the medians); tok/s: higher is better, ms and MiB: lower is better.",
             f"agree: the engine alone and through HTTP differ by at most {tolerance:.0%}."]
    return "\n".join(text + notes + missing)


def cells(line):
    def number(side):
        if side not in line:
            return "not available" if side in line["not_available"] else "-"
        return f"{line[side]['best']:.1f} ({line[side]['median']:.1f})"

    says = {True: "yes", False: "NO", None: "-"}
    ratio = "-" if line["ratio"] is None else f"{line['ratio']:.2f} ({line['ratio_of_medians']:.2f})"
    sign = "<=" if line["unit"] != "tok/s" else ">="
    torch = " / ".join(f"{line[side]['best']:.1f}" if side in line else "-" for side in ("transformers_bfloat16", "transformers_float32"))
    return [f"{line['name']} [{line['unit']}]", line["weights"], number("ours"), number("ours_http"), says[line["http_agrees"]],
            f"{line['rival']} {number('against')}", ratio, f"{sign} {line['goal']}", says[line["reached"]], "-" if torch == "- / -" else torch]


def machine():
    """CPU model, cores, and those of its instruction sets that matter here."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = {key: re.search(rf"^{key}\s*:\s*(.*)$", text, re.M) for key in ("model name", "flags", "Features")}
    flags = " ".join(match.group(1) for key, match in found.items() if match and key != "model name").split()
    model = found["model name"].group(1) if found["model name"] else platform.processor() or platform.machine()
    return {"cpu": model, "system": f"{platform.system()} {platform.machine()}", "flags": [flag for flag in FLAGS if flag in flags]}
