"""Our worker on the scripted queue: results, streams, refusals, heartbeat, stops."""
from __future__ import annotations

import json

import pytest

from harness import questions
from harness.program import wait_for
from harness.queue import Reply

# Seconds of work in one row.
LONG = {"ignore_eos": True, "max_tokens": 1500, "n": 12, "temperature": 1}


def job(name: str, question, **more) -> dict:
    return {"id": name, "input": question.request(**more)}


def test_result(queue, worker):
    question = questions.BY_NAME["emoji"]
    queue.give([job("j-u1", question)])
    worker()
    done = queue.done("j-u1")
    assert (done.method, done.line) == ("POST", "/v2/ep/job-done/pod-1/j-u1?gpu=NVIDIA+RTX+A5000&isStream=false")
    assert set(done.json) == {"output"} and questions.text(done.json["output"]) == question.answer
    assert question.answer.encode() in done.body, "text beyond ASCII is not escaped"
    assert queue.requests("job-stream") == []


def test_stream(queue, worker, story):
    queue.give([job("j-u1", story, stream=True)])
    worker()
    done = queue.done("j-u1")
    assert done.query["isStream"] == ["true"]
    posts = queue.requests("job-stream")
    assert {post.line for post in posts} == {"/v2/ep/job-stream/pod-1/j-u1?gpu=NVIDIA+RTX+A5000&isStream=false"}
    assert "".join(questions.delta(chunk) for chunk in queue.chunks("j-u1")) == story.answer
    assert done.json == {"output": queue.chunks("j-u1")}, "the aggregate is what was streamed"
    assert all(post.at <= done.at for post in posts), "nothing after the result"


def test_stream_of_an_openai_route(queue, worker, story):
    body = {"messages": story.body["messages"], "temperature": 0, "stream": True}
    queue.give([{"id": "j-u1", "input": {"openai_route": "/v1/chat/completions", "openai_input": body}}])
    worker()
    queue.done("j-u1")
    pieces = queue.chunks("j-u1")
    assert all(isinstance(piece, str) and piece.startswith("data: ") and piece.endswith("\n\n") for piece in pieces)
    frames = [frame for frame in "".join(pieces).split("\n\n") if frame]
    assert frames[-1] == "data: [DONE]"
    assert "".join(questions.delta(json.loads(frame[6:])) for frame in frames[:-1]) == story.answer


def test_a_slow_queue_gets_fewer_and_larger_posts_in_order(queue, worker, story):
    queue.streams.extend([Reply(200, b"{}", hang=0.5)] * 3)
    queue.give([job("j-u1", story, stream=True)])
    worker()
    queue.done("j-u1")
    assert "".join(questions.delta(chunk) for chunk in queue.chunks("j-u1")) == story.answer


def test_failed_job(queue, worker, capital):
    queue.give([{"id": "bad-u1", "input": {"messages": []}}, job("good-u1", capital)])
    worker()
    result = queue.result("bad-u1")
    assert set(result) == {"error"} and isinstance(result["error"], str)
    error = json.loads(result["error"])["error"]
    assert (error["status"], error["param"], error["type"]) == (400, "messages", "invalid_request_error")
    assert questions.text(queue.result("good-u1")["output"]) == capital.answer


@pytest.mark.parametrize("trouble", [Reply(500), Reply(503), Reply(429), Reply(cut=True)], ids=["500", "503", "429", "cut"])
def test_a_result_is_posted_until_it_arrives(queue, worker, capital, trouble):
    queue.dones.extend([trouble, trouble])
    queue.give([job("j-u1", capital)])
    worker()
    wait_for(lambda: len(queue.requests("job-done")) == 3, "the third try")
    bodies = {seen.body for seen in queue.requests("job-done")}
    assert len(bodies) == 1 and questions.text(json.loads(bodies.pop())["output"]) == capital.answer
    queue.closed.wait(1)
    assert len(queue.requests("job-done")) == 3, "and not again"


def test_stream_posts_that_fail_do_not_lose_the_rest(queue, worker, story):
    queue.streams.extend([Reply(500), Reply(cut=True), Reply(400)])
    queue.give([job("j-u1", story, stream=True)])
    worker()
    output = queue.result("j-u1")["output"]
    assert "".join(questions.delta(chunk) for chunk in output) == story.answer, "the aggregate is whole"


