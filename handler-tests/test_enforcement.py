"""What a model may write is enforced: budgets of thoughts, answers of a form behind thoughts, and calls of the tools there are. At temperature
2, where the model by itself keeps to nothing."""
from __future__ import annotations

import json
from typing import Literal

import anthropic
import openai
import pydantic
import pytest

from harness import questions

CAPITAL = questions.BY_NAME["capital-france"]
PARIS = next(question for question in questions.WITH_TOOLS if question.name == "tool-paris")
THOUGHT = "The user asks for the capital of France. That is Paris."
THINK = {"enable_thinking": True}
CITIES = ["Paris", "Tokyo"]
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "strict": True, "parameters": {
        "type": "object", "properties": {"city": {"enum": CITIES}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"], "additionalProperties": False}}},
    {"type": "function", "function": {"name": "get_time", "parameters": {
        "type": "object", "properties": {"zone": {"type": "string", "pattern": "^[A-Z]{3}$"}}, "required": ["zone"], "additionalProperties": False}}},
]
NAMED = {"type": "function", "function": {"name": "get_time"}}


@pytest.fixture
def client(door):
    with openai.OpenAI(base_url=door, api_key="any", max_retries=0, timeout=120) as client:
        yield client


def ask(client, messages=CAPITAL.body["messages"], **more):
    return client.chat.completions.create(**{"model": "default", "messages": messages, "temperature": 0, **more})


def gathered(client, **more) -> tuple[dict, str]:
    chunks = [chunk.model_dump(exclude_unset=True) for chunk in ask(client, stream=True, **more)]
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice.get("finish_reason")]
    return questions.gathered(chunks), reasons[-1]


def fits(name: str, arguments: str) -> bool:
    arguments = json.loads(arguments)
    if name == "get_weather":
        return set(arguments) == {"city", "days"} and arguments["city"] in CITIES and 1 <= arguments["days"] <= 9
    return name == "get_time" and set(arguments) == {"zone"} and len(arguments["zone"]) == 3 and arguments["zone"].isupper()


BUDGETS = [
    lambda tokens: {"thinking_token_budget": tokens},
    lambda tokens: {"reasoning_max_tokens": tokens},
    lambda tokens: {"metadata": {"reasoning_max_tokens": tokens}},
    lambda tokens: {"thinking_budget": tokens},
    lambda tokens: {"thinking_budget_tokens": tokens},
    lambda tokens: {"thinking": {"type": "enabled", "budget_tokens": tokens}},
    lambda tokens: {"reasoning": {"max_tokens": tokens}},
]


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_a_thought_has_no_more_tokens_than_its_budget(client, tokens):
    free = ask(client, extra_body=THINK).usage.completion_tokens_details.reasoning_tokens
    for budget in BUDGETS if tokens == 5 else BUDGETS[:1]:
        body = {**THINK, **budget(tokens)}
        answer = ask(client, extra_body=body)
        message, usage = answer.choices[0].message, answer.usage
        thought = getattr(message, "reasoning_content", "") or ""
        assert THOUGHT.startswith(thought) and thought != THOUGHT and (tokens > 1 or len(thought) < 12)
        assert message.content and "<think>" not in message.content and "</think>" not in message.content
        # The marks count, and the line break before the closing one.
        assert usage.completion_tokens_details.reasoning_tokens <= tokens + 3 < free
        streamed, _ = gathered(client, extra_body=body)
        assert (streamed["content"], streamed.get("reasoning_content") or "") == (message.content, thought)


def test_a_budget_that_is_not_reached_changes_nothing(client):
    for budget in BUDGETS:
        message = ask(client, extra_body={**THINK, **budget(1000)}).choices[0].message
        assert (message.content, message.reasoning_content) == ("Paris.", THOUGHT)
    message = ask(client, extra_body={"thinking_token_budget": 3}).choices[0].message
    assert message.content == "Paris." and not hasattr(message, "reasoning_content")


