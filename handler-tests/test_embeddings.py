"""Embedding models and rerankers through the real doors: tiny checkpoints made from their golden files, transformers as the judge."""
from __future__ import annotations

import base64
import json
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from harness.program import REPOSITORY, Server, run
from test_families import numbers

FOLDER = REPOSITORY / "handler-tests" / "fixtures" / "pooling"


def safetensors(tensors: list[dict]) -> bytes:
    header, data = {}, b""
    for tensor in tensors:
        values = numbers(tensor)
        header[tensor["name"].split("/")[-1]] = {"dtype": "F32", "shape": tensor["shape"], "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def vocabulary(size: int) -> dict[str, int]:
    """A word for each id: special ones first, then `w3`, `w4` …"""
    return {["[PAD]", "[CLS]", "[SEP]"][id] if id < 3 else f"w{id}": id for id in range(size)}


def make_model(name: str, folder: Path) -> dict:
    """A model folder with the golden file's checkpoint, and a tokenizer of words that adds what BERT's adds. The golden file's content."""
    golden = json.loads((FOLDER / f"{name}.json").read_text())
    inside = [tensor for tensor in golden["tensors"] if "/" not in tensor["name"]]
    (folder / "model.safetensors").write_bytes(safetensors(inside))
    (folder / "config.json").write_text(json.dumps(golden["config"]))
    for file, content in golden["files"].items():
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
        of_module = [tensor for tensor in golden["tensors"] if tensor["name"].startswith(f"{path.parent.name}/")]
        if of_module:
            (path.parent / "model.safetensors").write_bytes(safetensors(of_module))
    special = lambda text, id: {"id": id, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "decoder": None,
        "added_tokens": [special(text, id) for id, text in enumerate(["[PAD]", "[CLS]", "[SEP]"])],
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 1]},
        "model": {"type": "WordLevel", "vocab": vocabulary(golden["config"]["vocab_size"]), "unk_token": "[PAD]"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return golden


def floats(text: str) -> list[float]:
    raw = base64.b64decode(text)
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))


def served(name: str, factory):
    folder = factory.mktemp(name)
    golden = make_model(name, folder)
    return Server("serve", "--model", str(folder), "--served-model-name", name), golden


@pytest.fixture(scope="module", params=["bert", "modernbert", "gemma3_text", "qwen3"])
def embedder(request, tmp_path_factory):
    server, golden = served(request.param, tmp_path_factory)
    with server:
        yield server, golden


@pytest.fixture(scope="module", params=["bert_score", "xlm-roberta_score"])
def reranker(request, tmp_path_factory):
    server, golden = served(request.param, tmp_path_factory)
    with server:
        yield server, golden


def close(got: list[float], want: list[float]) -> None:
    assert len(got) == len(want)
    assert max(abs(a - b) for a, b in zip(got, want)) < 1e-5
    dot, lengths = sum(a * b for a, b in zip(got, want)), (sum(a * a for a in got) * sum(b * b for b in want)) ** 0.5
    assert dot / lengths > 0.99999


@pytest.mark.parametrize("door", ["direct", "queue"])
def test_vectors_by_openais_sdk(embedder, door):
    """The SDK asks for base64 unless told otherwise."""
    server, golden = embedder
    inputs = [sequence["ids"] for sequence in golden["sequences"]]
    with openai.OpenAI(base_url=server.doors()[door], api_key="any", max_retries=0, timeout=120) as client:
        plain = client.embeddings.create(model=client.models.list().data[0].id, input=inputs)
        as_floats = client.embeddings.create(model="default", input=inputs, encoding_format="float")
        text = client.embeddings.create(model="default", input="w5 w6 w7")
        with pytest.raises(openai.BadRequestError) as wrong:
            client.embeddings.create(model="default", input=[[5], [100_000]])
        with pytest.raises(openai.BadRequestError, match="generates none"):
            client.chat.completions.create(model="default", messages=[{"role": "user", "content": "Hi"}])
    assert "check_embedding_ctx_length=False" in str(wrong.value)
    assert [row.index for row in plain.data] == [0, 1, 2] and plain.usage.prompt_tokens == sum(map(len, inputs)) == plain.usage.total_tokens
    for row, same, sequence in zip(plain.data, as_floats.data, golden["sequences"]):
        close(row.embedding, floats(sequence["result"]))
        assert [struct.pack("<f", number) for number in row.embedding] == [struct.pack("<f", number) for number in same.embedding]
    assert text.usage.prompt_tokens == 5, "[CLS] and [SEP] are around a text"


