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
import quiet
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
    ours = programs.Ours(prepare.our_binary(REPOSITORY, given.bin, given.prefix), folder, given.threads, given.kv_cache_gb, given.dtype, given.prefix)
    race = Race(given, ours, programs.Llama(llama_bin, given.threads, given.prefix), folder, ggufs)
    head = {"machine": dict(report.machine(), cores=os.cpu_count(), threads=given.threads, bandwidth_gb_s=ours.bandwidth() if given.rounds else None),
            "checkpoint": folder.name, "rounds": given.rounds, "kv_cache_gb": given.kv_cache_gb, "our dtype": given.dtype}
    for path in given.add:
        race.add(path)
    try:
        for number in range(given.rounds):
            for weights in given.weights:
                say(f"round {number + 1} of {given.rounds}, weights {weights}")
                race.round(weights)
    except KeyboardInterrupt:
        head["interrupted"] = True
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

    def add(self, path):
        """The samples of earlier runs, one JSON object a line, as further rounds."""
        for run in path.read_text().splitlines():
            for line in json.loads(run)["rows"]:
                for side, samples in line.items():
                    if isinstance(samples, dict) and "samples" in samples:
                        for value, disturbed in zip(samples["samples"], samples["disturbed"]):
                            self.cell(line["row"], line["weights"]).add(side, value, disturbed)

    def wanted(self, weights):
        return [row.key for row in report.ROWS if row.key in self.given.only and weights in row.goals]

    def attempt(self, keys, weights, side, measure, server=None, tries=None):
        """Adds what `measure` returns, row → value or row → side → value; what is not available is said in the row instead. Where others disturb the machine,
        it is measured again, and the least disturbed values count."""
        if not keys:
            return
        made = []
        try:
            for _ in range(tries or self.given.tries):
                quiet.wait(self.given.quiet)
                with quiet.Watch(server and server.process.pid) as watch:
                    values = measure()
                made.append((watch.share or 0.0, values))
                if made[-1][0] <= self.given.quiet:
                    break
                say(f"  {', '.join(keys)} {weights}, {side}: others took {watch.share:.0%} of the machine")
        except NotAvailable as reason:
            return self.not_available(keys, weights, side, reason)
        share, values = min(made, key=lambda one: one[0])
        for key, value in values.items():
            for side, value in (value if isinstance(value, dict) else {side: value}).items():
                self.cell(key, weights).add(side, value, share)
                say(f"  {key} {weights}, {side}: {value:.1f}")

    def not_available(self, keys, weights, side, reason):
        say(f"  {', '.join(keys)} {weights}, {side}: not available: {reason}")
        for key in keys:
            self.cell(key, weights).missing[side] = str(reason)

    def refusal(self, weights):
        """`None`, or why these weights cannot be measured."""
        if weights not in self.refused:
            try:
                self.ours.verify(weights)
                self.refused[weights] = None
            except NotAvailable as reason:
                self.refused[weights] = reason
        return self.refused[weights]

    def round(self, weights):
        keys = self.wanted(weights)
        rows = [key for key in keys if key in SHAPES]
        # Ours and theirs alternate shape by shape.
        for shape in dict.fromkeys(SHAPES[key] for key in rows):
            served = [key for key in rows if SHAPES[key] == shape]
            if reason := self.refusal(weights):
                self.not_available(served, weights, "ours", reason)
            else:
                self.attempt(served, weights, "ours", lambda: programs.row_values(self.ours.bench(weights, shape), served))
            for key in served:
                self.attempt([key], weights, "against", lambda: {key: self.llama.measure(self.ggufs[weights], key)})
        if "memory" in keys and ("memory", weights) not in self.cells:  # once: it does not depend on who else is busy
            self.memory(weights)
        self.through_http(weights, keys, rows)
        if self.given.torch_python and weights == "bf16":
            for dtype in ("bfloat16", "float32"):
                self.attempt(rows, weights, f"transformers_{dtype}",
                             lambda: programs.transformers(self.given.torch_python, self.folder, self.given.threads, dtype, rows, self.given.prefix))

    def through_http(self, weights, keys, rows):
        """One run of our server for all rows through HTTP, then one of theirs."""
        served = [key for key in keys if key != "memory"]
        if not served:
            return

        try:
            if reason := self.refusal(weights):
                raise reason
            with servers.our_server(self.ours, weights) as server:
                for shape in dict.fromkeys(SHAPES[key] for key in rows):
                    of_shape = [key for key in rows if SHAPES[key] == shape]
                    self.attempt(of_shape, weights, "ours_http", lambda: programs.row_values(self.ours.bench(weights, shape, server.url), of_shape), server)
                self.server_rows(server, weights, keys, "ours")
        except NotAvailable as reason:
            self.not_available(served, weights, "ours", reason)
        if "ttft" in keys:
            try:
                with servers.llama_server(self.llama, self.ggufs[weights], self.template()) as server:
                    self.server_rows(server, weights, ["ttft"], "against")
            except NotAvailable as reason:
                self.not_available(["ttft"], weights, "against", reason)

    def server_rows(self, server, weights, keys, side):
        if "ttft" in keys:
            def p95():
                times = servers.ttft_under_load(server)
                say(f"  ttft {weights}, {side}: {len(times)} chats, median {servers.percentile(times, 50):.0f} ms")
                return {"ttft": servers.percentile(times, 95)}
            self.attempt(["ttft"], weights, side, p95, server)
        if "second-turn" in keys:
            def turns():
                first, second, cached = servers.two_turns(server)
                if cached == 0:
                    raise NotAvailable("the second turn reports no cached tokens (prefix cache)")
                return {"second-turn": {"ours": second, "against": first}}
            self.attempt(["second-turn"], weights, side, turns, server)

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
            return {"memory": {"ours": peak, "against": float(found[0].group(1)) + float(found[1].group(1))}}
        if reason := self.refusal(weights):
            self.not_available(["memory"], weights, "ours", reason)
        else:
            self.attempt(["memory"], weights, "ours", measure, tries=1)

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
    add("--preset", default="ernie-0.3b", help="shape of the checkpoint that scripts/make_checkpoint.py makes: ernie-0.3b (default), qwen3-0.6b, llama-1b, gemma3-1b, qwen3-30b-a3b-4l …")
    add("--checkpoint", help="a checkpoint instead; with --gguf, the same weights in bf16")
    add("--gguf")
    add("--torch-python", metavar="PYTHON", help="a Python with torch and transformers: they take part; else they do not")
    add("--dtype", default="auto", help="our DTYPE: bfloat16 rounds activations as the others do, where the processor multiplies bf16 (default: auto, f32)")
    add("--kv-cache-gb", type=float, default=1.0, help="our KV pool (default: 1)")
    add("--cache", type=Path, default=prepare.default_cache(), help="where llama.cpp and the weights are kept (default: $WORKER_CANDLE_RACE_CACHE, else ~/.cache/worker-candle/race)")
    add("--llama-cpp-python", metavar="VERSION", help="version of the source package (default: what is built already, else the newest)")
    add("--prefix", type=shlex.split, default=[], metavar="COMMAND", help="put before every build and measuring process, e.g. 'taskset -c 0,1' or 'flock FILE'")
    add("--quiet", type=float, default=0.05, metavar="SHARE", help="measure while others take at most this share of the machine: wait for it, and repeat what was disturbed (default: 0.05)")
    add("--tries", type=int, default=3, help="how often a disturbed measurement is made at most (default: 3)")
    add("--tolerance", type=float, default=0.1, help="how far the engine alone and through HTTP may differ (default: 0.1)")
    add("--add", type=Path, action="append", default=[], metavar="FILE", help="a file of --json runs on the same machine: its samples count as further rounds; may be repeated")
    add("--json", action="store_true", help="one JSON object instead of the table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
