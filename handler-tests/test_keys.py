"""`API_KEYS_FILE`: keys with names, rates, tokens, concurrency and models; read again while the server runs."""
from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import time

import httpx
import openai
import pytest

from harness.program import Server, run, wait_for

CLIENT = httpx.Client(timeout=120)
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


def written(path, *keys: dict) -> str:
    """Put in place at once, as an editor would."""
    (path.parent / "new").write_text(json.dumps(list(keys)))
    os.replace(path.parent / "new", path)
    return str(path)


def client(server, key: str) -> openai.OpenAI:
    return openai.OpenAI(api_key=key, base_url=f"{server.base}/v1", max_retries=0)


def ask(server, key: str, **fields):
    body = {"model": "demo", "messages": MESSAGES, "max_tokens": 4, **fields}
    return CLIENT.post(f"{server.base}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.json"


def test_requests_a_minute_as_the_sdk_sees_them(path):
    digest = hashlib.sha256(b"sk-two").hexdigest()
    keys = written(path, {"name": "one", "key": "sk-one", "requests_per_minute": 2}, {"name": "two", "sha256": digest})
    with Server("http", "--model", "demo", env={"API_KEYS_FILE": keys}) as server:
        one = client(server, "sk-one")
        answer = one.chat.completions.with_raw_response.create(model="demo", messages=MESSAGES, max_tokens=4)
        assert answer.headers["x-ratelimit-limit-requests"] == "2" and answer.headers["x-ratelimit-remaining-requests"] == "1"
        assert answer.headers["x-ratelimit-reset-requests"].endswith("s") and "x-ratelimit-limit-tokens" not in answer.headers
        list(one.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=4, stream=True))
        with pytest.raises(openai.RateLimitError) as error:
            one.chat.completions.create(model="demo", messages=MESSAGES)
        headers = error.value.response.headers
        assert error.value.code == "rate_limit_exceeded" and error.value.type == "rate_limit_error"
        assert 0 < int(headers["retry-after"]) <= 30 and 0 < int(headers["retry-after-ms"]) <= 30_000
        assert headers["x-ratelimit-remaining-requests"] == "0" and "one" in error.value.message and "sk-one" not in error.value.message
        assert one.models.list().data, "questions after the models are not counted"
        for _ in range(4):
            assert client(server, "sk-two").chat.completions.create(model="demo", messages=MESSAGES, max_tokens=4).choices
        with pytest.raises(openai.AuthenticationError):
            client(server, "sk-three").models.list()
        anthropic = httpx.post(f"{server.base}/v1/messages", json={}, headers={"x-api-key": "sk-one"})
        assert anthropic.status_code == 429 and anthropic.json()["error"]["type"] == "rate_limit_error"
        lines = wait_for(lambda: [line for line in server.log.splitlines() if line.rstrip().split(" key=")[1:] == ["two"]], "the line of a request")
        assert "sk-" not in server.log and " key=one" in server.log and lines


def test_tokens_are_charged_when_an_answer_ends_streams_included(path):
    keys = written(path, *({"name": name, "key": name, "tokens_per_minute": 1000} for name in ("whole", "stream")))
    with Server("http", "--model", "demo", env={"API_KEYS_FILE": keys}) as server:
        left = lambda answer: int(answer.headers["x-ratelimit-remaining-tokens"])  # noqa: E731
        answer = ask(server, "whole", max_tokens=40)
        used = answer.json()["usage"]["total_tokens"]
        # A token flows in every 60 ms.
        assert 1000 - used <= left(answer) <= 1000 - used + 100
        streamed = ask(server, "stream", max_tokens=40, stream=True, stream_options={"include_usage": True})
        assert left(streamed) == 1000, "at its beginning nothing was used"
        usage = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")][-1]["usage"]
        after = left(httpx.get(f"{server.base}/v1/models", headers={"x-api-key": "stream"}))
        assert 1000 - usage["total_tokens"] <= after <= 1000 - usage["total_tokens"] + 100

        written(path, {"name": "small", "key": "small", "tokens_per_minute": 3})
        wait_for(lambda: ask(server, "small").status_code == 200, "the new keys")
        refused = ask(server, "small")
        assert refused.status_code == 429 and "tokens_per_minute" in refused.json()["error"]["message"], refused.text
        assert refused.headers["x-ratelimit-remaining-tokens"] == "0" and int(refused.headers["retry-after"]) > 60


