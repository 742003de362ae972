"""Structured output: whatever comes to its end meets what was asked for, in every spelling, at every door."""
from __future__ import annotations

import json
import re
import time
from typing import Literal

import jsonschema
import openai
import pydantic
import pytest

from harness import questions
from harness.program import Server

MESSAGES = [{"role": "user", "content": "Give me a JSON object with a name and an age."}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mood": {"enum": ["good", "bad"]},
    },
    "required": ["name", "age", "mood"],
    "additionalProperties": False,
}
LIST = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}
GBNF = 'root ::= "[" digit ("," digit)* "]"\ndigit ::= [0-9]{1,2}'
LARK = 'start: "[" DIGIT ("," DIGIT)* "]"\nDIGIT: /[0-9]{1,2}/'


def schema(wanted):
    return lambda text: jsonschema.validate(json.loads(text), wanted)


def matches(pattern):
    def check(text):
        assert re.fullmatch(pattern, text), text

    return check


def an_object(text):
    assert isinstance(json.loads(text), dict)


PERSON_IS, LIST_IS = schema(PERSON), schema(LIST)
DIGITS_ARE = matches(r"\[\d{1,2}(,\d{1,2})*\]")
DATE, DATE_IS = r"\d{4}-\d{2}-\d{2}", matches(r"\d{4}-\d{2}-\d{2}")
COLOUR, COLOUR_IS = ["red", "green", "a very \"odd\" blue"], matches(r"red|green|a very \"odd\" blue")

