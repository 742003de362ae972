"""Tokenizers without a tokenizer.json, through the doors: vocabularies trained here, random texts in many scripts, and the libraries as the judges.

`FUZZ_SECONDS=60` goes on with new texts for so long in each test; a failure prints the text."""
from __future__ import annotations

import base64
import io
import json
import os
import random
import time

import pytest
import sentencepiece
import tiktoken

from harness import questions
from harness.gguf import DEMO
from harness.program import Server

SECONDS = float(os.environ.get("FUZZ_SECONDS", 0))
TEXTS = 150
ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJ", "0123456789", " ", "  \t\n\r\u00a0\u2003\u3000", ".,;:!?'\"()[]{}<>|`~#$%^&*-_=+/\\", "äöüßéèñçøå", "абвгдежзийклмн", "αβγδεζηθ", "中文分词测试汉字漢字",
    "ひらがなカタカナ", "한국어띄어쓰기", "हिन्दीकाखग", "ไทยกขค", "مرحبابك", "שלוםאב", "😀🚀👩\u200d👧🇩🇪", "ﬁﬂ①②½²Ⅷｆｕｌｌ", "e\u0301a\u0308\u200b\ufeff", "▁", "\u0001\u007f\u0085",
]
WORDS = ["the", "quick", "brown", "fox", "I'm", "don't", "HTTPServer", "12345", "<s>", "</s>", "<|im_end|>", "[INST]", "lazy dog", "\r\n\r\n", "    ", "中文", "Привет"]
CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def sample(random_: random.Random) -> str:
    parts = []
    for _ in range(random_.randint(0, 14)):
        if random_.random() < 0.3:
            parts.append(random_.choice(WORDS))
        else:
            alphabet = random_.choice(ALPHABETS)
            parts.append("".join(random_.choice(alphabet) for _ in range(random_.randint(1, 6))))
        parts.append(random_.choice(["", " ", " ", "\n"]))
    return "".join(parts)


def corpus() -> list[str]:
    random_ = random.Random(5)
    dialogues = (DEMO / "dialogues.json").read_text()
    return [line for line in (sample(random_).replace("\n", " ") for _ in range(600)) if line.strip()] + [dialogues[at : at + 200].replace("\n", " ") for at in range(0, 40_000, 200)]


def compare(http, folder, encode, decode, **env):
    """Ids of random texts, and what those ids read as, by the server and by the library."""
    started, at = time.monotonic(), 0
    with Server("serve", "--model", "demo", env={"TOKENIZER": str(folder), "CHAT_TEMPLATE": "{{ messages[0].content }}", **env}) as server:
        while at < TEXTS or time.monotonic() - started < SECONDS:
            text = sample(random.Random(at))
            answer = http.post(f"{server.base}/tokenize", json={"prompt": text, "add_special_tokens": False})
            assert answer.status_code == 200, answer.text
            ids = answer.json()["tokens"]
            assert ids == encode(text), f"text {at}: {text!r}"
            answer = http.post(f"{server.base}/detokenize", json={"tokens": ids})
            if (read := decode(ids)) is not None:
                assert answer.json()["prompt"] == read, f"text {at}: {text!r}"
            at += 1
        # Tokens of the demo model by this vocabulary are no sentences, but what is streamed is what is answered, and what the library reads in it.
        body = {"prompt": "Hello wörld", "max_tokens": 40, "temperature": 1, "seed": 3, "ignore_eos": True, "return_token_ids": True}
        whole = http.post(f"{server.base}/v1/completions", json=body)
        assert whole.status_code == 200, whole.text
        choice, pieces = whole.json()["choices"][0], []
        # httpx's own lines end at U+0085 and U+2028, too; those of a stream of events do not.
        for line in http.post(f"{server.base}/v1/completions", json={**body, "stream": True}).text.split("\n"):
            if line.startswith("data: {"):
                pieces.append(questions.delta(json.loads(line[6:])))
        assert "".join(pieces) == choice["text"]
        return choice


@pytest.mark.parametrize(
    "name",
    ["unigram, nfkc", "unigram, identity, bytes", "unigram, nmt_nfkc_cf, no prefix, symbols", "bpe, nmt_nfkc, bytes, symbols", "bpe, identity, bytes"],
)
def test_sentencepiece_models(http, tmp_path, name):
    kind, rules, *more = name.split(", ")
    out = io.BytesIO()
    options = {"normalization_rule_name": rules, "byte_fallback": "bytes" in more, "add_dummy_prefix": "no prefix" not in more, "remove_extra_whitespaces": rules != "identity"}
    if "symbols" in more:
        options["user_defined_symbols"] = ["lazy dog", "12", "ﬁ"]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(corpus()), model_writer=out, vocab_size=1200, model_type=kind, hard_vocab_limit=False, character_coverage=0.99,
                                             num_threads=1, minloglevel=2, **options)
    (tmp_path / "tokenizer.model").write_bytes(out.getvalue())
    library = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    # The library takes every space from the beginning where it merges spaces; a server's answers go on.
    compare(http, tmp_path, library.encode, lambda ids: None if library.unk_id() in ids or rules != "identity" else library.decode(ids))


def ranks() -> list[bytes]:
    """Bytes, and unions of neighbours in the corpus in an order that makes many a token the union of several pairs."""
    tokens, random_ = [bytes([byte]) for byte in range(256)], random.Random(7)
    data = "\n".join(corpus()).encode()
    while len(tokens) < 1000:
        at = random_.randrange(len(data) - 12)
        piece = data[at : at + random_.randint(2, 6)]
        for end in range(2, len(piece) + 1):
            if piece[:end] not in tokens and len(tokens) < 1000:
                tokens.append(piece[:end])
    return tokens


@pytest.mark.parametrize("name", ["qwen.tiktoken", "tekken.json"])
def test_vocabularies_of_ranks(http, tmp_path, name):
    tokens, first = ranks(), 0
    if name == "tekken.json":
        first, vocab = 20, [{"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None} for rank, token in enumerate(tokens)]
        config = {"pattern": TEKKEN, "num_vocab_tokens": len(vocab), "default_vocab_size": len(vocab) + first, "default_num_special_tokens": first, "version": "v3"}
        (tmp_path / name).write_text(json.dumps({"config": config, "vocab": vocab}))
    else:
        (tmp_path / name).write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    library = tiktoken.Encoding(name="test", pat_str=TEKKEN if first else CUT, mergeable_ranks={token: rank for rank, token in enumerate(tokens)}, special_tokens={})
    decode = lambda ids: library.decode([id - first for id in ids])
    choice = compare(http, tmp_path, lambda text: [id + first for id in library.encode_ordinary(text)], decode)
    ids = choice["token_ids"]
    if all(first <= id < first + len(tokens) for id in ids):
        assert choice["text"] == decode(ids)
