"""Each feature at each door: it does what it is for, and all doors, whole and streamed, say the same. And the table of docs/features.md, whose
cells name tests, names tests that there are."""
from __future__ import annotations

import ast
import json
import re
from functools import cache

import pytest

from harness import dialects, questions
from harness.program import REPOSITORY, Server, wait_for
from test_structured import MESSAGES as ASKED_FOR_JSON
from test_structured import SPELLINGS, check

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
DOORS = ["native", "openai_route", "endpoint", "direct"]
CAPITAL, STORY, COUNT = (questions.BY_NAME[name] for name in ("capital-france", "story", "count"))
FOX = questions.BY_NAME["complete-fox"]
THINKS = questions.BY_NAME["sum-thinking"]
PARIS, BOTH, OTHERS = (next(one for one in questions.WITH_TOOLS if one.name == name) for name in ("tool-paris", "tool-parallel", "tool-among-others"))
NAMED = {"type": "function", "function": {"name": "get_weather"}}
# Ids of the demo model's text.
IDS = list(range(300, 700))


# ---- what comes of each

def said(*texts: str):
    """The contents of the choices, in order."""
    return lambda choices: [choice.get("text", choice.get("message", {}).get("content")) for choice in choices] == list(texts)


def says_other_than(text: str):
    return lambda choices: choices[0]["message"]["content"] not in (text, None)


def called(*arguments: dict, reason: str = "tool_calls"):
    def came_true(choices) -> bool:
        calls = choices[0]["message"]["tool_calls"]
        return [json.loads(call["function"]["arguments"]) for call in calls] == list(arguments) and choices[0]["finish_reason"] == reason

    return came_true


def thought(text: str | None, content: str):
    return lambda choices: (choices[0]["message"].get("reasoning_content"), choices[0]["message"]["content"]) == (text, content)


def joined_logprobs(choices) -> bool:
    tokens = choices[0]["logprobs"]["content"]
    return "".join(token["token"] for token in tokens) == CAPITAL.answer and all(len(token["top_logprobs"]) == 2 for token in tokens)


THOUGHT, SUM = THINKS.answer.removeprefix("<think>\n").split("\n</think>\n\n")
OF_FRANCE = "The user asks for the capital of France. That is Paris."
THINK = {"enable_thinking": True}

