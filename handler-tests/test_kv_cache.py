"""KV_CACHE_DTYPE: the demo model still answers word for word, through the queue and directly, streaming and not; what is held is said."""
from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from harness import questions
from harness.program import Server, run

BYTES = {"float32": 1.0, "float16": 0.5, "bfloat16": 0.5, "int8": 0.265625}


@pytest.fixture(scope="module", params=["float16", "bfloat16", "int8"])
def narrow(request):
    with Server("serve", "--model", "demo", "--kv-cache-dtype", request.param) as server:
        yield request.param, server


def test_every_question_is_answered_word_for_word(http, narrow):
    dtype, server = narrow

    def ask(question) -> str:
        response = http.post(f"{server.base}/v1{question.route}", json=question.request())
        assert response.status_code == 200, response.text
        return questions.text(response.json())

    # Twice: the second time the prompts' beginnings come from the prefix cache.
    for _ in range(2):
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, questions.ALL))
        wrong = {question.name: answer for question, answer in zip(questions.ALL, answers) if answer != question.answer}
        assert not wrong, f"{dtype}: {len(wrong)} of {len(answers)}: {wrong}"


def test_jobs_and_streams_answer_the_same(http, narrow, capital):
    dtype, server = narrow
    job = http.post(f"{server.endpoint}/runsync", json={"input": capital.request()}).json()
    assert job["status"] == "COMPLETED" and questions.text(job["output"]) == capital.answer, (dtype, job)
    said = ""
    with http.stream("POST", f"{server.base}/v1/chat/completions", json={**capital.request(), "stream": True}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                said += "".join(choice["delta"].get("content") or "" for choice in json.loads(line[6:])["choices"])
    assert said == capital.answer


def test_log_and_metrics_name_it(http, narrow):
    dtype, server = narrow
    assert f'cache_config_info{{model_name="demo",cache_dtype="{dtype}",block_size="32"}} 1' in http.get(f"{server.base}/metrics").text
    assert f"bytes per token, {dtype})" in server.log


@pytest.mark.parametrize(
    ("asked", "dtype"),
    [("auto", "float32"), ("float", "float32"), ("half", "float16"), ("BF16", "bfloat16"), ("int8_per_token_head", "int8")],
)
def test_check_says_what_is_held_and_how_many_blocks_that_makes(asked, dtype):
    done = run("check", "--model", "demo", env={"KV_CACHE_DTYPE": asked, "KV_CACHE_GB": "0.5"})
    assert done.process.returncode == 0, done.log
    [line] = [line for line in done.stdout.splitlines() if line.startswith("KV cache: ")]
    assert line.endswith(f" bytes per token, {dtype})"), line
    blocks = int(line.split(" = ")[1].split(" blocks")[0])
    plain = run("check", "--model", "demo", env={"KV_CACHE_GB": "0.5"})
    [line] = [line for line in plain.stdout.splitlines() if line.startswith("KV cache: ")]
    of_float32 = int(line.split(" = ")[1].split(" blocks")[0])
    assert blocks == pytest.approx(of_float32 / BYTES[dtype], rel=0.01)


@pytest.mark.parametrize("asked", ["fp8", "fp8_e4m3", "int4"])
def test_other_types_are_refused_by_name_with_those_that_work(asked):
    done = run("check", "--model", "demo", "--kv-cache-dtype", asked)
    assert done.process.returncode == 1 and "int8" in done.log, done.log
    assert "--kv-cache-dtype: " in done.log and asked in done.log, done.log