def test_a_result_refused_for_its_size_becomes_an_error(queue, worker, capital):
    queue.dones.append(Reply(413))
    queue.give([job("j-u1", capital)])
    worker()
    wait_for(lambda: len(queue.requests("job-done")) == 2, "the second post")
    error = json.loads(queue.result("j-u1")["error"])["error"]
    assert (error["status"], error["code"]) == (500, "result_too_large")


def test_a_large_result_that_the_platform_calls_bad_becomes_an_error(queue, worker, story):
    """How the platform refuses what is too large: HTTP 400, and silence for whoever waits."""
    queue.dones.append(Reply(400))
    prompt = story.answer[:100]
    queue.give([{"id": "j-u1", "input": {"prompt": [prompt] * 4, "n": 64, "max_tokens": 400, "ignore_eos": True, "temperature": 1, "seed": 1}}])
    worker(MAX_NUM_SEQS="64")
    wait_for(lambda: len(queue.requests("job-done")) == 2, "the second post", within=240)
    first, second = queue.requests("job-done")
    assert len(first.body) > 256 * 1024 and len(second.body) < 4096
    assert json.loads(second.json["error"])["error"]["code"] == "result_too_large"


def test_heartbeat(queue, worker, story):
    program = worker(MAX_NUM_SEQS="1", MAX_CONCURRENCY="2")
    idle = wait_for(lambda: queue.requests("ping"), "a ping")[0]
    assert idle.method == "GET" and idle.tail == ["pod-1"]
    assert set(idle.query) == {"gpu", "runpod_version"}, "no job_id while idle"
    queue.give([job("a-u1", story, **LONG), job("b-u1", story, **LONG)])
    busy = wait_for(lambda: [seen for seen in queue.requests("ping") if "job_id" in seen.query], "a ping that names jobs")
    assert set(busy[0].query["job_id"][0].split(",")) <= {"a-u1", "b-u1"}
    queue.to_stop.extend(["a-u1", "b-u1"])
    wait_for(lambda: "job_id" not in queue.requests("ping")[-1].query, "pings of an idle worker")
    count = len(queue.requests("ping"))
    wait_for(lambda: len(queue.requests("ping")) > count + 1, "pings that go on")
    queue.pings.extend([Reply(500), Reply(cut=True), Reply(404)])
    count = len(queue.requests("ping"))
    wait_for(lambda: len(queue.requests("ping")) > count + 4, "pings after failed ones")
    assert program.alive()


def test_a_stopped_job_is_silent(queue, worker, story, capital):
    # Minutes of work, if nothing stops it.
    queue.give([job("stop-u1", story, stream=True, ignore_eos=True, max_tokens=1500, n=100, temperature=1)])
    worker(MAX_NUM_SEQS="1", MAX_CONCURRENCY="2")
    wait_for(lambda: queue.chunks("stop-u1"), "the first chunk")
    # The first chunk may come before the first ping.
    wait_for(lambda: any("job_id" in last.query for last in queue.requests("ping")[-1:]), "a ping that names the job")
    queue.to_stop.append("stop-u1")
    wait_for(lambda: "job_id" not in queue.requests("ping")[-1].query, "a ping that no longer names the job")
    posted = len(queue.chunks("stop-u1"))
    queue.give([job("next-u1", capital)])
    assert questions.text(queue.result("next-u1")["output"]) == capital.answer
    assert [seen.tail[-1] for seen in queue.requests("job-done")] == ["next-u1"]
    assert len(queue.chunks("stop-u1")) <= posted + 1, "at most the post that was under way"


def test_stops_of_unknown_jobs_and_odd_answers_do_no_harm(queue, worker, capital):
    program = worker()
    wait_for(lambda: queue.requests("job-stop"), "a stop poll")
    queue.to_stop.extend(["nobody-u1", 7, None, ["x"]])
    wait_for(lambda: not queue.to_stop, "the stops to be read")
    queue.give([job("j-u1", capital)])
    assert questions.text(queue.result("j-u1")["output"]) == capital.answer
    assert program.alive()
    assert queue.requests("job-stop")[0].line == "/v2/ep/job-stop/pod-1?gpu=NVIDIA+RTX+A5000"