# name: (question, route, fields, whether it came true)
FEATURES = {
    "chat": (CAPITAL, CHAT, {}, said(CAPITAL.answer)),
    "completion": (FOX, TEXT, {}, said(FOX.answer)),
    "several prompts": (FOX, TEXT, {"prompt": [FOX.body["prompt"], "One, two, three,"]}, said(FOX.answer, questions.BY_NAME["complete-numbers"].answer)),
    "prompt_token_ids": (FOX, TEXT, {"prompt": None, "prompt_token_ids": [300, 301], "return_token_ids": True}, lambda choices: choices[0]["prompt_token_ids"] == [300, 301]),
    "max_tokens": (STORY, CHAT, {"max_tokens": 1}, lambda choices: choices[0]["finish_reason"] == "length"),
    "min_tokens": (CAPITAL, CHAT, {"min_tokens": 20, "max_tokens": 40}, lambda choices: choices[0]["message"]["content"].startswith("Paris") and choices[0]["message"]["content"] != CAPITAL.answer),
    "unknown fields": (CAPITAL, CHAT, {"verbosity": "low", "service_tier": "auto", "nobody_knows": {"x": [1]}, "user": "u"}, said(CAPITAL.answer)),
    "n": (CAPITAL, CHAT, {"n": 3}, said(*[CAPITAL.answer] * 3)),
    "stop": (COUNT, CHAT, {"stop": ["5", "zzz"]}, said("1, 2, 3, 4, ")),
    "include_stop_str_in_output": (COUNT, CHAT, {"stop": "5", "include_stop_str_in_output": True}, said("1, 2, 3, 4, 5")),
    "stop_token_ids": (CAPITAL, CHAT, {"stop_token_ids": IDS}, lambda choices: choices[0]["message"]["content"] != CAPITAL.answer and choices[0]["stop_reason"] in IDS),
    "seed": (FOX, TEXT, {"prompt": "Once", "temperature": 2, "top_p": 1, "seed": 7, "max_tokens": 30, "n": 2}, lambda choices: choices[0]["text"] != choices[1]["text"]),
    "top_k": (STORY, CHAT, {"temperature": 2, "top_k": 1}, said(STORY.answer)),
    "top_p": (STORY, CHAT, {"temperature": 2, "top_p": 0}, said(STORY.answer)),
    "min_p": (STORY, CHAT, {"temperature": 1, "min_p": 1}, said(STORY.answer)),
    "penalties": (STORY, CHAT, {"repetition_penalty": 1.9, "presence_penalty": 1, "frequency_penalty": 1, "max_tokens": 60}, says_other_than(STORY.answer[:100])),
    "logit_bias": (CAPITAL, CHAT, {"logit_bias": {str(id): -100 for id in IDS}, "max_tokens": 20}, says_other_than(CAPITAL.answer)),
    "bad_words": (CAPITAL, CHAT, {"bad_words": ["Paris"], "max_tokens": 20}, lambda choices: "Paris" not in choices[0]["message"]["content"]),
    "logprobs of a chat": (CAPITAL, CHAT, {"logprobs": True, "top_logprobs": 2}, joined_logprobs),
    "logprobs of a completion": (FOX, TEXT, {"logprobs": 2}, lambda choices: "".join(choices[0]["logprobs"]["tokens"]) == FOX.answer),
    "prompt_logprobs": (FOX, TEXT, {"prompt_logprobs": 1, "max_tokens": 1}, lambda choices: len(choices[0]["prompt_logprobs"]) > 2),
    "echo": (FOX, TEXT, {"echo": True}, said(FOX.body["prompt"] + FOX.answer)),
    "best_of": (FOX, TEXT, {"best_of": 4, "n": 2, "temperature": 1, "seed": 3, "max_tokens": 9}, lambda choices: len(choices) == 2),
    "return_token_ids": (FOX, TEXT, {"return_token_ids": True}, lambda choices: choices[0]["token_ids"] and choices[0]["prompt_token_ids"]),
    "truncate_prompt_tokens": (FOX, TEXT, {"truncate_prompt_tokens": 2, "max_tokens": 4, "return_token_ids": True}, lambda choices: len(choices[0]["prompt_token_ids"]) == 2),
    "continue_final_message": (COUNT, CHAT, {"messages": [*COUNT.body["messages"], {"role": "assistant", "content": "1, 2, 3,"}], "continue_final_message": True, "add_generation_prompt": False}, said(COUNT.answer.removeprefix("1, 2, 3,"))),
    "tools": (PARIS, CHAT, {}, called({"city": "Paris"})),
    "tool_choice required": (PARIS, CHAT, {"tool_choice": "required"}, called({"city": "Paris"})),
    "tool_choice named": (PARIS, CHAT, {"tool_choice": NAMED}, called({"city": "Paris"}, reason="stop")),
    "tool_choice none": (PARIS, CHAT, {"tool_choice": "none"}, said(PARIS.answer)),
    "tool_choice allowed_tools": (OTHERS, CHAT, {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}}, called({"city": "Paris"})),
    "functions": (PARIS, CHAT, {"tools": None, "functions": [tool["function"] for tool in PARIS.body["tools"]]}, called({"city": "Paris"})),
    "parallel calls": (BOTH, CHAT, {}, called({"city": "Paris"}, {"city": "Tokyo"})),
    "parallel_tool_calls false": (BOTH, CHAT, {"parallel_tool_calls": False}, called({"city": "Paris"})),
    "strict tools": (PARIS, CHAT, {"tools": [{"type": "function", "function": {"name": "get_weather", "strict": True, "parameters": {
        "type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"], "additionalProperties": False}}}]}, called({"city": "Rome"})),
    "reasoning": (THINKS, CHAT, THINK, thought(THOUGHT, SUM)),
    "reasoning off": (THINKS, CHAT, {"enable_thinking": False, "chat_template_kwargs": None}, lambda choices: "reasoning_content" not in choices[0]["message"]),
    "reasoning budget": (THINKS, CHAT, {**THINK, "thinking_token_budget": 0}, lambda choices: len(choices[0]["message"].get("reasoning_content") or "") < 5),
    "reasoning left out": (THINKS, CHAT, {**THINK, "include_reasoning": False}, thought(None, SUM)),
    "reasoning in the content": (THINKS, CHAT, {**THINK, "separate_reasoning": False}, said(THINKS.answer)),
    "structured behind a thought": (CAPITAL, CHAT, {**THINK, "guided_choice": ["Rome it is", "Paris it is"]}, thought(OF_FRANCE, "Paris it is")),
    "messages as token ids": (CAPITAL, CHAT, {"messages": [300, 301, 302], "max_tokens": 3, "ignore_eos": True, "return_token_ids": True}, lambda choices: len(choices[0]["token_ids"]) == 3),
    "disable_chat_template": (FOX, CHAT, {"prompt": None, "messages": [{"role": "user", "content": FOX.body["prompt"]}], "disable_chat_template": True}, said(FOX.answer)),
    "completion_token_ids": (FOX, TEXT, {"completion_token_ids": [300, 301], "return_token_ids": True}, lambda choices: choices[0]["prompt_token_ids"][-2:] == [300, 301]),
    "response_max_tokens": (STORY, CHAT, {"response_max_tokens": 2}, lambda choices: choices[0]["finish_reason"] == "length"),
    "metadata": (THINKS, CHAT, {"chat_template_kwargs": None, "metadata": {"enable_thinking": True}}, thought(THOUGHT, SUM)),
}
# OpenAI streams neither, and its ranking wants all of them first.
WHOLE_ONLY = ("prompt_logprobs", "best_of")


