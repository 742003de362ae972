"""Random requests in every dialect, by every door: a stream, put together as its clients do, is the whole answer; what is wrong is refused by
the dialect's own envelope, and never by a 5xx.

A case is its number: a failure prints it, and `FUZZ_CASE=number` runs that one alone. `FUZZ_SECONDS=600` goes on
with new ones for so long in each test."""
from __future__ import annotations

import json
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from harness import dialects, questions
from harness.program import Server

CASES = 40
SECONDS = float(os.environ.get("FUZZ_SECONDS", 0))
ALONE = os.environ.get("FUZZ_CASE")
AT_ONCE = 4
MODEL_LENGTH = 2048

SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 0, "maximum": 99}},
          "required": ["city"], "additionalProperties": False}
TOOLS = [
    {"name": "get_weather", "description": "The weather", "parameters": SCHEMA},
    {"name": "get_time", "parameters": {"type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"], "additionalProperties": False}},
    {"name": "stop_it", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
]
FORMS = [
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}},
    {"structured_outputs": {"choice": ["red", "green", "grün", "😀🚀"]}},
    {"guided_regex": "[a-z]{2,9} [0-9]+"},
    {"grammar": 'root ::= "a" [bc]* "d"?'},
]
# Formats with a grammar of their calls, and those that put the opening of a call into the model's mouth.
SETTINGS = [{}, {}, {}, *({"TOOL_CALL_PARSER": name} for name in (
    "mistral", "deepseek_v3", "deepseek_v31", "llama3_json", "granite", "kimi_k2", "phi4_mini_json", "ernie45", "internlm", "command",
    "qwen3_coder", "glm45", "pythonic", "seed_oss",
)), {"REASONING_PARSER": "deepseek_r1"},
    {"REASONING_FIELD": "reasoning"}, {"FASTDEPLOY_COMPATIBLE": "true"}, {"ENABLE_PREFIX_CACHING": "false"},
    {"SPECULATIVE_CONFIG": '{"method": "ngram", "num_speculative_tokens": 4}'}]
# `<think>`, `</think>`, `<tool_call>`, `</tool_call>` of the demo model, and what may follow: written in places where no model would.
MARKS = [1394, 1395, 1396, 1397, 312, 1236]
TOKENS = {"NATIVE_OUTPUT_FORMAT": "tokens"}


@pytest.fixture(scope="module")
def server_of():
    """A server with given settings; each is started when it is first wanted."""
    started: dict[str, Server] = {}

    def server_of(env: dict[str, str]) -> Server:
        key = json.dumps(env)
        if key not in started:
            started[key] = Server("serve", "--model", "demo", env={**env, "NUM_GPU_BLOCKS_OVERRIDE": "600"}, ready=False)
        return started[key]

    yield server_of
    for server in started.values():
        server.kill()


# ---- random requests

def some(draw: random.Random, share: float, **fields) -> dict:
    """Each of the fields with that probability. A value that can be called is drawn."""
    return {name: value() if callable(value) else value for name, value in fields.items() if draw.random() < share}


def sampling(draw: random.Random) -> dict:
    warm = draw.random() < 0.6
    return {
        "temperature": draw.choice([0.5, 1.0, 1.3, 2.0]) if warm else 0,
        **({"seed": draw.randrange(1 << 31)} if warm else {}),
        **some(draw, 0.15, top_p=lambda: draw.choice([0.3, 0.9, 1]), top_k=lambda: draw.choice([1, 5, 40]), min_p=0.05, presence_penalty=0.5,
               frequency_penalty=-0.4, repetition_penalty=1.2, min_tokens=lambda: draw.randrange(8), ignore_eos=lambda: draw.random() < 0.4,
               logit_bias=lambda: {str(draw.randrange(100, 700)): draw.choice([-100, -3, 4]) for _ in range(4)}, skip_special_tokens=False,
               include_stop_str_in_output=True, max_streaming_response_tokens=lambda: draw.choice([1, 3, 16]),
               stop_token_ids=lambda: [draw.randrange(300, 700)]),
    }


