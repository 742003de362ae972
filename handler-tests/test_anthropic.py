"""`/v1/messages` through Anthropic's official Python SDK, on the direct door and through the queue."""
from __future__ import annotations

import json

import anthropic
import pytest

from harness.program import Server


@pytest.fixture
def base(door) -> str:
    """The SDK adds `/v1` itself."""
    return door.removesuffix("/v1")


@pytest.fixture
def client(base):
    with anthropic.Anthropic(base_url=base, api_key="any", max_retries=0, timeout=120) as client:
        yield client


def ask(chosen, **more) -> dict:
    return {"model": "default", "max_tokens": 400, "messages": chosen.body["messages"], "temperature": 0, **more}


def create(client, chosen, **more):
    return client.messages.create(**given(ask(chosen, **more)))


def given(body: dict) -> dict:
    """Fields that the SDK's own signature may lack go as a part of the body."""
    known = {"model", "max_tokens", "messages", "system", "stop_sequences", "stream", "tools", "tool_choice", "thinking", "metadata"}
    extra = {name: value for name, value in body.items() if name not in known}
    return {**{name: value for name, value in body.items() if name in known}, "extra_body": extra}


def test_whole(client, capital):
    message = create(client, capital)
    assert (message.type, message.role, message.stop_reason, message.stop_sequence) == ("message", "assistant", "end_turn", None)
    assert [(block.type, block.text) for block in message.content] == [("text", capital.answer)]
    assert message.id.startswith("msg_")
    prompt = message.usage.input_tokens + message.usage.cache_read_input_tokens
    assert prompt > 0 and message.usage.output_tokens > 0
    counted = client.messages.count_tokens(model="default", messages=capital.body["messages"])
    assert counted.input_tokens == prompt


def test_stream_is_the_whole_answer(client, story):
    whole = create(client, story)
    with client.messages.stream(**given(ask(story))) as stream:
        events = list(stream)
        final = stream.get_final_message()
    assert "".join(event.delta.text for event in events if event.type == "content_block_delta") == story.answer
    assert final.content[0].text == whole.content[0].text == story.answer
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    raw = [event.type for event in create(client, story, stream=True)]
    deltas = raw.count("content_block_delta")
    assert deltas > 1
    assert raw == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


def test_reasons_to_stop(client, story):
    message = create(client, story, max_tokens=5)
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 5)
    word = story.answer.split()[3]
    message = create(client, story, stop_sequences=["never", word])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", word)
    assert message.content[0].text == story.answer[: story.answer.index(word)]


def test_blocks_system_and_billing(client, capital):
    question = capital.body["messages"][0]["content"]
    plain = client.messages.count_tokens(model="default", system="Be brief.", messages=[{"role": "user", "content": question}])
    blocks = client.messages.count_tokens(
        model="default",
        system=[{"type": "text", "text": "x-anthropic-billing-header: cc_version=2.0; cch=abcde;"}, {"type": "text", "text": "Be brief."}],
        messages=[{"role": "user", "content": [{"type": "text", "text": question, "cache_control": {"type": "ephemeral"}}]}],
    )
    assert blocks.input_tokens == plain.input_tokens


def test_an_answer_goes_on_where_the_assistant_stopped(client, story):
    begun = story.answer[: len(story.answer) // 2].rsplit(" ", 1)[0]
    messages = [*story.body["messages"], {"role": "assistant", "content": begun}]
    message = create(client, story, messages=messages)
    assert begun + message.content[0].text == story.answer


def test_tool_results_of_the_history(client):
    """A call and its result are read, whatever the model makes of them."""
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris"}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "Rain"}, {"type": "text", "text": "And?"}]},
    ]
    counted = client.messages.count_tokens(model="default", messages=messages).input_tokens
    assert counted > client.messages.count_tokens(model="default", messages=messages[:1]).input_tokens


