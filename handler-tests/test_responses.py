"""`/v1/responses` through the official Python SDK, on the direct door and through the queue."""
from __future__ import annotations

import json

import httpx
import openai
import pytest

from harness.program import Server


@pytest.fixture
def client(door):
    with openai.OpenAI(base_url=door, api_key="any", max_retries=0, timeout=120) as client:
        yield client


def question(chosen) -> str:
    return chosen.body["messages"][-1]["content"]


def items(response) -> list[dict]:
    """Output items without their ids."""
    return [item.model_dump(exclude={"id"}, exclude_none=True) for item in response.output]


def test_whole(client, capital):
    response = client.responses.create(model="default", input=question(capital), temperature=0)
    assert (response.object, response.status, response.output_text) == ("response", "completed", capital.answer)
    assert response.id.startswith("resp_") and response.created_at > 0
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    [message] = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")


def test_stream_is_the_whole_answer(client, story):
    whole = client.responses.create(model="default", input=question(story), temperature=0)
    events = list(client.responses.create(model="default", input=question(story), temperature=0, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    types = [event.type for event in events]
    deltas = types.count("response.output_text.delta")
    assert deltas > 1
    assert types == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    final = events[-1].response
    assert text == final.output_text == whole.output_text == story.answer
    assert items(final) == items(whole)
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_stream_helper(client, story):
    with client.responses.stream(model="default", input=question(story), temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == story.answer


def test_what_a_limit_cuts_off(client, story):
    response = client.responses.create(model="default", input=question(story), temperature=0, max_output_tokens=5)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.usage.output_tokens == 5 and story.answer.startswith(response.output_text)
    last = list(client.responses.create(model="default", input=question(story), temperature=0, max_output_tokens=5, stream=True))[-1]
    assert last.type == "response.incomplete" and last.response.output_text == response.output_text


def test_items_and_instructions(client, capital):
    given = [
        {"role": "user", "content": "Hello!"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello! How can I help you?"}]},
        {"role": "user", "content": [{"type": "input_text", "text": question(capital)}]},
    ]
    response = client.responses.create(model="default", input=given, instructions="You are a helpful assistant.", temperature=0)
    assert response.status == "completed" and response.output_text
    chat = client.chat.completions.create(
        model="default",
        messages=[
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Hello!"},
            {"role": "assistant", "content": "Hello! How can I help you?"},
            {"role": "user", "content": question(capital)},
        ],
        temperature=0,
    )
    assert response.output_text == chat.choices[0].message.content
    assert response.usage.input_tokens == chat.usage.prompt_tokens


def test_logprobs(client, capital):
    response = client.responses.create(
        model="default", input=question(capital), temperature=0, include=["message.output_text.logprobs"], top_logprobs=2
    )
    logprobs = response.output[0].content[0].logprobs
    assert "".join(token.token for token in logprobs) == capital.answer
    assert all(len(token.top_logprobs) == 2 for token in logprobs)


def test_a_conversation_is_continued_and_deleted(client, door, capital):
    first = client.responses.create(model="default", input=question(capital), temperature=0)
    assert client.responses.retrieve(first.id).output_text == capital.answer
    second = client.responses.create(model="default", input=question(capital), previous_response_id=first.id, temperature=0)
    assert second.previous_response_id == first.id and second.usage.input_tokens > first.usage.input_tokens
    listed = client.responses.input_items.list(second.id, order="asc").data
    assert [item.content[0].text for item in listed] == [question(capital), capital.answer, question(capital)]
    with pytest.raises(openai.NotFoundError) as refused:
        client.responses.create(model="default", input="x", previous_response_id="resp_unknown")
    assert refused.value.code == "previous_response_not_found" and refused.value.param == "previous_response_id"
    if "/v2/" in door:
        # The queue carries no method, so a job says it.
        endpoint = door.removesuffix("/openai/v1")
        job = {"input": {"route": f"/v1/responses/{first.id}", "method": "DELETE"}}
        assert httpx.post(f"{endpoint}/runsync", json=job, timeout=120).json()["output"]["deleted"] is True
        with pytest.raises(openai.APIStatusError) as refused:
            client.responses.delete(first.id)
        assert refused.value.status_code == 405
    else:
        client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


REFUSED = [
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x/y.png"}]}]}, "input[0].content[0]", "unsupported_value"),
    ({"input": [{"type": "web_search_call", "id": "x", "status": "completed"}]}, "input[0]", "unsupported_value"),
    ({"input": "Hi", "tools": [{"type": "web_search"}]}, "tools[0]", "unsupported_value"),
    ({"input": "Hi", "background": True}, "background", "unsupported_parameter"),
    ({"input": "Hi", "max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
    ({"input": "Hi", "temperature": 3}, "temperature", "invalid_value"),
    ({"input": "x " * 5000}, "input", "context_length_exceeded"),
]


@pytest.mark.parametrize("body, param, code", REFUSED, ids=[param for _, param, _ in REFUSED])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_refusals_name_the_field_and_are_sent_once(door, body, param, code, stream):
    with openai.OpenAI(base_url=door, api_key="any", timeout=120) as client:
        sent, send = [], client._client.send
        client._client.send = lambda request, **more: (sent.append(request), send(request, **more))[1]
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model="default", stream=stream, **body)
    assert (refused.value.param, refused.value.code) == (param, code)
    assert len(sent) == 1, "a client's mistake is not tried again"


def test_an_unknown_model(client):
    with pytest.raises(openai.NotFoundError) as refused:
        client.responses.create(model="nobody/no-such-model", input="Hi")
    assert refused.value.code == "model_not_found"


def test_frames_as_they_are(http, server, capital):
    """Named events, and no `[DONE]`, the same at both doors."""
    body = {"input": question(capital), "temperature": 0, "stream": True}
    for url in (f"{server.base}/v1/responses", f"{server.base}/openai/v1/responses", f"{server.endpoint}/openai/v1/responses"):
        answer = http.post(url, json=body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        frames = [frame for frame in answer.text.split("\n\n") if frame and not frame.startswith(":")]
        assert "[DONE]" not in answer.text
        for frame in frames:
            name, data = frame.split("\n")
            assert name == "event: " + json.loads(data.removeprefix("data: "))["type"]
        assert frames[-1].startswith("event: response.completed")


def test_a_stream_that_fails_midway_says_so(http, server, door):
    """All that may be written is `a`, and at its end the answer must hold a `0`."""
    [a] = http.post(f"{server.base}/tokenize", json={"content": "a"}).json()["tokens"]
    body = {"input": "Hello!", "guided_regex": "[ab]{30}0", "bad_words_token_ids": [id for id in range(3, 1400) if id != a], "stream": True}
    with http.stream("POST", f"{door}/responses", json=body) as response:
        assert response.status_code == 200
        events = [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line.startswith("data: ")]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text and set(text) == {"a"}
    assert events[-1]["type"] == "response.failed" and [event["type"] for event in events].count("response.failed") == 1
    failed = events[-1]["response"]
    assert failed["status"] == "failed" and "bad_words" in failed["error"]["message"]
    with openai.OpenAI(base_url=door, api_key="any", max_retries=0) as client:
        types = [event.type for event in client.responses.create(model="default", input="Hello!", stream=True, extra_body={k: body[k] for k in ("guided_regex", "bad_words_token_ids")})]
    assert types[-1] == "response.failed"


def test_an_answer_that_is_there_cannot_be_cancelled(client, capital):
    first = client.responses.create(model="default", input=question(capital), temperature=0)
    with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous response"):
        client.responses.cancel(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel("resp_unknown")
    assert client.responses.retrieve(first.id).output_text == capital.answer


def test_the_store_is_off_where_it_would_not_be_found(http):
    with Server("serve", "--model", "demo", "--no-responses-store") as server:
        first = http.post(f"{server.base}/v1/responses", json={"input": "Hello!"}).json()
        assert first["store"] is False
        answer = http.post(f"{server.base}/v1/responses", json={"input": "x", "previous_response_id": first["id"]})
        assert answer.status_code == 404 and "another worker" in answer.json()["error"]["message"]


def test_a_queue_worker_stores_nothing(queue, worker):
    body = {"input": "Hello!", "temperature": 0}
    queue.give([{"id": "j-1", "input": {"openai_route": "/v1/responses", "openai_input": body}}])
    worker()
    response = queue.done("j-1").json["output"]
    assert (response["status"], response["store"]) == ("completed", False)
    queue.give([{"id": "j-2", "input": {"openai_route": "/v1/responses", "openai_input": {**body, "previous_response_id": response["id"]}}}])
    error = json.loads(queue.done("j-2").json["error"])["error"]
    assert (error["status"], error["code"]) == (404, "previous_response_not_found") and "another worker" in error["message"]


def test_a_stream_through_the_queue_is_strings_of_whole_frames(queue, worker, story):
    body = {"input": question(story), "temperature": 0, "stream": True}
    queue.give([{"id": "j-1", "input": {"openai_route": "/v1/responses", "openai_input": body}}])
    worker()
    queue.done("j-1")
    pieces = queue.chunks("j-1")
    assert all(isinstance(piece, str) and piece.startswith("event: ") and piece.endswith("\n\n") for piece in pieces)
    assert pieces[-1].split("\n\n")[-2].startswith("event: response.completed")