def stops(draw: random.Random, text: str) -> list[str] | str:
    def one() -> str:
        if text and draw.random() < 0.8:
            start = draw.randrange(len(text))
            return text[start : start + draw.randrange(1, 7)]
        return draw.choice(["zzz", "\n", "e", " a", "</tool_call>", "</think>", '"', "🚀"])

    return one() if draw.random() < 0.3 else [one() for _ in range(draw.randrange(1, 4))]


def calls(draw: random.Random, wrap) -> tuple[list, list[str]]:
    chosen = draw.sample(TOOLS, draw.randrange(1, len(TOOLS) + 1))
    return [wrap(tool) for tool in chosen], [tool["name"] for tool in chosen]


def chat(draw: random.Random) -> dict:
    question = draw.choice([*(question for question in questions.ALL if question.is_chat), *questions.WITH_TOOLS * 4])
    body = {"messages": question.body["messages"], "max_tokens": draw.choice([1, 3, 12, 60, 120, 120]), **sampling(draw)}
    body |= some(draw, 0.25, n=lambda: draw.randrange(1, 4), stop=lambda: stops(draw, question.answer), return_token_ids=True)
    body |= some(draw, 0.35, logprobs=True)
    if "logprobs" in body:
        body |= some(draw, 0.5, top_logprobs=lambda: draw.randrange(4), return_tokens_as_token_ids=True)
    if draw.random() < 0.2:
        body["logit_bias"] = {str(mark): draw.choice([6, 10, 14]) for mark in draw.sample(MARKS, draw.randrange(1, 4))}
        body |= {"temperature": 1.5, "seed": draw.randrange(1 << 31), "max_tokens": 150}
    if draw.random() < 0.1:
        body |= {"messages": [*body["messages"], {"role": "assistant", "content": question.answer[:9] or "So"}], "continue_final_message": True, "echo": draw.random() < 0.5}
    if "tools" in question.body or draw.random() < 0.2:
        body["tools"], names = calls(draw, lambda tool: {"type": "function", "function": {**tool, **some(draw, 0.3, strict=True)}})
        named = {"type": "function", "function": {"name": draw.choice(names)}}
        body |= some(draw, 0.8, tool_choice=lambda: draw.choice(["auto", "required", "required", "none", named, named]))
        body |= some(draw, 0.3, parallel_tool_calls=False)
    if draw.random() < 0.4:
        body |= {"enable_thinking": True, **some(draw, 0.3, thinking_token_budget=lambda: draw.randrange(9), include_reasoning=False,
                                                  response_max_tokens=lambda: draw.randrange(1, 20), reasoning_format=lambda: draw.choice(["none", "hidden", "auto"]))}
    if draw.random() < 0.2:
        body |= draw.choice(FORMS)
    return body


def completion(draw: random.Random) -> dict:
    prompts = [question for question in questions.ALL if not question.is_chat]
    question = draw.choice(prompts)
    prompt = question.body["prompt"]
    body = {"prompt": prompt if draw.random() < 0.7 else [prompt, draw.choice(prompts).body["prompt"]], "max_tokens": draw.choice([1, 3, 12, 40]), **sampling(draw)}
    body |= some(draw, 0.25, n=lambda: draw.randrange(1, 4), stop=lambda: stops(draw, question.answer), return_token_ids=True, echo=True)
    body |= some(draw, 0.4, logprobs=lambda: draw.randrange(4))
    if draw.random() < 0.2:
        body |= draw.choice(FORMS)
    return body


def fastchat(draw: random.Random) -> dict:
    body = chat(draw)
    if draw.random() < 0.2:
        body["messages"] = "Once upon a time"
    return body


def native(draw: random.Random) -> dict:
    body = chat(draw) if draw.random() < 0.5 else completion(draw)
    if draw.random() < 0.4:
        nested = [name for name in ("temperature", "seed", "max_tokens", "top_p", "n", "stop") if name in body]
        body["sampling_params"] = {name: body.pop(name) for name in nested}
    return body


