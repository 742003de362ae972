"""The forms in which jobs may bring their input, and the shapes of their output."""
from __future__ import annotations

import pytest

from harness import questions
from harness.program import Server

FOX = "The quick brown fox"
# Ids of the demo model's text.
SUPPRESSED = list(range(300, 700))


@pytest.fixture
def ask(http, server):
    def ask(given) -> dict:
        status = http.post(f"{server.endpoint}/runsync", json={"input": given}).json()
        assert status["status"] == "COMPLETED", status
        return status["output"]

    return ask


@pytest.fixture
def fox():
    return questions.BY_NAME["complete-fox"]


def test_messages(ask, capital):
    output = ask({"messages": capital.body["messages"], "temperature": 0})
    assert isinstance(output, dict) and output["object"] == "chat.completion"
    assert questions.text(output) == capital.answer


def test_prompt(ask, fox):
    output = ask({"prompt": fox.body["prompt"], "max_tokens": 50, "temperature": 0})
    assert isinstance(output, dict) and output["object"] == "text_completion"
    assert questions.text(output) == fox.answer
    assert output["text"] == fox.answer, "as the FastDeploy worker gives it"


@pytest.mark.parametrize("name", ["text", "input"])
def test_other_names_of_a_prompt(ask, fox, name):
    output = ask({name: fox.body["prompt"], "max_tokens": 50, "temperature": 0})
    assert output["object"] == "text_completion" and questions.text(output) == fox.answer


def test_input_ids(ask, http, server, fox):
    given = {"prompt": fox.body["prompt"], "max_tokens": 50, "temperature": 0, "return_token_ids": True}
    ids = ask(given)["choices"][0]["prompt_token_ids"]
    output = ask({"input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": 50}})
    assert questions.text(output) == fox.answer


def test_several_prompts(ask, fox):
    output = ask({"prompt": [fox.body["prompt"], questions.BY_NAME["complete-roses"].body["prompt"]], "max_tokens": 50, "temperature": 0})
    assert [choice["text"] for choice in output["choices"]] == [fox.answer, questions.BY_NAME["complete-roses"].answer]


