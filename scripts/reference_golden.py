#!/usr/bin/env python3
"""Records what Hugging Face transformers computes on a checkpoint: greedy ids (end of sequence ignored) and the last position's logits, in f32.

    python scripts/make_checkpoint.py --preset ernie-tiny --layout pt --out handler-tests/fixtures/ernie-tiny
    python scripts/reference_golden.py handler-tests/fixtures/ernie-tiny --ids 100 200 300 400 500 1000 1500 2000 --out handler-tests/fixtures/ernie-tiny/golden.json
    python scripts/make_checkpoint.py --preset ernie-0.3b --layout pt --out out/ernie-0.3b-pt
    python scripts/reference_golden.py out/ernie-0.3b-pt --ids 100 200 300 400 500 1000 2000 3000 --no-logits --out handler-tests/fixtures/ernie-0.3b.golden.json

Needs torch and transformers; tests only read the result.
"""
import argparse
import json

import torch
import transformers


def golden(model, ids, count, logits=True):
    """Greedy continuation of `ids`; the margin is the least lead of a chosen logit over the next best."""
    with torch.no_grad():
        out, past, fed, margin, first = [], None, torch.tensor([ids]), float("inf"), None
        for _ in range(count):
            step = model(fed, past_key_values=past, use_cache=True)
            past, last = step.past_key_values, step.logits[0, -1].float()
            first = last if first is None else first
            top = last.topk(2).values
            margin = min(margin, (top[0] - top[1]).item())
            out.append(last.argmax().item())
            fed = torch.tensor([[out[-1]]])
    record = dict(prompt_ids=ids, greedy_ids=out, least_margin=round(margin, 5))
    if logits:
        record["logits"] = [round(value, 5) for value in first.tolist()]
    return record


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", help="a folder in Hugging Face layout")
    arguments.add_argument("--ids", type=int, nargs="+", required=True)
    arguments.add_argument("--count", type=int, default=16)
    arguments.add_argument("--no-logits", action="store_true")
    arguments.add_argument("--note", help="how the checkpoint is made")
    arguments.add_argument("--out", required=True)
    options = arguments.parse_args()
    torch.set_num_threads(2)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    record = dict(made_with=f"transformers {transformers.__version__}, torch {torch.__version__}, f32 on CPU", checkpoint=options.note)
    record |= golden(model, options.ids, options.count, not options.no_logits)
    with open(options.out, "w") as file:
        json.dump(record, file)
        file.write("\n")
    print(record["greedy_ids"], record["least_margin"])


if __name__ == "__main__":
    main()
