"""What clients of OpenAI's, Anthropic's, FastChat's and vLLM's servers count on, one edge at a time: rules of streams, borders of fields and
lengths, names, keys, errors by class. What other files show of it already is not here."""
from __future__ import annotations

import json

import httpx
import openai
import pytest

from harness import dialects, questions
from harness.program import Server
from test_faults import CHOICES, occupied

HELLO = [{"role": "user", "content": "Hello!"}]


@pytest.fixture
def post(http, door):
    def post(route: str, **body) -> httpx.Response:
        return http.post(f"{door}{route}", json=body)

    return post


# ---- streams

def test_three_choices_open_in_order_and_the_usage_ends_the_stream(post):
    """The helpers of the SDKs break where a choice comes before its role, and take the usage from the last chunk."""
    body = {"messages": HELLO, "n": 3, "temperature": 2, "seed": 4, "max_tokens": 30, "logprobs": True, "stream": True}
    stream = post("/chat/completions", **body, stream_options={"include_usage": True})
    found = dialects.events(stream.text)
    assert [(chunk["choices"][0]["index"], chunk["choices"][0]["delta"]) for chunk in found[:3]] == [
        (index, {"role": "assistant", "content": ""}) for index in range(3)
    ]
    assert found[-1] == "[DONE]" and found[-2]["choices"] == [] and found[-2]["usage"]["completion_tokens"] <= 90
    whole = dialects.server_sent_chunks(stream.text, with_usage=True)
    assert all(type(chunk["created"]) is int and chunk["object"] == "chat.completion.chunk" for chunk in found[:-1])
    assert all("finish_reason" in choice for chunk in found[:-1] for choice in chunk["choices"])
    assert [choice["finish_reason"] is not None for choice in whole["choices"]] == [True] * 3


