"""What one request must not do to the others, and what a thousand must not leave behind."""
from __future__ import annotations

import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest

from harness import questions
from harness.program import Server, run, wait_for
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
        assert (waiting.status_code, waiting.json()["error"]["code"]) == (504, "request_timeout")
        assert "retry-after" not in waiting.headers and waiting.headers["x-should-retry"] == "false"
        assert "REQUEST_TIMEOUT" in waiting.json()["error"]["message"]
        frames = (first + "".join(stream)).split("\n\n")
        # A stream that has begun is told in a frame of its own.
        assert frames[-2] == "data: [DONE]" and json.loads(frames[-3].removeprefix("data: "))["error"]["code"] == "request_timeout"
    answered = wait_for(lambda: (again := http.post(f"{hurried.base}/v1/chat/completions", json=capital.request())).status_code == 200 and again, "room")
    assert questions.text(answered.json()) == capital.answer


def test_a_request_past_its_time_limit_is_sent_once(hurried):
    """The SDK tries again after a 5xx, unless told not to: the same request would run out of time again."""
    for door in hurried.doors().values():
        sent = []
        client = httpx.Client(timeout=120, event_hooks={"request": [sent.append]})
        with openai.OpenAI(base_url=door, api_key="any", http_client=client) as sdk, pytest.raises(openai.InternalServerError) as error:
            sdk.completions.create(model="default", prompt="Once", max_tokens=900, n=CHOICES, temperature=1, extra_body={"ignore_eos": True})
        assert (error.value.status_code, error.value.code, len(sent)) == (504, "request_timeout", 1)


def test_a_native_stream_that_fails_midway_ends_with_an_error_chunk(http, hurried):
    url = hurried.endpoint
    job = http.post(f"{url}/run", json={"input": {**ENDLESS, "stream": True}}).json()["id"]
    chunks = []
    while True:
        progress = http.get(f"{url}/stream/{job}").json()
        chunks += [chunk["output"] for chunk in progress["stream"]]
        if progress["status"] not in ("IN_QUEUE", "IN_PROGRESS") and not progress["stream"]:
            break
    assert progress["status"] == "FAILED" and len(chunks) > 1
    assert all("choices" in chunk and "error" not in chunk for chunk in chunks[:-1])
    assert set(chunks[-1]) == {"error"}, "who reads the chunks alone learns of it, too"
    assert (chunks[-1]["error"]["code"], chunks[-1]["error"]["status"]) == ("request_timeout", 504)
    assert json.loads(http.get(f"{url}/status/{job}").json()["error"]) == chunks[-1]


def resident(pid: int) -> int:
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


# MiB of the pool: what the prompts below write into the cache is far less.
POOL = 512


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="resident memory is read from /proc")
def test_a_thousand_requests_leave_no_memory_behind(http):
    """Each is a prompt of its own, so that each writes blocks that no other has written."""
    with Server("http", "--model", "demo", "--kv-cache-gb", str(POOL / 1024)) as server, ThreadPoolExecutor(8) as pool:

        def ask(number: int) -> None:
            body = {"prompt": f"{number} " + f"Once upon {number} times. " * 6, "max_tokens": 20, "ignore_eos": True, "temperature": 0}
            answer = http.post(f"{server.base}/v1/completions", json=body)
            assert answer.status_code == 200, answer.text

        metrics = lambda: scrape(http, server)  # noqa: E731
        # Warm: every allocator's arena grown.
        list(pool.map(ask, range(200)))
        wait_for(lambda: metrics()["worker_candle_memory_resident"] == 1, "the KV cache's memory", within=120)
        before = resident(server.process.pid)
        assert before > POOL * 1024, f"{before} KiB are less than the pool of {POOL} MiB"
        list(pool.map(ask, range(200, 1200)))
        after = resident(server.process.pid)
        print(f"resident: {before} KiB after warm-up, {after} KiB after 1,000 requests more")
        assert after <= before * 1.02, f"{before} KiB grew to {after} KiB"
        # They have written more than that margin, and the pool had room left: it was not full before they came.
        end = metrics()
        assert 0.04 < end["worker_candle_kv_cache_cached_blocks"] / end["worker_candle_kv_cache_blocks"] < 0.9, end
        assert end["worker_candle_prefix_cache_hits_total"] < 0.2 * end["worker_candle_prefix_cache_queries_total"], end


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="resident memory is read from /proc")
def test_readiness_does_not_wait_for_the_memory_of_the_pool(http, capital):
    """It comes afterwards, without anybody asking for anything; and what is asked meanwhile is answered."""
    with Server("http", "--model", "demo", "--kv-cache-gb", "1") as server:
        at_first = resident(server.process.pid)
        answer = http.post(f"{server.base}/v1/chat/completions", json=capital.request()).json()
        assert questions.text(answer) == capital.answer
        wait_for(lambda: scrape(http, server)["worker_candle_memory_resident"] == 1, "the KV cache's memory", within=120)
        assert at_first < 512 * 1024 < 1024 * 1024 < resident(server.process.pid)
        server.terminate()
        assert server.wait() == 0


def test_memory_that_is_not_there_stops_the_start():
    for env, words in [
        ({"KV_CACHE_GB": "100000"}, ["KV_CACHE_GB=100000", "there is in all", "at most"]),
        ({"NUM_GPU_BLOCKS_OVERRIDE": "99999999"}, ["NUM_GPU_BLOCKS_OVERRIDE=99999999", "at most"]),
        ({"MAX_NUM_BATCHED_TOKENS": "999999999999"}, ["lower MAX_NUM_BATCHED_TOKENS=999999999999", "step buffers"]),
        ({"MAX_NUM_SEQS": "999999999999"}, ["lower MAX_NUM_SEQS=999999999999", "step buffers"]),
        ({"MAX_NUM_SEQS": "16", "MAX_NUM_BATCHED_TOKENS": "8"}, ["MAX_NUM_BATCHED_TOKENS: 8 is less than MAX_NUM_SEQS=16"]),
        ({"MAX_MODEL_LEN": "1"}, ["MAX_MODEL_LEN", "at least 2"]),
    ]:
        for command in ("http", "check"):
            done = run(command, "--model", "demo", "--device", "cpu", env=env)
            said = done.stdout + done.stderr
            assert done.process.returncode == 1 and all(word in said for word in words), (command, env, said)


def test_the_plan_says_what_follows_and_what_is_without_effect():
    done = run("check", "--model", "demo", "--device", "cpu", env={"MAX_NUM_BATCHED_TOKENS": "4", "GPU_MEMORY_UTILIZATION": "0.5"})
    assert done.process.returncode == 0, done.log
    assert "4 sequences at once, 4 tokens per step (MAX_NUM_SEQS follows MAX_NUM_BATCHED_TOKENS)" in done.stdout
    assert "warning: GPU_MEMORY_UTILIZATION has no effect on a CPU" in done.stdout
