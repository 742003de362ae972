"""Filling in the middle: `suffix` of completions and llama.cpp's `/infill`, on the demo model with control tokens for it in free rows of its embedding."""
from __future__ import annotations

import json
import shutil

import pytest

from harness.hub import DEMO
from harness.program import Server

MARKS = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_sep|>"]
FILES = ["config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json", "tokenizer.model", "model.safetensors"]


@pytest.fixture(scope="module")
def filler(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filler")
    for name in FILES:
        shutil.copy(DEMO / name, folder)
    added = json.loads((DEMO / "added_tokens.json").read_text())
    first = max(added.values()) + 1
    ids = {mark: first + place for place, mark in enumerate(MARKS)}
    (folder / "added_tokens.json").write_text(json.dumps({**added, **ids}))
    with Server("serve", "--model", str(folder)) as server:
        server.ids = ids
        yield server


@pytest.fixture(params=["direct", "queue", "job"])
def post(request, http, filler):
    def post(route: str, body: dict):
        if request.param == "job":
            job = http.post(f"{filler.endpoint}/runsync", json={"input": {"openai_route": route, "openai_input": body}}).json()
            return (200, job["output"]) if job["status"] == "COMPLETED" else (json.loads(job["error"])["error"]["status"], json.loads(job["error"]))
        base = filler.base if request.param == "direct" else f"{filler.endpoint}/openai"
        answer = http.post(base + route, json=body)
        return answer.status_code, answer.json()

    return post


PREFIX, SUFFIX = "The capital of France", " is the largest city."


@pytest.fixture
def laid_out(http, filler):
    """Prefix, suffix and middle, as this model's tokens."""
    ids = lambda text: http.post(f"{filler.base}/tokenize", json={"content": text, "parse_special": False}).json()["tokens"]  # noqa: E731
    prefix, suffix, middle, _ = filler.ids.values()
    return [prefix, *ids(PREFIX), suffix, *ids(SUFFIX), middle]


def test_a_suffix_is_laid_out_and_filled(post, laid_out):
    body = {"prompt": PREFIX, "suffix": SUFFIX, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    status, answer = post("/v1/completions", body)
    choice = answer["choices"][0]
    assert status == 200 and choice["prompt_token_ids"] == laid_out, answer
    # The same ids by themselves have the same answer: the layout is all there is to it.
    alone = post("/v1/completions", {**body, "prompt": laid_out, "suffix": None})[1]["choices"][0]
    assert (choice["text"], choice["token_ids"]) == (alone["text"], alone["token_ids"])
    held = post("/v1/completions", {**body, "guided_regex": "[a-z]{3}"})[1]["choices"][0]
    assert len(held["text"]) == 3 and held["text"].isalpha() and held["finish_reason"] == "stop"


def test_infill_answers_in_llama_cpps_form(post, laid_out):
    body = {"input_prefix": PREFIX[:4], "prompt": PREFIX[4:], "input_suffix": SUFFIX, "n_predict": 12, "temperature": 0, "return_token_ids": True}
    status, filled = post("/infill", body)
    assert status == 200 and filled["stop"] is True and filled["stop_type"] in ("eos", "limit"), filled
    assert filled["prompt_token_ids"] == laid_out and filled["tokens_evaluated"] == len(laid_out)
    completion = post("/v1/completions", {"prompt": PREFIX, "suffix": SUFFIX, "max_tokens": 12, "temperature": 0})[1]
    assert filled["content"] == completion["choices"][0]["text"]
    assert filled["tokens_predicted"] == completion["usage"]["completion_tokens"] == len(filled["tokens"])
    status, several = post("/infill", {**body, "n": 2, "temperature": 1, "seed": 1, "n_probs": 1})
    assert status == 200 and [choice["index"] for choice in several] == [0, 1]
    assert all(choice["completion_probabilities"][0]["top_logprobs"] for choice in several)
    status, ahead = post("/infill", {**body, "n_predict": 0})
    assert (status, ahead["content"], ahead["tokens_predicted"]) == (200, "", 0)


def test_infill_streams(http, filler):
    body = {"input_prefix": PREFIX, "input_suffix": SUFFIX, "n_predict": 12, "temperature": 1, "seed": 5}
    whole = http.post(f"{filler.base}/infill", json=body).json()
    for base in (filler.base, f"{filler.endpoint}/openai"):
        chunks = []
        with http.stream("POST", f"{base}/infill", json={**body, "stream": True}) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            for line in response.iter_lines():
                if line:
                    chunks.append(json.loads(line.removeprefix("data: ")))
        assert "".join(chunk["content"] for chunk in chunks) == whole["content"]
        assert [chunk["stop"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert chunks[-1] == {**whole, "content": ""}


def test_other_files_and_what_is_too_long(post, filler):
    body = {"input_prefix": "word " * 5000, "input_suffix": " more" * 5000, "input_extra": [{"filename": "a.py", "text": "x = 1"}], "n_predict": 4}
    status, filled = post("/infill", {**body, "return_token_ids": True})
    assert status == 200 and filled["truncated"] is True
    prefix, suffix, middle, file = filler.ids.values()
    ids = filled["prompt_token_ids"]
    assert ids[0] == prefix and ids[-1] == middle and suffix in ids and file not in ids
    status, filled = post("/infill", {**body, "input_prefix": "a", "input_suffix": "b", "return_token_ids": True})
    assert status == 200 and filled["truncated"] is False and filled["prompt_token_ids"].count(file) == 2


def test_mistakes_and_models_without_the_tokens(post, http, server):
    status, refused = post("/infill", {"input_prefix": "a"})
    assert (status, refused["error"]["param"]) == (400, "input_suffix")
    for route, body, param in [
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("/infill", {"input_prefix": "a", "input_suffix": "b"}, "input_suffix"),
    ]:
        refused = http.post(server.base + route, json=body)
        assert (refused.status_code, refused.json()["error"]["param"], refused.json()["error"]["code"]) == (400, param, "unsupported_parameter")