def tokens(draw: random.Random) -> dict:
    body = native(draw)
    return {name: value for name, value in body.items() if name not in ("logprobs", "top_logprobs", "return_token_ids", "tool_choice", "tools")}


def response(draw: random.Random) -> dict:
    body = chat(draw)
    question = [message for message in body.pop("messages") if message["role"] in ("user", "system") or message.get("content")]
    asked = {"input": [message for message in question if message["role"] != "tool"], "max_output_tokens": body.pop("max_tokens")}
    for name in ("n", "logprobs", "top_logprobs", "return_token_ids", "return_tokens_as_token_ids", "continue_final_message", "echo"):
        body.pop(name, None)
    if draw.random() < 0.3:
        asked |= {"include": ["message.output_text.logprobs"], **some(draw, 0.5, top_logprobs=2)}
    if "tools" in body:
        body["tools"], names = calls(draw, lambda tool: {"type": "function", **tool})
        if isinstance(body.get("tool_choice"), dict):
            body["tool_choice"] = {"type": "function", "name": draw.choice(names)}
    if "json_schema" in str(body.get("response_format")):
        body.pop("response_format")
        asked["text"] = {"format": {"type": "json_schema", "name": "weather", "schema": SCHEMA}}
    return {**asked, **body, **some(draw, 0.3, store=False, instructions="Be brief.")}


def message(draw: random.Random) -> dict:
    body = chat(draw)
    for name in ("n", "logprobs", "top_logprobs", "return_token_ids", "return_tokens_as_token_ids", "parallel_tool_calls", "continue_final_message", "echo"):
        body.pop(name, None)
    system = [one["content"] for one in body["messages"] if one["role"] == "system"]
    body["messages"] = [one for one in body["messages"] if one["role"] == "user" or (one["role"] == "assistant" and one["content"])]
    if body["messages"][-1]["role"] != "user":
        body["messages"].append({"role": "user", "content": "And?"})
    if system:
        body["system"] = system[0]
    stop = body.pop("stop", None)
    if stop is not None:
        body["stop_sequences"] = stop if isinstance(stop, list) else [stop]
    if "tools" in body:
        body["tools"], names = calls(draw, lambda tool: {"name": tool["name"], "input_schema": tool["parameters"]})
        choice = body.pop("tool_choice", None)
        if choice is not None:
            kind = choice if isinstance(choice, str) else "tool"
            body["tool_choice"] = {"type": {"required": "any"}.get(kind, kind), **({"name": draw.choice(names)} if kind == "tool" else {})}
            if kind != "none":
                body["tool_choice"] |= some(draw, 0.3, disable_parallel_tool_use=True)
    return body


def usage_last(draw: random.Random) -> dict:
    return some(draw, 0.6, stream_options=lambda: {"include_usage": draw.random() < 0.7, **some(draw, 0.3, continuous_usage_stats=True)})


# name: (how a request is drawn, its route)
DIALECTS = {
    "chat": (chat, "/v1/chat/completions"),
    "completions": (completion, "/v1/completions"),
    "responses": (response, "/v1/responses"),
    "messages": (message, "/v1/messages"),
    "fastchat": (fastchat, "/api/v1/chat/completions"),
    "native": (native, None),
    "tokens": (tokens, None),
}


class Case:
    """A request of a dialect, a server's settings and a door: all of it from the number."""

    def __init__(self, dialect: str, number: str):
        self.dialect, self.number = dialect, number
        self.draw = random.Random(f"{dialect} {number}")
        make, self.route = DIALECTS[dialect]
        self.env = TOKENS if dialect == "tokens" else self.draw.choice(SETTINGS)
        self.door = self.draw.choice(["direct", "direct", "queue", "job"]) if self.route else "job"
        self.body = make(self.draw)
        self.streamed = {**self.body, "stream": True}
        if dialect in ("chat", "completions", "fastchat"):
            self.streamed |= usage_last(self.draw)

    def __repr__(self) -> str:
        return f"FUZZ_CASE={self.number} {self.dialect} {self.env} {self.door} {self.route}\n{json.dumps(self.body, ensure_ascii=False)}"


