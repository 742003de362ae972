"""True answers: word for word, alone and in company, streamed and not, at every door."""
from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from harness import questions
from harness.program import wait_for

SEVERAL = 32


# ---- the ways to ask

def frames(text: str) -> list[dict]:
    """The chunks of an event stream, which must be whole."""
    assert text.endswith("data: [DONE]\n\n")
    lines = [frame for frame in text.split("\n\n") if frame and not frame.startswith(":")]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line[len("data: ") :]) for line in lines]


def post(http, url: str, body: dict):
    response = http.post(url, json=body)
    assert response.status_code == 200, response.text
    return response


def direct(http, server, question, **more) -> str:
    return questions.text(post(http, f"{server.base}/v1{question.route}", question.request(**more)).json())


def direct_stream(http, server, question, **more) -> str:
    response = post(http, f"{server.base}/v1{question.route}", question.request(stream=True, **more))
    assert response.headers["content-type"].startswith("text/event-stream")
    return questions.stream_text(frames(response.text))


def through_queue(http, server, question, **more) -> str:
    return questions.text(post(http, f"{server.endpoint}/openai/v1{question.route}", question.request(**more)).json())


def through_queue_stream(http, server, question, **more) -> str:
    response = post(http, f"{server.endpoint}/openai/v1{question.route}", question.request(stream=True, **more))
    return questions.stream_text(frames(response.text))


def job(http, server, question, **more) -> str:
    status = post(http, f"{server.endpoint}/runsync", {"input": question.request(**more)}).json()
    assert status["status"] == "COMPLETED", status
    return questions.text(status["output"])


def job_stream(http, server, question, **more) -> str:
    """What `/stream` gives; the aggregate in `/status` must be the same, and tell usage in its last chunk."""
    url = server.endpoint
    job = post(http, f"{url}/run", {"input": question.request(stream=True, **more)}).json()["id"]
    chunks = []
    while True:
        progress = http.get(f"{url}/stream/{job}").json()
        chunks += [chunk["output"] for chunk in progress["stream"]]
        if progress["status"] not in ("IN_QUEUE", "IN_PROGRESS") and not progress["stream"]:
            break
    status = http.get(f"{url}/status/{job}").json()
    assert status["status"] == "COMPLETED", status
    assert status["output"] == chunks
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    return questions.stream_text(chunks)


WAYS = [direct, direct_stream, through_queue, through_queue_stream, job, job_stream]
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


# ---- answers

@pytest.mark.parametrize("question", questions.ALL, ids=lambda question: question.name)
def test_every_question(http, server, question):
    for way in WAYS:
        assert way(http, server, question) == question.answer, way.__name__


@pytest.mark.parametrize("question", questions.WITH_TOOLS, ids=lambda question: question.name)
def test_tools_as_text(http, server, question):
    """With `tool_choice: "none"` tools are text for the template, and so are calls and results of the history; what comes is text."""
    for way in WAYS:
        assert way(http, server, question, tool_choice="none") == question.answer, way.__name__


@pytest.mark.parametrize("question", questions.WITH_TOOLS, ids=lambda question: question.name)
def test_tools(http, server, question):
    """Thoughts, content and tool calls are told apart, and together they are what the model wrote."""
    for way in WAYS:
        assert way(http, server, question) == question.answer, way.__name__


def test_there_are_questions_of_every_kind():
    names = set(questions.BY_NAME)
    assert len(names) == len(questions.ALL) >= 36
    assert any(len(question.answer) > 800 for question in questions.ALL)
    assert any(not question.is_chat for question in questions.ALL)
    assert any("<think>" in question.answer for question in questions.ALL)
    assert any(len(question.body.get("messages", [])) > 2 for question in questions.ALL), "several turns"
    assert any(question.body.get("messages", [{}])[0].get("role") == "system" for question in questions.ALL)


@ways
def test_many_at_once(http, server, way):
    """Different questions at the same time: each gets its own answer, the one it gets alone."""
    asked = [questions.ALL[number % len(questions.ALL)] for number in range(SEVERAL)]
    assert len({question.name for question in asked}) == SEVERAL
    with ThreadPoolExecutor(SEVERAL) as pool:
        answers = list(pool.map(lambda question: way(http, server, question), asked))
    assert answers == [question.answer for question in asked]


def test_many_at_once_over_all_doors(http, server):
    calls = [(way, question) for question in questions.ALL for way in WAYS]
    with ThreadPoolExecutor(SEVERAL) as pool:
        answers = list(pool.map(lambda call: call[0](http, server, call[1]), calls))
    wrong = [(way.__name__, question.name, answer) for (way, question), answer in zip(calls, answers) if answer != question.answer]
    assert wrong == []


def test_no_character_is_cut(http, server):
    for name in ("emoji", "family", "thai", "chinese-story"):
        question = questions.BY_NAME[name]
        text = post(http, f"{server.base}/v1{question.route}", question.request(stream=True)).text
        pieces = [questions.delta(chunk) for chunk in frames(text)]
        assert "".join(pieces) == question.answer and "\ufffd" not in "".join(pieces)


# ---- sampling

DRAWN = {"temperature": 1.0, "max_tokens": 60, "ignore_eos": True}


def choices(http, url: str, body: dict) -> list[str]:
    answer = post(http, url, body).json()
    return [questions.text({"choices": [choice]}) for choice in answer["choices"]]


