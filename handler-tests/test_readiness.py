"""What load balancers and container platforms ask, while loading, ready, and draining."""
from __future__ import annotations

import httpx

from harness import questions
from harness.hub import Hub, demo_files
from harness.program import Server, binary, free_port, wait_for, Program

NAME = "Some-Org/Demo-Model"


def status(server: Server, path: str, **request) -> int:
    return httpx.request(request.pop("method", "GET"), f"{server.base}{path}", timeout=60, **request).status_code


def test_loading_ready(tmp_path, capital):
    """The listener is up before the weights are there, and says so."""
    with Hub(NAME, demo_files()) as hub:
        hub.gate.clear()
        env = {"HF_ENDPOINT": hub.base, "HF_HOME": str(tmp_path)}
        with Server("http", "--model", NAME, env=env, ready=False) as server:
            wait_for(lambda: server.ping() is not None, "the listener")
            assert status(server, "/ping") == 204 and status(server, "/health") == 503
            refused = httpx.post(f"{server.base}/v1/chat/completions", json=capital.request(), timeout=60)
            assert refused.status_code == 503 and refused.headers["retry-after"]
            assert refused.json()["error"]["code"] == "model_loading"
            assert server.alive()
            hub.gate.set()
            server.wait_ready()
            assert status(server, "/health") == 200 and status(server, "/ping", method="POST") == 200
            answer = httpx.post(f"{server.base}/v1/chat/completions", json=capital.request(), timeout=60)
            assert questions.text(answer.json()) == capital.answer


def test_jobs_wait_while_serve_loads(tmp_path, capital):
    with Hub(NAME, demo_files()) as hub:
        hub.gate.clear()
        env = {"HF_ENDPOINT": hub.base, "HF_HOME": str(tmp_path)}
        with Server("serve", "--model", NAME, env=env, ready=False) as server:
            wait_for(lambda: server.ping() is not None, "the listener")
            job = httpx.post(f"{server.endpoint}/run", json={"input": capital.request()}, timeout=60).json()["id"]
            hub.gate.set()
            ended = wait_for(
                lambda: (state := httpx.get(f"{server.endpoint}/status/{job}", timeout=60).json())["status"] == "COMPLETED" and state,
                "the job to complete",
            )
            assert questions.text(ended["output"]) == capital.answer


def test_sigterm_while_loading(tmp_path):
    with Hub(NAME, demo_files()) as hub:
        hub.gate.clear()
        with Server("http", "--model", NAME, env={"HF_ENDPOINT": hub.base, "HF_HOME": str(tmp_path)}, ready=False) as server:
            wait_for(lambda: server.ping() is not None, "the listener")
            server.terminate()
            assert server.wait() == 0


def test_http_on_port_alone(capital):
    """RunPod's load balancer sets PORT, and PORT_HEALTH where probes go elsewhere."""
    port, health = free_port(), free_port()
    env = {"MODEL": "demo", "PORT": str(port), "PORT_HEALTH": str(health), "HEALTH_CHECK_PATH": "/healthz"}
    with Program([binary()], env, name="worker-candle on PORT") as program:

        def ready():
            assert program.alive(), program.log
            try:
                return httpx.get(f"http://127.0.0.1:{health}/healthz", timeout=10).status_code == 200
            except httpx.TransportError:
                return False

        wait_for(ready, "the health port")
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=capital.request(), timeout=60)
        assert questions.text(answer.json()) == capital.answer
        assert httpx.get(f"http://127.0.0.1:{health}/v1/models", timeout=60).status_code == 404
        program.terminate()
        assert program.wait() == 0


def test_a_port_that_is_taken(server):
    with Server("http", "--model", "demo", port=server.port, ready=False) as second:
        assert second.wait() == 1 and str(server.port) in second.stderr and "--port" in second.stderr


def test_open_routes(server):
    assert status(server, "/") == 200
    assert httpx.get(f"{server.base}/version", timeout=60).json()["version"]
    assert status(server, "/openai/v1/models") == 200
    assert status(server, "/v1/models/") == 200


def test_request_ids(server):
    given = httpx.get(f"{server.base}/v1/models", headers={"x-request-id": "mine-1"}, timeout=60)
    assert given.headers["x-request-id"] == "mine-1"
    assert httpx.get(f"{server.base}/v1/models", timeout=60).headers["x-request-id"]


def test_browsers(server):
    preflight = {
        "origin": "https://example.org",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    }
    response = httpx.options(f"{server.base}/v1/chat/completions", headers=preflight, timeout=60)
    assert response.status_code < 300 and response.headers["access-control-allow-origin"] == "*"
    allowed = response.headers["access-control-allow-headers"].lower()
    assert allowed == "*" or all(name in allowed for name in ("authorization", "content-type", "x-stainless-lang"))
