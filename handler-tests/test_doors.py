"""Open doors: what strangers send costs little memory and time, and silent connections shut nobody out."""
from __future__ import annotations

import gzip
import http.client
import json
import os
import resource
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from harness.program import Program, Server, binary, free_port, wait_for

MB = 1_000_000
HI = '"messages":[{"role":"user","content":"Hi"}],"max_tokens":2'


def chat(more: str) -> str:
    return "{" + HI + "," + more + "}"


def shapes(size: int) -> dict[str, tuple[str, str]]:
    """Bodies of about `size` bytes, and what they are sent to. Those named `admitted` are as large as they may be and answered or refused late."""
    text = "word " * (size // 5)
    small = '{"a":1},'
    return {
        "small objects": ("chat/completions", chat('"chat_template_kwargs":{"a":[' + small * (size // len(small)) + "{}]}")),
        "small objects, admitted": ("chat/completions", chat('"chat_template_kwargs":{"a":[' + small * 50_000 + '{}],"s":"' + "x" * (size // 3) + '"}')),
        "one string": ("chat/completions", '{"messages":[{"role":"user","content":"' + text + '"}]}'),
        "one string by the system": ("chat/completions", '{"messages":[{"role":"system","content":"' + text + '"},{"role":"user","content":"Hi"}]}'),
        "one prompt": ("completions", '{"prompt":"' + text + '"}'),
        "deep lists": ("chat/completions", chat('"x":' + "[" * size)),
        "token ids": ("completions", '{"prompt":[' + "5," * (size // 2) + "5]}"),
        "token ids, admitted": ("completions", '{"prompt":[' + "5," * 600_000 + "5]}"),
        "many prompts": ("completions", '{"prompt":[' + '"hello world",' * (size // 14) + '"x"]}'),
        "long prompts": ("completions", '{"prompt":[' + ",".join(['"' + "word " * (size // 2500) + '"'] * 500) + "]}"),
        "many messages": ("chat/completions", '{"messages":[' + ",".join(['{"role":"user","content":"x"}'] * (size // 30)) + "]}"),
        "many messages, admitted": ("chat/completions", '{"messages":[' + ",".join(['{"role":"user","content":"x"}'] * 50_000) + "]}"),
        "many keys": ("chat/completions", chat('"x":{' + ",".join(f'"{i}":0' for i in range(size // 12)) + "}")),
        "a stop string": ("chat/completions", chat('"stop":["' + "y" * size + '"]')),
        "a model's name": ("chat/completions", chat('"model":"' + "m" * size + '"')),
        "a prompt to be cut": ("completions", '{"prompt":"' + text + '","truncate_prompt_tokens":20,"max_tokens":2}'),
    }


class Memory:
    """Resident memory of a process in MiB."""

    def __init__(self, program: Program):
        self.folder = Path(f"/proc/{program.process.pid}")

    def read(self, key: str) -> float:
        for line in (self.folder / "status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) / 1024
        raise AssertionError(f"no {key}")

    def reset_peak(self) -> None:
        (self.folder / "clear_refs").write_text("5")


def post(base: str, path: str, body: bytes, **headers: str) -> tuple[int, bytes]:
    """Sends the whole body whatever comes back meanwhile, as most clients do."""
    connection = http.client.HTTPConnection(base.removeprefix("http://"), timeout=120)
    try:
        connection.request("POST", path, body, {"content-type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def measured():
    """A `serve` that nobody else talks to, and its memory once it has answered each way."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("resident memory is read from /proc")
    with Server("serve", "--model", "demo") as server:
        for path in ("/v1/chat/completions", "/v2/local/openai/v1/chat/completions"):
            assert post(server.base, path, chat('"x":1').encode())[0] == 200
        time.sleep(1)
        yield server, Memory(server)


def check_memory(server: Server, memory: Memory, send, what: str) -> None:
    memory.reset_peak()
    before = memory.read("VmRSS")
    answer = send()
    peak = memory.read("VmHWM") - before
    assert peak <= 200, f"{what}: {peak:.0f} MiB at the peak ({answer})"
    end = time.monotonic() + 15
    while (left := memory.read("VmRSS") - before) > 20:
        assert time.monotonic() < end, f"{what}: {left:.0f} MiB stay ({answer})"
        time.sleep(0.2)


@pytest.mark.parametrize("shape", shapes(100))
def test_a_large_body_costs_little_memory_and_gives_it_back(measured, shape):
    server, memory = measured
    for door, size in (("/v1/", 31 * MB), ("/v2/local/openai/v1/", 19 * MB), ("/v2/local/runsync", 19 * MB)):
        path, text = shapes(size)[shape]
        body = text.encode()
        if door.endswith("runsync"):
            path, body = "", b'{"input":' + body + b"}"

        def send():
            status, answer = post(server.base, door + path, body)
            assert status in (200, 400, 404, 413), (status, answer[:200])
            return status, answer[:150]

        check_memory(server, memory, send, f"{shape} to {door}")


def test_a_large_job_costs_a_worker_little_memory(queue, worker):
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("resident memory is read from /proc")
    program = worker()
    queue.give({"id": "first", "input": {"prompt": "Hi", "max_tokens": 2}})
    assert "output" in queue.result("first")
    time.sleep(1)
    memory = Memory(program)
    for number, (shape, (path, text)) in enumerate(shapes(31 * MB).items()):
        if shape == "deep lists":
            continue  # no JSON at all: the queue would not hand it out
        queue.give(json_reply(f'{{"id":"job-{number}","input":{{"openai_route":"/v1/{path}","openai_input":{text}}}}}'))
        check_memory(None, memory, lambda: str(queue.result(f"job-{number}"))[:150], shape)


def json_reply(text: str):
    from harness.queue import Reply

    return Reply(body=text.encode())


def test_a_large_body_for_a_route_that_is_not_there(measured):
    server, memory = measured
    body = ('{"a":[' + '{"a":1},' * 4_000_000 + "{}]}").encode()
    for path in ("/nope", "/v1/nope", "/v1/models"):
        memory.reset_peak()
        before = memory.read("VmRSS")
        status, _ = post(server.base, path, body)
        assert status == (405 if path == "/v1/models" else 404)
        assert memory.read("VmHWM") - before < 10, path


def test_text_beyond_the_context_is_refused_at_once(server):
    text = "word " * (6 * MB)
    bodies = {"/v1/completions": {"prompt": text}, "/v1/chat/completions": {"messages": [{"role": "user", "content": text}]}}
    for path, body in bodies.items():
        for door in ("", "/v2/local/openai"):
            if door:
                body = json.loads(json.dumps(body).replace("word " * (2 * MB), "", 2))
            begin = time.monotonic()
            status, answer = post(server.base, door + path, json.dumps(body).encode())
            took = time.monotonic() - begin
            assert (status, json.loads(answer)["error"]["code"]) == (400, "context_length_exceeded"), answer[:300]
            # Sending and parsing thirty megabytes is most of it.
            assert took < 2, f"{door}{path}: {took:.2f} s"


def test_compressed_bodies(server):
    body = gzip.compress(chat('"temperature":0').encode())
    status, answer = post(server.base, "/v1/chat/completions", body, **{"content-encoding": "gzip"})
    assert status == 200 and json.loads(answer)["choices"]
    status, answer = post(server.base, "/v1/chat/completions", body, **{"content-encoding": "br"})
    assert status == 415 and "gzip" in json.loads(answer)["error"]["message"]


@pytest.mark.parametrize("mode", ["serve", "gateway", "http"])
def test_missing_routes_are_404_whatever_the_method_and_the_body(mode):
    arguments = [mode] if mode == "gateway" else [mode, "--model", "demo"]
    with Server(*arguments) as server:
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
            for content in (b"", b"no JSON"):
                assert httpx.request(method, f"{server.base}/nope", content=content).status_code == 404, method
        assert httpx.post(f"{server.base}/nope", files={"file": b"x"}).status_code == 404
        for path in ("/health", "/health/", "/ping", "/ping/"):
            assert httpx.get(server.base + path).status_code == 200
        refused = httpx.put(f"{server.base}/v1/chat/completions", content=b"{}")
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
        assert httpx.post(f"{server.base}/v1/models", content=b"").status_code == 405


class FewFiles(Server):
    """A server that may open 256 files, by the hard limit too."""

    def __init__(self, *arguments: str):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        popen = subprocess.Popen

        def limited(*args, **kwargs):
            return popen(*args, **kwargs, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)))

        subprocess.Popen = limited
        try:
            super().__init__(*arguments)
        finally:
            subprocess.Popen = popen


@pytest.mark.parametrize("mode", ["serve", "http"])
def test_idle_connections_do_not_shut_out_health_checks_or_requests(mode):
    with FewFiles(mode, "--model", "demo") as server:
        idle = []
        try:
            for number in range(400):
                connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
                if number % 2:
                    connection.sendall(b"GET /ping HTTP/1.1\r\nhost: x\r\n\r\n")
                idle.append(connection)
            for _ in range(5):
                assert httpx.get(f"{server.base}/ping", timeout=5).status_code == 200
            assert post(server.base, "/v1/chat/completions", chat('"x":1').encode())[0] == 200
            if mode == "serve":
                # The worker's own connections to this endpoint are among those that are closed when idle.
                assert post(server.base, "/v2/local/openai/v1/chat/completions", chat('"x":1').encode())[0] == 200
            assert server.log.count("connections are in use") == 1
            assert "Too many open files" not in server.log
        finally:
            for connection in idle:
                connection.close()


def test_silent_connections_are_closed_in_time():
    with Server("gateway", "--header-timeout", "1", "--keep-alive-timeout", "2") as server:
        half = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        half.sendall(b"GET /ping HTTP/1.1\r\nhost:")
        idle = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        idle.sendall(b"GET /ping HTTP/1.1\r\nhost: x\r\n\r\n")
        assert idle.recv(4096).startswith(b"HTTP/1.1 200")
        begin = time.monotonic()
        assert half.recv(4096) == b"" and time.monotonic() - begin < 1.9
        while idle.recv(4096):
            pass
        assert 1.5 < time.monotonic() - begin < 5


def test_a_killed_worker_that_comes_back_under_its_name_runs_its_job_again():
    with Server("gateway") as gateway:
        lines = wait_for(lambda: gateway.stdout if gateway.stdout.count("export") >= 8 else None, "the variables")
        variables = dict(line.removeprefix("export ").split("=", 1) for line in lines.splitlines() if line.startswith("export "))
        variables = {name: value.strip("'") for name, value in variables.items()}
        job = httpx.post(f"{gateway.endpoint}/run", json={"input": {"prompt": "Once", "max_tokens": 1500, "ignore_eos": True, "n": 4, "temperature": 1}}).json()["id"]

        def status():
            return httpx.get(f"{gateway.endpoint}/status/{job}").json()

        def start():
            return Program([binary(), "--model", "demo"], variables, name="queue worker")

        first = start()
        wait_for(lambda: status()["status"] == "IN_PROGRESS", "the job to run")
        first.kill()
        assert status()["status"] == "IN_PROGRESS"
        time.sleep(3)
        second = start()
        try:
            begin = time.monotonic()
            wait_for(lambda: status().get("retries") == 1, "the job to go back", 30)
            assert time.monotonic() - begin < 20
            wait_for(lambda: status()["status"] == "COMPLETED", "the job's end", 120)
        finally:
            second.kill()


def test_a_webhook_uses_no_proxy_and_its_secrets_are_not_logged():
    # A proxy that is not there: whoever uses it reaches nothing.
    proxy = f"http://127.0.0.1:{free_port()}"
    with socket.create_server(("127.0.0.1", 0)) as listener, Server("gateway", env={"HTTP_PROXY": proxy, "http_proxy": proxy}) as gateway:
        listener.settimeout(20)
        address = f"http://me:hush@127.0.0.1:{listener.getsockname()[1]}/hook?token=hush"
        job = httpx.post(f"{gateway.endpoint}/run", json={"input": 1, "webhook": address}).json()["id"]
        httpx.post(f"{gateway.endpoint}/cancel/{job}")
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(4096).startswith(b"POST /hook?token=hush ")
            connection.sendall(b"HTTP/1.1 500 no\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        wait_for(lambda: "/hook answered 500" in gateway.log, "the log's line")
        assert "hush" not in gateway.log