# name: (fields, what the text must be)
SPELLINGS = {
    "json_object": ({"response_format": {"type": "json_object"}}, an_object),
    "json_object with a schema": ({"response_format": {"type": "json_object", "schema": PERSON}}, PERSON_IS),
    "json_schema": ({"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}}, PERSON_IS),
    "json_schema, strict": ({"response_format": {"type": "json_schema", "json_schema": {"name": "p", "strict": True, "schema": LIST}}}, LIST_IS),
    "TGI's json": ({"response_format": {"type": "json", "value": LIST}}, LIST_IS),
    "TGI's regex": ({"response_format": {"type": "regex", "value": DATE}}, DATE_IS),
    "structured_outputs.json": ({"structured_outputs": {"json": PERSON}}, PERSON_IS),
    "structured_outputs.regex": ({"structured_outputs": {"regex": DATE}}, DATE_IS),
    "structured_outputs.choice": ({"structured_outputs": {"choice": COLOUR}}, COLOUR_IS),
    "structured_outputs.grammar": ({"structured_outputs": {"grammar": GBNF}}, DIGITS_ARE),
    "structured_outputs.json_object": ({"structured_outputs": {"json_object": True}}, an_object),
    "guided_decoding": ({"guided_decoding": {"choice": COLOUR}}, COLOUR_IS),
    "guided_json": ({"guided_json": PERSON}, PERSON_IS),
    "guided_json as text": ({"guided_json": json.dumps(LIST), "guided_decoding_backend": "xgrammar"}, LIST_IS),
    "guided_json_object": ({"guided_json_object": True}, an_object),
    "guided_regex": ({"guided_regex": f"^{DATE}$"}, DATE_IS),
    "guided_choice": ({"guided_choice": COLOUR}, COLOUR_IS),
    "guided_grammar in GBNF": ({"guided_grammar": GBNF}, DIGITS_ARE),
    "guided_grammar in Lark": ({"guided_grammar": LARK}, DIGITS_ARE),
    "SGLang's json_schema": ({"json_schema": json.dumps(PERSON)}, PERSON_IS),
    "SGLang's regex": ({"regex": DATE}, DATE_IS),
    "SGLang's ebnf": ({"ebnf": GBNF}, DIGITS_ARE),
    "in sampling_params": ({"sampling_params": {"regex": DATE}}, DATE_IS),
    "llama.cpp's grammar": ({"grammar": GBNF}, DIGITS_ARE),
    "llama.cpp's json_schema": ({"json_schema": LIST}, LIST_IS),
    "mistral.rs's regex": ({"grammar": {"type": "regex", "value": DATE}}, DATE_IS),
    "mistral.rs's json_schema": ({"grammar": {"type": "json_schema", "value": LIST}}, LIST_IS),
    "mistral.rs's lark": ({"grammar": {"type": "lark", "value": LARK}}, DIGITS_ARE),
    "mistral.rs's llguidance": ({"grammar": {"type": "llguidance", "value": json.dumps({"grammars": [{"json_schema": LIST}]})}}, LIST_IS),
    "a structural tag": (
        {"response_format": {"type": "structural_tag", "structures": [{"begin": "<f>", "schema": LIST, "end": "</f>"}], "triggers": ["<f>"]}},
        lambda text: [LIST_IS(part.split("</f>")[0]) for part in text.split("<f>")[1:]],
    ),
}
spellings = pytest.mark.parametrize("name", SPELLINGS)


def check(text: str, finish: str, right) -> bool:
    """Whether it came to its end. Only the length may cut an answer."""
    if finish == "length":
        return False
    assert finish == "stop"
    right(text)
    return True


def choices(answer: dict) -> list[tuple[str, str]]:
    return [(c["message"]["content"] if "message" in c else c["text"], c["finish_reason"]) for c in answer["choices"]]


def frames(text: str) -> list[dict]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


@spellings
def test_chat_whole_and_streamed(http, server, name):
    fields, right = SPELLINGS[name]
    body = {"messages": MESSAGES, "temperature": 1.5, "seed": 3, "n": 4, "max_tokens": 300, **fields}
    whole = http.post(f"{server.base}/v1/chat/completions", json=body)
    assert whole.status_code == 200, whole.text
    found = choices(whole.json())
    assert sum(check(text, finish, right) for text, finish in found) >= (0 if "tag" in name else 1), found
    streamed = frames(http.post(f"{server.base}/v1/chat/completions", json={**body, "stream": True}).text)
    assert ["".join(questions.delta(chunk, at) for chunk in streamed) for at in range(4)] == [text for text, _ in found]
    ends = {c["index"]: c["finish_reason"] for chunk in streamed for c in chunk["choices"] if c["finish_reason"]}
    assert [ends[at] for at in range(4)] == [finish for _, finish in found]


@spellings
def test_completions_and_jobs_give_the_same(http, server, name):
    fields, right = SPELLINGS[name]
    body = {"prompt": "The answer: ", "temperature": 1.2, "seed": 5, "max_tokens": 200, **fields}
    direct = choices(http.post(f"{server.base}/v1/completions", json=body).json())
    check(*direct[0], right)
    job = http.post(f"{server.endpoint}/runsync", json={"input": body}).json()
    assert job["status"] == "COMPLETED", job
    assert choices(job["output"]) == direct
    routed = http.post(f"{server.endpoint}/openai/v1/completions", json=body).json()
    assert choices(routed) == direct


def test_greedy_json_of_the_demo_model(http, server):
    body = {"messages": MESSAGES, "temperature": 0, "response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}}
    answer = http.post(f"{server.base}/v1/chat/completions", json=body).json()
    assert check(*choices(answer)[0], PERSON_IS), answer


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"top_k": 5},
        {"top_p": 0.4},
        {"min_p": 0.2},
        {"repetition_penalty": 1.5, "frequency_penalty": 1.0},
        {"logit_bias": {"5": 50, "300": -100}},
        {"logprobs": True, "top_logprobs": 3},
        {"ignore_eos": True},
        {"min_tokens": 20},
        {"bad_words": ["Tom", "x"]},
    ],
    ids=lambda more: ",".join(more) or "plain",
)
def test_with_everything_that_changes_sampling(http, server, more):
    body = {"messages": MESSAGES, "temperature": 2, "n": 6, "seed": 1, "max_tokens": 400, "guided_json": PERSON, **more}
    answer = http.post(f"{server.base}/v1/chat/completions", json=body).json()
    found = choices(answer)
    assert sum(check(text, finish, PERSON_IS) for text, finish in found) >= 4, found
    if "bad_words" in more:
        assert not any("Tom" in text for text, _ in found)
    if "logprobs" in more:
        for choice in answer["choices"]:
            said = "".join(entry["token"] for entry in choice["logprobs"]["content"])
            assert said.startswith(choice["message"]["content"])


def test_a_stop_string_may_cut(http, server):
    body = {"messages": MESSAGES, "temperature": 0, "guided_json": PERSON, "stop": '"age"'}
    text, finish = choices(http.post(f"{server.base}/v1/chat/completions", json=body).json())[0]
    assert finish == "stop" and '"name"' in text and '"age"' not in text


def test_the_length_may_cut(http, server):
    body = {"messages": MESSAGES, "temperature": 0, "guided_json": PERSON, "max_tokens": 4}
    answer = http.post(f"{server.base}/v1/chat/completions", json=body).json()
    assert choices(answer)[0][1] == "length" and answer["usage"]["completion_tokens"] == 4


def test_speculation_and_a_small_cache_change_nothing(http, server):
    body = {"messages": MESSAGES, "temperature": 0.9, "seed": 11, "n": 3, "guided_json": {"type": "array", "items": PERSON, "minItems": 3, "maxItems": 3}, "max_tokens": 400}
    want = choices(http.post(f"{server.base}/v1/chat/completions", json=body).json())
    with Server("serve", "--model", "demo", env={"SPECULATIVE_CONFIG": '{"method":"ngram","num_speculative_tokens":5}', "KV_CACHE_GB": "0.002"}) as other:
        assert choices(http.post(f"{other.base}/v1/chat/completions", json=body).json()) == want


NESTED = {"type": "string"}
for _ in range(12):
    NESTED = {"allOf": [NESTED, {"anyOf": [NESTED, {"type": "null"}]}]}

