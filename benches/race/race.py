#!/usr/bin/env python3
"""worker-candle against llama.cpp and Hugging Face transformers: the same weights and prompts, in turn in one run. README.md beside this file says how."""
import argparse
import json
import os
import re
import shlex
import sys
from pathlib import Path

import prepare
import programs
import report
import servers
from programs import NotAvailable, SHAPES

REPOSITORY = Path(__file__).resolve().parents[2]
KEYS = [row.key for row in report.ROWS]


def main():
    given = arguments()
    cache = given.cache.expanduser().resolve()
    cache.mkdir(parents=True, exist_ok=True)
    llama_bin, sdist = prepare.llama_cpp(cache, given.llama_cpp_python, given.prefix)
    folder, gguf = prepare.checkpoint(cache, REPOSITORY, given.preset, given.checkpoint, given.gguf)
    ggufs = {weights: prepare.quantized(cache, llama_bin, gguf, weights, given.prefix) for weights in given.weights}
    ours = programs.Ours(prepare.our_binary(REPOSITORY, given.bin, given.prefix), folder, given.threads, given.kv_cache_gb, given.prefix)
    race = Race(given, ours, programs.Llama(llama_bin, given.threads, given.prefix), folder, ggufs)
    head = {"machine": dict(report.machine(), cores=os.cpu_count(), threads=given.threads, bandwidth_gb_s=ours.bandwidth()),
            "checkpoint": folder.name, "rounds": given.rounds, "kv_cache_gb": given.kv_cache_gb}
    for number in range(given.rounds):
        for weights in given.weights:
            say(f"round {number + 1} of {given.rounds}, weights {weights}")
            race.round(number, weights)
    version = programs.output_of([ours.binary, "--version"]).stdout.strip()
    head["versions"] = {"ours": version, "llama-cpp-python": sdist, "llama.cpp": race.llama.version(), "ggml": race.llama.features(), "python": sys.version.split()[0]}
    lines = [report.summary(report.ROWS[KEYS.index(key)], weights, cell, given.tolerance) for (key, weights), cell in race.cells.items()]
    lines.sort(key=lambda line: (KEYS.index(line["row"]), report.WEIGHTS.index(line["weights"])))
    if given.json:
        print(json.dumps(dict(head, rows=lines)))
    else:
        print("\n".join(f"{key}: {value if not isinstance(value, dict) else ', '.join(f'{k} {v}' for k, v in value.items())}" for key, value in head.items()))
        print("\n" + report.table(lines, given.tolerance))
    if any(line["http_agrees"] is False for line in lines):
        sys.exit("The engine alone and through HTTP do not agree: see the column `agree`")


