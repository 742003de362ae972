"""The prefix cache: what it says in usage, and that it never changes an answer."""
from __future__ import annotations

import itertools
import uuid

import openai
import pytest

from harness import questions
from harness.program import Server

BLOCK = 32
CHAT = [
    {"role": "system", "content": "You answer in one word. " * 20},
    {"role": "user", "content": "What is the capital of France?"},
]


def unseen() -> dict:
    """A message that no other test has sent."""
    return {"role": "system", "content": str(uuid.uuid4())}


def cached(answer) -> int:
    return answer.usage.prompt_tokens_details.cached_tokens


@pytest.fixture
def client(door):
    with openai.OpenAI(base_url=door, api_key="any", max_retries=0, timeout=120) as client:
        yield client


def ask(client, messages, **more):
    return client.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=20, **more)


def test_a_repeated_prompt_comes_from_the_cache(client):
    messages = [unseen()] + CHAT
    first = ask(client, messages)
    assert cached(first) == 0
    again = ask(client, messages)
    assert cached(again) == (first.usage.prompt_tokens - 1) // BLOCK * BLOCK > 0
    assert again.choices[0].message.content == first.choices[0].message.content
    *_, last = ask(client, messages, stream=True, stream_options={"include_usage": True})
    assert last.usage == again.usage


def test_the_next_turn_finds_the_first_one_with_its_answer(client):
    """As far as the ids are the same: text read back from a message is not always cut into the tokens that were generated."""
    for _ in range(20):
        messages = [unseen(), *questions.BY_NAME["story"].body["messages"]]
        ids = {"extra_body": {"return_token_ids": True}}
        first = client.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=150, **ids)
        messages += [{"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": "And then?"}]
        second = ask(client, messages, **ids)
        # The last token of an answer is never computed.
        computed = first.prompt_token_ids + first.choices[0].token_ids[:-1]
        same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(computed, second.prompt_token_ids))))
        assert cached(second) == same // BLOCK * BLOCK
        if cached(second) > first.usage.prompt_tokens:
            return
    pytest.fail("no answer of twenty was read back as it was generated")


def test_choices_share_their_prompt(client):
    messages = [unseen()] + CHAT
    answer = ask(client, messages, n=4)
    assert cached(answer) == 0
    assert len({choice.message.content for choice in answer.choices}) == 1


def test_a_job_says_so_too(server, http):
    job = {"input": {"messages": [unseen()] + CHAT, "max_tokens": 5}}
    usages = [http.post(f"{server.endpoint}/runsync", json=job).json()["output"]["usage"] for _ in range(2)]
    assert usages[0]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert usages[1]["prompt_tokens_details"]["cached_tokens"] == (usages[0]["prompt_tokens"] - 1) // BLOCK * BLOCK


@pytest.mark.parametrize("switch", [["--no-enable-prefix-caching"], ["--disable-radix-cache"], ["--enable-prefix-caching=false"]])
def test_switched_off(switch):
    with Server("http", "--model", "demo", *switch) as off, openai.OpenAI(base_url=f"{off.base}/v1", api_key="any") as client:
        answers = [ask(client, CHAT) for _ in range(2)]
        assert [cached(answer) for answer in answers] == [0, 0]


def test_every_answer_is_the_same_twice(server, http):
    """Word for word, the second time over blocks of the first."""
    for question in questions.BY_NAME.values():
        for _ in range(2):
            answer = http.post(f"{server.base}/v1{question.route}", json=question.request()).json()
            assert questions.text(answer) == question.answer, question.name
