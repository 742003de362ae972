#!/usr/bin/env python3
"""Records what Hugging Face transformers' logits processors make of fixed logits, each alone and together.

    python scripts/reference_sampling.py src/models/sample/reference.json

Needs torch and transformers; tests only read the result. Together they run in transformers' order: repetition penalty, bad words,
temperature, top_k, top_p, min_p. The worker has min_p before top_k and top_p (FastDeploy's order), which is the same unless min_p
and top_p are both on: such cases are left out.
"""
import json
import sys

import torch
import transformers
from transformers.generation import logits_process as hf

WIDTHS = [(17, 1.0), (64, 3.0), (300, 2.0)]


def rows():
    """Logits with four decimals: short in the file, and no two of a row equal."""
    generator = torch.Generator().manual_seed(20)
    for width, spread in WIDTHS:
        values = (torch.randn(width, generator=generator) * spread * 10_000).round().to(torch.int64)
        seen = set()
        for i, value in enumerate(values.tolist()):
            while value in seen:
                value += 1
            seen.add(value)
            values[i] = value
        yield (values / 10_000).to(torch.float32)


def processed(row, case):
    ids = torch.tensor([case.get("context", [0])])
    steps = []
    if "repetition_penalty" in case:
        steps.append(hf.RepetitionPenaltyLogitsProcessor(case["repetition_penalty"]))
    if "bad_ids" in case:
        steps.append(hf.NoBadWordsLogitsProcessor([[id] for id in case["bad_ids"]], eos_token_id=None))
    if "temperature" in case:
        steps.append(hf.TemperatureLogitsWarper(case["temperature"]))
    if "top_k" in case:
        steps.append(hf.TopKLogitsWarper(case["top_k"]))
    if "top_p" in case:
        steps.append(hf.TopPLogitsWarper(case["top_p"]))
    if "min_p" in case:
        steps.append(hf.MinPLogitsWarper(case["min_p"]))
    scores = hf.LogitsProcessorList(steps)(ids, row[None].clone())[0]
    return [None if score == -torch.inf else round(score.item(), 6) for score in scores]


def cases():
    alone = [
        dict(top_k=1000), dict(top_k=5), dict(top_k=50), dict(top_k=200),
        dict(top_p=0.1), dict(top_p=0.5), dict(top_p=0.9), dict(top_p=0.99),
        dict(min_p=0.01), dict(min_p=0.1), dict(min_p=0.5),
        dict(temperature=0.3, top_k=1000), dict(temperature=2.5, top_k=1000),
        dict(repetition_penalty=1.3, context=[3, 1, 4, 1, 5, 9, 2, 6], top_k=1000),
        dict(repetition_penalty=0.7, context=[0, 16, 16], top_k=1000),
        dict(bad_ids=[0, 7, 11], top_k=1000),
    ]
    together = [
        dict(repetition_penalty=1.2, context=[2, 7, 1, 8], bad_ids=[3, 12], temperature=0.8, top_k=40, top_p=0.9),
        dict(repetition_penalty=1.1, context=[10, 11, 12], temperature=1.7, top_p=0.8),
        dict(bad_ids=[5], temperature=0.6, top_k=10, top_p=0.95),
        dict(temperature=1.4, top_k=30, min_p=0.05),
        dict(repetition_penalty=1.5, context=[1, 2, 3], temperature=0.9, min_p=0.2),
    ]
    return alone + together


def main():
    out = dict(made_with=f"transformers {transformers.__version__}, torch {torch.__version__}, f32 on CPU", rows=[], cases=[])
    for number, row in enumerate(rows()):
        out["rows"].append([round(value, 4) for value in row.tolist()])
        row = torch.tensor(out["rows"][-1], dtype=torch.float32)
        out["cases"].append(dict(row=number, top_k=1_000_000, processed=out["rows"][-1],
                                 log_softmax=[round(value, 6) for value in torch.log_softmax(row, -1).tolist()]))
        for case in cases():
            out["cases"].append(dict(row=number, **case, processed=processed(row, case)))
    text = json.dumps(out, separators=(",", ":"))
    with open(sys.argv[1], "w") as file:
        file.write(text + "\n")
    print(len(out["cases"]), "cases,", len(text), "bytes")


if __name__ == "__main__":
    main()
