"""Hugging Face transformers' share of the race: run by race.py in a Python that has torch and transformers. Prints one JSON line: row → tokens per second."""
import argparse
import json
import time

import torch
from transformers import AutoModelForCausalLM

OUTPUT = 64


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", required=True)
    arguments.add_argument("--threads", type=int, required=True)
    arguments.add_argument("--dtype", choices=["bfloat16", "float32"], required=True)
    arguments.add_argument("--rows", required=True)
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=getattr(torch, given.dtype)).eval()
    generator = torch.Generator().manual_seed(0)
    rows = given.rows.split(",")
    # (prompt tokens, sequences) → the rows it serves
    shapes = {(128, 1): ["decode-128"], (512, 1): ["prefill-512"], (4096, 1): ["prefill-4096", "decode-4096"], (128, 16): ["batch-16"]}
    values = {}
    with torch.inference_mode():
        measure(model, generator, 16, 1, 2)
        for (prompt, sequences), served in shapes.items():
            wanted = [row for row in served if row in rows]
            if wanted:
                decodes = any(not row.startswith("prefill") for row in wanted)
                prefill, decode = measure(model, generator, prompt, sequences, OUTPUT if decodes else 1)
                values.update({row: prefill if row.startswith("prefill") else decode for row in wanted})
    print(json.dumps(values))


def measure(model, generator, prompt, sequences, output):
    """Tokens per second of the prompt, and of the `output - 1` greedy tokens after the first."""
    ids = torch.randint(300, model.config.vocab_size, (sequences, prompt), generator=generator)
    begin = time.perf_counter()
    step = model(ids, use_cache=True, logits_to_keep=1)
    ids = step.logits[:, -1:].argmax(-1)
    first = time.perf_counter()
    for _ in range(output - 1):
        step = model(ids, past_key_values=step.past_key_values, use_cache=True)
        ids = step.logits[:, -1:].argmax(-1)
    last = time.perf_counter()
    return sequences * prompt / (first - begin), sequences * (output - 1) / (last - first) if output > 1 else None


main()