@pytest.mark.parametrize("limit", ["max_tokens", "max_new_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("nested", [True, False], ids=["sampling_params", "top-level"])
def test_parameters(ask, story, limit, nested):
    parameters = {limit: 4, "temperature": 0}
    given = {"messages": story.body["messages"], **({"sampling_params": parameters} if nested else parameters)}
    output = ask(given)
    assert (output["usage"]["completion_tokens"], output["choices"][0]["finish_reason"]) == (4, "length")
    assert story.answer.startswith(questions.text(output))


def test_messages_beat_prompt(ask, capital):
    output = ask({"messages": capital.body["messages"], "prompt": FOX, "temperature": 0})
    assert output["object"] == "chat.completion" and questions.text(output) == capital.answer


def test_without_max_tokens_a_job_goes_to_its_end(ask, story):
    assert questions.text(ask({"messages": story.body["messages"], "temperature": 0})) == story.answer
    tale = questions.BY_NAME["complete-tale"]
    assert questions.text(ask({"prompt": tale.body["prompt"], "temperature": 0})) == tale.answer


@pytest.mark.parametrize("route", ["/v1/chat/completions", "v1/chat/completions", "/openai/v1/chat/completions", "openai/v1/chat/completions"])
def test_openai_route(ask, capital, route):
    output = ask({"openai_route": route, "openai_input": capital.request()})
    assert output["object"] == "chat.completion" and questions.text(output) == capital.answer


def test_openai_route_completions(ask, fox):
    output = ask({"openai_route": "/v1/completions", "openai_input": fox.request()})
    assert output["object"] == "text_completion" and questions.text(output) == fox.answer


@pytest.mark.parametrize("more", [{}, {"openai_input": {}}, {"openai_input": None}], ids=["absent", "empty", "null"])
def test_get_routes(ask, more):
    models = ask({"openai_route": "/v1/models", **more})
    assert models["object"] == "list" and models["data"][0]["object"] == "model"
    name = models["data"][0]["id"]
    assert ask({"openai_route": f"/v1/models/{name}", **more})["id"] == name


def test_route_body_method(ask, capital):
    assert questions.text(ask({"route": "/v1/chat/completions", "body": capital.request(), "method": "POST"})) == capital.answer
    assert questions.text(ask({"route": "/v1/chat/completions", "body": capital.request()})) == capital.answer
    assert ask({"route": "/v1/models", "method": "GET"})["object"] == "list"
    assert ask({"route": "/v1/models"})["object"] == "list"


def test_an_input_inside_the_input(ask, capital):
    assert questions.text(ask({"input": capital.request()})) == capital.answer


def test_a_whole_test_of_the_hub_as_input(ask, capital):
    given = {"name": "basic", "input": capital.request(), "timeout": 30000, "startedAt": "2026-01-01T00:00:00Z"}
    assert questions.text(ask(given)) == capital.answer


# Each does what the field that this server calls otherwise does.
OTHER_NAMES = [
    ({"n_predict": 4}, {"max_tokens": 4}),
    ({"min_new_tokens": 40}, {"min_tokens": 40}),
    ({"repeat_penalty": 1.9}, {"repetition_penalty": 1.9}),
    ({"stop_sequences": ["the"]}, {"stop": ["the"]}),
    ({"suppress_tokens": SUPPRESSED}, {"bad_words_token_ids": SUPPRESSED}),
    ({"sampling_params": {"max_tokens": 5, "stop": "zzz"}}, {"max_tokens": 5}),
]


@pytest.mark.parametrize(("other", "ours"), OTHER_NAMES, ids=lambda fields: next(iter(fields)))
def test_other_names_of_fields(http, door, story, capital, other, ours):
    def texts(**more) -> list[str]:
        responses = [http.post(f"{door}/chat/completions", json=question.request(**more)) for question in (story, capital)]
        assert [response.status_code for response in responses] == [200, 200], responses[0].text
        return [questions.text(response.json()) for response in responses]

    named = texts(**other)
    assert named == texts(**ours) != [story.answer, capital.answer]


def test_no_sampling_is_greedy(ask, story):
    assert questions.text(ask({"messages": story.body["messages"], "temperature": 2.0, "do_sample": False})) == story.answer


def test_names_of_the_model(ask, http, server, capital):
    served = http.get(f"{server.base}/v1/models").json()["data"]
    for name in {model["id"] for model in served} | {served[0]["root"], served[0]["id"].split("/")[-1], "default", "null", "", None}:
        output = ask({**capital.request(), "model": name})
        assert output["model"] == served[0]["id"]


def test_content_parts_and_roles(ask, capital):
    parts = [{"type": "text", "text": capital.body["messages"][-1]["content"]}]
    assert questions.text(ask({"messages": [{"role": "user", "content": parts}], "temperature": 0})) == capital.answer
    words = capital.body["messages"][-1]["content"].rpartition(" ")
    lines = [{"type": "text", "text": words[0]}, {"type": "text", "text": words[2]}]
    given = {"return_token_ids": True, "max_tokens": 1}
    joined = ask({"messages": [{"role": "user", "content": f"{words[0]}\n{words[2]}"}], **given})["prompt_token_ids"]
    assert ask({"messages": [{"role": "user", "content": lines}], **given})["prompt_token_ids"] == joined, "parts are lines of one text"
    pirate = next(question for question in questions.ALL if question.is_chat and question.body["messages"][0]["role"] == "system")
    messages = [{**pirate.body["messages"][0], "role": "developer"}, *pirate.body["messages"][1:]]
    assert questions.text(ask({"messages": messages, "temperature": 0})) == pirate.answer


@pytest.fixture(scope="module")
def tokens_server():
    with Server("serve", "--model", "demo", env={"NATIVE_OUTPUT_FORMAT": "tokens"}) as server:
        yield server


def test_the_older_output(http, tokens_server, story):
    url = tokens_server.endpoint
    whole = http.post(f"{url}/runsync", json={"input": story.request()}).json()["output"]
    assert set(whole) == {"choices", "usage"} and whole["choices"] == [{"tokens": [story.answer]}]
    assert whole["usage"]["input"] > 0 and whole["usage"]["output"] > 0
    pieces = http.post(f"{url}/runsync", json={"input": story.request(stream=True)}).json()["output"]
    assert "".join(token for piece in pieces for token in piece["choices"][0]["tokens"]) == story.answer
    assert pieces[-1]["usage"] == whole["usage"]


def test_the_older_output_leaves_openai_calls_alone(http, tokens_server, capital):
    output = http.post(f"{tokens_server.endpoint}/runsync", json={"input": {"openai_route": "/v1/chat/completions", "openai_input": capital.request()}})
    assert output.json()["output"]["object"] == "chat.completion"
    assert questions.text(http.post(f"{tokens_server.endpoint}/openai/v1/chat/completions", json=capital.request()).json()) == capital.answer