def test_headers_of_a_stream(server):
    with httpx.Client() as client, client.stream("POST", f"{server.base}/v1/chat/completions", json={"messages": HELLO, "stream": True}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert stream.headers["cache-control"] == "no-cache" and stream.headers["x-accel-buffering"] == "no"
        stream.read()


def test_streaming_is_asked_for_by_the_body_alone(http, server, capital):
    """SDKs accept JSON when they stream, and others accept event streams when they do not."""
    whole = http.post(f"{server.base}/v1/chat/completions", json=capital.request(), headers={"accept": "text/event-stream"})
    assert questions.text(whole.json()) == capital.answer
    stream = http.post(f"{server.base}/v1/chat/completions", json=capital.request(stream=True), headers={"accept": "application/json"})
    assert stream.text.endswith("data: [DONE]\n\n")


# ---- stop strings and characters

# The story begins: "Once there was a lighthouse on a rock so small that only one".
STOPS = [
    (["very small", "small"], "small"),
    (["rock so small that only", "small that", "nothing"], "small that"),
    (["a rock so small", "small"], "a rock so small"),
    ("Once", "Once"),
]


@pytest.mark.parametrize("stop, found", STOPS, ids=[found for _, found in STOPS])
def test_of_stops_that_overlap_the_first_to_be_complete_ends_the_text(post, story, stop, found):
    """And of two that end together the one that begins first. None of it is in any chunk; with `include_stop_str_in_output` all of it is."""
    at = story.answer.index(found)
    for included in (False, True):
        body = story.request(stop=stop, include_stop_str_in_output=included)
        choice = post("/chat/completions", **body).json()["choices"][0]
        assert choice["message"]["content"] == story.answer[: at + len(found) * included]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", found)
        stream = dialects.server_sent_chunks(post("/chat/completions", **body, stream=True).text, with_usage=False)
        assert (stream["choices"][0]["message"]["content"], stream["choices"][0]["stop_reason"]) == (choice["message"]["content"], found)


def test_a_stop_that_is_the_whole_answer_leaves_nothing(post, capital):
    choice = post("/chat/completions", **capital.request(stop=capital.answer)).json()["choices"][0]
    assert (choice["message"]["content"] or "", choice["stop_reason"]) == ("", capital.answer)


def test_choices_stop_at_different_times(post):
    body = {"prompt": "Once", "n": 8, "temperature": 2, "seed": 6, "max_tokens": 60, "stop": "e", "ignore_eos": True}
    choices = post("/completions", **body).json()["choices"]
    assert len({len(choice["text"]) for choice in choices}) > 2 and not any("e" in choice["text"] for choice in choices)
    stream = dialects.server_sent_chunks(post("/completions", **body, stream=True).text, with_usage=False)
    assert [choice["text"] for choice in stream["choices"]] == [choice["text"] for choice in choices]


@pytest.mark.parametrize("character", ["🚀", "\ufe0f", "😀🚀", "🍕"])
def test_a_stop_of_characters_of_several_tokens(post, character):
    emoji = questions.BY_NAME["emoji"]
    before = emoji.answer.split(character)[0]
    for stream in (False, True):
        answer = post("/chat/completions", **emoji.request(stop=character, stream=stream))
        text = questions.stream_text(dialects.events(answer.text)[:-1]) if stream else questions.text(answer.json())
        assert text == before


def test_what_a_limit_leaves_of_a_character_is_one_replacement_at_the_end(post):
    emoji = questions.BY_NAME["emoji"]
    cut = 0
    for limit in range(1, 13):
        body = emoji.request(max_tokens=limit)
        text = questions.text(post("/chat/completions", **body).json())
        pieces = [questions.delta(chunk) for chunk in dialects.events(post("/chat/completions", **body, stream=True).text)[:-1]]
        assert "".join(pieces) == text
        kept = text.rstrip("\ufffd")
        assert emoji.answer.startswith(kept) and "\ufffd" not in kept
        assert not any("\ufffd" in piece for piece in pieces[:-2]), "only what is last may be half a character"
        cut += kept != text
    assert cut > 2


# ---- borders

# field: (values that pass, values that do not)
BORDERS = {
    "temperature": ([0, -0.0, 2, 1e-9, None], [-0.001, 2.001, "1", True, [], 2**70]),
    "top_p": ([0, 1, 1e-9, None], [-0.001, 1.001, "1", {}]),
    "top_k": ([-1, 0, 1, 2**31, 2**70, None], [-2, 1.5, "5"]),
    "min_p": ([0, 1, None], [-0.01, 1.01, "x"]),
    "n": ([1, 2, None], [0, -1, 2**40, 1.5, "2", True]),
    "max_tokens": ([1, 2**31, 2**70, None], [0, -5, 1.5, "3"]),
    "max_completion_tokens": ([1, 2**31, None], [0, -1, "3"]),
    "presence_penalty": ([-2, 2, None], [-2.01, 2.01, "0"]),
    "frequency_penalty": ([-2, 2, None], [-2.01, 2.01, []]),
    "repetition_penalty": ([0.001, 1000, None], [0, -1, "1"]),
    "seed": ([0, -(2**63), 2**63 - 1, None], [1.5, "7", 2**70]),
    "stop": (["x", [], ["x"] * 16, None], [[""], "", 7, [7], ["x"] * 17]),
    "logit_bias": ([{}, {"5": 100}, {"5": -100}, None], [{"5": 100.5}, {"5": -101}, {"x": 1}, {"999999": 1}, [1], {"5": "1"}]),
    "top_logprobs": ([0, 20, None], [-1, 21, "1", 1.5]),
    "min_tokens": ([0, 1, None], [-1, 1.5, "1"]),
    "bad_words": ([[], ["x"] * 128, None], [["x"] * 129, "x" * 0, [7]]),
    "stop_token_ids": ([[], [5], None], [["x"], [-1], [999_999], 5]),
    "response_format": ([{"type": "text"}, {"type": "json_object"}, None], [{}, {"type": "x"}, "json", 7]),
}


@pytest.mark.parametrize("field", BORDERS)
def test_borders_of_fields(http, server, field):
    right, wrong = BORDERS[field]
    least = {} if field.startswith("max_") else {"max_tokens": 2}
    more = {"logprobs": True} if field == "top_logprobs" else {}
    url = f"{server.base}/v1/chat/completions"
    for value in right:
        answer = http.post(url, json={"messages": HELLO, **least, **more, field: value})
        assert answer.status_code == 200, (value, answer.text)
    for value in wrong:
        answer = http.post(url, json={"messages": HELLO, **least, **more, field: value})
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"].startswith(field), (value, answer.text)
        job = http.post(f"{server.endpoint}/runsync", json={"input": {"messages": HELLO, **least, **more, field: value}}).json()
        assert json.loads(job["error"])["error"]["param"] == error["param"]


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "0x1", "01", "1."])
def test_what_is_no_number_of_json_is_refused(http, server, text):
    answer = http.post(f"{server.base}/v1/chat/completions", content=f'{{"messages": {json.dumps(HELLO)}, "max_tokens": 2, "temperature": {text}}}')
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_lengths_around_the_context(http, server):
    """A prompt of one token less than the context has room for one; of as many or more it is refused."""
    length = http.get(f"{server.base}/v1/models").json()["data"][0]["max_model_len"]
    for route, field in (("/completions", "prompt"), ("/chat/completions", "prompt_token_ids")):
        def ask(tokens: int, **more) -> httpx.Response:
            return http.post(f"{server.base}/v1{route}", json={field: [300] * tokens, "temperature": 0, "ignore_eos": True, **more})

        fits = ask(length - 1, max_tokens=50).json()
        assert (fits["usage"]["completion_tokens"], fits["choices"][0]["finish_reason"]) == (1, "length")
        one = ask(length - 5, max_tokens=1).json()
        assert one["usage"]["completion_tokens"] == 1
        clipped = ask(length - 5, max_tokens=50).json()
        assert (clipped["usage"]["total_tokens"], clipped["choices"][0]["finish_reason"]) == (length, "length")
        for tokens in (length, length + 1):
            error = ask(tokens, max_tokens=1).json()["error"]
            assert error["code"] == "context_length_exceeded"
            # What LangChain and LiteLLM look for.
            assert f"This model's maximum context length is {length} tokens" in error["message"]
            assert "context_length_exceeded" in error["message"] and "prompt is too long" in error["message"]


