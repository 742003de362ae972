"""Tools and thoughts through `/v1/responses` and `/v1/messages`, with the official SDKs, on the direct door and through the queue."""
from __future__ import annotations

import json

import anthropic
import openai
import pytest

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "get_weather", "description": "Current weather of a city"}
QUESTION = "What is the weather in Paris?"
BOTH = "What is the weather in Paris and in Tokyo?"
TWICE = "Think step by step: what is 12 times 12?"
THOUGHT = "12 times 10 is 120, and 12 times 2 is 24. Together that is 144."


@pytest.fixture
def oai(door):
    with openai.OpenAI(base_url=door, api_key="any", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture
def claude(door):
    with anthropic.Anthropic(base_url=door.removesuffix("/v1"), api_key="any", max_retries=0, timeout=120) as client:
        yield client


def response(client, given, stream, **more):
    request = {"model": "default", "input": given, "temperature": 0, **more}
    if not stream:
        return client.responses.create(**request)
    with client.responses.stream(**request) as events:
        for _ in events:
            pass
        return events.get_final_response()


def message(client, messages, stream, **more):
    request = {"model": "default", "max_tokens": 300, "messages": messages, "extra_body": {"temperature": 0}, **more}
    if not stream:
        return client.messages.create(**request)
    with client.messages.stream(**request) as events:
        return events.get_final_message()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
class TestBoth:
    def test_a_call_and_its_result_of_responses(self, oai, stream):
        tools = [{"type": "function", **WEATHER, "parameters": SCHEMA, "strict": False}]
        first = response(oai, QUESTION, stream, tools=tools)
        [call] = first.output
        assert (call.type, call.name, json.loads(call.arguments), call.status) == ("function_call", "get_weather", {"city": "Paris"}, "completed")
        result = {"type": "function_call_output", "call_id": call.call_id, "output": '{"weather": "sunny"}'}
        by_id = response(oai, [result], stream, tools=tools, previous_response_id=first.id)
        by_items = response(oai, [{"role": "user", "content": QUESTION}, call.model_dump(exclude_none=True), result], stream, tools=tools)
        assert by_id.output_text == by_items.output_text == "It is sunny there."

    def test_two_calls_of_responses(self, oai, stream):
        tools = [{"type": "function", **WEATHER, "parameters": SCHEMA, "strict": False}]
        calls = response(oai, BOTH, stream, tools=tools).output
        assert [json.loads(call.arguments)["city"] for call in calls] == ["Paris", "Tokyo"]
        [only] = response(oai, BOTH, stream, tools=tools, parallel_tool_calls=False).output
        assert json.loads(only.arguments) == {"city": "Paris"}

    def test_a_thought_of_responses(self, oai, stream):
        answer = response(oai, TWICE, stream)
        thought, said = answer.output
        assert (thought.type, thought.content[0].text.strip()) == ("reasoning", THOUGHT)
        assert said.content[0].text.strip() == "12 times 12 is 144."
        assert 0 < answer.usage.output_tokens_details.reasoning_tokens < answer.usage.output_tokens

    def test_a_call_and_its_result_of_messages(self, claude, stream):
        tools = [{**WEATHER, "input_schema": SCHEMA}]
        asked = [{"role": "user", "content": QUESTION}]
        first = message(claude, asked, stream, tools=tools)
        [call] = first.content
        assert (call.type, call.name, call.input, first.stop_reason) == ("tool_use", "get_weather", {"city": "Paris"}, "tool_use")
        result = {"type": "tool_result", "tool_use_id": call.id, "content": '{"weather": "sunny"}'}
        history = [*asked, {"role": "assistant", "content": [call.model_dump(exclude_none=True)]}, {"role": "user", "content": [result]}]
        second = message(claude, history, stream, tools=tools)
        assert (second.content[0].text, second.stop_reason) == ("It is sunny there.", "end_turn")

    def test_a_forced_call_of_messages(self, claude, stream):
        tools = [{**WEATHER, "input_schema": SCHEMA}]
        asked = [{"role": "user", "content": QUESTION}]
        for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
            answer = message(claude, asked, stream, tools=tools, tool_choice=choice)
            assert (answer.content[0].name, answer.content[0].input, answer.stop_reason) == ("get_weather", {"city": "Paris"}, "tool_use")

    def test_a_thought_of_messages(self, claude, stream):
        answer = message(claude, [{"role": "user", "content": TWICE}], stream)
        thought, said = answer.content
        assert (thought.type, thought.thinking.strip(), said.text.strip()) == ("thinking", THOUGHT, "12 times 12 is 144.")
        # It may stand in the history.
        history = [{"role": "user", "content": TWICE}, {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in answer.content]}, {"role": "user", "content": "Hello!"}]
        assert message(claude, history, stream).content


def test_thinking_is_switched(claude):
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    on = message(claude, asked, False, thinking={"type": "adaptive"})
    off = message(claude, asked, False, thinking={"type": "disabled"})
    assert ([block.type for block in on.content], [block.type for block in off.content]) == (["thinking", "text"], ["text"])


def test_tools_are_named_as_the_caller_wrote_them(oai, claude):
    with pytest.raises(openai.BadRequestError) as refused:
        oai.responses.create(model="default", input="Hi", tools=[{"type": "function", "name": "a b", "parameters": SCHEMA}])
    assert refused.value.param == "tools[0].name"
    with pytest.raises(anthropic.BadRequestError) as refused:
        claude.messages.create(model="default", max_tokens=9, messages=[{"role": "user", "content": "Hi"}], tools=[{"name": "f", "input_schema": "x"}])
    assert "tools[0].input_schema" in refused.value.body["error"]["message"]