def answer(http, server, door: str, route: str, body: dict):
    """The answer of a whole request; of one that streams, what its client makes of it."""
    stream = body.get("stream", False)
    if door in ("direct", "endpoint"):
        base = server.base if door == "direct" else f"{server.endpoint}/openai"
        response = http.post(base + route, json=body)
        assert response.status_code == 200, response.text
        return dialects.server_sent_chunks(response.text, with_usage=True) if stream else response.json()
    job = http.post(f"{server.endpoint}/runsync", json={"input": body if door == "native" else {"openai_route": route, "openai_input": body}}).json()
    assert job["status"] == "COMPLETED", job
    if not stream:
        return job["output"]
    return dialects.chunks(job["output"]) if door == "native" else dialects.server_sent_chunks("".join(job["output"]), with_usage=True)


@pytest.mark.parametrize("door", DOORS)
def test_the_moments_of_a_request(http, server, door):
    metrics = answer(http, server, door, CHAT, {**CAPITAL.body, "collect_metrics": True})["metrics"]
    moments = [metrics[name] for name in ("arrival_time", "preprocess_end_time", "inference_start_time", "engine_recv_first_token_time", "engine_recv_latest_token_time")]
    assert moments == sorted(moments) and metrics["first_token_time"] <= metrics["model_forward_time"] <= metrics["model_execute_time"], metrics


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", FEATURES)
def test_at_every_door(http, server, name, door):
    question, route, fields, came_true = FEATURES[name]
    body = {"max_tokens": 300, **question.body, "temperature": 0, **fields}
    whole = answer(http, server, door, route, body)
    assert came_true(whole["choices"]), whole
    whole.pop("text", None)
    same = [answer(http, server, "direct", route, body)]
    if name not in WHOLE_ONLY:
        options = {} if door == "native" else {"stream_options": {"include_usage": True}}
        same.append(answer(http, server, door, route, {**body, "stream": True, **options}))
    for other in same:
        assert (found := dialects.differences(dialects.plain(other), dialects.plain(whole))) == [], "\n".join(found)


@pytest.mark.parametrize("name", SPELLINGS)
def test_structured_output_at_every_door(http, server, name):
    body = {"messages": ASKED_FOR_JSON, "temperature": 1, "seed": 2, "max_tokens": 60, **SPELLINGS[name][0]}
    given = [answer(http, server, door, CHAT, body) for door in DOORS]
    assert [dialects.plain(one["choices"]) for one in given] == [dialects.plain(given[0]["choices"])] * len(DOORS)
    choice = given[0]["choices"][0]
    check(choice["message"]["content"], choice["finish_reason"], SPELLINGS[name][1])


def test_a_stored_response_by_jobs(http, server):
    """Made, read, continued and deleted."""
    def job(route: str, body: dict | None = None, method: str = "POST"):
        return http.post(f"{server.endpoint}/runsync", json={"input": {"route": route, "method": method, **({"body": body} if body else {})}}).json()

    first = job("/v1/responses", {"input": "Hello!", "temperature": 0})["output"]
    assert job(f"/v1/responses/{first['id']}", method="GET")["output"]["output"] == first["output"]
    second = job("/v1/responses", {"input": "Tell me a joke.", "previous_response_id": first["id"], "temperature": 0})["output"]
    assert second["previous_response_id"] == first["id"] and second["usage"]["input_tokens"] > first["usage"]["input_tokens"]
    assert len(job(f"/v1/responses/{second['id']}/input_items", method="GET")["output"]["data"]) == 3
    assert job(f"/v1/responses/{first['id']}", method="DELETE")["output"]["deleted"] is True
    assert job(f"/v1/responses/{first['id']}", method="GET")["status"] == "FAILED"


def test_count_tokens_by_jobs(http, server):
    body = {"messages": [{"role": "user", "content": "Hello!"}]}
    counted = http.post(f"{server.base}/v1/messages/count_tokens", json=body).json()
    job = http.post(f"{server.endpoint}/runsync", json={"input": {"openai_route": "/v1/messages/count_tokens", "openai_input": body}}).json()
    assert job["output"] == counted and counted["input_tokens"] > 0


@pytest.mark.parametrize("route", ["/version", "/load", "/v1/models", "/v1/models/demo"])
def test_questions_about_the_server(http, server, route):
    direct, endpoint = (http.get(f"{base}{route}").json() for base in (server.base, f"{server.endpoint}/openai"))
    job = http.post(f"{server.endpoint}/runsync", json={"input": {"openai_route": route}}).json()["output"]
    assert dialects.plain(direct) == dialects.plain(endpoint) == dialects.plain(job) != {}