# ---- names and keys

def test_names_with_a_slash(http):
    """SDKs percent-encode them."""
    with Server("serve", "--model", "demo", "--served-model-name", "some-org/some-model") as server:
        for door in server.doors().values():
            with openai.OpenAI(base_url=door, api_key="any", max_retries=0) as client:
                assert client.models.retrieve("some-org/some-model").id == "some-org/some-model"
                assert client.chat.completions.create(model="some-org/some-model", messages=HELLO, max_tokens=2).choices
                with pytest.raises(openai.NotFoundError) as missing:
                    client.models.retrieve("some-org/other")
                assert missing.value.code == "model_not_found"
        answers = [{"model": "some-org/some-model", "messages": HELLO, "max_tokens": 2}, {"openai_route": "/v1/models/some-org/some-model"}]
        for given in answers:
            assert http.post(f"{server.endpoint}/runsync", json={"input": given}).json()["status"] == "COMPLETED"
        for door in server.doors().values():
            for written in ("some-org/some-model", "some-org%2Fsome-model"):
                assert http.get(f"{door}/models/{written}").json()["id"] == "some-org/some-model"


def test_keys_in_every_form(http, capital):
    with Server("http", "--model", "demo", env={"API_KEY": "secret"}) as server:
        def status(route: str, **headers) -> int:
            return http.post(f"{server.base}{route}", json=capital.request(), headers=headers).status_code

        routes = ["/v1/chat/completions", "/api/v1/chat/completions", "/chat/completions", "/", "/openai/v1/chat/completions", "/v1/engines/demo/chat/completions"]
        for route in routes:
            assert status(route) == status(route, authorization="Bearer wrong") == status(route, **{"x-api-key": "wrong"}) == 401, route
            assert status(route, authorization="Bearer secret") == status(route, authorization="bearer secret") == status(route, **{"x-api-key": "secret"}) == 200, route
        preflight = {"origin": "https://example.org", "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        assert http.options(f"{server.base}/v1/chat/completions", headers=preflight).status_code < 300
        refused = http.post(f"{server.base}/v1/chat/completions", json=capital.request())
        assert refused.headers["www-authenticate"] == "Bearer" and refused.json()["error"]["code"] == "invalid_api_key"
        with openai.OpenAI(base_url=f"{server.base}/v1", api_key="wrong") as client, pytest.raises(openai.AuthenticationError) as error:
            client.models.list()
        assert error.value.code == "invalid_api_key"


# ---- errors

def counted(base: str):
    """OpenAI's SDK at its defaults, and the requests that it sends."""
    sent = []
    http_client = openai.DefaultHttpxClient(event_hooks={"request": [sent.append]})
    return openai.OpenAI(base_url=base, api_key="any", http_client=http_client), sent


def test_a_full_server_is_asked_again_and_a_client_s_mistake_is_not():
    env = {"MAX_NUM_SEQS": "1", "MAX_WAITING": str(CHOICES)}
    with Server("serve", "--model", "demo", env=env) as server:
        for base in server.doors().values():
            client, sent = counted(base)
            with occupied(server) as stream, client:
                next(stream)
                with pytest.raises(openai.RateLimitError) as full:
                    # As many as all places: the stream frees some between the SDK's attempts.
                    client.chat.completions.create(model="default", messages=HELLO, n=CHOICES, temperature=1)
                assert (full.value.code, len(sent)) == ("engine_overloaded", 3)
            client, sent = counted(base)
            with client, pytest.raises(openai.BadRequestError):
                client.chat.completions.create(model="default", messages=HELLO, temperature=9)
            assert len(sent) == 1


def test_a_body_that_is_too_large_is_an_error_of_the_client(server):
    client, sent = counted(f"{server.base}/v1")
    with client, pytest.raises(openai.APIStatusError) as error:
        client.chat.completions.create(model="default", messages=[{"role": "user", "content": "x" * (33 << 20)}])
    assert (error.value.status_code, error.value.code, len(sent)) == (413, "request_too_large", 1)


@pytest.mark.parametrize("given", ["Hello", ["Hello"], [5, 6], [[5, 6], [7]]], ids=["text", "texts", "ids", "lists of ids"])
def test_embeddings_are_refused_once_in_every_form(door, given):
    """A model that generates has none. Vectors of a wrong form would be taken for right ones."""
    client, sent = counted(door)
    with client, pytest.raises(openai.BadRequestError) as error:
        client.embeddings.create(model="default", input=given)
    assert error.value.message and len(sent) == 1


# ---- every door says the same

BODIES = {
    "/v1/chat/completions": {"messages": HELLO, "n": 2, "logprobs": True},
    "/v1/completions": {"prompt": ["Once", "One, two, three,"], "logprobs": 1, "echo": True},
    "/v1/responses": {"input": "Hello!", "store": False},
    "/v1/messages": {"messages": HELLO, "max_tokens": 20},
    "/api/v1/chat/completions": {"messages": HELLO},
    "/tokenize": {"prompt": "Hello!"},
    "/api/v1/token_check": {"prompts": [{"model": "demo", "prompt": "Hello", "max_tokens": 3}]},
}


@pytest.mark.parametrize("route", BODIES)
def test_a_job_gives_what_the_route_gives(http, server, route):
    body = {**BODIES[route], "temperature": 0}
    answers = [http.post(f"{server.base}{prefix}{route}", json=body).json() for prefix in ("", "/openai", "/v2/local/openai")]
    answers += [
        http.post(f"{server.endpoint}/runsync", json={"input": given}).json()["output"]
        for given in ({"openai_route": route, "openai_input": body}, {"route": route, "body": body, "method": "POST"})
    ]
    for answer in answers[1:]:
        assert dialects.differences(dialects.plain(answer), dialects.plain(answers[0])) == []


def test_unknown_fields_pass(post, capital):
    body = capital.request(verbosity="low", prompt_cache_key="k", metadata={"a": "b"}, service_tier="auto", store=True, user="u", nobody_knows={"x": [1]})
    assert questions.text(post("/chat/completions", **body).json()) == capital.answer
