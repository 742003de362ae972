"""The official `runpod` Python client against our endpoint and worker."""
from __future__ import annotations

import asyncio
import json

import pytest
import runpod
from runpod.endpoint.asyncio.asyncio_runner import Endpoint as AsyncEndpoint
from runpod.http_client import AsyncClientSession

from harness import questions
from harness.program import wait_for


@pytest.fixture
def endpoint(server, monkeypatch):
    # What RUNPOD_ENDPOINT_BASE_URL sets at import.
    monkeypatch.setattr(runpod, "endpoint_url_base", f"{server.base}/v2")
    monkeypatch.setattr(runpod, "api_key", "any")
    return runpod.Endpoint("local")


def spoken(chunks) -> str:
    return "".join(questions.delta(chunk) for chunk in chunks)


def test_run_sync(endpoint, capital):
    output = endpoint.run_sync(capital.request(), timeout=120)
    assert isinstance(output, dict), "one object, no list around it"
    assert output["object"] == "chat.completion" and questions.text(output) == capital.answer


def test_run_sync_with_the_input_wrapped(endpoint, capital):
    assert questions.text(endpoint.run_sync({"input": capital.request()}, timeout=120)) == capital.answer


def test_run_and_output(endpoint, story):
    job = endpoint.run(story.request())
    assert questions.text(job.output(timeout=120)) == story.answer
    assert job.status() == "COMPLETED"


def test_run_and_stream(endpoint, story):
    job = endpoint.run(story.request(stream=True))
    chunks = list(job.stream())
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert spoken(chunks) == story.answer
    assert chunks[-1]["usage"]["completion_tokens"] > 0, "native streams tell usage in their last chunk"
    # The aggregate holds the same.
    assert spoken(job.output(timeout=120)) == story.answer


def test_stream_of_a_job_that_does_not_stream(endpoint, capital):
    job = endpoint.run(capital.request())
    assert list(job.stream()) == []
    assert questions.text(job.output(timeout=120)) == capital.answer


def test_stream_of_an_openai_route(endpoint, story):
    body = {"model": "default", "messages": story.body["messages"], "temperature": 0, "stream": True}
    job = endpoint.run({"openai_route": "/v1/chat/completions", "openai_input": body})
    frames = "".join(job.stream())
    assert frames.endswith("data: [DONE]\n\n")
    chunks = [json.loads(frame[len("data: ") :]) for frame in frames.split("\n\n") if frame and frame != "data: [DONE]"]
    assert spoken(chunks) == story.answer


def test_cancel(endpoint, story, capital):
    job = endpoint.run(story.request(ignore_eos=True, max_tokens=1500, n=128, temperature=1))
    assert job.cancel()["status"] == "CANCELLED"
    assert job.status() == "CANCELLED"
    assert questions.text(endpoint.run_sync(capital.request(), timeout=120)) == capital.answer


def test_failed_job(endpoint):
    assert endpoint.run_sync({"messages": []}, timeout=120) is None
    job = endpoint.run({"messages": []})
    wait_for(lambda: job.status() == "FAILED", "the job to fail")


def test_health(endpoint, capital):
    before = endpoint.health()
    assert set(before["jobs"]) >= {"completed", "failed", "inProgress", "inQueue", "retried"}
    assert before["workers"]["idle"] + before["workers"]["running"] == 1
    endpoint.run_sync(capital.request(), timeout=120)
    assert endpoint.health()["jobs"]["completed"] == before["jobs"]["completed"] + 1


def test_purge_queue(endpoint, monkeypatch):
    # Nobody works on this endpoint, so its jobs wait.
    parked = runpod.Endpoint("parked")
    jobs = [parked.run({"prompt": "x"}) for _ in range(3)]
    assert parked.purge_queue() == {"removed": 3, "status": "completed"}
    assert {job.status() for job in jobs} == {"CANCELLED"}
    assert parked.health()["jobs"]["inQueue"] == 0


def test_async_client(endpoint, capital, story):
    async def talk():
        async with AsyncClientSession() as session:
            endpoint = AsyncEndpoint("local", session)
            whole = await endpoint.run(capital.request())
            streamed = await endpoint.run(story.request(stream=True))
            chunks = [chunk async for chunk in streamed.stream()]
            stopped = await endpoint.run(story.request(ignore_eos=True, max_tokens=1500, n=128, temperature=1))
            cancelled = await stopped.cancel()
            health = await endpoint.health()
            return questions.text(await whole.output(timeout=120)), spoken(chunks), cancelled["status"], set(health)

    assert asyncio.run(talk()) == (capital.answer, story.answer, "CANCELLED", {"jobs", "workers"})