IMAGE = [{"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}]
REFUSED = [
    ({"messages": [{"role": "user", "content": IMAGE}]}, "messages[0].content[0]"),
    ({"messages": []}, "messages"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"temperature": 7}, "temperature"),
    ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
    ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking.budget_tokens"),
    ({"messages": [{"role": "user", "content": "x " * 5000}]}, "maximum context length"),
]


@pytest.mark.parametrize("more, name", REFUSED, ids=[name for _, name in REFUSED])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_refusals_name_the_field_and_are_sent_once(base, capital, more, name, stream):
    with anthropic.Anthropic(base_url=base, api_key="any", timeout=120) as client:
        sent, send = [], client._client.send
        client._client.send = lambda request, **more: (sent.append(request), send(request, **more))[1]
        with pytest.raises(anthropic.BadRequestError) as refused:
            create(client, capital, stream=stream, **more)
    body = refused.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error") and name in body["error"]["message"]
    assert body["request_id"] == refused.value.response.headers["request-id"] == refused.value.request_id
    assert len(sent) == 1, "a client's mistake is not tried again"


def test_an_unknown_model(client, capital):
    with pytest.raises(anthropic.NotFoundError) as refused:
        create(client, capital, model="nobody/no-such-model")
    assert refused.value.body["error"]["type"] == "not_found_error"


def test_models(client):
    [model, *_] = client.models.list().data
    assert model.type == "model" and model.id and model.display_name and model.created_at.year > 1969
    assert client.models.retrieve(model.id).id == model.id
    with pytest.raises(anthropic.NotFoundError) as refused:
        client.models.retrieve("no-such-model")
    assert refused.value.body["error"]["type"] == "not_found_error"


def test_what_is_not_read_at_all(http, server):
    """Failures before there is a request: each in Anthropic's form."""
    url = f"{server.base}/v1/messages"
    answers = [
        (http.get(url), 405, "invalid_request_error"),
        (http.post(f"{url}/batches", json={}), 404, "not_found_error"),
        (http.post(url, content="{"), 400, "invalid_request_error"),
        (http.post(url), 400, "invalid_request_error"),
        (http.post(url, content=b"x" * (40 << 20)), 413, "request_too_large"),
        (http.get(f"{server.endpoint}/openai/v1/messages"), 405, "invalid_request_error"),
        (http.post(f"{server.endpoint}/openai/v1/messages", content="{"), 400, "invalid_request_error"),
    ]
    for answer, status, kind in answers:
        body = answer.json()
        assert (answer.status_code, body["type"], body["error"]["type"]) == (status, "error", kind), answer.url
        assert body["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]
    # The routes of OpenAI keep their own form.
    body = http.post(f"{server.base}/v1/chat/completions", json={}).json()
    assert body["error"]["param"] == "messages" and "request_id" not in body


def test_keys():
    with Server("serve", "--model", "demo", env={"API_KEY": "secret-one"}) as server:
        for base in (server.base, f"{server.endpoint}/openai"):
            with anthropic.Anthropic(base_url=base, api_key="wrong", max_retries=0) as client:
                with pytest.raises(anthropic.AuthenticationError) as refused:
                    client.messages.count_tokens(model="default", messages=[{"role": "user", "content": "Hi"}])
                assert refused.value.body["error"]["type"] == "authentication_error"
            with anthropic.Anthropic(base_url=base, api_key="secret-one", max_retries=0) as client:
                assert client.messages.count_tokens(model="default", messages=[{"role": "user", "content": "Hi"}]).input_tokens > 0


def test_a_stream_through_the_queue_is_strings_of_whole_frames(queue, worker, story):
    body = {"max_tokens": 400, "messages": story.body["messages"], "temperature": 0, "stream": True}
    queue.give([{"id": "j-1", "input": {"openai_route": "/v1/messages", "openai_input": body}}])
    worker()
    queue.done("j-1")
    pieces = queue.chunks("j-1")
    assert all(isinstance(piece, str) and piece.startswith("event: ") and piece.endswith("\n\n") for piece in pieces)
    events = [json.loads(frame.split("\ndata: ")[1]) for frame in "".join(pieces).split("\n\n") if frame]
    assert [event["type"] for event in (events[0], events[1], events[-1])] == ["message_start", "ping", "message_stop"]
    assert "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta") == story.answer
