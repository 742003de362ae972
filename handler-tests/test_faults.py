"""What one request must not do to the others, and what a thousand must not leave behind."""
from __future__ import annotations

import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from harness import questions
from harness.program import Server, wait_for
from test_metrics import scrape


def test_a_client_that_does_not_read_slows_nobody(http, capital):
    """Its stream is far larger than what lies in buffers, and it reads none of it."""
    with Server("http", "--model", "demo") as server, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", server.port))
        choices, tokens = 12, 900
        body = json.dumps(
            {"prompt": "Once", "max_tokens": tokens, "n": choices, "ignore_eos": True, "stream": True, "return_token_ids": True, "temperature": 1}
        ).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        deaf.sendall(head.encode() + body)
        generated = lambda: scrape(http, server)["worker_candle_generation_tokens_total"]  # noqa: E731
        wait_for(lambda: generated() > choices, "its first tokens")
        answer = http.post(f"{server.base}/v1/chat/completions", json=capital.request()).json()
        assert questions.text(answer) == capital.answer
        # Its own tokens are computed to the end, too: nothing waits for the socket.
        wait_for(lambda: generated() >= choices * tokens, "all its tokens", within=120)
        answer = http.post(f"{server.base}/v1/chat/completions", json=capital.request()).json()
        assert questions.text(answer) == capital.answer


CHOICES = 128
# One after another: far more than can be done in a few seconds, however fast the machine.
ENDLESS = {"prompt": "Once", "max_tokens": 900, "n": CHOICES, "ignore_eos": True, "temperature": 1}


@contextmanager
def occupied(server: Server):
    """A stream that takes the one row, and a place to wait for each further choice."""
    body = {**ENDLESS, "stream": True}
    with httpx.Client(timeout=120) as client, client.stream("POST", f"{server.base}/v1/completions", json=body) as stream:
        assert stream.status_code == 200
        yield stream.iter_text()


def test_a_full_queue_says_so_through_every_door(http, capital):
    env = {"MAX_NUM_SEQS": "1", "MAX_WAITING": str(CHOICES)}
    with Server("serve", "--model", "demo", env=env) as narrow, occupied(narrow) as stream:
        next(stream)
        for door in narrow.doors().values():
            refused = http.post(f"{door}/chat/completions", json=capital.request(n=30, temperature=1))
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "engine_overloaded")
            assert int(refused.headers["retry-after"]) > 0
        job = http.post(f"{narrow.endpoint}/runsync", json={"input": capital.request(n=30, temperature=1)}).json()
        error = json.loads(job["error"])["error"]
        assert (job["status"], error["status"], error["code"]) == ("FAILED", 429, "engine_overloaded")


@pytest.fixture
def hurried():
    env = {"MAX_NUM_SEQS": "1", "MAX_WAITING": str(3 * CHOICES), "REQUEST_TIMEOUT": "3"}
    with Server("serve", "--model", "demo", env=env) as server:
        yield server


def test_a_time_limit_ends_what_runs_and_what_waits(http, hurried, capital):
    with occupied(hurried) as stream:
        first = next(stream)
        waiting = http.post(f"{hurried.base}/v1/completions", json=ENDLESS)
        assert (waiting.status_code, waiting.json()["error"]["code"]) == (503, "request_timeout")
        assert waiting.headers["retry-after"] and "REQUEST_TIMEOUT" in waiting.json()["error"]["message"]
        frames = (first + "".join(stream)).split("\n\n")
        # A stream that has begun is told in a frame of its own.
        assert frames[-2] == "data: [DONE]" and json.loads(frames[-3].removeprefix("data: "))["error"]["code"] == "request_timeout"
    answered = wait_for(lambda: (again := http.post(f"{hurried.base}/v1/chat/completions", json=capital.request())).status_code == 200 and again, "room")
    assert questions.text(answered.json()) == capital.answer


def resident(pid: int) -> int:
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="resident memory is read from /proc")
def test_a_thousand_requests_leave_no_memory_behind(http):
    every = list(questions.BY_NAME.values())
    with Server("http", "--model", "demo", "--kv-cache-gb", "0.01") as server, ThreadPoolExecutor(8) as pool:

        def ask(number: int) -> None:
            question = every[number % len(every)]
            answer = http.post(f"{server.base}/v1{question.route}", json=question.request(max_tokens=20, user=str(number)))
            assert answer.status_code == 200, answer.text

        # Warm: every page of the cache written, every allocator's arena grown.
        list(pool.map(ask, range(2000)))
        before = resident(server.process.pid)
        list(pool.map(ask, range(1000)))
        after = resident(server.process.pid)
        print(f"resident: {before} KiB after warm-up, {after} KiB after 1,000 requests more")
        assert after <= before * 1.02, f"{before} KiB grew to {after} KiB"
