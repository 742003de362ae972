"""The official Node SDK, on the direct door and through the queue."""
from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from harness import questions

CASES = Path(__file__).parent / "node/cases.mjs"


@pytest.fixture
def node(door):
    def ask(case: str, question):
        command = [os.environ.get("NODE", "node"), str(CASES), case, door, json.dumps(question.body)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask


def test_plain(node, capital):
    answer = node("plain", capital)["result"]
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"] == capital.answer
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_logprobs(node, capital):
    result = node("logprobs", capital)["result"]
    content = result["whole"]["logprobs"]["content"]
    assert "".join(item["token"] for item in content) == capital.answer
    assert all(len(item["top_logprobs"]) == 2 for item in content)
    assert result["streamed"]["logprobs"]["content"] == content


def test_responses(node, story):
    result = node("responses", story)["result"]
    assert result["whole"]["output_text"] == result["final"]["output_text"] == result["text"] == story.answer
    assert result["next"]["previous_response_id"] == result["final"]["id"]
    assert result["next"]["usage"]["input_tokens"] > result["whole"]["usage"]["input_tokens"]


def test_parse(node):
    """An object by a schema of zod's: a chat, its stream, and a response."""
    person = {"name": "Ada", "age": 36}
    assert node("parse", questions.BY_NAME["json"])["result"] == {"whole": person, "final": person, "response": person}


def test_run_tools(node):
    """The SDK's own loop: it calls the function and sends its result back, whole and streamed."""
    (paris,) = [question for question in questions.WITH_TOOLS if question.name == "tool-paris"]
    said = "It is sunny there."
    assert node("runTools", paris)["result"] == {"whole": said, "streamed": said, "asked": ["Paris", "Paris"]}


def test_stream(node, story):
    chunks = node("stream", story)["result"]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == story.answer
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_stream_helper(node, story):
    result = node("helper", story)["result"]
    final = result["final"]
    assert result["text"] == story.answer
    assert final["choices"][0]["message"]["content"] == story.answer
    assert final["usage"]["completion_tokens"] > 0


def test_stream_helper_with_several_choices(node, capital):
    final = node("choices", capital)["result"]
    said = [(choice["index"], choice["message"]["role"], choice["message"]["content"], choice["finish_reason"]) for choice in final["choices"]]
    assert said == [(index, "assistant", capital.answer, "stop") for index in range(3)]


def test_models(node, capital):
    result = node("models", capital)["result"]
    assert result["retrieved"] == result["id"]
    assert result["missing"] == {"class": "NotFoundError", "code": "model_not_found"}


def test_errors_are_of_the_right_class(node, capital):
    answer = node("errors", capital)
    errors = answer["result"]
    assert {name: (error["class"], error["status"]) for name, error in errors.items()} == {
        "model": ("NotFoundError", 404),
        "range": ("BadRequestError", 400),
        "stream": ("BadRequestError", 400),
        "empty": ("BadRequestError", 400),
    }
    assert (errors["model"]["code"], errors["model"]["param"]) == ("model_not_found", "model")
    assert (errors["range"]["code"], errors["range"]["param"]) == ("invalid_value", "temperature")
    assert errors["stream"]["param"] == "top_p" and errors["empty"]["param"] == "messages"
    assert all(error["message"] and "no body" not in error["message"] for error in errors.values())
    assert all(error["requestID"] for error in errors.values())


def test_a_stream_that_is_left_early(node, story, capital):
    assert node("aborted", story)["result"] == {"aborted": True}
    assert node("plain", capital)["result"]["choices"][0]["message"]["content"] == capital.answer
