"""Vercel's AI SDK with its providers for OpenAI (Responses, chat) and for compatible servers, on the direct door and through the queue."""
from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

CASES = Path(__file__).parent / "node/ai-sdk.mjs"
ADA = {"name": "Ada", "age": 36}


@pytest.fixture(params=["responses", "chat", "compatible"])
def provider(request) -> str:
    return request.param


@pytest.fixture
def ask(provider, door):
    def ask(case: str):
        command = [os.environ.get("NODE", "node"), str(CASES), case, door, provider]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["result"]

    return ask


@pytest.mark.parametrize("case", ["text", "stream"])
def test_text(ask, case, provider):
    result = ask(case)
    assert (result["text"], result["finishReason"]) == ("Paris.", "stop")
    # The provider for compatible servers does not ask a stream for its usage.
    if (case, provider) != ("stream", "compatible"):
        assert result["usage"]["outputTokens"] > 0


@pytest.mark.parametrize("case", ["tools", "toolsStreamed"])
def test_a_tool_in_two_turns(ask, case):
    assert ask(case) == {"text": "It is sunny there.", "steps": 2, "asked": ["Paris"]}


def test_a_tool_that_must_be_called(ask):
    for calls in ask("toolRequired")["calls"]:
        assert calls == [["get_weather", {"city": "Paris"}]]


def test_an_object(ask):
    assert ask("object") == {"object": ADA, "output": ADA, "streamed": ADA, "last": ADA}


def test_a_schema_of_many_parts(ask):
    # The SDK has checked it against the schema.
    assert ask("manyParts")["object"]["verdict"] in ("good", "bad")


def test_an_enumeration(ask):
    assert ask("enumeration")["object"] in ("red", "blue")


def test_errors(ask):
    errors = ask("errors")
    assert {name: (error["isAPICallError"], error["status"], error["retryable"]) for name, error in errors.items()} == {
        "model": (True, 404, False),
        "long": (True, 400, False),
        "range": (True, 400, False),
    }
    assert "gpt-none" in errors["model"]["message"]
    assert "maximum context length" in errors["long"]["message"]
    assert "temperature" in errors["range"]["message"]
