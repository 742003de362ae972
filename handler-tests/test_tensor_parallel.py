"""A model that several ranks compute together: the answers stay what they are, and what cannot be divided is refused with the numbers."""
from __future__ import annotations

import json

import pytest

from harness import questions
from harness.program import Server, run

SPECULATION = json.dumps({"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1})
NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 4}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "numbers", "schema": NUMBERS}}


@pytest.fixture(scope="module")
def divided():
    """Two ranks on the CPU, with everything that decides what is sampled: the prefix cache, drafts, grammars."""
    with Server("serve", "--model", "demo", "--tensor-parallel-size", "2", env={"SPECULATIVE_CONFIG": SPECULATION, "THREADS": "2"}) as server:
        yield server


def test_every_answer_word_for_word(http, divided):
    for question in questions.BY_NAME.values():
        answer = http.post(f"{divided.base}/v1{question.route}", json=question.request()).json()
        assert questions.text(answer) == question.answer, question.name


def test_both_doors_stream_the_same(http, divided, story):
    for base in divided.doors().values():
        with http.stream("POST", f"{base}{story.route}", json=story.request(stream=True)) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        assert questions.joined(questions.gathered([json.loads(line) for line in lines[:-1]])) == story.answer


@pytest.mark.parametrize("more", [{"temperature": 0, "max_tokens": 40}, {"temperature": 0.8, "seed": 5, "n": 3, "max_tokens": 30}, {"response_format": SCHEMA, "temperature": 1.2, "seed": 9}])
def test_the_leader_alone_samples(http, server, divided, more):
    body = {"model": "demo", "messages": [{"role": "user", "content": "Count from one to ten, and again from one to ten."}], **more}
    alone, together = (http.post(f"{at.base}/v1/chat/completions", json=body).json() for at in (server, divided))
    assert together["choices"] == alone["choices"]


def test_check_shows_each_rank():
    program = run("check", "--model", "demo", env={"TENSOR_PARALLEL_SIZE": "2"})
    assert program.process.returncode == 0
    assert "tensor parallel: 2 ranks" in program.log and "rank 0: weights: " in program.log and "rank 1: KV cache: " in program.log
    assert "prepared copy: none" in program.log


@pytest.mark.parametrize("command", ["check", "http"])
@pytest.mark.parametrize("size, problem", [("3", "4 attention heads, which 3 ranks cannot divide among them; use one of 1, 2, 4"), ("0", "at least 1"), ("many", "at least 1")])
def test_what_cannot_be_divided_is_refused_with_the_numbers(command, size, problem):
    program = run(command, "--model", "demo", env={"TENSOR_PARALLEL_SIZE": size, "PORT": "0"})
    assert program.process.returncode != 0
    assert "TENSOR_PARALLEL_SIZE" in program.log and problem in program.log


def test_all_there_are_is_one_on_the_cpu():
    program = run("check", "--model", "demo", env={"TENSOR_PARALLEL_SIZE": "auto", "DEVICE": "cpu"})
    assert program.process.returncode == 0 and "tensor parallel" not in program.log
