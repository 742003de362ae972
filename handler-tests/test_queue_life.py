"""Our worker in queue mode: its log lines, and a model that cannot be loaded."""
from __future__ import annotations

import json

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
