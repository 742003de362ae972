"""Tool calls on a true forward pass: through the official SDK on both doors, and in native jobs."""
from __future__ import annotations

import json

import openai
import pytest

from harness import questions
from harness.program import Server, run

BY_NAME = {question.name: question for question in questions.WITH_TOOLS}
PARIS = BY_NAME["tool-paris"]
TOOLS = PARIS.body["tools"]
OTHERS = BY_NAME["tool-among-others"].body["tools"]


@pytest.fixture
def client(door):
    with openai.OpenAI(base_url=door, api_key="any", max_retries=0, timeout=120) as client:
        yield client


def ask(client, question=PARIS, **more):
    body = {"messages": question.body["messages"], "tools": question.body["tools"], "temperature": 0, **more}
    return client.chat.completions.create(model="default", **body)


def calls(message) -> list[tuple[str, dict]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]


def test_a_call(client):
    choice = ask(client).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert calls(choice.message) == [("get_weather", {"city": "Paris"})]
    call = choice.message.tool_calls[0]
    assert call.type == "function" and call.id.startswith("call_") and len(call.id) == 29


def test_a_call_in_a_stream(client):
    chunks = list(ask(client, stream=True))
    parts = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]
    assert [part.function.name for part in parts if part.function.name] == ["get_weather"]
    assert [part.id is not None for part in parts] == [True] + [False] * (len(parts) - 1)
    assert {part.index for part in parts} == {0}
    assert json.loads("".join(part.function.arguments or "" for part in parts)) == {"city": "Paris"}
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_stream_helper_gathers_the_call(client):
    with client.chat.completions.stream(model="default", messages=PARIS.body["messages"], tools=TOOLS, temperature=0) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    assert calls(final.choices[0].message) == [("get_weather", {"city": "Paris"})]
    assert final.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("city, weather", [("Paris", "sunny"), ("Tokyo", "rainy"), ("Berlin", "sunny")])
def test_two_turns(client, city, weather):
    """The model asks for the weather, gets it, and says it."""
    messages = [{"role": "user", "content": f"What is the weather in {city}?"}]
    first = client.chat.completions.create(model="default", messages=messages, tools=TOOLS, temperature=0).choices[0].message
    assert calls(first) == [("get_weather", {"city": city})]
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": json.dumps({"weather": weather})}
    messages += [first.model_dump(exclude_none=True), result]
    second = client.chat.completions.create(model="default", messages=messages, tools=TOOLS, temperature=0).choices[0]
    assert (second.message.content, second.finish_reason) == (f"It is {weather} there.", "stop")


def test_parallel_calls_and_their_limit(client):
    question = BY_NAME["tool-parallel"]
    both = ask(client, question).choices[0]
    assert calls(both.message) == [("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Tokyo"})]
    assert len({call.id for call in both.message.tool_calls}) == 2
    for stream in (False, True):
        if stream:
            with client.chat.completions.stream(
                model="default", messages=question.body["messages"], tools=TOOLS, temperature=0, parallel_tool_calls=False
            ) as events:
                one = events.get_final_completion().choices[0]
        else:
            one = ask(client, question, parallel_tool_calls=False).choices[0]
        assert calls(one.message) == [("get_weather", {"city": "Paris"})]
        assert one.finish_reason == "tool_calls"


def test_an_answer_without_a_call(client):
    question = BY_NAME["tool-not-needed"]
    choice = ask(client, question).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("Paris.", None, "stop")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, question, stream=True)) == "Paris."


def test_no_call_is_wanted(client):
    choice = ask(client, tool_choice="none").choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (PARIS.answer, None, "stop")


