"""pydantic-ai: text, tools, and the three ways to an object, over chat completions and over Responses."""
from __future__ import annotations

import asyncio

import pytest
from pydantic_ai import Agent, ModelHTTPError, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from asked import CAPITAL, CAPITAL_ANSWER, JSON, TOO_LONG, WEATHER, WEATHER_ANSWER, Calls, Person, Review

MODELS = {"chat": OpenAIChatModel, "responses": OpenAIResponsesModel}


def provider(door, key="any"):
    return OpenAIProvider(base_url=door, api_key=key)


@pytest.fixture(params=list(MODELS))
def model(request, door):
    return MODELS[request.param]("default", provider=provider(door), settings={"temperature": 0})


def test_text(model):
    result = Agent(model).run_sync(CAPITAL)
    assert result.output == CAPITAL_ANSWER
    assert result.usage.output_tokens > 0


def test_stream(model):
    async def talk():
        async with Agent(model).run_stream(CAPITAL) as result:
            return [text async for text in result.stream_text(delta=True)]

    assert "".join(asyncio.run(talk())) == CAPITAL_ANSWER


def test_a_tool_in_two_turns(model):
    calls = Calls()
    agent = Agent(model)

    @agent.tool_plain
    def get_weather(city: str) -> dict:
        """Current weather of a city"""
        calls.append(city)
        return {"weather": "sunny"}

    assert agent.run_sync(WEATHER).output == WEATHER_ANSWER
    assert calls == ["Paris"]


@pytest.mark.parametrize("way", [NativeOutput, PromptedOutput])
def test_an_object(model, way):
    assert Agent(model, output_type=way(Person), retries=0).run_sync(JSON).output == Person(name="Ada", age=36)


@pytest.mark.bound_arguments
def test_an_object_by_a_tool(model):
    """The default: `tool_choice: "required"` with a tool for the output."""
    assert isinstance(Agent(model, output_type=ToolOutput(Person), retries=0).run_sync(JSON).output, Person)


@pytest.mark.parametrize("way", [NativeOutput, pytest.param(ToolOutput, marks=pytest.mark.bound_arguments)])
def test_a_schema_of_many_parts(model, way):
    assert isinstance(Agent(model, output_type=way(Review), retries=0).run_sync(JSON).output, Review)


def test_errors(door):
    for kind in MODELS.values():
        with pytest.raises(ModelHTTPError) as caught:
            Agent(kind("gpt-none", provider=provider(door))).run_sync(CAPITAL)
        assert (caught.value.status_code, caught.value.body["code"]) == (404, "model_not_found")
        with pytest.raises(ModelHTTPError) as caught:
            Agent(kind("default", provider=provider(door))).run_sync(TOO_LONG)
        assert (caught.value.status_code, caught.value.body["code"]) == (400, "context_length_exceeded")


def test_a_wrong_key(locked_door):
    with pytest.raises(ModelHTTPError) as caught:
        Agent(OpenAIChatModel("default", provider=provider(locked_door, "wrong"))).run_sync(CAPITAL)
    assert caught.value.status_code == 401
