"""instructor: TOOLS by default, and its other modes."""
from __future__ import annotations

import instructor
import openai
import pytest
from instructor.core import InstructorRetryException

from asked import CAPITAL, JSON, TOO_LONG, Person, Review

TOOLS = pytest.param(instructor.Mode.TOOLS, id="TOOLS", marks=pytest.mark.bound_arguments)
RESPONSES_TOOLS = pytest.param(instructor.Mode.RESPONSES_TOOLS, id="RESPONSES_TOOLS", marks=pytest.mark.bound_arguments)
JSON_MODE = pytest.param(instructor.Mode.JSON, id="JSON")
JSON_SCHEMA = pytest.param(instructor.Mode.JSON_SCHEMA, id="JSON_SCHEMA")


@pytest.fixture
def openai_client(door):
    with openai.OpenAI(base_url=door, api_key="any", max_retries=0, timeout=120) as client:
        yield client


def ask(client, model, text=JSON, **more):
    return client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": text}], response_model=model, max_retries=0, **{"temperature": 0, **more}
    )


@pytest.mark.parametrize("mode", [TOOLS, JSON_MODE, JSON_SCHEMA, RESPONSES_TOOLS])
def test_a_person(openai_client, mode):
    assert isinstance(ask(instructor.from_openai(openai_client, mode=mode), Person), Person)


@pytest.mark.parametrize("mode", [TOOLS, JSON_SCHEMA])
def test_a_schema_of_many_parts(openai_client, mode):
    assert isinstance(ask(instructor.from_openai(openai_client, mode=mode), Review), Review)


@pytest.mark.bound_arguments
def test_the_default_mode_is_tools(openai_client):
    client = instructor.from_openai(openai_client)
    assert client.mode == instructor.Mode.TOOLS
    assert isinstance(ask(client, Person), Person)


def test_partial_objects_of_a_stream(openai_client):
    client = instructor.from_openai(openai_client, mode=instructor.Mode.JSON_SCHEMA)
    *_, last = client.chat.completions.create_partial(
        model="default", messages=[{"role": "user", "content": JSON}], response_model=Person, temperature=0
    )
    assert (last.name, last.age) == ("Ada", 36)


def test_errors_pass_through(openai_client):
    client = instructor.from_openai(openai_client)
    with pytest.raises(InstructorRetryException) as caught:
        ask(client, Person, CAPITAL, temperature=9)
    assert "temperature" in str(caught.value) and "400" in str(caught.value)
    with pytest.raises(InstructorRetryException) as caught:
        ask(client, Person, TOO_LONG)
    assert "context_length_exceeded" in str(caught.value)
