"""A request that nobody waits for is given up, and its place and blocks go to the next one."""
from __future__ import annotations

import httpx
import pytest

from harness import questions
from harness.program import Server, wait_for

# One row and a cache that one long sequence fills: whoever holds them blocks everybody.
TIGHT = {"MAX_NUM_SEQS": "1", "BLOCK_SIZE": "16", "MAX_MODEL_LEN": "1024", "NUM_GPU_BLOCKS_OVERRIDE": "64", "MAX_CONCURRENCY": "4"}


@pytest.fixture(scope="module")
def tight():
    with Server("serve", "--model", "demo", env=TIGHT) as server:
        yield server


def endless(story, **more) -> dict:
    """Minutes of work in that row, were it not cancelled: at temperature 0 all choices would be one."""
    return story.request(ignore_eos=True, max_tokens=900, n=128, **{"temperature": 1, **more})


def fills_the_cache(tight, story) -> None:
    """A sequence that needs all blocks runs to its end."""
    body = story.request(ignore_eos=True, max_tokens=900)
    answer = httpx.post(f"{tight.base}/v1/chat/completions", json=body, timeout=90).json()
    assert answer["usage"]["completion_tokens"] == 900


def test_the_cache_is_as_tight_as_meant(tight, story):
    fills_the_cache(tight, story)


@pytest.mark.parametrize("door", ["direct", "queue"])
def test_a_client_that_leaves_its_stream(tight, story, door):
    for _ in range(3):
        url = f"{tight.doors()[door]}/chat/completions"
        with httpx.stream("POST", url, json=endless(story, stream=True), timeout=90) as response:
            assert response.status_code == 200 and next(response.iter_text())
    fills_the_cache(tight, story)


@pytest.mark.parametrize("door", ["direct", "queue"])
def test_a_client_that_does_not_wait_for_its_answer(tight, story, door):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{tight.doors()[door]}/chat/completions", json=endless(story), timeout=1)
    fills_the_cache(tight, story)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_cancelled_job(tight, story, stream):
    url = tight.endpoint
    for _ in range(3):
        job = httpx.post(f"{url}/run", json={"input": endless(story, stream=stream)}, timeout=60).json()["id"]
        state = lambda: httpx.get(f"{url}/status/{job}", timeout=60).json()["status"]  # noqa: B023, E731
        wait_for(lambda: state() == "IN_PROGRESS", "the job to run")
        if stream:
            wait_for(lambda: httpx.get(f"{url}/stream/{job}", timeout=60).json()["stream"], "a chunk")
        assert httpx.post(f"{url}/cancel/{job}", timeout=60).json()["status"] == "CANCELLED"
    fills_the_cache(tight, story)


def test_a_job_cancelled_before_it_was_taken(tight, story, capital):
    url = tight.endpoint
    running = [httpx.post(f"{url}/run", json={"input": endless(story)}, timeout=60).json()["id"] for _ in range(6)]
    waiting = httpx.post(f"{url}/run", json={"input": capital.request()}, timeout=60).json()["id"]
    assert httpx.post(f"{url}/cancel/{waiting}", timeout=60).json()["status"] == "CANCELLED"
    for job in running:
        httpx.post(f"{url}/cancel/{job}", timeout=60)
    fills_the_cache(tight, story)
    assert httpx.get(f"{url}/status/{waiting}", timeout=60).json() == {"id": waiting, "status": "CANCELLED"} | {
        key: value for key, value in httpx.get(f"{url}/status/{waiting}", timeout=60).json().items() if key in ("delayTime", "executionTime")
    }


def test_an_execution_timeout_stops_the_work(tight, story):
    url = tight.endpoint
    order = {"input": endless(story), "policy": {"executionTimeout": 5000}}
    job = httpx.post(f"{url}/run", json=order, timeout=60).json()["id"]
    wait_for(lambda: httpx.get(f"{url}/status/{job}", timeout=60).json()["status"] == "TIMED_OUT", "the job to time out")
    fills_the_cache(tight, story)


def test_other_requests_go_on(server, http, story, capital):
    """Cancelling one of a batch leaves its neighbours as they are."""
    url = server.endpoint
    doomed = [http.post(f"{url}/run", json={"input": story.request(ignore_eos=True, max_tokens=1500, n=32, temperature=1, stream=True)}).json()["id"] for _ in range(4)]
    kept = [http.post(f"{url}/run", json={"input": story.request()}).json()["id"] for _ in range(4)]
    for job in doomed:
        http.post(f"{url}/cancel/{job}")
    for job in kept:
        ended = wait_for(
            lambda: (status := http.get(f"{url}/status/{job}").json())["status"] not in ("IN_QUEUE", "IN_PROGRESS") and status,  # noqa: B023
            "the job to end",
        )
        assert questions.text(ended["output"]) == story.answer
