"""litellm: `openai/` and `hosted_vllm/`, its exceptions, and its bridge from Anthropic's Messages."""
from __future__ import annotations

import asyncio
import json

import litellm
import pytest

from asked import CAPITAL, CAPITAL_ANSWER, JSON, TOO_LONG, WEATHER, WEATHER_ANSWER, Person, Review

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(params=["openai", "hosted_vllm"])
def ask(request, door):
    def ask(text=CAPITAL, model="default", **more):
        messages = more.pop("messages", None) or [{"role": "user", "content": text}]
        arguments = {"api_base": door, "api_key": "any", "temperature": 0, "num_retries": 0, **more}
        return litellm.completion(model=f"{request.param}/{model}", messages=messages, **arguments)

    return ask


def test_text(ask):
    answer = ask()
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (CAPITAL_ANSWER, "stop")
    assert answer.usage.completion_tokens > 0


def test_stream(ask):
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == CAPITAL_ANSWER
    rebuilt = litellm.stream_chunk_builder(chunks)
    assert rebuilt.choices[0].message.content == CAPITAL_ANSWER and rebuilt.usage.completion_tokens > 0


def test_async(door):
    async def talk():
        answer = await litellm.acompletion(
            model="openai/default", messages=[{"role": "user", "content": CAPITAL}], api_base=door, api_key="any", temperature=0
        )
        return answer.choices[0].message.content

    assert asyncio.run(talk()) == CAPITAL_ANSWER


@pytest.mark.parametrize("stream", [False, True])
def test_tools_in_two_turns(ask, stream):
    answer = ask(WEATHER, tools=[TOOL], stream=stream)
    message = (litellm.stream_chunk_builder(list(answer)) if stream else answer).choices[0].message
    (call,) = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"weather": "sunny"}'}
    messages = [{"role": "user", "content": WEATHER}, message.model_dump(), result]
    assert ask(messages=messages, tools=[TOOL]).choices[0].message.content == WEATHER_ANSWER


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=["required", "named"])
def test_a_tool_that_must_be_called(ask, choice):
    message = ask(WEATHER, tools=[TOOL], tool_choice=choice).choices[0].message
    assert message.tool_calls[0].function.name == "get_weather"


def test_an_object(ask):
    assert Person.model_validate_json(ask(JSON, response_format=Person).choices[0].message.content) == Person(name="Ada", age=36)
    assert Review.model_validate_json(ask(JSON, response_format=Review).choices[0].message.content)
    assert isinstance(json.loads(ask(JSON, response_format={"type": "json_object"}).choices[0].message.content), dict)


def test_exceptions(ask):
    with pytest.raises(litellm.NotFoundError):
        ask(model="gpt-none")
    with pytest.raises(litellm.ContextWindowExceededError):
        ask(TOO_LONG)
    with pytest.raises(litellm.ContextWindowExceededError):
        list(ask(TOO_LONG, stream=True))
    with pytest.raises(litellm.BadRequestError):
        ask(temperature=9)


def test_a_wrong_key(ask, locked_door):
    with pytest.raises(litellm.AuthenticationError):
        ask(api_base=locked_door, api_key="wrong")


def test_responses(door):
    answer = litellm.responses(model="openai/default", input=CAPITAL, api_base=door, api_key="any", temperature=0)
    assert answer.output[-1].content[0].text == CAPITAL_ANSWER


def test_a_bridge_from_messages(door):
    """Messages of Anthropic's form, which litellm turns into calls of OpenAI's."""

    async def talk(**more):
        return await litellm.anthropic.messages.acreate(
            model="openai/default", max_tokens=200, temperature=0, api_base=door, api_key="any", **more
        )

    answer = asyncio.run(talk(messages=[{"role": "user", "content": CAPITAL}]))
    assert answer["content"][-1]["text"] == CAPITAL_ANSWER
    tool = {"name": "get_weather", "description": "Current weather of a city", "input_schema": TOOL["function"]["parameters"]}
    answer = asyncio.run(talk(messages=[{"role": "user", "content": WEATHER}], tools=[tool]))
    uses = [block for block in answer["content"] if block["type"] == "tool_use"]
    assert [(use["name"], use["input"]) for use in uses] == [("get_weather", {"city": "Paris"})]
    result = {"type": "tool_result", "tool_use_id": uses[0]["id"], "content": '{"weather": "sunny"}'}
    messages = [
        {"role": "user", "content": WEATHER},
        {"role": "assistant", "content": [{"type": "tool_use", "id": uses[0]["id"], "name": "get_weather", "input": {"city": "Paris"}}]},
        {"role": "user", "content": [result]},
    ]
    answer = asyncio.run(talk(messages=messages, tools=[tool]))
    assert answer["content"][-1]["text"] == WEATHER_ANSWER


def test_messages_on_our_own_route(door):
    """The provider `anthropic` speaks to `/v1/messages`."""
    answer = litellm.completion(
        model="anthropic/default",
        messages=[{"role": "user", "content": CAPITAL}],
        api_base=door.removesuffix("/v1"),
        api_key="any",
        temperature=0,
    )
    assert answer.choices[0].message.content == CAPITAL_ANSWER


def test_embeddings_are_refused(door):
    with pytest.raises(litellm.BadRequestError) as caught:
        litellm.embedding(model="openai/default", input=["text"], api_base=door, api_key="any")
    assert "does not support the Embeddings API" in str(caught.value)
