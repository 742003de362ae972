"""Log probabilities, echo, prompt scores, best_of, bad words, and seeds in company: the official SDK at both doors, and native jobs."""
from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from harness import questions
from harness.program import Server

# Both sides of each comparison are f32 on the same machine: only where the steps were cut may differ, and that changes nothing on a CPU.
NEAR = {"rel": 1e-5, "abs": 1e-5}
FOX = questions.BY_NAME["complete-fox"]
EMOJI = questions.BY_NAME["emoji"]
# What the model was not trained on: here it is unsure, so that seeds make a difference.
ODD = ["a b c", "What is", "green candle of the 7", "zebra umbrella", "The", "Tell me about the sea and the lighthouse and"]


def sdk(door: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=door, api_key="any", max_retries=0, timeout=120)


@pytest.fixture
def client(door):
    with sdk(door) as client:
        yield client


def chat(client, question, **more):
    return client.chat.completions.create(model="default", messages=question.body["messages"], **{"temperature": 0, **more})


def complete(client, prompt=FOX.body["prompt"], **more):
    return client.completions.create(model="default", prompt=prompt, **{"temperature": 0, "max_tokens": 40, **more})


def tokens_of(content) -> str:
    return "".join(item.token for item in content)


def bytes_of(content) -> bytes:
    return b"".join(bytes(item.bytes) for item in content)


def test_chat(client, story):
    choice = chat(client, story, logprobs=True, top_logprobs=5).choices[0]
    content = choice.logprobs.content
    assert tokens_of(content) == choice.message.content == story.answer
    assert bytes_of(content).decode() == story.answer
    for item in content:
        values = [top.logprob for top in item.top_logprobs]
        assert len(values) == 5 and values == sorted(values, reverse=True)
        assert sum(math.exp(value) for value in values) <= 1 + 1e-5
        # Greedy: what was drawn is the most probable.
        assert (item.top_logprobs[0].token, item.top_logprobs[0].logprob) == (item.token, item.logprob)
    assert chat(client, story, logprobs=True, max_tokens=2).choices[0].logprobs.content[0].top_logprobs == []
    assert chat(client, story, max_tokens=2).choices[0].logprobs is None


def test_asking_changes_no_text(client, story):
    for more in ({"temperature": 0}, {"temperature": 1, "seed": 5}, {"temperature": 1.3, "top_p": 0.9, "seed": 6}):
        plain = chat(client, story, max_tokens=40, **more).choices[0].message.content
        assert chat(client, story, max_tokens=40, logprobs=True, top_logprobs=3, **more).choices[0].message.content == plain


def test_characters_cut_across_tokens(client):
    for question in (EMOJI, questions.BY_NAME["family"], questions.BY_NAME["thai"], questions.BY_NAME["chinese-hello"]):
        content = chat(client, question, logprobs=True, top_logprobs=1).choices[0].logprobs.content
        assert tokens_of(content) == question.answer
        assert bytes_of(content) == question.answer.encode()
    parts = [item for item in chat(client, EMOJI, logprobs=True).choices[0].logprobs.content if item.token == ""]
    assert parts and all(item.bytes for item in parts), "parts of a character have bytes and no text"


@pytest.mark.parametrize("stop", [None, ["STOP"], ["along until S"]])
def test_streams_equal_whole_answers(client, stop):
    question = questions.BY_NAME["stop"]
    for asked in (question, EMOJI):
        whole = chat(client, asked, logprobs=True, top_logprobs=2, stop=stop).choices[0]
        content, text = [], ""
        for chunk in chat(client, asked, logprobs=True, top_logprobs=2, stop=stop, stream=True):
            choice = chunk.choices[0]
            content += choice.logprobs.content if choice.logprobs else []
            text += choice.delta.content or ""
            # Of a token that a stop string may yet cut only a part is out: it is told when all of it is.
            assert text.startswith(tokens_of(content))
            assert stop or text == tokens_of(content)
        assert content == whole.logprobs.content
        assert tokens_of(content) == whole.message.content


