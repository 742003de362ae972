"""Routes beside OpenAI's: tokens, templates, aborting, FastChat's and FastDeploy's; straight into the engine and as jobs."""
from __future__ import annotations

import concurrent.futures

import pytest

from harness import questions
from harness.program import Server, wait_for


@pytest.fixture(params=["direct", "prefixed", "queue", "job"])
def post(request, http, server):
    """Posts to a route by one of the ways there; gives status and answer."""

    def post(route: str, body: dict):
        if request.param == "job":
            job = http.post(f"{server.endpoint}/runsync", json={"input": {"openai_route": route, "openai_input": body}}).json()
            return (200, job["output"]) if job["status"] == "COMPLETED" else (400, job)
        base = {"direct": server.base, "prefixed": f"{server.base}/openai", "queue": f"{server.endpoint}/openai"}[request.param]
        answer = http.post(base + route, json=body)
        return answer.status_code, answer.json()

    return post


def test_tokens_of_a_prompt_are_those_that_a_completion_reads(post):
    text = "Once upon a time, 讲一个短故事 🦀 <think>"
    status, tokens = post("/tokenize", {"prompt": text, "return_token_strs": True})
    assert status == 200 and tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    read = post("/v1/completions", {"prompt": text, "max_tokens": 1, "return_token_ids": True})[1]
    assert tokens["tokens"] == read["choices"][0]["prompt_token_ids"]
    assert post("/detokenize", {"tokens": tokens["tokens"]})[1] == {"prompt": text, "content": text}
    assert post("/tokenize", {"content": text, "parse_special": False})[1] == {"tokens": tokens["tokens"]}


def test_tokens_of_messages_are_those_that_a_chat_reads(post, capital):
    asked = {"messages": capital.body["messages"]}
    read = post("/v1/chat/completions", {**asked, "max_tokens": 1, "return_token_ids": True})[1]
    assert post("/tokenize", asked)[1]["tokens"] == read["prompt_token_ids"]
    assert post("/v1/chat/completions/render", asked)[1]["token_ids"] == read["prompt_token_ids"]
    assert capital.body["messages"][-1]["content"] in post("/apply-template", asked)[1]["prompt"]


def test_token_check(post):
    prompts = [{"model": "demo", "prompt": "Hello there", "max_tokens": most} for most in (10, 10_000_000)]
    status, answer = post("/api/v1/token_check", {"prompts": prompts})
    assert status == 200 and [prompt["fits"] for prompt in answer["prompts"]] == [True, False]


def test_mistakes(post):
    for route, body in [("/tokenize", {}), ("/detokenize", {"tokens": ["x"]}), ("/apply-template", {}), ("/v1/abort_requests", {})]:
        assert post(route, body)[0] == 400, route


def test_methods_and_versions(http, server):
    assert http.get(f"{server.base}/tokenize").status_code == 405
    assert http.post(f"{server.base}/v1/tokenize", json={"prompt": "x", "model": "gpt"}).status_code == 404
    version = http.get(f"{server.base}/version").json()
    job = http.post(f"{server.endpoint}/runsync", json={"input": {"openai_route": "/version"}}).json()
    assert job["output"] == version


def test_engines_and_fastchat(post, capital):
    asked = {**capital.body, "temperature": 0}
    asked.pop("model", None)
    for route in ("/v1/engines/demo/chat/completions", "/api/v1/chat/completions"):
        status, answer = post(route, asked)
        assert status == 200 and questions.text(answer) == capital.answer, answer
    assert post("/v1/engines/gpt/chat/completions", asked)[0] in (400, 404)


def test_fastdeploys_fields(post, capital, story):
    messages = capital.body["messages"]
    ids = post("/tokenize", {"messages": messages})[1]["tokens"]
    asked = {"temperature": 0, "request_id": "mine"}
    answer = post("/v1/chat/completions", {**asked, "messages": ids})[1]
    assert questions.text(answer) == capital.answer and answer["id"] == "chatcmpl-mine"
    # The answer goes on where its own tokens end.
    tokens = post("/v1/chat/completions", {**asked, "messages": messages, "return_token_ids": True})[1]["choices"][0]["token_ids"]
    rest = post("/v1/chat/completions", {**asked, "messages": messages, "completion_token_ids": tokens[:2]})[1]
    assert capital.answer.endswith(questions.text(rest)) and questions.text(rest) != capital.answer
    prompt = post("/apply-template", {"messages": messages})[1]["prompt"]
    raw = post("/v1/chat/completions", {**asked, "messages": [{"role": "user", "content": prompt}], "disable_chat_template": True, "max_tokens": 1})
    assert raw[0] == 200
    short = post("/v1/chat/completions", {**asked, "messages": story.body["messages"], "response_max_tokens": 5})[1]
    assert (short["usage"]["completion_tokens"], short["choices"][0]["finish_reason"]) == (5, "length")


@pytest.mark.parametrize("way", ["direct", "queue"])
def test_abort(http, server, way):
    base = server.doors()[way]
    body = {"prompt": "Once", "ignore_eos": True, "max_tokens": 900, "request_id": f"doomed-{way}", "temperature": 1}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answers = [pool.submit(http.post, f"{base}/completions", json=body) for _ in range(4)]
        ended = wait_for(
            lambda: http.post(f"{base}/abort_requests", json={"req_ids": [f"cmpl-doomed-{way}", "nobody"]}).json()["result"]["aborted"]
            or all(answer.done() for answer in answers),
            "a request to abort",
        )
        choices = [answer.result().json()["choices"][0] for answer in answers]
    assert ended and ended is not True, "all had ended before they could be aborted"
    assert any(choice["finish_reason"] == "abort" for choice in choices), choices


def test_fastdeploys_form(http, capital):
    with Server("http", "--model", "demo", "--fastdeploy-compatible") as server:
        body = {"messages": capital.body["messages"], "temperature": 2.5, "top_k": 1, "return_token_ids": True}
        message = http.post(f"{server.base}/v1/chat/completions", json=body).json()["choices"][0]["message"]
        assert message["content"] == capital.answer and message["completion_tokens"].startswith(capital.answer)
        lines = http.post(f"{server.base}/v1/chat/completions", json={**body, "stream": True}).text
        assert '"arrival_time":' in lines and '"completion_token_ids":' in lines