def test_budgets_with_seeds_choices_and_log_probabilities(client):
    wish = {"temperature": 2, "seed": 5, "n": 3, "max_tokens": 30, "extra_body": {**THINK, "thinking_token_budget": 4}}
    plain = ask(client, **wish)
    told = ask(client, **wish, logprobs=True)
    texts = [(choice.message.content, getattr(choice.message, "reasoning_content", None)) for choice in plain.choices]
    assert texts == [(choice.message.content, getattr(choice.message, "reasoning_content", None)) for choice in told.choices]
    assert all(THOUGHT.startswith(thought) and thought != THOUGHT and content for content, thought in texts)
    assert sum(len(choice.logprobs.content) for choice in told.choices) >= told.usage.completion_tokens - 3


def test_the_answer_behind_a_thought_has_a_limit_of_its_own(client):
    answer = ask(client, extra_body={**THINK, "response_max_tokens": 1})
    choice = answer.choices[0]
    assert choice.message.reasoning_content == THOUGHT and choice.finish_reason == "length"
    assert len(choice.message.content or "") < len("Paris.")


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
@pytest.mark.parametrize("budget", [{}, {"thinking_token_budget": 6}], ids=["free", "bounded"])
def test_an_answer_of_a_form_comes_behind_the_thought(client, seed, budget):
    schema = {"type": "object", "properties": {"capital": {"enum": ["Paris", "Rome"]}}, "required": ["capital"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    more = {"seed": seed, "temperature": 0 if seed is None else 2, "max_tokens": 400, "response_format": form, "extra_body": {**THINK, **budget}}
    choice = ask(client, **more).choices[0]
    if seed is None and not budget:
        assert choice.message.reasoning_content == THOUGHT
    if choice.finish_reason != "length":
        assert json.loads(choice.message.content)["capital"] in ["Paris", "Rome"]
    streamed, reason = gathered(client, **more)
    assert (streamed.get("content"), reason) == (choice.message.content, choice.finish_reason)


@pytest.mark.parametrize("tool_choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("thinks", [False, True], ids=["plain", "thinking"])
def test_a_demanded_call_is_one_at_any_temperature(client, tool_choice, thinks):
    ended = 0
    for seed in range(6):
        more = {"tools": TOOLS, "tool_choice": tool_choice, "temperature": 2, "seed": seed, "max_tokens": 500, "parallel_tool_calls": seed % 2 == 0}
        if thinks:
            more["extra_body"] = {**THINK, "thinking_token_budget": 20}
        choice = ask(client, **more).choices[0]
        if choice.finish_reason == "length":
            continue
        ended += 1
        calls = choice.message.tool_calls
        assert choice.finish_reason == ("tool_calls" if tool_choice == "required" else "stop") and not choice.message.content
        assert all(fits(call.function.name, call.function.arguments) for call in calls)
        assert len(calls) == 1 or seed % 2 == 0
        if tool_choice != "required":
            assert [call.function.name for call in calls] == ["get_time"]
        streamed, reason = gathered(client, **more)
        given = [(call["function"]["name"], call["function"]["arguments"]) for call in streamed["tool_calls"]]
        assert given == [(call.function.name, call.function.arguments) for call in calls] and reason == choice.finish_reason
    assert ended >= 3


def test_a_free_choice_gives_right_calls_only(client):
    """The model writes calls of `get_weather` with a city alone: here it must say the days, too."""
    choice = ask(client, PARIS.body["messages"], tools=TOOLS, max_tokens=200).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert [call.function.name for call in choice.message.tool_calls] and all(fits(c.function.name, c.function.arguments) for c in choice.message.tool_calls)
    for seed in range(6):
        choice = ask(client, PARIS.body["messages"], tools=TOOLS, temperature=1.5, seed=seed, max_tokens=200).choices[0]
        if choice.finish_reason != "length":
            assert all(fits(call.function.name, call.function.arguments) for call in choice.message.tool_calls or [])


def test_parsed_tools_of_the_sdk(client):
    class GetWeather(pydantic.BaseModel):
        city: Literal["Paris", "Tokyo"]
        unit: Literal["C", "F"]

    for tool_choice in ("auto", "required"):
        choice = client.chat.completions.parse(
            model="default", messages=PARIS.body["messages"], temperature=0, tools=[openai.pydantic_function_tool(GetWeather, name="get_weather")],
            tool_choice=tool_choice,
        ).choices[0]
        parsed = choice.message.tool_calls[0].function.parsed_arguments
        assert isinstance(parsed, GetWeather) and parsed.city == "Paris" and parsed.unit in ("C", "F")


def test_schemas_that_cannot_be_kept_to(client):
    odd = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "odd", "parameters": odd}}
    strict = {"type": "function", "function": {**tool["function"], "strict": True}}
    for choice in ("auto", "required"):
        with pytest.raises(openai.BadRequestError) as refused:
            ask(client, tools=[TOOLS[0], strict], tool_choice=choice)
        assert refused.value.param == "tools[1].function.parameters"
    call = ask(client, tools=[tool], tool_choice="required", max_tokens=200)
    assert call.choices[0].message.tool_calls[0].function.name == "odd"


def test_native_jobs(http, server):
    body = {"messages": CAPITAL.body["messages"], "temperature": 0, **THINK, "reasoning_max_tokens": 5}
    output = http.post(f"{server.endpoint}/runsync", json={"input": body}).json()["output"]
    message = output["choices"][0]["message"]
    assert THOUGHT.startswith(message["reasoning_content"]) and message["reasoning_content"] != THOUGHT and message["content"]
    body = {"messages": CAPITAL.body["messages"], "temperature": 2, "seed": 1, "tools": TOOLS, "tool_choice": NAMED, "max_tokens": 300}
    output = http.post(f"{server.endpoint}/runsync", json={"input": body}).json()["output"]
    call = output["choices"][0]["message"]["tool_calls"][0]["function"]
    assert fits(call["name"], call["arguments"])
    refused = http.post(f"{server.endpoint}/runsync", json={"input": {"prompt": "Hi", "reasoning_max_tokens": 5}}).json()
    assert "reasoning_max_tokens" in json.dumps(refused["error"])


def test_messages_of_anthropic(door):
    with anthropic.Anthropic(base_url=door.removesuffix("/v1"), api_key="any", max_retries=0, timeout=120) as client:
        ask = {"model": "default", "messages": CAPITAL.body["messages"], "max_tokens": 1100}
        thought, text = client.messages.create(**ask, thinking={"type": "enabled", "budget_tokens": 1024}, extra_body={"temperature": 0}).content
        assert (thought.thinking, text.text) == (THOUGHT, "Paris.")
        tools = [{"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]} for tool in TOOLS]
        wild = {"temperature": 2, "seed": 1, "thinking_token_budget": 20}
        message = client.messages.create(**ask, tools=tools, tool_choice={"type": "any", "disable_parallel_tool_use": True}, extra_body=wild)
        *thoughts, call = message.content
        assert all(block.type == "thinking" for block in thoughts)
        assert message.stop_reason == "tool_use" and fits(call.name, json.dumps(call.input))


def test_responses(client):
    ask = {"model": "default", "input": CAPITAL.body["messages"][0]["content"], "temperature": 0}
    response = client.responses.create(**ask, extra_body={**THINK, "reasoning": {"max_tokens": 5}})
    thought, message = response.output
    assert (thought.type, message.type) == ("reasoning", "message") and response.output_text
    assert response.usage.output_tokens_details.reasoning_tokens <= 8
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
    # A thought at this temperature need not end by itself.
    wild = {**ask, "temperature": 2, "extra_body": {"seed": 1, "reasoning": {"max_tokens": 20}}}
    called = client.responses.create(**wild, tools=tools, tool_choice="required", parallel_tool_calls=False, max_output_tokens=500)
    *thoughts, call = called.output
    assert all(item.type == "reasoning" for item in thoughts)
    assert call.type == "function_call" and fits(call.name, call.arguments)
