"""openai-agents: its runner over Responses, which is its default, and over chat completions."""
from __future__ import annotations

import asyncio

import openai
import pytest
from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool

from asked import CAPITAL, CAPITAL_ANSWER, JSON, TOO_LONG, WEATHER, WEATHER_ANSWER, Person, Review

KINDS = {"responses": OpenAIResponsesModel, "chat": OpenAIChatCompletionsModel}


@pytest.fixture(params=list(KINDS))
def agent(request, door):
    def make(model="default", base_url=door, **more):
        client = openai.AsyncOpenAI(base_url=base_url, api_key="any", max_retries=0, timeout=120)
        settings = more.pop("model_settings", ModelSettings(temperature=0))
        return Agent(name="tester", model=KINDS[request.param](model=model, openai_client=client), model_settings=settings, **more)

    return make


@function_tool
def get_weather(city: str) -> str:
    """Current weather of a city"""
    return '{"weather": "sunny"}'


def test_text(agent):
    result = Runner.run_sync(agent(), CAPITAL)
    assert result.final_output == CAPITAL_ANSWER
    assert result.context_wrapper.usage.output_tokens > 0


def test_stream(agent):
    async def talk():
        result = Runner.run_streamed(agent(), CAPITAL)
        events = [event async for event in result.stream_events()]
        deltas = [e.data.delta for e in events if e.type == "raw_response_event" and e.data.type == "response.output_text.delta"]
        return "".join(deltas), result.final_output

    assert asyncio.run(talk()) == (CAPITAL_ANSWER, CAPITAL_ANSWER)


def test_a_tool_in_two_turns(agent):
    result = Runner.run_sync(agent(tools=[get_weather]), WEATHER)
    assert result.final_output == WEATHER_ANSWER
    assert [item.type for item in result.new_items] == ["tool_call_item", "tool_call_output_item", "message_output_item"]


def test_a_tool_in_a_stream(agent):
    async def talk():
        result = Runner.run_streamed(agent(tools=[get_weather]), WEATHER)
        async for _ in result.stream_events():
            pass
        return result.final_output

    assert asyncio.run(talk()) == WEATHER_ANSWER


@pytest.mark.parametrize("choice", ["required", "get_weather"])
def test_a_tool_that_must_be_called(agent, choice):
    settings = ModelSettings(temperature=0, tool_choice=choice, parallel_tool_calls=False)
    result = Runner.run_sync(agent(tools=[get_weather], model_settings=settings), WEATHER)
    assert result.final_output == WEATHER_ANSWER


def test_an_object(agent):
    assert Runner.run_sync(agent(output_type=Person), JSON).final_output == Person(name="Ada", age=36)


def test_the_next_turn(agent):
    first = Runner.run_sync(agent(), CAPITAL)
    again = first.to_input_list() + [{"role": "user", "content": CAPITAL}]
    assert Runner.run_sync(agent(), again).final_output == CAPITAL_ANSWER


def test_errors(agent):
    with pytest.raises(openai.NotFoundError) as caught:
        Runner.run_sync(agent(model="gpt-none"), CAPITAL)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        Runner.run_sync(agent(), TOO_LONG)
    assert caught.value.code == "context_length_exceeded"


def test_a_wrong_key(agent, locked_door):
    with pytest.raises(openai.AuthenticationError):
        Runner.run_sync(agent(base_url=locked_door), CAPITAL)