def test_requests_at_a_time_and_who_leaves_gives_the_place_back(path):
    keys = written(path, {"name": "one", "key": "one", "max_concurrency": 1})
    with Server("http", "--model", "demo", env={"API_KEYS_FILE": keys}) as server:
        headers = {"authorization": "Bearer one"}
        body = {"model": "demo", "prompt": "Once", "max_tokens": 900, "ignore_eos": True, "n": 64, "stream": True}
        with CLIENT.stream("POST", f"{server.base}/v1/completions", json=body, headers=headers) as stream:
            # Kept: a dropped iterator closes the connection.
            lines = stream.iter_lines()
            assert next(lines)
            refused = ask(server, "one")
            assert refused.status_code == 429 and refused.json()["error"]["code"] == "rate_limit_exceeded"
            assert "max_concurrency" in refused.json()["error"]["message"]
        wait_for(lambda: ask(server, "one").status_code == 200, "the place to be free")


def test_models_of_a_key(path):
    keys = written(path, {"name": "some", "key": "some", "models": ["second"]}, {"name": "all", "key": "all"}, {"name": "none", "key": "none", "models": ["other"]})
    with Server("http", "--model", "demo", env={"API_KEYS_FILE": keys, "SERVED_MODEL_NAME": "first,second"}) as server:
        some = client(server, "some")
        assert [model.id for model in some.models.list()] == ["second"]
        assert [model.id for model in client(server, "all").models.list()] == ["first", "second"]
        assert list(client(server, "none").models.list()) == []
        assert some.chat.completions.create(model="second", messages=MESSAGES, max_tokens=4).choices
        for model in ("first", "default", "gpt-4"):
            with pytest.raises(openai.PermissionDeniedError) as error:
                some.chat.completions.create(model=model, messages=MESSAGES)
            assert error.value.code == "model_not_allowed" and error.value.param == "model"
        with pytest.raises(openai.PermissionDeniedError):
            some.models.retrieve("first")
        prompts = [{"model": model, "prompt": "x", "max_tokens": 1} for model in ("second", "first")]
        check = lambda prompts: httpx.post(f"{server.base}/api/v1/token_check", json={"prompts": prompts}, headers={"x-api-key": "some"})  # noqa: E731
        assert check(prompts[:1]).status_code == 200
        refused = check(prompts)
        assert (refused.status_code, refused.json()["error"]["param"]) == (403, "prompts[1].model")
        refused = httpx.post(f"{server.base}/v1/messages", json={"max_tokens": 4, "messages": MESSAGES}, headers={"x-api-key": "some"})
        assert refused.status_code == 403 and refused.json()["error"]["type"] == "permission_error"
        assert httpx.post(f"{server.base}/tokenize", json={"prompt": "x"}, headers={"x-api-key": "none"}).status_code == 403
        everybodys = httpx.post(f"{server.base}/v1/abort_requests", json={"abort_all": True}, headers={"x-api-key": "some"})
        assert everybodys.status_code == 403 and everybodys.json()["error"]["param"] == "abort_all"
        own = httpx.post(f"{server.base}/v1/abort_requests", json={"req_ids": ["x"]}, headers={"x-api-key": "some"})
        assert own.status_code == 200 and own.json()["result"]["not_found"] == ["x"]


def test_the_file_is_read_again_and_a_broken_one_changes_nothing(path):
    keys = written(path, {"name": "old", "key": "old"})
    with Server("http", "--model", "demo", env={"API_KEYS_FILE": keys}) as server:
        assert (ask(server, "old").status_code, ask(server, "new").status_code) == (200, 401)
        written(path, {"name": "new", "key": "new"})
        wait_for(lambda: ask(server, "new").status_code == 200, "the new key")
        assert ask(server, "old").status_code == 401
        path.write_text("- name: newest\n  key: newest\n  requests_per_minute: many\n")
        wait_for(lambda: (ask(server, "newest"), "line 3: requests_per_minute" in server.log)[1], "the error in the log")
        assert (ask(server, "new").status_code, ask(server, "newest").status_code) == (200, 401)
        path.unlink()
        time.sleep(1.2)
        assert ask(server, "new").status_code == 200 and ask(server, "nobody").status_code == 401


