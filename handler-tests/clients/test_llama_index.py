"""LlamaIndex's `OpenAILike`: chat, completion, tools, structured output."""
from __future__ import annotations

import openai
import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

from asked import CAPITAL, CAPITAL_ANSWER, JSON, TOO_LONG, WEATHER, WEATHER_ANSWER, Calls, Person


@pytest.fixture
def llm(door):
    return make(door)


def make(door, **more):
    arguments = {"api_base": door, "api_key": "any", "model": "default", "temperature": 0, "max_retries": 0, "is_chat_model": True}
    return OpenAILike(**{**arguments, "is_function_calling_model": True, "context_window": 2048, **more})


def user(text):
    return [ChatMessage(role="user", content=text)]


def test_chat(llm):
    assert llm.chat(user(CAPITAL)).message.content == CAPITAL_ANSWER
    *_, last = llm.stream_chat(user(CAPITAL))
    assert last.message.content == CAPITAL_ANSWER


def test_completion(door):
    llm = make(door, is_chat_model=False, is_function_calling_model=False, max_tokens=60)
    assert llm.complete("The quick brown fox").text
    *_, last = llm.stream_complete("The quick brown fox")
    assert last.text == llm.complete("The quick brown fox").text


@pytest.mark.parametrize("required", [False, True])
def test_tools_in_two_turns(llm, required):
    calls = Calls()
    tool = FunctionTool.from_defaults(calls.get_weather, name="get_weather", description="Current weather of a city")
    asks = llm.chat_with_tools([tool], user_msg=WEATHER, tool_required=required)
    (call,) = llm.get_tool_calls_from_response(asks)
    assert (call.tool_name, call.tool_kwargs) == ("get_weather", {"city": "Paris"})
    result = ChatMessage(role="tool", content=tool(**call.tool_kwargs).content, additional_kwargs={"tool_call_id": call.tool_id})
    answer = llm.chat_with_tools([tool], chat_history=[*user(WEATHER), asks.message, result])
    assert answer.message.content == WEATHER_ANSWER
    assert calls == ["Paris"]


def test_predict_and_call(llm):
    calls = Calls()
    tool = FunctionTool.from_defaults(calls.get_weather, name="get_weather", description="Current weather of a city")
    assert llm.predict_and_call([tool], user_msg=WEATHER).response == '{"weather": "sunny"}'


@pytest.mark.bound_arguments
def test_structured_output(llm):
    assert isinstance(llm.as_structured_llm(Person).chat(user(JSON)).raw, Person)


def test_structured_output_by_a_schema(door):
    llm = make(door, should_use_structured_outputs=True)
    assert llm.as_structured_llm(Person).chat(user(JSON)).raw == Person(name="Ada", age=36)


def test_errors(door, llm):
    with pytest.raises(openai.NotFoundError):
        make(door, model="gpt-none").chat(user(CAPITAL))
    with pytest.raises(openai.BadRequestError) as caught:
        llm.chat(user(TOO_LONG))
    assert caught.value.code == "context_length_exceeded"


def test_a_wrong_key(locked_door):
    with pytest.raises(openai.AuthenticationError):
        make(locked_door, api_key="wrong").chat(user(CAPITAL))