@pytest.mark.parametrize("tool_choice, reason", [("required", "tool_calls"), ({"type": "function", "function": {"name": "get_weather"}}, "stop")])
def test_a_call_is_demanded(client, tool_choice, reason):
    for question in (PARIS, BY_NAME["tool-not-needed"]):
        for stream in (False, True):
            if stream:
                message = questions.gathered([chunk.model_dump(exclude_unset=True) for chunk in ask(client, question, tool_choice=tool_choice, stream=True, max_tokens=40)])
                names = [call["function"]["name"] for call in message["tool_calls"]]
            else:
                choice = ask(client, question, tool_choice=tool_choice, max_tokens=40).choices[0]
                names = [call.function.name for call in choice.message.tool_calls]
            assert names[0] == "get_weather"
    choice = ask(client, tool_choice=tool_choice).choices[0]
    assert calls(choice.message) == [("get_weather", {"city": "Paris"})]
    assert choice.finish_reason == reason


def test_some_tools_are_allowed(client):
    """The model is shown these alone: with one tool it answers as it does when there is only one."""
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "get_weather"}}]}}
    alone = ask(client)
    among = ask(client, tools=OTHERS, extra_body={"tool_choice": allowed})
    assert calls(among.choices[0].message) == [("get_weather", {"city": "Paris"})]
    assert among.usage.prompt_tokens == alone.usage.prompt_tokens
    assert ask(client, tools=OTHERS).usage.prompt_tokens > alone.usage.prompt_tokens


def test_the_older_form(client):
    functions = [tool["function"] for tool in TOOLS]
    answer = client.chat.completions.create(model="default", messages=PARIS.body["messages"], functions=functions, temperature=0)
    assert calls(answer.choices[0].message) == [("get_weather", {"city": "Paris"})]
    text = client.chat.completions.create(
        model="default", messages=PARIS.body["messages"], functions=functions, function_call="none", temperature=0
    )
    assert text.choices[0].message.content == PARIS.answer


def test_a_call_that_is_cut_off(client):
    choice = ask(client, max_tokens=18).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.name == "get_weather"


def test_native_jobs(http, server):
    body = PARIS.request()
    output = http.post(f"{server.endpoint}/runsync", json={"input": body}).json()["output"]
    call = output["choices"][0]["message"]["tool_calls"][0]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("get_weather", {"city": "Paris"})
    assert output["choices"][0]["finish_reason"] == "tool_calls"


def test_marks_are_text_without_tools(client):
    """A request without tools wants no calls."""
    messages = PARIS.body["messages"]
    answer = client.chat.completions.create(
        model="default", messages=messages, temperature=0, extra_body={"chat_template_kwargs": {"tools": TOOLS}, "tool_choice": "none"}
    )
    assert answer.choices[0].message.content == PARIS.answer


def test_parsers_off_and_auto_off(http):
    with Server("serve", "--model", "demo", env={"TOOL_CALL_PARSER": "none", "REASONING_PARSER": "none"}) as raw:
        for question in (PARIS, BY_NAME["tool-thinking"]):
            message = http.post(f"{raw.base}/v1/chat/completions", json=question.request()).json()["choices"][0]["message"]
            assert message == {"role": "assistant", "content": question.answer, "refusal": None}
    # What the vLLM worker's form sends unasked takes nobody's tools away.
    with Server("serve", "--model", "demo", env={"ENABLE_AUTO_TOOL_CHOICE": "false"}) as formed:
        assert http.post(f"{formed.base}/v1/chat/completions", json=PARIS.request()).json()["choices"][0]["message"]["tool_calls"]
        assert "ENABLE_AUTO_TOOL_CHOICE=false in the environment refuses no tools" in formed.log
    with Server("serve", "--model", "demo", "--no-enable-auto-tool-choice") as strict:
        refused = http.post(f"{strict.base}/v1/chat/completions", json=PARIS.request())
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "tools"
        named = http.post(f"{strict.base}/v1/chat/completions", json=PARIS.request(tool_choice="required")).json()
        assert named["choices"][0]["message"]["tool_calls"]


def test_an_unknown_parser_stops_the_start():
    for name in ("TOOL_CALL_PARSER", "REASONING_PARSER"):
        with Server("serve", "--model", "demo", env={name: "nonsense"}, ready=False) as server:
            assert server.wait() == 1
            assert name in server.log and "hermes" in server.log
        done = run("check", "--model", "demo", env={name: "nonsense"})
        assert done.process.returncode == 1 and f"problem: {name}: " in done.stdout and "hermes" in done.stdout, done.log
