"""instructor: TOOLS by default, and its other modes."""
from __future__ import annotations

import instructor
import openai
import pytest
from instructor.core import InstructorRetryException

from asked import CAPITAL, JSON, TOO_LONG, Person, Review

MODES = [instructor.Mode.TOOLS, instructor.Mode.JSON, instructor.Mode.JSON_SCHEMA, instructor.Mode.RESPONSES_TOOLS]


@pytest.fixture
def openai_client(door):
    with openai.OpenAI(base_url=door, api_key="any", max_retries=0, timeout=120) as client:
        yield client


def ask(client, model, text=JSON, **more):
    return client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": text}], response_model=model, temperature=0, max_retries=0, **more
    )


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_a_person(openai_client, mode):
    assert isinstance(ask(instructor.from_openai(openai_client, mode=mode), Person), Person)


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA], ids=lambda mode: mode.name)
def test_a_schema_of_many_parts(openai_client, mode):
    assert isinstance(ask(instructor.from_openai(openai_client, mode=mode), Review), Review)


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
        ask(client, Person, TOO_LONG)
    assert isinstance(caught.value.__cause__.__cause__ or caught.value.__cause__, Exception)
    assert "context_length_exceeded" in str(caught.value)