def test_many_at_once_are_what_each_is_alone(http, embedder):
    server, _ = embedder
    texts = [" ".join(f"w{3 + (n * 7 + place) % 90}" for place in range(1 + n % 40)) for n in range(200)]

    def ask(part: list[str]) -> list[list[float]]:
        response = http.post(f"{server.base}/v1/embeddings", json={"input": part})
        assert response.status_code == 200, response.text
        return [row["embedding"] for row in response.json()["data"]]

    together = ask(texts)
    with ThreadPoolExecutor(8) as pool:
        alone = list(pool.map(lambda text: ask([text])[0], texts[::10]))
    assert together[::10] == alone, "to the bit"


def test_native_jobs(http, embedder):
    server, golden = embedder
    ids = golden["sequences"][0]["ids"]
    job = http.post(f"{server.endpoint}/runsync", json={"input": {"input": [ids]}}).json()
    assert job["status"] == "COMPLETED", job
    close(job["output"]["data"][0]["embedding"], floats(golden["sequences"][0]["result"]))
    job = http.post(f"{server.endpoint}/runsync", json={"input": {"messages": [{"role": "user", "content": "Hi"}]}}).json()
    assert job["status"] == "FAILED" and "messages" in job["error"], job


def test_scores_and_ranks(http, reranker):
    server, golden = reranker
    # [CLS] query [SEP] document [SEP] of the golden file's ids cannot be texts: what is compared are scores by every way to ask for them.
    query, documents = "w5 w9", ["w5 w9 w11", "w40", "w7 w8 w9 w10"]
    scored = http.post(f"{server.base}/v1/score", json={"text_1": query, "text_2": documents}).json()
    scores = [row["score"] for row in scored["data"]]
    assert all(0 < score < 1 for score in scores) and len(set(scores)) == 3
    ranked = http.post(f"{server.base}/v1/rerank", json={"query": query, "documents": documents}).json()
    order = [row["index"] for row in ranked["results"]]
    assert order == sorted(range(3), key=lambda place: -scores[place])
    assert [row["relevance_score"] for row in ranked["results"]] == [scores[place] for place in order]
    assert [row["document"]["text"] for row in ranked["results"]] == [documents[place] for place in order]
    assert ranked["usage"] == scored["usage"]
    job = http.post(f"{server.endpoint}/runsync", json={"input": {"query": query, "docs": documents, "top_n": 1}}).json()
    assert [row["index"] for row in job["output"]["results"]] == order[:1], job
    routed = {"openai_route": "/v2/rerank", "openai_input": {"query": query, "documents": documents, "return_documents": False}}
    job = http.post(f"{server.endpoint}/runsync", json={"input": routed}).json()
    assert job["output"]["results"] == [{"index": place, "relevance_score": scores[place]} for place in order]
    response = http.post(f"{server.base}/v1/embeddings", json={"input": "w5"})
    assert response.status_code == 400 and "scores pairs of texts" in response.json()["error"]["message"]


def test_check_names_what_a_model_is_for(tmp_path):
    make_model("bert", tmp_path)
    done = run("check", "--model", str(tmp_path))
    assert done.process.returncode == 0 and "bert with 3 layers" in done.stdout, done.log
    assert "it embeds texts: the first token's row, 64 numbers of length 1" in done.stdout, done.log
    done = run("check", "--model", str(tmp_path), "--task", "generate")
    assert done.process.returncode == 1 and "cannot generate text" in done.stdout, done.log
    done = run("check", "--model", str(tmp_path), env={"OVERRIDE_POOLER_CONFIG": '{"pooling_type": "MEAN", "normalize": false}'})
    assert "it embeds texts: the mean of all rows, 64 numbers" in done.stdout, done.log
    done = run("check", "--model", str(tmp_path), "--runner", "pooling", "--max-num-batched-tokens", "16", "--max-model-len", "40")
    assert done.process.returncode == 1 and "runs a text in one step" in done.stdout, done.log