class Race:
    def __init__(self, given, ours, llama, folder, ggufs):
        self.given, self.ours, self.llama, self.folder, self.ggufs = given, ours, llama, folder, ggufs
        self.cells, self.refused = {}, {}

    def cell(self, key, weights):
        return self.cells.setdefault((key, weights), report.Cell())

    def wanted(self, weights):
        return [row.key for row in report.ROWS if row.key in self.given.only and weights in row.goals]

    def attempt(self, keys, weights, side, measure):
        """Adds what `measure` returns, row → value; what is not available is said in the row instead."""
        if not keys:
            return
        try:
            values = measure()
        except NotAvailable as reason:
            say(f"  {', '.join(keys)} {weights}, {side}: not available: {reason}")
            for key in keys:
                self.cell(key, weights).missing[side] = str(reason)
            return
        for key, value in values.items():
            self.cell(key, weights).add(side, value)
            say(f"  {key} {weights}, {side}: {value:.1f}")

    def available(self, weights):
        """The settings are refused by `check`, if at all: nothing is measured with other weights than were asked for."""
        if weights not in self.refused:
            try:
                self.ours.check(weights)
                self.refused[weights] = None
            except NotAvailable as reason:
                self.refused[weights] = reason
        return self.refused[weights]

    def our(self, keys, weights, measure, side="ours"):
        def checked():
            reason = self.available(weights)
            if reason:
                raise reason
            return measure()
        self.attempt(keys, weights, side, checked)

    def round(self, number, weights):
        keys = self.wanted(weights)
        rows = [key for key in keys if key in SHAPES]
        # Ours and theirs alternate shape by shape.
        for shape in dict.fromkeys(SHAPES[key] for key in rows):
            served = [key for key in rows if SHAPES[key] == shape]
            self.our(served, weights, lambda: programs.row_values(self.ours.bench(weights, shape), served))
            for key in served:
                self.attempt([key], weights, "against", lambda: {key: self.llama.measure(self.ggufs[weights], key)})
        if "memory" in keys:
            self.memory(weights)
        self.through_http(number, weights, keys, rows)
        if self.given.torch_python and weights == "bf16":
            for dtype in ("bfloat16", "float32"):
                self.attempt(rows, weights, f"transformers_{dtype}",
                             lambda: programs.transformers(self.given.torch_python, self.folder, self.given.threads, dtype, rows, self.given.prefix))

    def through_http(self, number, weights, keys, rows):
        """One run of our server for all rows through HTTP, then one of theirs."""
        served = [key for key in keys if key != "memory"]
        if not served:
            return

        def ours():
            with servers.our_server(self.ours, weights) as server:
                for shape in dict.fromkeys(SHAPES[key] for key in rows):
                    of_shape = [key for key in rows if SHAPES[key] == shape]
                    self.attempt(of_shape, weights, "ours_http", lambda: programs.row_values(self.ours.bench(weights, shape, server.url), of_shape))
                self.server_rows(server, number, weights, keys, "ours")
            return {}
        self.our(served, weights, ours)
        if "ttft" in keys:
            def theirs():
                with servers.llama_server(self.llama, self.ggufs[weights], self.template()) as server:
                    self.server_rows(server, number, weights, ["ttft"], "against")
                return {}
            self.attempt(["ttft"], weights, "against", theirs)

    def server_rows(self, server, number, weights, keys, side):
        if "ttft" in keys:
            def p95():
                times = servers.ttft_under_load(server, number)
                say(f"  ttft {weights}, {side}: {len(times)} chats, median {servers.percentile(times, 50):.0f} ms")
                return {"ttft": servers.percentile(times, 95)}
            self.attempt(["ttft"], weights, side, p95)
        if "second-turn" in keys:
            first, second, _, cached = servers.two_turns(server, number)
            cell = self.cell("second-turn", weights)
            if cached == 0:
                cell.missing["ours"] = "the second turn reports no cached tokens (prefix cache)"
                return
            cell.add("ours", second)
            cell.add("against", first)

    def memory(self, weights):
        """A wave that fills nine tenths of the KV pool, in a pool of half a GiB."""
        def measure():
            ours = programs.Ours(self.ours.binary, self.folder, self.given.threads, 0.5, self.given.prefix)
            text = ours.check(weights)
            found = [re.search(pattern, text, re.M) for pattern in (r"^weights: ([\d.]+) MiB", r"^KV cache: ([\d.]+) MiB = (\d+) blocks of (\d+) tokens")]
            if not all(found):
                raise NotAvailable("`check` does not print the lines `weights:` and `KV cache:`")
            tokens = int(found[1].group(2)) * int(found[1].group(3)) * 9 // 10 // 16
            # Outputs long enough that no sequence ends before the last has begun.
            peak = ours.bench(weights, (tokens - 128, 128, 16))["peak_rss_mb"]
            self.cell("memory", weights).add("against", float(found[0].group(1)) + float(found[1].group(1)))
            return {"memory": peak}
        self.our(["memory"], weights, measure)

    def template(self):
        """The checkpoint's chat template as a file, for llama-server."""
        path = self.given.cache.expanduser() / "chat_template.jinja"
        path.write_text(json.loads((self.folder / "tokenizer_config.json").read_text())["chat_template"])
        return path


def say(text):
    print(text, file=sys.stderr, flush=True)


def arguments():
    def several(choices):
        def parse(text):
            names = text.split(",")
            unknown = [name for name in names if name not in choices]
            if unknown:
                raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(choices)}")
            return names
        return parse

    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--only", type=several(KEYS), default=KEYS, metavar="ROW,…", help=f"rows to run: {', '.join(KEYS)} (default: all)")
    add("--weights", type=several(report.WEIGHTS), default=report.WEIGHTS, metavar="W,…", help="forms of the weights: bf16,8bit,4bit (default: all)")
    add("--rounds", type=int, default=3, help="how often each measurement is repeated, in turn with the others (default: 3)")
    add("--threads", type=int, default=os.cpu_count(), help="threads of every side (default: all cores)")
    add("--bin", help="our binary (default: `cargo build --release`, then that)")
    add("--preset", default="ernie-0.3b", help="checkpoint made by scripts/make_checkpoint.py (default: ernie-0.3b)")
    add("--checkpoint", help="a checkpoint instead; with --gguf, the same weights in bf16")
    add("--gguf")
    add("--torch-python", metavar="PYTHON", help="a Python with torch and transformers: they take part; else they do not")
    add("--kv-cache-gb", type=float, default=1.0, help="our KV pool (default: 1)")
    add("--cache", type=Path, default=prepare.default_cache(), help="where llama.cpp and the weights are kept (default: $WORKER_CANDLE_RACE_CACHE, else ~/.cache/worker-candle/race)")
    add("--llama-cpp-python", metavar="VERSION", help="version of the source package (default: what is built already, else the newest)")
    add("--prefix", type=shlex.split, default=[], metavar="COMMAND", help="put before every build and measuring process, e.g. 'taskset -c 0,1' or 'flock FILE'")
    add("--tolerance", type=float, default=0.1, help="how far the engine alone and through HTTP may differ (default: 0.1)")
    add("--json", action="store_true", help="one JSON object instead of the table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