@pytest.mark.parametrize("form", ["completions", "native"])
def test_each_prompt_of_a_list_draws_for_itself(http, server, form):
    def texts(**body) -> list[str]:
        body = {**DRAWN, "temperature": 1.5, "max_tokens": 25, **body}
        if form == "completions":
            return choices(http, f"{server.base}/v1/completions", body)
        return [choice["text"] for choice in post(http, f"{server.endpoint}/runsync", {"input": body}).json()["output"]["choices"]]

    assert len(set(texts(prompt=["Once"] * 6))) == 6
    assert len(set(texts(prompt=["Once"] * 3, n=2))) == 6
    alone = texts(prompt="Once", n=2, seed=7)
    assert len(set(alone)) == 2 and texts(prompt=["Once"] * 3, n=2, seed=7) == alone * 3


def test_same_seed_same_text_alone_and_in_company(http, server):
    url = f"{server.base}/v1/chat/completions"
    bodies = [{"messages": [{"role": "user", "content": f"Say something about number {number}."}], "seed": number, **DRAWN} for number in range(16)]
    alone = [choices(http, url, body)[0] for body in bodies]
    with ThreadPoolExecutor(16) as pool:
        company = list(pool.map(lambda body: choices(http, url, body)[0], bodies))
    assert company == alone
    assert len(set(alone)) > 1


def test_choices_with_a_seed(http, server, door):
    body = {"messages": [{"role": "user", "content": "Qwerty uiop?"}], "n": 2, "seed": 11, **DRAWN, "temperature": 2.0}
    first, second = choices(http, f"{door}/chat/completions", body)
    assert first != second, "each choice draws for itself"
    assert choices(http, f"{door}/chat/completions", body) == [first, second]
    assert choices(http, f"{door}/chat/completions", {**body, "seed": 12}) != [first, second]
    chunks = frames(post(http, f"{door}/chat/completions", {**body, "stream": True}).text)
    assert [chunk["choices"][0]["index"] for chunk in chunks[:2]] == [0, 1], "the roles first, in order"
    assert [questions.delta(chunk, 0) for chunk in chunks] and ["".join(questions.delta(chunk, index) for chunk in chunks) for index in (0, 1)] == [
        first,
        second,
    ]


def test_usage_counts_the_prompt_once(http, server, capital):
    one = post(http, f"{server.base}/v1/chat/completions", capital.request()).json()["usage"]
    three = post(http, f"{server.base}/v1/chat/completions", capital.request(n=3)).json()["usage"]
    assert three["prompt_tokens"] == one["prompt_tokens"]
    assert three["completion_tokens"] == 3 * one["completion_tokens"]


def test_limits_on_length(http, server, story):
    url = f"{server.base}/v1/chat/completions"
    least = post(http, url, story.request(min_tokens=5, max_tokens=5)).json()
    assert (least["usage"]["completion_tokens"], least["choices"][0]["finish_reason"]) == (5, "length")
    capital = questions.BY_NAME["capital-france"]
    longer = post(http, url, capital.request(min_tokens=20, max_tokens=40)).json()
    assert longer["usage"]["completion_tokens"] >= 20


def test_the_context_bounds_what_is_asked(http, server, story):
    models = http.get(f"{server.base}/v1/models").json()["data"]
    context = models[0]["max_model_len"]
    answer = post(http, f"{server.base}/v1/chat/completions", story.request(ignore_eos=True, max_tokens=10 * context)).json()
    assert answer["usage"]["total_tokens"] == context
    assert answer["choices"][0]["finish_reason"] == "length"


def test_same_request_same_object_at_every_door(http, server, capital):
    """Apart from ids and times."""

    def stripped(answer: dict) -> dict:
        return {key: value for key, value in answer.items() if key not in ("id", "created")}

    body = capital.request()
    openai = stripped(post(http, f"{server.base}/v1/chat/completions", body).json())
    queued = stripped(post(http, f"{server.endpoint}/openai/v1/chat/completions", body).json())
    routed = post(http, f"{server.endpoint}/runsync", {"input": {"openai_route": "/v1/chat/completions", "openai_input": body}}).json()
    native = post(http, f"{server.endpoint}/runsync", {"input": body}).json()
    assert openai == queued == stripped(routed["output"]) == stripped(native["output"])


def test_stop_strings(http, server):
    count = questions.BY_NAME["count"]
    for stop, expected in ((["10,"], "1, 2, 3, 4, 5, 6, 7, 8, 9, "), ("5", "1, 2, 3, 4, "), (["zzz"], count.answer), (["1"], "")):
        for way in WAYS:
            assert way(http, server, count, stop=stop) == expected, (way.__name__, stop)
    emoji = questions.BY_NAME["emoji"]
    cut = emoji.answer[:1]
    for way in WAYS:
        assert way(http, server, emoji, stop=emoji.answer[1]) == cut, way.__name__


def test_special_tokens_in_user_text_are_text(http, server):
    """They neither end the turn nor open another one, and cost more than a token."""
    url = f"{server.base}/v1/chat/completions"

    def prompt_tokens(text: str) -> int:
        return post(http, url, {"messages": [{"role": "user", "content": text}], "max_tokens": 1}).json()["usage"]["prompt_tokens"]

    assert prompt_tokens("a<|end_of_sentence|>") > prompt_tokens("a") + 2


def test_status_shapes(http, server, capital):
    url = server.endpoint
    job = post(http, f"{url}/run", {"input": capital.request()}).json()
    assert set(job) == {"id", "status"} and job["status"] == "IN_QUEUE"
    ended = wait_for(
        lambda: (status := http.get(f"{url}/status/{job['id']}").json())["status"] == "COMPLETED" and status, "the job to complete"
    )
    assert {"id", "status", "output", "delayTime", "executionTime", "workerId"} <= set(ended)