# ---- the doors

def send(http, server: Server, case: Case, body) -> tuple[int, object, str | list | None]:
    """The status, with the whole answer or the stream: a text of events, or a native job's chunks."""
    if case.door == "job":
        return job(http, server, case, body)
    base = server.base if case.door == "direct" else f"{server.endpoint}/openai"
    answer = http.post(base + case.route, json=body)
    if answer.headers["content-type"].startswith("text/event-stream"):
        return answer.status_code, None, answer.text
    return answer.status_code, answer.json(), None


def job(http, server: Server, case: Case, body) -> tuple[int, object, str | list | None]:
    given = {"openai_route": case.route, "openai_input": body} if case.route else body
    if not (isinstance(body, dict) and body.get("stream") is True):
        ended = http.post(f"{server.endpoint}/runsync", json={"input": given}).json()
        return outcome(ended)
    name = http.post(f"{server.endpoint}/run", json={"input": given}).json()["id"]
    found = []
    while True:
        progress = http.get(f"{server.endpoint}/stream/{name}").json()
        found += [piece["output"] for piece in progress["stream"]]
        if progress["status"] not in ("IN_QUEUE", "IN_PROGRESS") and not progress["stream"]:
            break
    status, _, _ = failed = outcome(http.get(f"{server.endpoint}/status/{name}").json())
    if status != 200:
        return failed
    return 200, None, "".join(found) if case.route else found


def outcome(ended: dict) -> tuple[int, object, None]:
    if ended.get("status") == "COMPLETED":
        return 200, ended["output"], None
    if ended.get("status") == "FAILED":
        told = json.loads(ended["error"])
        return told["error"]["status"], told, None
    # The input was no job's at all.
    return 400, ended, None


def streamed(case: Case, stream: str | list) -> dict:
    if case.dialect == "native":
        return dialects.chunks(stream)
    if case.dialect == "tokens":
        return dialects.pieces(stream)
    if case.dialect == "responses":
        return dialects.response(stream)
    if case.dialect == "messages":
        return dialects.message(stream)
    options = case.streamed.get("stream_options") or {}
    return dialects.server_sent_chunks(stream, options.get("include_usage"))


def compare(server_of, http, case: Case) -> bool:
    """Whether it was answered; that both ways say the same is checked in any case."""
    server = server_of(case.env)
    status, whole, _ = send(http, server, case, case.body)
    status_of_stream, refused, stream = send(http, server, case, case.streamed)
    assert status < 500 and status == status_of_stream, (status, whole, status_of_stream, refused)
    if status != 200:
        envelope(case, status, whole)
        assert whole["error"] == refused["error"]
        return False
    given = streamed(case, stream)
    if case.dialect == "native":
        whole.pop("text", None)
    if "FASTDEPLOY_COMPATIBLE" in case.env:
        # Chunks alone have these in FastDeploy, too.
        for choice in given.get("choices", []):
            choice.get("message", {}).pop("token_ids", None)
    if case.dialect not in ("responses", "messages") and given["usage"] is None:
        whole.pop("usage"), given.pop("usage")
    assert (found := dialects.differences(dialects.plain(given), dialects.plain(whole))) == [], "\n".join(found)
    return True


def envelope(case: Case, status: int, refused: dict) -> None:
    """A refusal in the form that the dialect's clients read; a job's is OpenAI's."""
    error = refused["error"]
    if isinstance(error, str):
        # What the endpoint itself says of a body that brings no job.
        assert error
    elif case.dialect == "messages" and case.door != "job":
        assert refused["type"] == "error" and set(error) == {"type", "message"} and error["message"] and refused["request_id"]
    else:
        assert {"message", "type", "param", "code"} <= set(error) and error["message"], refused
        assert error["type"] == "invalid_request_error" and 400 <= status < 500


