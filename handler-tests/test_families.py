"""Every family of models through the real doors: tiny checkpoints made from their golden files, logits of transformers as the judge."""
from __future__ import annotations

import base64
import json
import math
import struct
from pathlib import Path

import pytest

from harness.program import REPOSITORY, Server, run
from test_metrics import scrape

FOLDER = REPOSITORY / "handler-tests" / "fixtures" / "families"
FAMILIES = sorted(path.stem for path in FOLDER.glob("*.json"))
# Those that go through a server of their own; the others are planned by `check`, since their arithmetic is the unit tests' affair.
SERVED = ["deepseek_v3", "gemma3_text", "glm4", "lfm2", "llama", "ministral3", "olmo3", "qwen3", "qwen3_5_text", "qwen3_moe"]
MASK = (1 << 64) - 1


def hashed(name: str) -> int:
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = (value ^ byte) * 0x100000001B3 & MASK
    return value


def single(number: float) -> float:
    """The nearest f32."""
    return struct.unpack("<f", struct.pack("<f", number))[0]


def numbers(tensor: dict) -> bytes:
    """The generator of the golden files' README."""
    start, count = hashed(tensor["name"]), math.prod(tensor["shape"])
    scale, offset = single(tensor["scale"]), single(tensor["offset"])
    values = []
    for index in range(1, count + 1):
        z = start + index * 0x9E3779B97F4A7C15 & MASK
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
        uniform = ((z ^ z >> 31) >> 40) / (1 << 24)
        values.append(single((2 * uniform - 1) * scale) + offset)
    return struct.pack(f"<{count}f", *values)


def make_model(family: str, folder: Path) -> dict:
    """A model folder with the family's checkpoint and a tokenizer of single characters. The golden file's content."""
    golden = json.loads((FOLDER / f"{family}.json").read_text())
    header, data = {}, b""
    for tensor in golden["tensors"]:
        values = numbers(tensor)
        header[tensor["name"]] = {"dtype": "F32", "shape": tensor["shape"], "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    header = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    (folder / "config.json").write_text(json.dumps(golden["config"]))
    vocab = {chr(0x4E00 + id): id for id in range(golden["config"]["vocab_size"])}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "dropout": None, "unk_token": None, "byte_fallback": False, "fuse_unk": False}
    tokenizer = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "decoder": {"type": "Fuse"}, "model": model}))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return golden


def log_probabilities(sequence: dict, vocab: int) -> list[float]:
    """After the sequence's last token."""
    raw = base64.b64decode(sequence["logits"])[-4 * vocab :]
    logits = struct.unpack(f"<{vocab}f", raw)
    greatest = max(logits)
    total = math.log(sum(math.exp(logit - greatest) for logit in logits)) + greatest
    return [logit - total for logit in logits]


@pytest.mark.parametrize("family", SERVED)
def test_a_family_answers_as_transformers_does(http, tmp_path, family):
    golden = make_model(family, tmp_path)
    vocab = golden["config"]["vocab_size"]
    with Server("serve", "--model", str(tmp_path), "--kv-cache-gb", "0.02") as server:
        for door in server.doors().values():
            for sequence in golden["sequences"]:
                expected = log_probabilities(sequence, vocab)
                request = {"prompt": sequence["ids"], "max_tokens": 1, "temperature": 0, "logprobs": 5, "return_token_ids": True}
                response = http.post(f"{door}/completions", json=request)
                assert response.status_code == 200, response.text
                choice = response.json()["choices"][0]
                best = max(range(vocab), key=expected.__getitem__)
                assert choice["token_ids"] == [best]
                assert choice["logprobs"]["token_logprobs"][0] == pytest.approx(expected[best], abs=1e-3)
                for text, value in choice["logprobs"]["top_logprobs"][0].items():
                    assert value == pytest.approx(expected[ord(text) - 0x4E00], abs=1e-3)
        text = "".join(chr(0x4E00 + id) for id in golden["sequences"][0]["ids"])
        request = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0}
        whole = http.post(f"{server.base}/v1/chat/completions", json=request).json()["choices"][0]["message"]["content"]
        native = http.post(f"{server.endpoint}/runsync", json={"input": request}).json()
        assert whole and native["output"]["choices"][0]["message"]["content"] == whole


# The tiny LFM2 repeats itself, so that drafts are accepted; the tiny Qwen 3.5 does not, so that all are taken back.
@pytest.mark.parametrize(("family", "repeats"), [("lfm2", True), ("qwen3_5_text", False)])
def test_a_model_that_keeps_states_shares_beginnings_and_drafts(http, tmp_path, family, repeats):
    golden = make_model(family, tmp_path)
    prompt = golden["sequences"][0]["ids"] * 2
    asked = {"max_tokens": 200, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    model = ("serve", "--model", str(tmp_path), "--kv-cache-gb", "0.02", "--block-size", "16")
    drafts = json.dumps({"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 1})

    def answers(server) -> list[list[int]]:
        found = []
        for door in server.doors().values():
            for request in [
                {"prompt": prompt},
                {"prompt": prompt[:50] + prompt[:20]},
                {"prompt": prompt, "n": 3, "temperature": 1.0, "seed": 5},
                {"prompt": [prompt, prompt[:33], prompt[:60]]},
            ]:
                response = http.post(f"{door}/completions", json={**asked, **request})
                assert response.status_code == 200, response.text
                found.extend(choice["token_ids"] for choice in response.json()["choices"])
        return found

    with Server(*model, env={"ENABLE_PREFIX_CACHING": "false"}) as server:
        plain = answers(server)
    with Server(*model, env={"SPECULATIVE_CONFIG": drafts}) as server:
        assert answers(server) == plain
        turn = {**asked, "prompt": prompt + plain[0] + prompt[:5], "max_tokens": 1}
        response = http.post(f"{server.base}/v1/completions", json=turn)
        cached = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached == (len(prompt) + len(plain[0]) - 1) // 16 * 16, "up to the answer's last full block"
        counts = scrape(http, server)
        drafted, accepted = (counts[f"worker_candle_spec_decode_num_{what}_tokens_total"] for what in ("draft", "accepted"))
        assert drafted > 0 and (accepted > 0) == repeats
    states = run("check", "--model", str(tmp_path)).stdout
    assert "states: " in states and "slots of " in states, states


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(SERVED)))
def test_check_plans_every_family(tmp_path, family):
    golden = make_model(family, tmp_path)
    done = run("check", "--model", str(tmp_path))
    assert done.process.returncode == 0, done.log
    assert f"architecture: {golden['config']['model_type']} with" in done.stdout and "warning" not in done.stdout, done.log


def test_a_variant_that_is_not_known_is_refused_by_key_and_value(tmp_path):
    make_model("qwen3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, words in [
        ({"hidden_act": "mish"}, 'hidden_act "mish"'),
        ({"rope_parameters": {"rope_type": "xpos", "rope_theta": 10000.0}}, 'rope scaling of type "xpos"'),
        ({"model_type": "mamba"}, 'model_type "mamba" is not supported; this version serves'),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        done = run("check", "--model", str(tmp_path))
        assert done.process.returncode == 1 and words in done.stdout, done.log
