"""Programs that measure and end: our `bench`, llama.cpp's `llama-bench` and `llama-batched-bench`, transformers in a Python of its own."""
import json
import os
import re
import subprocess
from pathlib import Path

# Row → what `bench` runs: prompt tokens, output tokens, sequences. One run may serve several rows.
SHAPES = {"decode-128": (128, 64, 1), "decode-4096": (4096, 64, 1), "prefill-512": (512, 2, 1), "prefill-4096": (4096, 64, 1), "batch-16": (128, 64, 16)}
QUANTIZATION = {"bf16": "BF16", "8bit": "wint8", "4bit": "wint4"}


class NotAvailable(Exception):
    """Something that this build cannot do: reported in its rows, never counted as a number."""


def output_of(command, env=None):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=env)
    if done.returncode != 0:
        raise NotAvailable(f"{Path(command[0]).name}: " + (done.stderr.strip() or "no message").splitlines()[-1][-300:])
    return done


class Ours:
    def __init__(self, binary, model, threads, kv_cache_gb, dtype, prefix):
        self.binary, self.model, self.threads, self.kv_cache_gb, self.dtype, self.prefix = binary, model, threads, kv_cache_gb, dtype, prefix

    def env(self, weights):
        """Ours is set by variables alone; whatever else this shell has set for the worker must not leak in."""
        kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "TMPDIR", "LANG")}
        return dict(kept, MODEL=str(self.model), THREADS=str(self.threads), KV_CACHE_GB=str(self.kv_cache_gb), QUANTIZATION=QUANTIZATION[weights], DTYPE=self.dtype, LOG_LEVEL="error")

    def check(self, weights):
        """What `check` prints; its refusal is the reason why rows with these weights are not available."""
        return output_of([self.binary, "check"], self.env(weights)).stdout

    def verify(self, weights):
        """Nothing is measured with other weights than were asked for: quantized ones must be smaller in the memory plan."""
        sizes = [re.search(r"^weights: ([\d.]+) MiB", self.check(form), re.M) for form in dict.fromkeys([weights, "bf16"])]
        if not all(sizes):
            raise NotAvailable("`check` does not print the line `weights:`")
        if weights != "bf16" and float(sizes[0].group(1)) > 0.75 * float(sizes[1].group(1)):
            raise NotAvailable(f"with {QUANTIZATION[weights]}, `check` counts {sizes[0].group(1)} MiB of weights, and {sizes[1].group(1)} in bf16")

    def bench(self, weights, shape, url=None):
        """One line of `bench --json`: the engine alone, or through HTTP."""
        prompt, output, sequences = shape
        command = [self.binary, "bench", "--prompt-tokens", prompt, "--output-tokens", output, "--concurrency", sequences, "--json"]
        command = [*command, "--url", url] if url else [*self.prefix, *command]
        return json.loads(output_of(command, self.env(weights)).stdout.splitlines()[-1])

    def bandwidth(self):
        """GB/s of the machine's memory, as `bench` measures and prints it."""
        text = output_of([*self.prefix, self.binary, "bench", "--prompt-tokens", 16, "--output-tokens", 2, "--concurrency", 1], self.env("bf16")).stdout
        found = re.search(r"memory bandwidth ([\d.]+) GB/s", text)
        return float(found.group(1)) if found else None


def row_values(result, rows):
    """The figures of one `bench` run that the rows of its shape want."""
    return {row: result["prefill_tok_s" if row.startswith("prefill") else "decode_tok_s"] for row in rows}


class Llama:
    def __init__(self, folder, threads, prefix):
        self.folder, self.threads, self.prefix = folder, threads, prefix

    def measure(self, gguf, row):
        if row == "batch-16":
            return self.batched(gguf)
        kind, depth = row.split("-")
        # Loaded rather than mapped, so that no page is touched for the first time inside the clock; the warm-up would double a long prefill.
        shape = ["-p", 0, "-n", 64, "-d", depth] if kind == "decode" else ["-p", depth, "-n", 0, "--load-mode", "none", *(["--no-warmup"] if depth == "4096" else [])]
        command = [*self.prefix, self.folder / "llama-bench", "-m", gguf, "-t", self.threads, "-r", 1, "-o", "json", *shape]
        return json.loads(output_of(command).stdout)[-1]["avg_ts"]

    def batched(self, gguf):
        prompt, output, sequences = SHAPES["batch-16"]
        command = [*self.prefix, self.folder / "llama-batched-bench", "-m", gguf, "-t", self.threads, "-c", (prompt + output) * sequences,
                   "-npp", prompt, "-ntg", output, "-npl", sequences, "--output-format", "jsonl"]
        done = output_of(command)
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("{")]
        return json.loads(lines[-1])["speed_tg"]

    def version(self):
        done = subprocess.run([str(self.folder / "llama-server"), "--version"], capture_output=True, text=True)
        return "; ".join((done.stdout + done.stderr).strip().splitlines()).removeprefix("version: ")

    def features(self):
        """What ggml uses of this CPU: the server says it before it misses its model."""
        done = subprocess.run([str(self.folder / "llama-server"), "-m", "no-such-model.gguf", "-lv", "4"], capture_output=True, text=True)
        found = re.search(r"\| (CPU : .*?)[|\s]*$", done.stdout + done.stderr, re.M)
        return found.group(1) if found else None


def transformers(python, checkpoint, threads, dtype, rows, prefix):
    """Row → tokens per second of Hugging Face transformers; it runs in the Python that has torch."""
    script = Path(__file__).with_name("transformers_side.py")
    done = output_of([*prefix, python, script, "--model", checkpoint, "--threads", threads, "--dtype", dtype, "--rows", ",".join(rows)])
    return json.loads(done.stdout.splitlines()[-1])
