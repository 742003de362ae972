"""Speculation by prompt lookup: the answers stay what they are."""
from __future__ import annotations

import json

import pytest

from harness import questions
from harness.program import Server, run
from test_metrics import scrape

CONFIG = json.dumps({"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 1})


@pytest.fixture(scope="module")
def guessing():
    with Server("http", "--model", "demo", env={"SPECULATIVE_CONFIG": CONFIG}) as server:
        yield server


def test_every_answer_word_for_word(http, guessing):
    for question in questions.BY_NAME.values():
        answer = http.post(f"{guessing.base}/v1{question.route}", json=question.request()).json()
        assert questions.text(answer) == question.answer, question.name
    values = scrape(http, guessing)
    assert 0 < values["worker_candle_spec_decode_num_accepted_tokens_total"] < values["worker_candle_spec_decode_num_draft_tokens_total"]


@pytest.mark.parametrize("more", [{}, {"temperature": 0.9, "seed": 7}, {"temperature": 1.0, "top_k": 20, "seed": 3, "n": 3}])
def test_the_same_text_as_without(http, server, guessing, more):
    body = {"model": "demo", "prompt": "one two three one two three one two three one two", "max_tokens": 120, "ignore_eos": True, "temperature": 0}
    plain, guessed = (http.post(f"{at.base}/v1/completions", json={**body, **more}).json() for at in (server, guessing))
    assert guessed["choices"] == plain["choices"]
    assert guessed["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]


@pytest.mark.parametrize("config", ['{"method": "mtp", "num_speculative_tokens": 1}', '{"method": "ngram", "draft": 1}', "ngram"])
def test_what_there_is_not_is_refused_at_start(config):
    program = run("check", "--model", "demo", env={"SPECULATIVE_CONFIG": config})
    assert program.process.returncode != 0 and "SPECULATIVE_CONFIG" in program.log
