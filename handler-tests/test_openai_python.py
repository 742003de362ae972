"""The official Python SDK, on the direct door and through the queue."""
from __future__ import annotations

import asyncio

import openai
import pydantic
import pytest

from harness import questions


@pytest.fixture
def client(door):
    # Retries would hide an answer of the wrong class.
    with openai.OpenAI(base_url=door, api_key="any", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture
def model(client) -> str:
    return client.models.list().data[0].id


def test_chat(client, model, capital):
    answer = client.chat.completions.create(model=model, messages=capital.body["messages"], temperature=0)
    assert answer.object == "chat.completion" and answer.model == model
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", capital.answer, "stop")
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_stream(client, model, story):
    chunks = list(client.chat.completions.create(model=model, messages=story.body["messages"], temperature=0, stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert [chunk.choices[0].delta.role for chunk in chunks if chunk.choices[0].delta.role] == ["assistant"]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == story.answer
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_usage_comes_last_when_asked_for(client, model, capital):
    chunks = list(
        client.chat.completions.create(
            model=model, messages=capital.body["messages"], temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])
    whole = client.chat.completions.create(model=model, messages=capital.body["messages"], temperature=0)
    # The second one may find the first one's blocks.
    assert chunks[-1].usage.model_copy(update={"prompt_tokens_details": None}) == whole.usage.model_copy(update={"prompt_tokens_details": None})


def test_stream_helper(client, model, story):
    with client.chat.completions.stream(model=model, messages=story.body["messages"], temperature=0) as stream:
        texts = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(texts) == story.answer
    assert final.choices[0].message.role == "assistant"
    assert final.choices[0].message.content == story.answer
    assert final.choices[0].finish_reason == "stop"


def test_stream_helper_with_several_choices(client, model, capital):
    with client.chat.completions.stream(model=model, messages=capital.body["messages"], temperature=0, n=3) as stream:
        final = stream.get_final_completion()
    assert [(choice.index, choice.message.role, choice.message.content) for choice in final.choices] == [
        (index, "assistant", capital.answer) for index in range(3)
    ]


def test_completions(client, model):
    question = questions.BY_NAME["complete-fox"]
    answer = client.completions.create(model=model, prompt=question.body["prompt"], temperature=0, max_tokens=100)
    assert answer.object == "text_completion"
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (question.answer, "stop")
    streamed = list(client.completions.create(model=model, prompt=question.body["prompt"], temperature=0, max_tokens=100, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == question.answer


def test_completions_of_several_prompts(client, model):
    asked = [question for question in questions.ALL if not question.is_chat][:3]
    answer = client.completions.create(model=model, prompt=[question.body["prompt"] for question in asked], temperature=0, max_tokens=100)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.text for choice in answer.choices] == [question.answer for question in asked]


def test_max_tokens_and_its_new_name(client, model, story):
    for limit in ({"max_tokens": 5}, {"max_completion_tokens": 5}, {"max_tokens": 50, "max_completion_tokens": 5}):
        answer = client.chat.completions.create(model=model, messages=story.body["messages"], temperature=0, **limit)
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (5, "length")
        assert story.answer.startswith(answer.choices[0].message.content)


def test_stop_string_is_in_no_chunk(client, model):
    question = questions.BY_NAME["stop"]
    before = question.answer.split("STOP")[0]
    messages = question.body["messages"]
    answer = client.chat.completions.create(model=model, messages=messages, temperature=0, stop="STOP")
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (before, "stop")
    chunks = list(client.chat.completions.create(model=model, messages=messages, temperature=0, stop=["nothing", "STOP"], stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == before


class Person(pydantic.BaseModel):
    """A person."""

    name: str
    age: int


def test_parse(client, model):
    """An object by a schema of pydantic's: a chat, its stream, and a response."""
    ada = Person(name="Ada", age=36)
    messages = questions.BY_NAME["json"].body["messages"]
    whole = client.chat.completions.parse(model=model, messages=messages, temperature=0, response_format=Person)
    assert whole.choices[0].message.parsed == ada
    with client.chat.completions.stream(model=model, messages=messages, temperature=0, response_format=Person) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == ada
    response = client.responses.parse(model=model, input=messages, temperature=0, text_format=Person)
    assert response.output_parsed == ada
    with client.responses.stream(model=model, input=messages, temperature=0, text_format=Person) as stream:
        assert stream.get_final_response().output_parsed == ada


def test_parse_a_call(client, model):
    """`pydantic_function_tool` makes a strict tool; the call's arguments are an object of the class."""

    class get_weather(pydantic.BaseModel):
        """Current weather of a city"""

        city: str

    (paris,) = [question for question in questions.WITH_TOOLS if question.name == "tool-paris"]
    tools = [openai.pydantic_function_tool(get_weather)]
    answer = client.chat.completions.parse(model=model, messages=paris.body["messages"], temperature=0, tools=tools)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.parsed_arguments == get_weather(city="Paris")


def test_models(client, model):
    models = client.models.list().data
    assert all(one.object == "model" and one.owned_by and isinstance(one.created, int) for one in models)
    assert client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nobody/no-such-model")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("name", [None, "null", "default"])
def test_a_model_need_not_be_named(client, capital, name):
    body = {"model": name} if name else {}
    answer = client.chat.completions.create(messages=capital.body["messages"], temperature=0, model=openai.NOT_GIVEN, extra_body=body)
    assert answer.choices[0].message.content == capital.answer


def refused(client, error, **request) -> openai.APIStatusError:
    arguments = {"model": "default", "messages": [{"role": "user", "content": "Hello!"}], **request}
    with pytest.raises(error) as caught:
        client.chat.completions.create(**arguments)
    # Exactly this class, and not one of its kin.
    assert type(caught.value) is error
    assert caught.value.request_id
    return caught.value


def test_errors_are_of_the_right_class(client):
    error = refused(client, openai.NotFoundError, model="gpt-none")
    assert (error.status_code, error.code, error.param, error.type) == (404, "model_not_found", "model", "invalid_request_error")
    error = refused(client, openai.BadRequestError, temperature=9)
    assert (error.status_code, error.code, error.param) == (400, "invalid_value", "temperature")
    error = refused(client, openai.BadRequestError, messages=[])
    assert (error.status_code, error.param) == (400, "messages")
    error = refused(client, openai.BadRequestError, messages=[{"role": "user", "content": "word " * 5000}])
    assert (error.code, error.param) == ("context_length_exceeded", "messages")
    assert "maximum context length is" in error.message and "context_length_exceeded" in error.message


def test_errors_of_streams_are_of_the_right_class(client):
    error = refused(client, openai.NotFoundError, model="gpt-none", stream=True)
    assert (error.status_code, error.code) == (404, "model_not_found")
    error = refused(client, openai.BadRequestError, top_p=7, stream=True)
    assert (error.status_code, error.code, error.param) == (400, "invalid_value", "top_p")


def test_a_client_mistake_is_sent_once(door):
    """With the SDK's own retries on: a 4xx must not be one that it repeats."""
    sent = []
    http_client = openai.DefaultHttpxClient(event_hooks={"request": [sent.append]})
    with openai.OpenAI(base_url=door, api_key="any", http_client=http_client) as client:
        refused(client, openai.BadRequestError, temperature=9)
        refused(client, openai.NotFoundError, model="gpt-none")
    assert len(sent) == 2


def test_async_client(door, capital, story):
    async def talk():
        async with openai.AsyncOpenAI(base_url=door, api_key="any", max_retries=0, timeout=120) as client:
            model = (await client.models.list()).data[0].id

            async def whole(question):
                answer = await client.chat.completions.create(model=model, messages=question.body["messages"], temperature=0)
                return answer.choices[0].message.content

            async def streamed(question):
                stream = await client.chat.completions.create(model=model, messages=question.body["messages"], temperature=0, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            async def helped(question):
                async with client.chat.completions.stream(model=model, messages=question.body["messages"], temperature=0) as stream:
                    return (await stream.get_final_completion()).choices[0].message.content

            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(model="gpt-none", messages=story.body["messages"])
            asked = [capital, story]
            return await asyncio.gather(*(ask(question) for ask in (whole, streamed, helped) for question in asked))

    assert asyncio.run(talk()) == [capital.answer, story.answer] * 3