def test_completions(client):
    answer = complete(client, logprobs=3).choices[0]
    logprobs = answer.logprobs
    assert "".join(logprobs.tokens) == answer.text == FOX.answer
    assert [answer.text[offset:].startswith(token) for offset, token in zip(logprobs.text_offset, logprobs.tokens)] == [True] * len(logprobs.tokens)
    for token, value, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs):
        assert len(top) == 3 and top[token] == value == max(top.values())
    assert all(len(top) == 1 for top in complete(client, logprobs=0).choices[0].logprobs.top_logprobs)
    streamed = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for chunk in complete(client, logprobs=3, stream=True):
        if chunk.choices[0].logprobs:
            for name, values in streamed.items():
                values += getattr(chunk.choices[0].logprobs, name)
    assert streamed == {name: getattr(logprobs, name) for name in streamed}


def test_tokens_as_ids(client):
    answer = complete(client, logprobs=1, extra_body={"return_tokens_as_token_ids": True, "return_token_ids": True}).choices[0]
    ids = [f"token_id:{id}" for id in answer.token_ids]
    # The end of sequence is no part of the text, and was drawn: with its id comes its log probability.
    assert answer.logprobs.tokens == ids and ids[-1] == "token_id:2"
    alone = complete(client, logprobs=1, extra_body={"return_tokens_as_token_ids": True}).choices[0]
    assert alone.logprobs.tokens == ids[:-1]


def test_a_generated_text_scores_as_it_was_generated(client):
    """What the model thought while writing is what it thinks when it reads the same: decode steps against prefill."""
    for prompt in (FOX.body["prompt"], questions.BY_NAME["complete-chinese"].body["prompt"]):
        written = complete(client, prompt, logprobs=2, extra_body={"return_token_ids": True}).choices[0]
        ids = written.prompt_token_ids + written.token_ids[: len(written.logprobs.tokens)]
        for _ in range(2):  # the second time the prompt lies in the cache
            read = complete(client, ids, logprobs=2, echo=True, max_tokens=0)
            choice = read.choices[0]
            assert (read.usage.completion_tokens, choice.finish_reason) == (0, "length")
            assert choice.text == prompt + written.text
            assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
            new = len(written.logprobs.tokens)
            assert choice.logprobs.token_logprobs[-new:] == pytest.approx(written.logprobs.token_logprobs, **NEAR)
            assert choice.logprobs.tokens[-new:] == written.logprobs.tokens
            for got, want in zip(choice.logprobs.top_logprobs[-new:], written.logprobs.top_logprobs):
                assert got == pytest.approx(want, **NEAR)


def test_echo(client):
    plain = complete(client, echo=True)
    assert plain.choices[0].text == FOX.body["prompt"] + FOX.answer and plain.choices[0].logprobs is None
    whole = complete(client, echo=True, logprobs=1).choices[0]
    assert "".join(whole.logprobs.tokens) == whole.text == plain.choices[0].text
    assert all(whole.text[offset:].startswith(token) for offset, token in zip(whole.logprobs.text_offset, whole.logprobs.tokens))
    chunks = list(complete(client, echo=True, logprobs=1, stream=True))
    assert chunks[0].choices[0].text.startswith(FOX.body["prompt"])
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    tokens = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.tokens]
    assert tokens == whole.logprobs.tokens
    several = complete(client, [FOX.body["prompt"], "One, two, three,"], echo=True, n=2, max_tokens=1, logprobs=0).choices
    assert [choice.text.startswith(prompt) for choice, prompt in zip(several, [FOX.body["prompt"]] * 2 + ["One, two, three,"] * 2)] == [True] * 4
    assert several[0].logprobs.token_logprobs == several[1].logprobs.token_logprobs


def test_prompt_logprobs(client, capital):
    answer = chat(client, capital, extra_body={"prompt_logprobs": 2, "return_token_ids": True})
    assert len(answer.prompt_logprobs) == len(answer.prompt_token_ids) and answer.prompt_logprobs[0] is None
    for id, entry in list(zip(answer.prompt_token_ids, answer.prompt_logprobs))[1:]:
        own = entry[str(id)]
        assert own["logprob"] <= 0 and own["rank"] >= 1 and isinstance(own["decoded_token"], str)
        assert len(entry) in (2, 3) and {1, 2} <= {other["rank"] for other in entry.values()}
    echoed = complete(client, echo=True, logprobs=0, max_tokens=0, extra_body={"prompt_logprobs": 0, "return_token_ids": True}).choices[0]
    scores = [entry and entry[str(id)]["logprob"] for id, entry in zip(echoed.prompt_token_ids, echoed.prompt_logprobs)]
    assert scores == echoed.logprobs.token_logprobs


