"""Bad input: a clear, typed error at every door, and the worker keeps serving."""
from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from harness import hub, questions
from harness.program import Server, wait_for

HELLO = [{"role": "user", "content": "Hello!"}]
IMAGE = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "objekt"}}}

# name: (chat body, param, code); None in place of a code means JSON null, ... any.
BODIES = {
    "no messages": ({}, ..., "missing_required_parameter"),
    "empty messages": ({"messages": []}, "messages", "missing_required_parameter"),
    "messages of a wrong type": ({"messages": 7}, "messages", None),
    "a message of a wrong type": ({"messages": ["hello"]}, "messages[0]", None),
    "content of a wrong type": ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content", None),
    "no role": ({"messages": [{"content": "x"}]}, "messages[0].role", ...),
    "unknown role": ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", ...),
    "unknown model": ({"messages": HELLO, "model": "gpt-none"}, "model", "model_not_found"),
    "model of a wrong type": ({"messages": HELLO, "model": 7}, "model", None),
    "temperature of a wrong type": ({"messages": HELLO, "temperature": "hot"}, "temperature", None),
    "temperature too high": ({"messages": HELLO, "temperature": 2.1}, "temperature", "invalid_value"),
    "temperature below zero": ({"messages": HELLO, "temperature": -0.1}, "temperature", "invalid_value"),
    "top_p too high": ({"messages": HELLO, "top_p": 1.1}, "top_p", "invalid_value"),
    "top_k below -1": ({"messages": HELLO, "top_k": -2}, "top_k", "invalid_value"),
    "min_p too high": ({"messages": HELLO, "min_p": 2}, "min_p", "invalid_value"),
    "presence_penalty too high": ({"messages": HELLO, "presence_penalty": 3}, "presence_penalty", "invalid_value"),
    "n of zero": ({"messages": HELLO, "n": 0}, "n", "invalid_value"),
    "n too high": ({"messages": HELLO, "n": 100_000}, "n", "invalid_value"),
    "max_tokens of zero": ({"messages": HELLO, "max_tokens": 0}, "max_tokens", "invalid_value"),
    "max_tokens of a fraction": ({"messages": HELLO, "max_tokens": 1.5}, "max_tokens", ...),
    "stop of a wrong type": ({"messages": HELLO, "stop": 7}, "stop", None),
    "logit_bias out of range": ({"messages": HELLO, "logit_bias": {"3": 101}}, ..., "invalid_value"),
    "seed of a wrong type": ({"messages": HELLO, "seed": "x"}, "seed", None),
    "stream of a wrong type": ({"messages": HELLO, "stream": "yes"}, "stream", None),
    "too long": ({"messages": [{"role": "user", "content": "word " * 5000}]}, "messages", "context_length_exceeded"),
    "a tool of another type": ({"messages": HELLO, "tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_value"),
    "a custom tool": ({"messages": HELLO, "tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type", "unsupported_value"),
    "a tool without a function": ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
    "a tool without a name": ({"messages": HELLO, "tools": [TOOL, {"type": "function", "function": {}}]}, "tools[1].function.name", "missing_required_parameter"),
    "a tool with a name of spaces": ({"messages": HELLO, "tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "invalid_value"),
    "tools of one name": ({"messages": HELLO, "tools": [TOOL, TOOL]}, "tools[1].function.name", "invalid_value"),
    "parameters of a wrong type": ({"messages": HELLO, "tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters", ...),
    "strict of a wrong type": ({"messages": HELLO, "tools": [{"type": "function", "function": {"name": "f", "strict": "yes"}}]}, "tools[0].function.strict", ...),
    "too many tools": ({"messages": HELLO, "tools": [TOOL] * 129}, "tools", "invalid_value"),
    "a tool choice that is none": ({"messages": HELLO, "tools": [TOOL], "tool_choice": "always"}, "tool_choice", "invalid_value"),
    "a choice of an unknown function": ({"messages": HELLO, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "invalid_value"),
    "an unknown allowed function": ({"messages": HELLO, "tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "g"}}]}}}, "tool_choice", "invalid_value"),
    "a demand without tools": ({"messages": HELLO, "tool_choice": "required"}, "tool_choice", "invalid_value"),
    "parallel_tool_calls of a wrong type": ({"messages": HELLO, "tools": [TOOL], "parallel_tool_calls": 1}, "parallel_tool_calls", ...),
    "tools for the template alone": ({"messages": HELLO, "chat_template_kwargs": {"tools": [TOOL]}}, "chat_template_kwargs.tools", "unsupported_parameter"),
    "tools of a wrong type": ({"messages": HELLO, "tools": {"f": TOOL}, "tool_choice": "none"}, "tools", None),
    "a call of nothing": ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[1].tool_calls[0]", ...),
    "beams": ({"messages": HELLO, "num_beams": 4}, "num_beams", "unsupported_parameter"),
    "thinking": ({"messages": HELLO, "thinking": {"type": "enabled", "budget_tokens": "many"}}, "thinking.budget_tokens", ...),
    "reasoning": ({"messages": HELLO, "reasoning": {"max_tokens": -2}}, "reasoning.max_tokens", "invalid_value"),
    "an effort that is none": ({"messages": HELLO, "reasoning": {"effort": "hard"}}, "reasoning.effort", "invalid_value"),
    "a thinking budget": ({"messages": HELLO, "thinking_budget": -10}, "thinking_budget", "invalid_value"),
    "no room for an answer": ({"messages": HELLO, "response_max_tokens": 0}, "response_max_tokens", "invalid_value"),
    "include_reasoning of a wrong type": ({"messages": HELLO, "include_reasoning": "no"}, "include_reasoning", ...),
    "thoughts twice": ({"messages": HELLO, "reasoning_format": "deepseek-legacy"}, "reasoning_format", "unsupported_value"),
    "repetition_detection": ({"messages": HELLO, "repetition_detection": {"max_pattern_size": 3}}, "repetition_detection", "unsupported_parameter"),
    "repeat_penalty too low": ({"messages": HELLO, "repeat_penalty": 0}, "repeat_penalty", "invalid_value"),
    "sampling_params too high": ({"messages": HELLO, "sampling_params": {"temperature": 9}}, "sampling_params.temperature", "invalid_value"),
    "response_format": ({"messages": HELLO, "response_format": SCHEMA}, "response_format.json_schema.schema", "invalid_value"),
    "logprobs of a wrong type": ({"messages": HELLO, "logprobs": "yes"}, "logprobs", None),
    "top_logprobs alone": ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs", "invalid_value"),
    "too many top_logprobs": ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    "an empty bad word": ({"messages": HELLO, "bad_words": [""]}, "bad_words[0]", "invalid_value"),
    "an image": ({"messages": IMAGE}, "messages[0].content[1]", ...),
    "guided_json": ({"messages": HELLO, "guided_json": {"type": "objekt"}}, "guided_json", "invalid_value"),
    "guided_json of a wrong type": ({"messages": HELLO, "guided_json": 5}, "guided_json", None),
    "guided_regex": ({"messages": HELLO, "guided_regex": "[a-z"}, "guided_regex", "invalid_value"),
    "json_object": ({"messages": HELLO, "response_format": {"type": "json_objects"}}, "response_format.type", "invalid_value"),
}


def statuses(name: str) -> int:
    return 404 if name == "unknown model" else 400


def check(error: dict, name: str, param, code) -> None:
    assert isinstance(error["message"], str) and error["message"]
    assert error["type"] == "invalid_request_error"
    if param is not ...:
        assert error["param"] == param
    if code is not ...:
        assert error["code"] == code


def serves(http, server, capital) -> None:
    assert questions.text(http.post(f"{server.base}/v1/chat/completions", json=capital.request()).json()) == capital.answer
    assert questions.text(http.post(f"{server.endpoint}/runsync", json={"input": capital.request()}).json()["output"]) == capital.answer


def ended(http, url: str, job: str) -> dict:
    return wait_for(lambda: (status := http.get(f"{url}/status/{job}").json())["status"] not in ("IN_QUEUE", "IN_PROGRESS") and status, "the job to end")


cases = pytest.mark.parametrize("name", BODIES)


@cases
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_openai_doors(http, server, door, capital, name, stream):
    body, param, code = BODIES[name]
    if stream and "stream" in body:
        pytest.skip("the case is about this field")
    response = http.post(f"{door}/chat/completions", json={**body, "stream": True} if stream else body)
    assert response.status_code == statuses(name), response.text
    assert response.headers["content-type"].startswith("application/json") and response.headers["x-request-id"]
    answer = response.json()
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    check(answer["error"], name, param, code)
    serves(http, server, capital)


@cases
@pytest.mark.parametrize("form", ["native", "openai_route"])
@pytest.mark.parametrize("operation", ["run", "runsync"])
def test_jobs(http, server, capital, name, form, operation):
    body, param, code = BODIES[name]
    given = body if form == "native" else {"openai_route": "/v1/chat/completions", "openai_input": body}
    response = http.post(f"{server.endpoint}/{operation}", json={"input": given})
    assert response.status_code == 200, response.text
    status = response.json() if operation == "runsync" else ended(http, server.endpoint, response.json()["id"])
    assert status["status"] == "FAILED" and "output" not in status
    envelope = json.loads(status["error"])
    assert set(envelope) == {"error"} and set(envelope["error"]) == {"message", "type", "param", "code", "status"}
    assert envelope["error"]["status"] == statuses(name)
    check(envelope["error"], name, param, code)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"nothing": 1}, "input"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": "word " * 5000}, "prompt"),
        ({"input_ids": [10**9]}, "input_ids[0]"),
        ({"input_ids": ["x"]}, "input_ids"),
        ({"prompt": "x", "sampling_params": 7}, "sampling_params"),
        ({"prompt": "x", "sampling_params": {"temperature": 9}}, "sampling_params.temperature"),
        ({"openai_route": 7}, "openai_route"),
        ({"openai_route": "/v1/completions", "openai_input": 7}, "openai_input"),
        ({"route": "/v1/chat/completions", "body": {"messages": []}, "method": "POST"}, "messages"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_other_inputs_of_jobs(http, server, given, param):
    status = http.post(f"{server.endpoint}/runsync", json={"input": given}).json()
    assert status["status"] == "FAILED"
    error = json.loads(status["error"])["error"]
    assert (error["status"], error["param"]) == (400, param) and error["message"]


def test_input_that_is_no_object(http, server, capital):
    for given in ("text", 7, ["x"], {}):
        response = http.post(f"{server.endpoint}/runsync", json={"input": given})
        if response.status_code == 200:
            error = json.loads(response.json()["error"])["error"]
            assert response.json()["status"] == "FAILED" and (error["status"], error["param"]) == (400, "input")
        else:
            assert response.status_code == 400 and "input" in response.json()["error"]
    serves(http, server, capital)


@pytest.mark.parametrize("operation", ["run", "runsync"])
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"{}", b'{"input":null}', b'{"inputs":{}}', b'{"input": {"prompt": "\xff\xfe"}}', b"\xff\xff"])
def test_bodies_that_are_no_jobs(http, server, capital, operation, body):
    response = http.post(f"{server.endpoint}/{operation}", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert isinstance(response.json()["error"], str)
    serves(http, server, capital)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', b"\xff", b'{"n": NaN}'])
@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_bodies_that_are_no_requests(http, server, door, capital, body, route):
    response = http.post(f"{door}/{route}", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"
    serves(http, server, capital)


def test_unknown_routes(http, server, door, capital):
    for path in ("nothing", "chat", "chat/completions/x", "audio/speech"):
        response = http.post(f"{door}/{path}", json={"x": 1})
        assert response.status_code == 404 and response.json()["error"]["type"] == "invalid_request_error", path
    assert http.get(f"{door}/nothing").status_code == 404
    serves(http, server, capital)


def test_unknown_routes_of_jobs(http, server):
    for given in ({"openai_route": "/v1/nothing", "openai_input": {"x": 1}}, {"openai_route": "/v1/nothing"}, {"route": "/nothing", "method": "POST", "body": {"x": 1}}):
        status = http.post(f"{server.endpoint}/runsync", json={"input": given}).json()
        assert (status["status"], json.loads(status["error"])["error"]["status"]) == ("FAILED", 404)


def test_wrong_methods(http, server, door):
    response = http.get(f"{server.base}/v1/chat/completions")
    assert response.status_code == 405 and response.headers["allow"] == "POST" and response.json()["error"]["message"]
    assert http.post(f"{server.base}/v1/models", json={}).status_code == 405
    assert http.delete(f"{door}/models").status_code == 405


def test_unknown_jobs(http, server):
    for operation, method in (("status", "GET"), ("stream", "GET"), ("cancel", "POST"), ("retry", "POST")):
        response = http.request(method, f"{server.endpoint}/{operation}/no-such-job")
        assert response.status_code == 404 and isinstance(response.json()["error"], str)


MB = 1024 * 1024


@pytest.mark.parametrize(
    ("path", "largest", "status"),
    [("/v1/chat/completions", 32 * MB, 413), ("/v2/local/run", 10 * MB, 400), ("/v2/local/runsync", 20 * MB, 400)],
)
def test_body_limits(http, server, capital, path, largest, status):
    body = {"messages": HELLO, "padding": ""} if path.startswith("/v1") else {"input": {"messages": HELLO}, "padding": ""}
    empty = len(json.dumps(body).encode())

    def sized(bytes_in_all: int) -> bytes:
        return json.dumps({**body, "padding": "x" * (bytes_in_all - empty)}).encode()

    assert http.post(f"{server.base}{path}", content=sized(largest)).status_code == 200, "the largest that is allowed"
    response = http.post(f"{server.base}{path}", content=sized(largest + 1))
    assert response.status_code == status
    error = response.json()["error"]
    if status == 413:
        assert (error["type"], error["code"]) == ("invalid_request_error", "request_too_large")
    else:
        assert isinstance(error, str) and "limit" in error
    serves(http, server, capital)


def test_a_body_without_an_end(http, server, capital):
    """A chunked body that goes past the limit is refused without being read to its end."""

    def endless():
        yield b'{"messages": "'
        for _ in range(80):
            yield b"x" * MB

    try:
        response = http.post(f"{server.base}/v1/chat/completions", content=endless(), headers={"content-type": "application/json"})
        assert response.status_code == 413
    except httpx.TransportError:
        pass  # Hung up on in the middle of sending: as good.
    serves(http, server, capital)


def test_deeply_nested_json(http, server, capital):
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        body = '{"messages": ' + opening * 100_000 + "1" * (opening != "[") + closing * 100_000 + "}"
        assert http.post(f"{server.base}/v1/chat/completions", content=body).status_code == 400
        assert http.post(f"{server.endpoint}/runsync", content='{"input": ' + body + "}").status_code == 400
    serves(http, server, capital)


def test_a_template_that_fails(http, capital, tmp_path):
    """A template that raises is the request's failure, not the worker's."""
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{% if m.content == 'boom' %}{{ raise_exception('no boom here') }}{% endif %}User: {{ m.content }}\n{% endfor %}")
    with Server("serve", "--model", "demo", "--chat-template", str(template)) as server:
        boom = {"messages": [{"role": "user", "content": "boom"}]}
        for door in server.doors().values():
            response = http.post(f"{door}/chat/completions", json=boom)
            assert response.status_code == 400 and "no boom here" in response.json()["error"]["message"]
        status = http.post(f"{server.endpoint}/runsync", json={"input": boom}).json()
        assert status["status"] == "FAILED" and "no boom here" in json.loads(status["error"])["error"]["message"]
        assert http.post(f"{server.base}/v1/chat/completions", json={"messages": HELLO, "max_tokens": 3}).status_code == 200


def test_a_token_beyond_the_embedding(http, capital, tmp_path):
    """An added token that the model has no row for: refused by name at both doors, and what runs beside it is untouched."""
    files = hub.demo_files()
    files["added_tokens.json"] = json.dumps({**json.loads(files["added_tokens.json"]), "<|far|>": 9999}).encode()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    # The test programs run with RUST_BACKTRACE=1.
    with Server("serve", "--model", str(tmp_path), env={"ALLOW_SPECIAL_TOKENS": "true"}) as server:
        warnings = [line for line in server.log.splitlines() if "<|far|>" in line]
        assert len(warnings) == 1 and "9999" in warnings[0], warnings
        with ThreadPoolExecutor() as pool:
            others = [pool.submit(http.post, f"{base}/chat/completions", json=capital.request()) for base in server.doors().values() for _ in range(4)]
            for base in server.doors().values():
                for route, body in {
                    "chat/completions": {"messages": [{"role": "user", "content": "a<|far|>b"}]},
                    "completions": {"prompt": "a<|far|>b"},
                }.items():
                    answer = http.post(f"{base}/{route}", json=body)
                    assert answer.status_code == 400, answer.text
                    error = answer.json()["error"]
                    assert "<|far|>" in error["message"] and "9999" in error["message"]
                    assert "backtrace" not in answer.text and ".rs:" not in answer.text
            for other in others:
                assert questions.text(other.result().json()) == capital.answer


def test_a_full_queue(story):
    """Beyond what may wait: 429 with a hint. When there is room again, the same request is answered."""
    env = {"MAX_NUM_SEQS": "1", "MAX_WAITING": "130"}
    with Server("http", "--model", "demo", env=env) as server, httpx.Client(timeout=120) as client:
        url = f"{server.base}/v1/chat/completions"
        body = story.request(ignore_eos=True, max_tokens=1500, n=128, temperature=1, stream=True)
        with client.stream("POST", url, json=body) as busy:
            assert busy.status_code == 200
            pieces = busy.iter_text()
            next(pieces)
            refused = client.post(url, json=story.request(n=10, temperature=1))
            assert refused.status_code == 429 and refused.headers["retry-after"]
            assert (refused.json()["error"]["type"], refused.json()["error"]["code"]) == ("rate_limit_error", "engine_overloaded")
        answered = wait_for(lambda: (again := client.post(url, json=story.request())).status_code == 200 and again, "room")
        assert questions.text(answered.json()) == story.answer


def test_what_no_queue_could_hold(http, capital):
    """More sequences than run and wait together: the cause and the settings are named. `min_tokens` beyond the room left likewise."""
    env = {"MAX_NUM_SEQS": "2", "MAX_WAITING": "3", "MAX_MODEL_LEN": "128"}
    with Server("serve", "--model", "demo", env=env) as server:
        # So many rows and places, so many jobs at once, whatever is said.
        for door in server.doors().values():
            for body, param, cause in (
                ({"prompt": ["x"] * 6}, "prompt", "6 prompts"),
                ({"prompt": "x", "n": 6, "temperature": 1}, "n", "6 by 'n'"),
                ({"prompt": ["x"] * 3, "best_of": 2, "temperature": 1}, "prompt", "3 prompts times 2 by 'best_of'"),
            ):
                refused = http.post(f"{door}/completions", json=body)
                error = refused.json()["error"]
                assert (refused.status_code, error["param"], error["code"]) == (400, param, "invalid_value"), body
                assert cause in error["message"] and "MAX_NUM_SEQS=2" in error["message"] and "MAX_WAITING=3" in error["message"]
            answer = http.post(f"{door}/completions", json={"prompt": ["x"] * 5, "max_tokens": 2})
            assert answer.status_code == 200 and len(answer.json()["choices"]) == 5
            refused = http.post(f"{door}/completions", json={"prompt": "x", "min_tokens": 500, "max_tokens": 600}).json()["error"]
            assert refused["param"] == "min_tokens" and "500" in refused["message"] and "context of 128" in refused["message"]
            refused = http.post(f"{door}/chat/completions", json=capital.request(priority=1)).json()["error"]
            assert (refused["param"], refused["code"]) == ("priority", "unsupported_parameter")
            assert http.post(f"{door}/chat/completions", json=capital.request(priority=0)).status_code == 200


def test_more_jobs_at_once_than_places(http, capital):
    """MAX_CONCURRENCY beyond what the engine can hold: no more jobs are taken than that, and every one is answered."""
    env = {"MAX_NUM_SEQS": "1", "MAX_WAITING": "2", "MAX_CONCURRENCY": "20"}
    with Server("serve", "--model", "demo", env=env) as server:
        wait_for(lambda: "MAX_CONCURRENCY=20" in server.log, "the warning")
        assert "3 are taken at once" in server.log
        jobs = [http.post(f"{server.endpoint}/run", json={"input": capital.request()}).json()["id"] for _ in range(20)]

        def done(job: str):
            status = http.get(f"{server.endpoint}/status/{job}").json()
            return status["status"] in ("COMPLETED", "FAILED") and status

        for job in jobs:
            status = wait_for(lambda: done(job), job)
            assert status["status"] == "COMPLETED" and questions.text(status["output"]) == capital.answer


def test_keys(http, capital):
    with Server("serve", "--model", "demo", env={"API_KEY": "secret-one"}) as server:
        for url in (f"{server.base}/v1/models", f"{server.endpoint}/openai/v1/models", f"{server.endpoint}/health"):
            assert http.get(url).status_code == 401
            assert http.get(url, headers={"authorization": "Bearer wrong"}).status_code == 401
            assert http.get(url, headers={"authorization": "Bearer secret-one"}).status_code == 200
            assert http.get(url, headers={"x-api-key": "secret-one"}).status_code == 200
        error = http.get(f"{server.base}/v1/models").json()["error"]
        assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
        assert http.get(f"{server.base}/health").status_code == 200
        headers = {"authorization": "Bearer secret-one"}
        assert questions.text(http.post(f"{server.endpoint}/runsync", json={"input": capital.request()}, headers=headers).json()["output"]) == capital.answer
        assert "secret-one" not in server.log
