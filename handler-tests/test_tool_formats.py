"""Calls in every family's own format are enforced: the demo model, told that it writes calls in that format, at temperature 2."""
from __future__ import annotations

import json

import openai
import pytest

from harness import questions
from harness.program import Server

PARIS = next(question for question in questions.WITH_TOOLS if question.name == "tool-paris").body["messages"]
CITIES = ["Paris", "New York", "Foz do Iguaçu"]
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "strict": True, "parameters": {
        "type": "object", "required": ["city", "days"], "additionalProperties": False, "$defs": {"city": {"enum": CITIES, "type": "string"}},
        "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9},
                       "unit": {"anyOf": [{"enum": ["C", "F"], "type": "string"}, {"type": "null"}]},
                       "hours": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 23}, "maxItems": 2}}}}},
    {"type": "function", "function": {"name": "get_time", "parameters": {
        "type": "object", "properties": {"zone": {"type": "string", "pattern": "^[A-Z]{3}$"}}, "required": ["zone"], "additionalProperties": False}}},
]
NAMED = {"type": "function", "function": {"name": "get_time"}}
FORMATS = ["openai", "qwen3_coder", "minimax_m2", "deepseek_v32", "glm45", "olmo3", "lfm2", "pythonic", "functiongemma", "gemma4"]


def fits(name: str, arguments: str) -> bool:
    arguments = json.loads(arguments)
    if name == "get_weather":
        assert {"city", "days"} <= set(arguments) <= {"city", "days", "unit", "hours"}
        hours = arguments.get("hours", [])
        return (arguments["city"] in CITIES and arguments["days"] in range(1, 10) and arguments.get("unit") in ("C", "F", None)
                and len(hours) <= 2 and all(hour in range(24) for hour in hours))
    return name == "get_time" and set(arguments) == {"zone"} and len(arguments["zone"]) == 3 and arguments["zone"].isupper()


def given(message) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or []]


@pytest.mark.parametrize("format", FORMATS)
def test_calls_in_a_format(format, http):
    # Channels hold thoughts as well as calls.
    thoughts = {"REASONING_PARSER": "openai_gptoss"} if format == "openai" else {}
    with Server("serve", "--model", "demo", env={"TOOL_CALL_PARSER": format, **thoughts}) as server:
        with openai.OpenAI(base_url=f"{server.base}/v1", api_key="any", max_retries=0, timeout=120) as client:
            def ask(**more):
                return client.chat.completions.create(**{"model": "default", "messages": PARIS, "tools": TOOLS, "max_tokens": 400, **more})

            ended = 0
            for seed in range(4):
                wish = {"tool_choice": NAMED if seed == 1 else "required", "temperature": 2, "seed": seed, "parallel_tool_calls": seed % 2 == 0}
                choice = ask(**wish).choices[0]
                chunks = [chunk.model_dump(exclude_unset=True) for chunk in ask(**wish, stream=True)]
                streamed = questions.gathered(chunks)
                assert [(call["function"]["name"], call["function"]["arguments"]) for call in streamed["tool_calls"]] == given(choice.message)
                if choice.finish_reason == "length":
                    continue
                ended += 1
                calls = given(choice.message)
                assert calls and not choice.message.content and all(fits(*call) for call in calls), (format, calls)
                assert len(calls) == 1 or wish["parallel_tool_calls"]
                assert seed != 1 or [name for name, _ in calls] == ["get_time"]
            assert ended >= 2
            # A free choice: this model writes calls in another format, which are text here.
            free = ask(temperature=0).choices[0]
            assert free.finish_reason in ("stop", "tool_calls") and all(fits(*call) for call in given(free.message))

            odd = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}, "required": ["a"]}
            tool = {"type": "function", "function": {"name": "odd", "parameters": odd}}
            with pytest.raises(openai.BadRequestError) as refused:
                ask(tools=[{"type": "function", "function": {**tool["function"], "strict": True}}], tool_choice="required")
            assert refused.value.param == "tools[0].function.parameters" and "not" in refused.value.message
            loose = ask(tools=[tool], tool_choice="required", temperature=0, max_tokens=60).choices[0]
            assert given(loose.message)[0][0] == "odd" if loose.message.tool_calls else loose.finish_reason == "length"