def test_best_of(client):
    def mean(choice):
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    # A length that no candidate falls short of: the end of sequence counts in the mean, and is not in the list.
    more = {"prompt": ODD[0], "temperature": 1, "top_p": 1, "seed": 11, "logprobs": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
    candidates = complete(client, n=5, best_of=5, **more).choices
    ranked = sorted(candidates, key=mean, reverse=True)
    assert len({choice.text for choice in candidates}) > 1
    answer = complete(client, n=2, best_of=5, **more)
    assert [choice.text for choice in answer.choices] == [choice.text for choice in ranked[:2]]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage.completion_tokens == 60


def test_bad_words(client, story):
    assert "lighthouse" in story.answer and "keeper" in story.answer
    ask = {"max_tokens": 120, "extra_body": {"bad_words": ["lighthouse", "keeper", "Nora"]}}
    text = chat(client, story, **ask).choices[0].message.content
    assert text and not any(word in text for word in ("lighthouse", "keeper", "Nora"))
    text = chat(client, EMOJI, extra_body={"bad_words": ["🚀"]}).choices[0].message.content
    assert text.startswith("😀") and "🚀" not in text, "four tokens of one character"
    first = chat(client, story, max_tokens=1, extra_body={"return_token_ids": True}).choices[0].token_ids
    other = chat(client, story, max_tokens=1, extra_body={"return_token_ids": True, "bad_words_token_ids": first}).choices[0].token_ids
    assert first != other


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"extra_body": {"logprobs": 3}}, "logprobs"),
        ({"stream": True, "extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs"),
        ({"extra_body": {"logprob_token_ids": [5]}}, "logprob_token_ids"),
        ({"extra_body": {"bad_words": [""]}}, "bad_words[0]"),
        ({"n": 3, "extra_body": {"best_of": 2}}, "best_of"),
    ],
)
def test_refusals(client, capital, more, param):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, capital, **more)
    assert caught.value.param == param


def test_the_same_seed_gives_the_same_text_in_any_company(client, story):
    """Temperature 1: alone, then all at once beside others of other lengths, and once more."""

    def ask(case):
        seed, prompt = case
        choice = complete(client, prompt, temperature=1, top_p=1, seed=seed, max_tokens=40, logprobs=0, extra_body={"ignore_eos": True}).choices[0]
        return choice.text, choice.logprobs.token_logprobs

    cases = [(seed, prompt) for seed in (1, 2) for prompt in ODD]
    alone = [ask(case) for case in cases]
    assert len({text for text, _ in alone}) == len(cases), "seeds matter"
    with ThreadPoolExecutor(len(cases) + 4) as pool:
        company = [pool.submit(chat, client, story, temperature=0.7, max_tokens=200) for _ in range(4)]
        together = list(pool.map(ask, cases))
        backwards = list(pool.map(ask, reversed(cases)))[::-1]
        assert all(one.result().choices for one in company)
    assert together == alone
    assert backwards == alone


@pytest.fixture
def ask(http, server):
    def ask(given) -> dict:
        status = http.post(f"{server.endpoint}/runsync", json={"input": given}).json()
        assert status["status"] == "COMPLETED", status
        return status["output"]

    return ask