def test_a_broken_file_stops_the_start(path):
    path.write_text("keys:\n- name: a\n  key: k\n  models: demo\n")
    for command in (["http", "--model", "demo", "--api-keys-file", str(path)], ["gateway", "--api-keys-file", str(path)]):
        program = run(*command)
        assert program.process.returncode != 0
        assert "API_KEYS_FILE" in program.log.upper().replace("-", "_") and "line 4: models" in program.log, program.log
    written(path, {"name": "a", "key": "a"})
    program = run("gateway", env={"API_KEYS_FILE": str(path)})
    assert program.process.returncode != 0 and "cannot keep its limits" in program.log


def test_serve_keeps_its_own_worker_and_its_queue_to_itself(path, http):
    keys = written(path, {"name": "a", "key": "a", "max_concurrency": 2})
    with Server("serve", "--model", "demo", env={"API_KEYS_FILE": keys, "API_KEY": "own"}) as server:
        assert ask(server, "a").status_code == 200
        job = {"input": {"prompt": "Hi", "max_tokens": 2}}
        for address in (f"{server.endpoint}/runsync", f"{server.endpoint}/openai/v1/completions"):
            refused = http.post(address, json=job, headers={"authorization": "Bearer a"})
            assert refused.status_code == 403 and "API_KEY" in refused.json()["error"]["message"], refused.text
        assert http.post(f"{server.endpoint}/runsync", json=job, headers={"authorization": "Bearer own"}).json()["status"] == "COMPLETED"
    with Server("serve", "--model", "demo", env={"API_KEYS_FILE": keys}) as server:
        assert ask(server, "a").status_code == 200
        take = http.get(f"{server.endpoint}/job-take/thief", headers={"authorization": "Bearer a"})
        assert take.status_code == 403
        log = server.log
        assert "401" not in log and "Unauthorized" not in log, "its own worker is let in"


def test_many_at_once_are_counted_one_by_one(path):
    keys = written(path, {"name": "a", "key": "a", "requests_per_minute": 5})
    with Server("http", "--model", "demo", env={"API_KEYS_FILE": keys}) as server, concurrent.futures.ThreadPoolExecutor(12) as pool:
        statuses = list(pool.map(lambda _: ask(server, "a").status_code, range(12)))
        assert statuses.count(200) in (5, 6) and set(statuses) == {200, 429}, statuses


def test_bounds_of_requests_are_settings(http):
    env = {"MAX_MESSAGES": "2", "MAX_TOOLS": "1", "MAX_STOP_STRINGS": "2", "MAX_N": "2", "MAX_JSON_DEPTH": "6"}
    tool = lambda name: {"type": "function", "function": {"name": name}}  # noqa: E731
    with Server("http", "--model", "demo", env=env) as server:
        for fields, param, setting in [
            ({"messages": MESSAGES * 3}, "messages", "MAX_MESSAGES"),
            ({"tools": [tool("a"), tool("b")]}, "tools", "MAX_TOOLS"),
            ({"stop": ["a", "b", "c"]}, "stop", "MAX_STOP_STRINGS"),
            ({"n": 3}, "n", "MAX_N"),
            ({"metadata": {"a": {"b": {"c": {"d": {"e": {}}}}}}}, None, "MAX_JSON_DEPTH"),
        ]:
            answer = http.post(f"{server.base}/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 1, **fields})
            error = answer.json()["error"]
            assert answer.status_code == 400 and error["param"] == param and setting in error["message"], answer.text
        fine = {"messages": MESSAGES * 2, "tools": [tool("a")], "stop": ["a", "b"], "n": 2, "metadata": {"a": {"b": {}}}, "max_tokens": 1}
        assert http.post(f"{server.base}/v1/chat/completions", json=fine).status_code == 200
    program = run("http", "--model", "demo", env={"MAX_JSON_DEPTH": "500"})
    assert program.process.returncode != 0 and "MAX_JSON_DEPTH" in program.log
