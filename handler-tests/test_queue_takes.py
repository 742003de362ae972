"""Our worker on the scripted queue: how it asks for jobs, and what odd answers do to it."""
from __future__ import annotations

import pytest

from harness import questions
from harness.program import wait_for
from harness.queue import Reply, ScriptedQueue


def job(name: str, question, **more) -> dict:
    return {"id": name, "input": question.request(**more)}


def answered(queue, name: str, question) -> None:
    assert questions.text(queue.result(name)["output"]) == question.answer


def test_one_job_at_a_time(queue, worker, capital):
    queue.give(job("j-u1", capital))
    worker(MAX_CONCURRENCY="1")
    answered(queue, "j-u1", capital)
    take = queue.requests("job-take")[0]
    assert (take.method, take.line) == ("GET", "/v2/ep/job-take/pod-1?gpu=NVIDIA+RTX+A5000&job_in_progress=0")
    assert queue.requests("job-take-batch") == []


def test_several_jobs_at_once(queue, worker, capital):
    queue.give([job(f"j{number}-u1", capital) for number in range(4)])
    worker(MAX_CONCURRENCY="4")
    for number in range(4):
        answered(queue, f"j{number}-u1", capital)
    take = queue.requests("job-take-batch")[0]
    assert (take.method, take.line) == ("GET", "/v2/ep/job-take-batch/pod-1?gpu=NVIDIA+RTX+A5000&batch_size=4&job_in_progress=0")


def test_a_busy_worker_asks_for_what_is_free(queue, worker, story):
    queue.give([job("long-u1", story, ignore_eos=True, max_tokens=1500, n=8, temperature=1)])
    worker(MAX_CONCURRENCY="3")
    busy = wait_for(lambda: [seen for seen in queue.requests("job-take-batch") if "job_in_progress=1" in seen.line], "a take beside the running job")
    assert busy[0].query["batch_size"] == ["2"]
    queue.done("long-u1")


def test_headers(queue, worker, capital):
    queue.give(job("j-u1", capital, stream=True))
    worker()
    queue.done("j-u1")
    wait_for(lambda: queue.requests("ping"), "a ping")
    for seen in queue.requests("job-take", "job-take-batch", "job-stop", "job-done", "job-stream", "ping"):
        assert seen.headers["authorization"] == "the-worker-key", f"the key as it is, on {seen.line}"
        assert seen.headers["user-agent"]
    for seen in queue.requests("job-take", "job-take-batch"):
        assert seen.headers["content-type"] == "application/json"
    for seen in queue.requests("job-done", "job-stream"):
        assert seen.headers["content-type"].split(";")[0] == "application/x-www-form-urlencoded"
        assert seen.headers["x-request-id"] == "j-u1"


@pytest.mark.parametrize(
    "odd",
    [
        Reply(204),
        Reply(400, b"{}"),
        Reply(429, b"{}"),
        Reply(401, b"{}"),
        Reply(500, b"oops", content_type="text/plain"),
        Reply(502, b""),
        Reply(200, b""),
        Reply(200, b"null"),
        Reply(200, b"[]"),
        Reply(200, b'"text"'),
        Reply(200, b"{not json"),
        Reply(200, b"<html>", content_type="text/html"),
        Reply(200, b'{"id":"no-input"}'),
        Reply(200, b'{"input":{}}'),
        Reply(cut=True),
        Reply(body=b'[{"id":"half', cut=True),
        Reply(204, hang=4),
    ],
    ids=lambda odd: f"{odd.status}-{odd.body.decode()[:12] or 'empty'}{'-cut' if odd.cut else ''}{'-late' if odd.hang else ''}",
)
def test_odd_answers_to_a_take(queue, worker, capital, odd):
    """Three of them in a row; then the worker still takes its job."""
    queue.give(odd, odd, odd, job("j-u1", capital))
    program = worker()
    answered(queue, "j-u1", capital)
    assert program.alive()
    queue.closed.wait(1)
    assert len([seen for seen in queue.requests("job-done") if seen.tail[-1] == "j-u1"]) == 1


