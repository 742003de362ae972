"""SIGTERM: what runs is finished, nothing new is taken, exit 0."""
from __future__ import annotations

import json
import threading
import time

import httpx
import pytest

from harness.program import Program, Server, binary, wait_for
from harness.queue import Reply, ScriptedQueue

TOKENS = 1200
# Of each job: the demo model is quick, and these must still run when the signal comes. (At temperature 0 they would be computed as one.)
CHOICES = 8


def long_input(story, **more) -> dict:
    return story.request(ignore_eos=True, max_tokens=TOKENS, n=CHOICES, temperature=1, **more)


def test_eight_running_jobs_end_on_their_worker(queue, worker, story):
    names = [f"long{number}-u1" for number in range(8)]
    queue.give([{"id": name, "input": long_input(story, stream=True)} for name in names])
    program = worker(MAX_CONCURRENCY="8", MAX_NUM_SEQS=str(8 * CHOICES))
    wait_for(lambda: all(queue.chunks(name) for name in names), "all eight to speak")
    program.terminate()
    assert not queue.requests("job-done"), "all of them were running"
    assert program.wait(240) == 0
    for name in names:
        last = queue.result(name)["output"][-1]
        assert last["choices"][0]["finish_reason"] == "length" and last["usage"]["completion_tokens"] == CHOICES * TOKENS
    assert len(queue.requests("job-done")) == 8, "each answered exactly once"


def test_eight_running_jobs_on_the_local_endpoint(http, gateway, story):
    """None goes back to the queue: another worker, free and waiting, gets none of them."""
    url = f"{gateway.base}/v2/drain"
    variables = {
        "MODEL": "demo",
        "RUNPOD_WEBHOOK_GET_JOB": f"{url}/job-take/$ID?gpu=x",
        "RUNPOD_WEBHOOK_POST_OUTPUT": f"{url}/job-done/$RUNPOD_POD_ID/$ID?gpu=x",
        "RUNPOD_WEBHOOK_POST_STREAM": f"{url}/job-stream/$RUNPOD_POD_ID/$ID?gpu=x",
        "RUNPOD_WEBHOOK_PING": f"{url}/ping/$RUNPOD_POD_ID?gpu=x",
        "RUNPOD_AI_API_KEY": "any",
        "MAX_CONCURRENCY": "8",
    }
    with Program([binary()], {**variables, "RUNPOD_POD_ID": "first"}, name="first worker") as first:
        jobs = [http.post(f"{url}/run", json={"input": long_input(story)}).json()["id"] for _ in range(8)]
        status = lambda job: http.get(f"{url}/status/{job}").json()  # noqa: E731
        wait_for(lambda: all(status(job)["status"] == "IN_PROGRESS" for job in jobs), "all eight to run")
        with Program([binary()], {**variables, "RUNPOD_POD_ID": "second"}, name="second worker"):
            first.terminate()
            assert all(status(job)["status"] == "IN_PROGRESS" for job in jobs), "all of them were running"
            assert first.wait(240) == 0
            for job in jobs:
                ended = status(job)
                assert (ended["status"], ended["workerId"]) == ("COMPLETED", "first")
                assert not ended.get("retries") and ended["output"]["usage"]["completion_tokens"] == CHOICES * TOKENS
    assert http.get(f"{url}/health").json()["jobs"]["retried"] == 0


def test_a_job_that_comes_with_the_last_poll_is_answered(queue, worker, capital):
    queue.give(Reply.json([{"id": "late-u1", "input": capital.request()}], hang=3))
    program = worker()
    wait_for(lambda: queue.requests("job-take-batch"), "the poll")
    program.terminate()
    assert program.wait() == 0
    assert [seen.tail[-1] for seen in queue.requests("job-done")] == ["late-u1"]
    assert capital.answer in json.dumps(queue.result("late-u1"))


def test_a_platform_that_holds_polls_for_long_loses_no_job(capital):
    """Longer than our own endpoint does: the last poll is waited for all the same, and no other begins."""
    with ScriptedQueue(hold=40) as queue, Program([binary()], {"MODEL": "demo", **queue.variables()}, name="queue worker") as program:
        wait_for(lambda: queue.requests("job-take-batch"), "the poll")
        program.terminate()
        time.sleep(13)
        assert program.alive()
        queue.give({"id": "late-u1", "input": capital.request()})
        assert program.wait(20) == 0
        assert [seen.tail[-1] for seen in queue.requests("job-done")] == ["late-u1"]
        assert capital.answer in json.dumps(queue.result("late-u1"))
        assert len(queue.requests("job-take", "job-take-batch")) == 1


def test_the_drain_s_limit_bounds_the_last_poll():
    with ScriptedQueue(hold=60) as queue, Program([binary()], {"MODEL": "demo", "DRAIN_TIMEOUT": "1", **queue.variables()}, name="queue worker") as program:
        wait_for(lambda: queue.requests("job-take-batch"), "the poll")
        program.terminate()
        assert program.wait(10) == 0


def test_an_idle_worker_ends_at_once(queue, worker):
    program = worker()
    wait_for(lambda: queue.requests("job-take-batch"), "the poll")
    program.terminate()
    assert program.wait() == 0


def test_what_is_unfinished_at_the_deadline_fails(queue, worker, story):
    queue.give([{"id": "endless-u1", "input": story.request(ignore_eos=True, max_tokens=1500, n=100, temperature=1)}])
    program = worker(DRAIN_TIMEOUT="1", MAX_NUM_SEQS="1")
    wait_for(lambda: [seen for seen in queue.requests("ping") if "job_id" in seen.query], "the job to run")
    program.terminate()
    assert program.wait() == 0
    error = json.loads(queue.result("endless-u1")["error"])["error"]
    assert error["status"] == 503 and error["message"]


@pytest.mark.parametrize("mode", ["serve", "http"])
def test_a_server_finishes_what_it_answers(mode, story):
    with Server(mode, "--model", "demo") as server:
        texts = []

        def ask():
            with httpx.stream("POST", f"{server.base}/v1/chat/completions", json=long_input(story, stream=True), timeout=240) as response:
                pieces = response.iter_text()
                texts.append(next(pieces))
                texts.append("".join(pieces))

        asking = threading.Thread(target=ask)
        asking.start()
        wait_for(lambda: texts, "the answer to begin")
        server.terminate()
        wait_for(lambda: server.ping() == 503, "readiness to end")
        refused = httpx.post(f"{server.base}/v1/chat/completions", json={"messages": story.body["messages"]}, timeout=60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert refused.headers["retry-after"]
        if mode == "serve":
            assert httpx.post(f"{server.endpoint}/run", json={"input": story.request()}, timeout=60).status_code == 503
        assert len(texts) == 1, "the answer was still being written"
        asking.join(240)
        assert len(texts) == 2 and texts[1].endswith("data: [DONE]\n\n")
        assert texts[1].count('"finish_reason":"length"') == CHOICES
        assert server.wait() == 0


def test_an_answer_through_the_queue_survives_the_drain_of_serve(story):
    with Server("serve", "--model", "demo") as server:
        url = server.endpoint
        with httpx.Client(timeout=240) as client:
            body = long_input(story, stream=True)
            with client.stream("POST", f"{url}/openai/v1/chat/completions", json=body) as response:
                texts = response.iter_text()
                next(texts)
                server.terminate()
                assert "".join(texts).endswith("data: [DONE]\n\n")
        assert server.wait() == 0