def test_native_jobs(ask, server, story):
    with sdk(server.doors()["direct"]) as client:
        want = [item.model_dump() for item in chat(client, story, logprobs=True, top_logprobs=2, max_tokens=6).choices[0].logprobs.content]
    given = {"messages": story.body["messages"], "temperature": 0, "max_tokens": 6}
    assert ask({**given, "logprobs": True, "top_logprobs": 2})["choices"][0]["logprobs"]["content"] == want
    assert ask({**given, "sampling_params": {"logprobs": 2}})["choices"][0]["logprobs"]["content"] == want, "vLLM's form"
    chunks = ask({**given, "logprobs": True, "top_logprobs": 2, "stream": True})
    assert [item for chunk in chunks for item in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]] == want
    text = ask({"prompt": FOX.body["prompt"], "temperature": 0, "sampling_params": {"logprobs": 1, "prompt_logprobs": 0, "max_tokens": 3, "best_of": 2}})
    assert len(text["choices"][0]["logprobs"]["tokens"]) == 3 and text["choices"][0]["prompt_logprobs"][0] is None
    assert "jumps" not in ask({"prompt": FOX.body["prompt"], "temperature": 0, "max_tokens": 20, "bad_words": ["jumps"]})["text"]


def log_softmax(logits):
    greatest = max(logits.values())
    shift = greatest + math.log(sum(math.exp(value - greatest) for value in logits.values()))
    return {token: value - shift for token, value in logits.items()}


def test_modes(story):
    """The whole vocabulary in each mode, against the arithmetic done here on the raw logits."""
    found = {}
    request = {"logprobs": -1, "max_tokens": 3, "temperature": 0.5, "seed": 3, "presence_penalty": 0.5, "extra_body": {"logit_bias": {"40": 3}}}
    for mode in ("raw_logits", "raw_logprobs", "processed_logits", "processed_logprobs"):
        with Server("serve", "--model", "demo", "--logprobs-mode", mode, env={"MAX_LOGPROBS": "-1", "RETURN_TOKENS_AS_TOKEN_IDS": "true"}) as server:
            with sdk(server.doors()["direct"]) as client:
                found[mode] = complete(client, **request).choices[0].logprobs
    tokens = found["raw_logits"].tokens
    assert all(logprobs.tokens == tokens for logprobs in found.values()), "the mode changes what is reported, not what is drawn"
    for step in range(len(tokens)):
        raw = found["raw_logits"].top_logprobs[step]
        assert found["raw_logprobs"].top_logprobs[step] == pytest.approx(log_softmax(raw), rel=1e-4, abs=1e-4)
        processed = dict(raw)
        processed["token_id:40"] += 3
        for token in set(tokens[:step]):
            processed[token] -= 0.5
        processed = {token: value / 0.5 for token, value in processed.items()}
        assert found["processed_logits"].top_logprobs[step] == pytest.approx(processed, rel=1e-4, abs=1e-4)
        assert found["processed_logprobs"].top_logprobs[step] == pytest.approx(log_softmax(processed), rel=1e-4, abs=1e-4)


def test_prompts_read_in_pieces_score_the_same(server):
    text = questions.BY_NAME["story"].answer
    request = {"echo": True, "logprobs": 1, "max_tokens": 0}
    with sdk(server.doors()["direct"]) as client:
        want = complete(client, text, **request).choices[0].logprobs
    assert len(want.tokens) > 100
    with Server("serve", "--model", "demo", "--max-num-batched-tokens", "33", "--max-num-seqs", "2") as small:
        with sdk(small.doors()["direct"]) as client, ThreadPoolExecutor(3) as pool:
            for got in pool.map(lambda _: complete(client, text, **request).choices[0].logprobs, range(3)):
                assert got.tokens == want.tokens
                assert got.token_logprobs[1:] == pytest.approx(want.token_logprobs[1:], **NEAR)


def test_log_probabilities_can_be_switched_off_and_limited(capital):
    with Server("serve", "--model", "demo", env={"ENABLE_LOGPROB": "false"}) as server, sdk(server.doors()["direct"]) as client:
        with pytest.raises(openai.BadRequestError, match="Logprobs is disabled, please enable it in startup config"):
            chat(client, capital, logprobs=True)
        assert chat(client, capital).choices[0].message.content == capital.answer
        assert client.models.list().data[0].permission[0]["allow_logprobs"] is False
    with Server("serve", "--model", "demo", env={"MAX_LOGPROBS": "30"}) as server, sdk(server.doors()["direct"]) as client:
        assert len(chat(client, capital, logprobs=True, top_logprobs=30).choices[0].logprobs.content[0].top_logprobs) == 30
        with pytest.raises(openai.BadRequestError, match="must be <= 30"):
            chat(client, capital, logprobs=True, top_logprobs=31)