def test_speculation_at_every_door(http):
    config = json.dumps({"method": "ngram", "num_speculative_tokens": 4})
    with Server("serve", "--model", "demo", env={"SPECULATIVE_CONFIG": config}) as guessing:
        for question in (STORY, COUNT, FOX):
            for door in DOORS:
                text = questions.text(answer(http, guessing, door, f"/v1{question.route}", question.request()))
                assert text == question.answer, door


def test_bounds_at_every_door(http):
    with Server("serve", "--model", "demo", env={"MAX_N": "2", "MAX_STOP_STRINGS": "1", "MAX_MESSAGES": "2"}) as server:
        for fields, param in (({"n": 3}, "n"), ({"stop": ["a", "b"]}, "stop"), ({"messages": CAPITAL.body["messages"] * 3}, "messages")):
            body = {**CAPITAL.body, "max_tokens": 1, **fields}
            errors = [http.post(f"{base}/chat/completions", json=body).json()["error"] for base in server.doors().values()]
            jobs = [http.post(f"{server.endpoint}/runsync", json={"input": form}).json() for form in (body, {"openai_route": CHAT, "openai_input": body})]
            errors += [json.loads(job["error"])["error"] for job in jobs]
            assert [error["param"] for error in errors] == [param] * len(DOORS)


def test_abort_by_jobs(http, server):
    """A job ends another one, whose id it knows; that one answers with what it has."""
    body = {"prompt": "Once", "max_tokens": 1900, "ignore_eos": True, "temperature": 1, "n": 32}
    for form in (body, {"openai_route": TEXT, "openai_input": body}):
        doomed = http.post(f"{server.endpoint}/run", json={"input": form}).json()["id"]
        end = {"openai_route": "/v1/abort_requests", "openai_input": {"req_ids": [doomed]}}
        aborted = wait_for(lambda: http.post(f"{server.endpoint}/runsync", json={"input": end}).json()["output"]["result"]["aborted"], "the job to be known")
        assert aborted[0]["request_id"].endswith(doomed)
        ended = wait_for(lambda: (job := http.get(f"{server.endpoint}/status/{doomed}").json())["status"] == "COMPLETED" and job, "its answer")
        assert "abort" in [choice["finish_reason"] for choice in ended["output"]["choices"]]


def test_a_cancelled_job_of_a_route(http, server):
    body = {"prompt": "Once", "max_tokens": 900, "n": 128, "ignore_eos": True, "temperature": 1}
    job = http.post(f"{server.endpoint}/run", json={"input": {"openai_route": TEXT, "openai_input": body}}).json()["id"]
    wait_for(lambda: http.get(f"{server.endpoint}/status/{job}").json()["status"] == "IN_PROGRESS", "the job to run")
    assert http.post(f"{server.endpoint}/cancel/{job}").json()["status"] == "CANCELLED"
    wait_for(lambda: http.get(f"{server.base}/load").json()["server_load"] == 0, "its places to be free")


# ---- the table

def cells() -> list[tuple[str, list[str]]]:
    """The rows of docs/features.md: the feature, and its cells."""
    lines = (REPOSITORY / "docs/features.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [(row[0], row[1:]) for row in rows if row[0] not in ("Feature", "Edge") and set(row[0]) != {"-"}]


@cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((REPOSITORY / "handler-tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@cache
def rust() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for folder in ("src", "tests") for path in sorted((REPOSITORY / folder).rglob("*.rs")))


def test_the_table_names_tests_that_there_are():
    rows = cells()
    # A cell for each door; or one of tests, where a door is not what matters.
    assert len(rows) > 50 and all(len(found) in (1, len(DOORS)) for _, found in rows), rows
    for feature, found in rows:
        for cell in found:
            names = re.findall(r"`([^`]+)`", cell)
            if cell.startswith("—"):
                assert len(cell) > 4, f"{feature}: a door that cannot have it needs a reason"
                continue
            assert names, f"{feature}: {cell}"
            for name in names:
                short = re.fullmatch(r"at_every_door\[(.+)\]", name)
                if short is not None:
                    assert short[1] in FEATURES, f"{feature}: no case {name}"
                    continue
                python = re.fullmatch(r"([\w/]+\.py)::(test_\w+)", name)
                if python is None:
                    assert re.search(rf"\bfn {name.split('::')[-1]}\(", rust()), f"{feature}: no Rust test {name}"
                    continue
                file, test = python.groups()
                assert test in names_in(file), f"{feature}: no test {name}"


def test_every_case_is_in_the_table():
    text = (REPOSITORY / "docs/features.md").read_text(encoding="utf-8")
    assert [name for name in FEATURES if f"`at_every_door[{name}]`" not in text] == []
