"""`ChatOpenAI` and `OpenAIEmbeddings` of langchain-openai."""
from __future__ import annotations

import openai
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

from asked import CAPITAL, CAPITAL_ANSWER, JSON, TOO_LONG, WEATHER, WEATHER_ANSWER, Person, Review


@tool
def get_weather(city: str) -> str:
    """Current weather of a city"""
    return '{"weather": "sunny"}'


@pytest.fixture(params=["chat", "responses"])
def llm(request, door):
    return ChatOpenAI(base_url=door, api_key="any", model="default", temperature=0, max_retries=0, use_responses_api=request.param == "responses")


def test_text(llm):
    message = llm.invoke(CAPITAL)
    assert message.text == CAPITAL_ANSWER
    assert message.usage_metadata["total_tokens"] == message.usage_metadata["input_tokens"] + message.usage_metadata["output_tokens"]


def test_stream(llm):
    chunks = list(llm.stream(CAPITAL))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.text == CAPITAL_ANSWER


def test_usage_of_a_stream(llm):
    """LangChain asks for it by itself at OpenAI's own address alone."""
    *_, last = [chunk for chunk in llm.model_copy(update={"stream_usage": True}).stream(CAPITAL) if chunk.usage_metadata]
    assert last.usage_metadata["output_tokens"] > 0


def test_tools_in_two_turns(llm):
    with_tools = llm.bind_tools([get_weather])
    messages = [HumanMessage(WEATHER)]
    asks = with_tools.invoke(messages)
    assert [(call["name"], call["args"]) for call in asks.tool_calls] == [("get_weather", {"city": "Paris"})]
    messages += [asks, *(get_weather.invoke(call) for call in asks.tool_calls)]
    assert isinstance(messages[-1], ToolMessage)
    assert with_tools.invoke(messages).text == WEATHER_ANSWER


def test_tools_in_a_stream(llm):
    chunks = list(llm.bind_tools([get_weather]).stream(WEATHER))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [("get_weather", {"city": "Paris"})]


@pytest.mark.parametrize("choice", ["any", "get_weather", "required"])
def test_a_tool_that_must_be_called(llm, choice):
    asks = llm.bind_tools([get_weather], tool_choice=choice).invoke(WEATHER)
    assert [call["name"] for call in asks.tool_calls] == ["get_weather"]


@pytest.mark.parametrize(
    "method, strict",
    [
        ("json_schema", None),
        ("json_schema", True),
        ("json_mode", None),
        pytest.param("function_calling", None, marks=pytest.mark.bound_arguments),
        pytest.param("function_calling", True, marks=pytest.mark.bound_arguments),
    ],
)
def test_structured_output(llm, method, strict):
    person = llm.with_structured_output(Person, method=method, strict=strict).invoke(JSON)
    assert isinstance(person, Person)
    if method != "function_calling":
        assert person == Person(name="Ada", age=36)


@pytest.mark.parametrize("method", ["json_schema", pytest.param("function_calling", marks=pytest.mark.bound_arguments)])
def test_a_schema_of_many_parts(llm, method):
    assert isinstance(llm.with_structured_output(Review, method=method).invoke(JSON), Review)


def test_structured_output_in_a_stream(llm):
    *_, last = llm.with_structured_output(Person).stream(JSON)
    assert last == Person(name="Ada", age=36)


def test_errors(llm, door):
    with pytest.raises(ContextOverflowError):
        llm.invoke(TOO_LONG)
    with pytest.raises(ContextOverflowError):
        list(llm.stream(TOO_LONG))
    with pytest.raises(openai.NotFoundError):
        llm.model_copy(update={"model_name": "gpt-none"}).invoke(CAPITAL)
    with pytest.raises(openai.BadRequestError) as caught:
        llm.invoke(CAPITAL, temperature=9)
    assert caught.value.param == "temperature"


def test_a_wrong_key(locked_door):
    with pytest.raises(openai.AuthenticationError):
        ChatOpenAI(base_url=locked_door, api_key="wrong", model="default", max_retries=0).invoke(CAPITAL)


@pytest.mark.parametrize("door_of", ["direct", "queue"])
def test_embeddings(tmp_path, door_of):
    """Its default, to send OpenAI's token ids, is refused where they cannot be the model's (test_embeddings.py)."""
    from harness.program import Server
    from test_embeddings import make_model

    make_model("bert", tmp_path)
    with Server("serve", "--model", str(tmp_path)) as server:
        embeddings = OpenAIEmbeddings(
            base_url=server.doors()[door_of], api_key="any", model="default", max_retries=0, check_embedding_ctx_length=False)
        documents = embeddings.embed_documents(["w5 w6", "w7"])
        assert [len(vector) for vector in documents] == [64, 64]
        assert embeddings.embed_query("w7") == documents[1] != documents[0]


def test_embeddings_are_refused(door):
    with pytest.raises(openai.BadRequestError) as caught:
        OpenAIEmbeddings(base_url=door, api_key="any", model="default", max_retries=0, check_embedding_ctx_length=False).embed_query("text")
    assert "does not support the Embeddings API" in caught.value.message