def each(dialect: str, check, server_of) -> list:
    """What `check` says of the cases, several at a time."""
    start, results = time.monotonic(), []
    names = [ALONE] if ALONE else [str(number) for number in range(CASES)]

    def one(name: str):
        case = Case(dialect, name)
        try:
            return check(case)
        except Exception as failure:
            raise AssertionError(f"{type(failure).__name__} {failure}\n{case}") from failure

    for server in [server_of(env) for env in SETTINGS + [TOKENS]]:
        server.wait_ready()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        results += pool.map(one, names)
        while time.monotonic() < start + SECONDS:
            results += pool.map(one, [str(random.SystemRandom().getrandbits(32)) for _ in range(CASES)])
    return results


@pytest.mark.timeout(300 + 2 * SECONDS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_stream_is_the_whole_answer(http, server_of, dialect):
    answered = each(dialect, lambda case: compare(server_of, http, case), server_of)
    assert ALONE or sum(answered) > 0.6 * len(answered), f"only {sum(answered)} of {len(answered)} requests were answered: little was compared"


# ---- what is wrong

JUNK = [None, True, False, 0, -1, 1, 2**31, 2**64, -(2**70), 0.5, 1e308, "", "x", "\u0000", "😀" * 50, "NaN", [], {}, [[]], [None], [{}], {"a": None},
        {"type": "x"}, {"type": ["x"]}, [1, "a", {}], ["a"] * 40, {"": {"": [[[[{}]]]]}}, [-1], [2**40], "a" * 3000]


def spoil(draw: random.Random, value, names: list[str]):
    """Something in it is not what it was: a value, a member that is gone, or one more."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        copy = dict(value)
        name = draw.choice([*copy, draw.choice(names)])
        if name in copy and draw.random() < 0.15:
            del copy[name]
        else:
            copy[name] = spoil(draw, copy.get(name, draw.choice(JUNK)), [*copy, "type", "name"])
        return copy
    if isinstance(value, list) and value and draw.random() < 0.8:
        place = draw.randrange(len(value))
        return [*value[:place], spoil(draw, value[place], ["type", "name"]), *value[place + 1 :]]
    return draw.choice(JUNK)


def refuse(server_of, http, case: Case, names: list[str]) -> bool:
    body = case.streamed if case.draw.random() < 0.4 else case.body
    for _ in range(case.draw.randrange(1, 4)):
        spoilt = spoil(case.draw, body, names)
        body = spoilt if isinstance(spoilt, dict) or case.door == "direct" else body
    if isinstance(body, dict):
        # Else a request that happens to be right may go on for the whole context, many times over.
        limit = "max_output_tokens" if case.dialect == "responses" else "max_tokens"
        body = {**body, limit: body.get(limit, 20)}
    status, answer, stream = send(http, server_of(case.env), case, body)
    assert status < 500, (status, answer, body)
    if status != 200:
        envelope(case, status, answer)
    elif stream is not None:
        assert not any("error" in event for event in (dialects.events(stream) if isinstance(stream, str) else stream) if isinstance(event, dict) and event.get("error")), stream
    return status != 200


@pytest.mark.timeout(300 + 2 * SECONDS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_is_wrong_is_refused_in_the_dialects_words(http, server_of, server, capital, dialect):
    described = http.get(f"{server.base}/openapi.json").json()["components"]["schemas"]
    names = sorted({name for schema in described.values() for name in schema.get("properties", {}) if name not in ("abort_all",)})
    refused = each(dialect, lambda case: refuse(server_of, http, case, names), server_of)
    assert ALONE or sum(refused) > 0.3 * len(refused), "little was wrong"
    for env in (TOKENS, {}):
        answer = httpx.post(f"{server_of(env).base}/v1/chat/completions", json=capital.request()).json()
        assert questions.text(answer) == capital.answer, "the next one is served"
