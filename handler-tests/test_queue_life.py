"""Our worker in queue mode: its log lines, and a model that cannot be loaded."""
from __future__ import annotations

import json

import pytest

from harness.program import wait_for


def test_log_lines_are_json_inside_an_endpoint(queue, worker, capital):
    queue.give([{"id": "good-u1", "input": capital.request()}, {"id": "bad-u1", "input": {"messages": []}}])
    program = worker(RUNPOD_ENDPOINT_ID="ep", RUNPOD_LOG_LEVEL="DEBUG")
    queue.done("good-u1"), queue.done("bad-u1")
    program.terminate()
    assert program.wait() == 0
    lines = [json.loads(line) for line in program.stdout.splitlines()]
    assert lines and all(list(line) == ["requestId", "message", "level"] for line in lines)
    assert {line["level"] for line in lines} <= {"TRACE", "DEBUG", "INFO", "WARN", "ERROR"}
    assert {"good-u1", "bad-u1", None} <= {line["requestId"] for line in lines}
    assert program.stderr == ""
    assert "the-worker-key" not in program.stdout


def test_log_lines_are_text_elsewhere(queue, worker, capital):
    queue.give([{"id": "j-u1", "input": capital.request()}])
    program = worker()
    queue.done("j-u1")
    program.terminate()
    assert program.wait() == 0
    lines = program.stdout.splitlines()
    assert lines and all(line.split("|")[0].strip() in ("DEBUG", "INFO", "WARN", "ERROR") for line in lines)
    assert any("| j-u1 |" in line for line in lines)


def test_every_job_has_one_last_line(queue, worker, capital, story):
    secret = "a-name-that-nobody-should-log"
    queue.give(
        [
            {"id": "good-u1", "input": capital.request(messages=[{"role": "user", "content": secret}], max_tokens=5, ignore_eos=True)},
            {"id": "stream-u1", "input": {"openai_route": "/v1/chat/completions", "openai_input": story.request(stream=True, max_tokens=7)}},
            {"id": "bad-u1", "input": {"messages": []}},
            {"id": "empty-u1"},
        ]
    )
    program = worker(RUNPOD_ENDPOINT_ID="ep")
    names = ["good-u1", "stream-u1", "bad-u1", "empty-u1"]
    for name in names:
        queue.done(name)
    program.terminate()
    assert program.wait() == 0
    lines = [json.loads(line) for line in program.stdout.splitlines()]
    last = {name: [line for line in lines if line["requestId"] == name and " status=" in line["message"]] for name in names}
    assert all(len(of_job) == 1 for of_job in last.values()), program.log
    last = {name: of_job[0] for name, of_job in last.items()}
    for name, tokens in (("good-u1", 5), ("stream-u1", 7)):
        assert last[name]["level"] == "INFO" and "status=COMPLETED" in last[name]["message"]
        assert f" output_tokens={tokens} " in last[name]["message"] and " ms=" in last[name]["message"]
        assert " prompt_tokens=0 " not in last[name]["message"]
    for name in ("bad-u1", "empty-u1"):
        assert last[name]["level"] == "WARN" and "status=FAILED http=400 code=" in last[name]["message"]
    assert "messages" in last["bad-u1"]["message"] and "`input`" in last["empty-u1"]["message"]
    assert secret not in program.log


@pytest.mark.parametrize(
    ("variables", "arguments", "code"),
    [
        ({"MAX_MODEL_LEN": "many", "ANY_MODEL_NAME": "perhaps"}, (), 1),
        ({"RUNPOD_WEBHOOK_POST_OUTPUT": "JOB_DONE_URL"}, (), 1),
        ({"RUNPOD_WEBHOOK_POST_STREAM": "ftp://x/$ID"}, (), 1),
        ({}, ("--no-such-flag",), 2),
    ],
)
def test_a_refused_setting_is_told_to_the_platform(queue, worker, variables, arguments, code):
    """Before the model is looked for: there is none, and nothing says so."""
    program = worker(*arguments, RUNPOD_ENDPOINT_ID="ep", MODEL="nobody/no-such-model", HF_HUB_OFFLINE="1", **variables)
    assert program.wait() == code
    errors = [line for line in map(json.loads, program.stdout.splitlines()) if line["level"] == "ERROR"]
    (ping,) = queue.requests("ping")
    assert len(errors) == 1 and (ping.query["status"], ping.query["check"]) == (["unhealthy"], ["settings"])
    for name in [*variables, *arguments]:
        assert name in errors[0]["message"] and name in ping.query["reason"][0]
    assert "no-such-model" not in program.log and queue.requests("job-take", "job-take-batch") == []


def test_a_key_that_cannot_be_sent_stops_before_the_model(worker):
    program = worker(RUNPOD_ENDPOINT_ID="ep", MODEL="nobody/no-such-model", HF_HUB_OFFLINE="1", RUNPOD_AI_API_KEY="line\nbreak")
    assert program.wait() == 1
    assert "RUNPOD_AI_API_KEY" in program.stdout and "no-such-model" not in program.log and "line\\nbreak" not in program.log


def test_a_model_that_cannot_be_loaded(queue, worker):
    """One clear line, one unhealthy ping, exit 1: no crash loop that says nothing and bills."""
    queue.give([{"id": "never-u1", "input": {"prompt": "x"}}])
    program = worker(MODEL="nobody/no-such-model", HF_HUB_OFFLINE="1")
    assert program.wait() == 1
    pings = queue.requests("ping")
    assert len(pings) == 1
    assert pings[0].query["status"] == ["unhealthy"] and "nobody/no-such-model" in pings[0].query["reason"][0]
    assert len(pings[0].query["reason"][0]) <= 256 and pings[0].query["check"]
    assert queue.requests("job-take", "job-take-batch", "job-done") == []
    assert "nobody/no-such-model" in program.stdout and "panicked" not in program.log


def test_a_model_that_cannot_be_loaded_and_a_platform_that_is_gone(worker):
    program = worker(MODEL="nobody/no-such-model", HF_HUB_OFFLINE="1", RUNPOD_WEBHOOK_PING="http://127.0.0.1:9/ping/$RUNPOD_POD_ID")
    assert program.wait() == 1


def test_a_platform_that_is_gone_for_a_while(queue, worker, capital):
    """The worker starts before its queue, and waits for it."""
    program = worker(RUNPOD_WEBHOOK_GET_JOB="http://127.0.0.1:9/v2/ep/job-take/$ID?gpu=x")
    wait_for(lambda: "cannot be reached" in program.stdout, "the log to tell of it")
    assert program.alive()
    program.terminate()
    assert program.wait() == 0


def test_a_bad_address_is_named(worker):
    program = worker(RUNPOD_WEBHOOK_POST_OUTPUT="JOB_DONE_URL")
    assert program.wait() == 1 and "RUNPOD_WEBHOOK_POST_OUTPUT" in program.log


def test_a_job_that_no_model_can_answer_leaves_the_worker_ready(queue, worker, capital):
    hopeless = [{"id": f"bad{number}-u1", "input": given} for number, given in enumerate([7, "x", [], {}, {"prompt": "w " * 5000}, {"route": "/x"}])]
    queue.give([*hopeless, {"id": "good-u1", "input": capital.request()}])
    program = worker()
    for job in hopeless:
        error = json.loads(queue.result(job["id"])["error"])["error"]
        assert error["status"] in (400, 404) and error["message"]
    assert queue.result("good-u1")["output"]["choices"][0]["message"]["content"] == capital.answer
    assert program.alive()
