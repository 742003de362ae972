"""Thoughts told apart from answers, on a true forward pass."""
from __future__ import annotations

import openai
import pytest

from harness import questions

CAPITAL = questions.BY_NAME["capital-france-thinking"]
THOUGHT = "The user asks for the capital of France. That is Paris."
PLAIN = questions.BY_NAME["capital-france"]


@pytest.fixture
def client(door):
    with openai.OpenAI(base_url=door, api_key="any", max_retries=0, timeout=120) as client:
        yield client


def ask(client, **more):
    return client.chat.completions.create(model="default", messages=PLAIN.body["messages"], temperature=0, **more)


SWITCHES = [
    {"chat_template_kwargs": {"enable_thinking": True}},
    {"enable_thinking": True},
    {"metadata": {"enable_thinking": True}},
    {"thinking": {"type": "enabled"}},
    {"reasoning": {"enabled": True}},
]


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: next(iter(switch)))
def test_thinking_is_switched_on(client, switch):
    answer = ask(client, extra_body=switch)
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == ("Paris.", THOUGHT, THOUGHT)
    # The marks count as thoughts, the answer does not.
    tokens = answer.usage.completion_tokens_details.reasoning_tokens
    assert 0 < tokens < answer.usage.completion_tokens


@pytest.mark.parametrize("switch", [{}, {"enable_thinking": False}, {"reasoning_effort": "none"}, {"thinking": {"type": "disabled"}}], ids=str)
def test_thinking_is_off(client, switch):
    answer = ask(client, extra_body=switch)
    assert answer.choices[0].message.content == "Paris."
    assert not hasattr(answer.choices[0].message, "reasoning_content")
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


def test_a_stream_gives_the_same(client):
    chunks = [chunk.model_dump(exclude_unset=True) for chunk in ask(client, stream=True, extra_body=SWITCHES[0])]
    message = questions.gathered(chunks)
    assert (message["content"], message["reasoning_content"], message["reasoning"]) == ("Paris.", THOUGHT, THOUGHT)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    thinking = [place for place, delta in enumerate(deltas) if delta.get("reasoning")]
    answering = [place for place, delta in enumerate(deltas) if delta.get("content")]
    assert thinking and max(thinking) <= min(answering)
    with client.chat.completions.stream(model="default", messages=PLAIN.body["messages"], temperature=0, extra_body=SWITCHES[0]) as stream:
        assert stream.get_final_completion().choices[0].message.content == "Paris."


def test_usage_of_a_stream_counts_thoughts(client):
    whole = ask(client, extra_body=SWITCHES[0]).usage
    *_, last = ask(client, stream=True, stream_options={"include_usage": True}, extra_body=SWITCHES[0])
    assert last.usage.completion_tokens_details.reasoning_tokens == whole.completion_tokens_details.reasoning_tokens


@pytest.mark.parametrize("wish", [{"include_reasoning": False}, {"reasoning": {"exclude": True}}, {"reasoning_format": "hidden"}], ids=str)
def test_thoughts_are_left_out(client, wish):
    answer = ask(client, extra_body={**SWITCHES[0], **wish})
    assert answer.choices[0].message.content == "Paris."
    assert not hasattr(answer.choices[0].message, "reasoning_content")
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0
    chunks = [chunk.model_dump(exclude_unset=True) for chunk in ask(client, stream=True, extra_body={**SWITCHES[0], **wish})]
    assert questions.gathered(chunks) == {"role": "assistant", "content": "Paris."}


@pytest.mark.parametrize("wish", [{"separate_reasoning": False}, {"reasoning_format": "none"}], ids=str)
def test_thoughts_stay_in_the_content(client, wish):
    message = ask(client, extra_body={**SWITCHES[0], **wish}).choices[0].message
    assert message.content == CAPITAL.answer and not hasattr(message, "reasoning_content")


def test_max_tokens_within_the_thought(client):
    choice = ask(client, max_tokens=5, extra_body=SWITCHES[0]).choices[0]
    assert choice.finish_reason == "length" and choice.message.content is None
    assert THOUGHT.startswith(choice.message.reasoning_content)


def test_thoughts_before_a_call(client):
    question = next(question for question in questions.WITH_TOOLS if question.name == "tool-thinking")
    message = client.chat.completions.create(
        model="default",
        messages=question.body["messages"],
        tools=question.body["tools"],
        temperature=0,
        extra_body={"chat_template_kwargs": question.body["chat_template_kwargs"]},
    ).choices[0].message
    assert message.reasoning_content == "I know this one by heart."
    assert message.tool_calls[0].function.name == "get_weather" and message.content is None


def test_a_completion_is_not_parsed(client):
    answer = client.completions.create(model="default", prompt="User: Hello!\nAssistant: <think>", temperature=0, max_tokens=20)
    assert not hasattr(answer.choices[0], "reasoning_content")