# name: (fields, param)
REFUSED = {
    "an unsupported keyword": ({"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": {"type": "array", "uniqueItems": True}}}}, "response_format.json_schema.schema"),
    "a schema that nothing meets": ({"guided_json": {"type": "integer", "minimum": 3, "maximum": 2}}, "guided_json"),
    "no schema": ({"response_format": {"type": "json_schema", "json_schema": {"name": "p"}}}, "response_format.json_schema.schema"),
    "no JSON": ({"guided_json": "{"}, "guided_json"),
    "a schema that explodes": ({"guided_json": NESTED}, "guided_json"),
    "a megabyte of schema": ({"guided_json": {"enum": ["x" * 1000 + str(i) for i in range(1000)]}}, "guided_json"),
    "a megabyte of grammar": ({"guided_grammar": 'root ::= "a"\n' + "# comment\n" * 110_000}, "guided_grammar"),
    "a megabyte of parentheses": ({"grammar": "root ::= " + "(" * 500_000}, "grammar"),
    "deep parentheses": ({"grammar": "root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000}, "grammar"),
    "an invalid expression": ({"guided_regex": "a(b"}, "guided_regex"),
    "an expression that explodes": ({"regex": "((a{1000}){1000}){1000}"}, "regex"),
    "a pattern that explodes": ({"json_schema": {"type": "string", "pattern": "((a{1000}){1000}){1000}"}}, "json_schema"),
    "an invalid GBNF": ({"structured_outputs": {"grammar": "root ::= nothing"}}, "structured_outputs.grammar"),
    "an invalid Lark": ({"guided_grammar": "start: ("}, "guided_grammar"),
    "two constraints": ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    "two in one": ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
    "an unknown member": ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml"),
    "an unknown format": ({"response_format": {"type": "xml"}}, "response_format.type"),
    "an unknown backend": ({"guided_json": {}, "guided_decoding_backend": "mine"}, "guided_decoding_backend"),
    "a choice of numbers": ({"guided_choice": [1, 2]}, "guided_choice"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(http, server, capital, name):
    fields, param = REFUSED[name]
    answer = http.post(f"{server.base}/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 5, **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error"), error
    status = http.post(f"{server.endpoint}/runsync", json={"input": {"prompt": "x", "max_tokens": 5, **fields}}).json()
    assert status["status"] == "FAILED" and json.loads(status["error"])["error"]["param"] == param
    assert questions.text(http.post(f"{server.base}/v1/chat/completions", json=capital.request()).json()) == capital.answer


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=20)
    age: int = pydantic.Field(ge=0, le=150)
    mood: Literal["good", "bad"]


class Family(pydantic.BaseModel):
    parents: list[Person] = pydantic.Field(max_length=2)


def test_forbidding_all_that_may_follow_is_the_callers_mistake(http, server):
    body = {"prompt": "x", "guided_regex": "[0-9]{3}", "bad_words_token_ids": list(range(3, 1400)), "max_tokens": 8}
    for more in ({}, {"stream": True}):
        refused = http.post(f"{server.base}/v1/completions", json={**body, **more})
        error = refused.json()["error"]
        assert (refused.status_code, error["param"], error["code"]) == (400, "bad_words", "grammar_failed"), error
    job = http.post(f"{server.endpoint}/runsync", json={"input": body}).json()
    assert job["status"] == "FAILED" and json.loads(job["error"])["error"]["status"] == 400


@pytest.mark.parametrize("model", [Person, Family], ids=lambda model: model.__name__)
def test_parse_of_the_sdk(door, model):
    with openai.OpenAI(base_url=door, api_key="any", max_retries=0, timeout=120) as client:
        parsed = 0
        for seed in range(6):
            try:
                answer = client.chat.completions.parse(model="demo", messages=MESSAGES, response_format=model, temperature=1, seed=seed, max_tokens=600)
            except openai.LengthFinishReasonError:
                continue
            assert isinstance(answer.choices[0].message.parsed, model)
            parsed += 1
        assert parsed >= 2


def test_many_at_once_each_under_its_own(http, server):
    names = [name for name in SPELLINGS if "tag" not in name]
    jobs = {}
    for name in names:
        body = {"prompt": "Go: ", "temperature": 1.5, "max_tokens": 150, **SPELLINGS[name][0]}
        jobs[name] = http.post(f"{server.endpoint}/run", json={"input": body}).json()["id"]
    end = time.monotonic() + 120
    while jobs and time.monotonic() < end:
        for name, job in list(jobs.items()):
            status = http.get(f"{server.endpoint}/status/{job}").json()
            if status["status"] == "COMPLETED":
                check(*choices(status["output"])[0], SPELLINGS[name][1])
                del jobs[name]
            else:
                assert status["status"] in ("IN_QUEUE", "IN_PROGRESS"), status
        time.sleep(0.05)
    assert not jobs