@pytest.mark.parametrize("status", [400, 401, 404, 500])
def test_a_refusing_queue_is_not_asked_in_a_hot_loop(queue, worker, status):
    queue.give(*[Reply(status, b"{}")] * 10_000)
    program = worker(MAX_CONCURRENCY="1")
    wait_for(lambda: queue.requests("job-take"), "the first take")
    queue.closed.wait(3)
    # A hot loop on loopback makes thousands.
    assert len(queue.requests("job-take")) < 40
    assert program.alive()


def test_bad_entries_between_good_ones(queue, worker, capital):
    queue.give([{"id": "no-input-u1"}, 7, None, {"input": {"prompt": "x"}}, "text", job("good-u1", capital), {"id": "null-u1", "input": None}])
    worker()
    answered(queue, "good-u1", capital)
    for name in ("no-input-u1", "null-u1"):
        assert isinstance(queue.result(name)["error"], str)


def test_numeric_ids(queue, worker, capital):
    queue.give([job(17, capital)])
    worker()
    answered(queue, "17", capital)


def test_ids_are_percent_encoded_in_paths(queue, worker, capital):
    queue.give([job("a/b?c&d é-u1", capital)])
    worker()
    answered(queue, "a/b?c&d é-u1", capital)


def test_fields_beside_the_input_do_not_matter(queue, worker, capital):
    queue.give([{**job("j-u1", capital), "error": "", "status": "IN_QUEUE", "delayTime": 3, "retries": 1, "webhook": "http://127.0.0.1:9/x"}])
    worker()
    answered(queue, "j-u1", capital)


def test_a_job_given_twice_is_answered_once(queue, worker, story):
    long = job("twice-u1", story, ignore_eos=True, max_tokens=1500, n=8, temperature=1, stream=True)
    queue.give([long, long], [long])
    worker()
    queue.done("twice-u1")
    queue.closed.wait(1)
    assert len(queue.requests("job-done")) == 1
    assert queue.result("twice-u1")["output"] == queue.chunks("twice-u1"), "one stream, not two mixed"


def test_the_hub_s_harness(worker, capital):
    """RunPod's test bed: no query in GET_JOB, the worker's name as a placeholder, one route to take from, no stream, no ping, no key."""
    with ScriptedQueue(routes=("job-take", "job-done")) as queue:
        base = f"{queue.base}/v2/IDE"
        queue.give({"id": "one", "input": capital.request()}, {"id": "two", "input": {"input": capital.request()}}, job("three", capital, stream=True))
        program = worker(
            RUNPOD_WEBHOOK_GET_JOB=f"{base}/job-take/$RUNPOD_POD_ID",
            RUNPOD_WEBHOOK_POST_OUTPUT=f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=$RUNPOD_GPU_TYPE_ID",
            RUNPOD_WEBHOOK_POST_STREAM=None,
            RUNPOD_WEBHOOK_PING=None,
            RUNPOD_AI_API_KEY=None,
            RUNPOD_POD_ID=None,
            RUNPOD_GPU_TYPE_ID="NVIDIA GeForce RTX 4090",
            RUNPOD_LOG_LEVEL="INFO",
        )
        answered(queue, "one", capital)
        answered(queue, "two", capital)
        chunks = queue.result("three")["output"]
        assert "".join(questions.delta(chunk) for chunk in chunks) == capital.answer
        take = queue.requests("job-take")[0]
        name = take.tail[0]
        assert name and "$" not in name and take.query == {"job_in_progress": ["0"]}
        done = queue.requests("job-done")[0]
        assert done.tail == [name, "one"] and done.query == {"gpu": ["NVIDIA GeForce RTX 4090"], "isStream": ["false"]}
        assert queue.requests("job-stream", "ping") == []
        assert program.alive()
