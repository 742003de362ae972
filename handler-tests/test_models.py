"""Several models in one process: each answers as it does alone, at every door, and all of them at once."""
from __future__ import annotations

import concurrent.futures
import json
import re
import urllib.parse

import httpx
import openai
import pytest

from harness.hub import Hub, demo_files
from harness.program import Server, run, wait_for
from test_families import log_probabilities, make_model

GIB = 1 << 30


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint of another family with a tokenizer of its own, and what transformers computes on it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    return folder, make_model("llama", folder)


@pytest.fixture(scope="module")
def both(tiny):
    with Server("serve", "--model", "demo", "--model", str(tiny[0])) as server:
        yield server


@pytest.fixture(params=["direct", "queue"])
def each_door(request, both) -> str:
    return both.doors()[request.param]


def expect_golden(completion: dict, sequence: dict, vocab: int) -> None:
    """The next token after a golden sequence, as transformers has it."""
    expected = log_probabilities(sequence, vocab)
    best = max(range(vocab), key=expected.__getitem__)
    choice = completion["choices"][0]
    assert completion["model"] == "tiny" and choice["token_ids"] == [best]
    assert choice["logprobs"]["token_logprobs"][0] == pytest.approx(expected[best], abs=1e-3)


def after(sequence: dict) -> dict:
    return {"model": "tiny", "prompt": sequence["ids"], "max_tokens": 1, "temperature": 0, "logprobs": 1, "return_token_ids": True}


def text_of(sequence: dict) -> str:
    return "".join(chr(0x4E00 + id) for id in sequence["ids"])


def test_each_is_right_on_both_doors(http, each_door, tiny, capital):
    golden = tiny[1]
    client = openai.OpenAI(api_key="x", base_url=each_door, max_retries=0)
    assert [model.id for model in client.models.list()] == ["demo", "tiny"]
    for sequence in golden["sequences"]:
        expect_golden(http.post(f"{each_door}/completions", json=after(sequence)).json(), sequence, golden["config"]["vocab_size"])
        answer = client.chat.completions.create(model="demo", **capital.body, temperature=0)
        assert answer.model == "demo" and answer.choices[0].message.content == capital.answer
    # Streams, and the other tokenizer and template.
    messages = [{"role": "user", "content": text_of(golden["sequences"][1])}]
    asked = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert whole and "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole and {chunk.model for chunk in chunks} == {"tiny"}


def test_native_jobs(http, both, tiny, capital):
    golden = tiny[1]
    post = lambda **input: http.post(f"{both.endpoint}/runsync", json={"input": input}).json()["output"]  # noqa: E731
    expect_golden(post(**after(golden["sequences"][0])), golden["sequences"][0], golden["config"]["vocab_size"])
    assert post(**capital.request())["choices"][0]["message"]["content"] == capital.answer
    assert post(**capital.request(), sampling_params={"model": "demo"})["model"] == "demo"
    lines = [
        {"custom_id": "a", "url": "/v1/completions", "body": after(golden["sequences"][2])},
        {"custom_id": "b", "url": "/v1/chat/completions", "body": capital.request(model="demo")},
        {"custom_id": "c", "url": "/v1/chat/completions", "body": capital.request(model="third")},
    ]
    first, second, third = (line["response"] for line in post(batch=lines))
    expect_golden(first["body"], golden["sequences"][2], golden["config"]["vocab_size"])
    assert second["body"]["choices"][0]["message"]["content"] == capital.answer
    assert third["status_code"] == 404 and "This server serves: demo, tiny." in third["body"]["error"]["message"]


def test_names(http, both, each_door, tiny, capital):
    get = lambda id: http.get(f"{each_door}/models/{urllib.parse.quote(id, safe='')}")  # noqa: E731
    for id, served in [("demo", "demo"), ("tiny", "tiny"), (str(tiny[0]), "tiny")]:
        assert get(id).json()["id"] == served
    chat = lambda model: http.post(f"{each_door}/chat/completions", json=capital.request(model=model, max_tokens=2))  # noqa: E731
    for model, served in [("demo", "demo"), (None, "demo"), ("default", "demo"), ("", "demo"), ("tiny", "tiny"), (str(tiny[0]), "tiny")]:
        if served == "demo":
            assert chat(model).json()["model"] == "demo"
        else:
            # Its tokenizer knows no Latin letters, so the prompt is empty: a refusal of that model's own.
            assert chat(model).status_code == 400
    for answer in (chat("third"), get("third")):
        error = answer.json()["error"]
        assert answer.status_code == 404 and error["code"] == "model_not_found" and error["param"] == "model"
        assert error["message"] == "The model `third` does not exist. This server serves: demo, tiny."
    completion = {"prompt": "Once upon a time", "max_tokens": 2}
    assert http.post(f"{both.base}/v1/engines/demo/completions", json=completion).json()["model"] == "demo"
    assert http.post(f"{both.base}/v1/engines/third/completions", json=completion).status_code == 404
    assert http.post(f"{each_door}/embeddings", json={"model": "tiny", "input": "x"}).json()["error"]["message"].startswith("The model `tiny`")


def test_all_at_once(http, both, tiny, story):
    """Streams of one model run while the other answers, and neither changes what the other says."""
    golden = tiny[1]
    doors = list(both.doors().values())

    def ask(number: int) -> bool:
        door = doors[number // 2 % 2]
        if number % 2:
            sequence = golden["sequences"][number % 3]
            expect_golden(http.post(f"{door}/completions", json=after(sequence)).json(), sequence, golden["config"]["vocab_size"])
            return True
        answer = http.post(f"{door}/chat/completions", json=story.request(model="demo")).json()
        return answer["choices"][0]["message"]["content"] == story.answer

    order = []
    body = story.request(model="demo", stream=True, ignore_eos=True, max_tokens=700, n=8, temperature=1)
    with httpx.stream("POST", f"{both.base}/v1/chat/completions", json=body, timeout=120) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        assert ask(1)
        order.append("tiny")
        for line in lines:
            if line == "data: [DONE]":
                order.append("demo")
    assert order == ["tiny", "demo"]
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        assert all(pool.map(ask, range(48)))


def test_stored_responses_are_everybodys(both, each_door, tiny):
    client = openai.OpenAI(api_key="x", base_url=f"{both.base}/v1", max_retries=0)
    text = text_of(tiny[1]["sequences"][2])
    first = client.responses.create(model="tiny", input=text, max_output_tokens=4, temperature=0)
    assert first.model == "tiny" and client.responses.retrieve(first.id).id == first.id
    second = client.responses.create(model="demo", input="What is the capital of France?", previous_response_id=first.id, max_output_tokens=16)
    assert second.model == "demo" and second.previous_response_id == first.id
    third = client.responses.create(input=text, model="tiny", previous_response_id=first.id, max_output_tokens=4, temperature=0)
    assert third.model == "tiny" and third.usage.input_tokens > first.usage.input_tokens


def test_calls_without_generation(http, both, tiny):
    text = text_of(tiny[1]["sequences"][2])
    ids = http.post(f"{both.base}/tokenize", json={"model": "tiny", "prompt": text}).json()["tokens"]
    assert ids == tiny[1]["sequences"][2]["ids"]
    assert http.post(f"{both.base}/tokenize", json={"prompt": text}).json()["tokens"] != ids
    prompts = [{"model": "tiny", "prompt": text, "max_tokens": 1}, {"model": "demo", "prompt": text, "max_tokens": 1}]
    ask = lambda prompts: http.post(f"{both.base}/api/v1/token_check", json={"prompts": prompts})  # noqa: E731
    counts = ask(prompts).json()["prompts"]
    assert counts[0]["tokenCount"] == len(ids) and counts[0]["contextLength"] != counts[1]["contextLength"]
    wrong = ask([*prompts, {"model": "third", "prompt": "x", "max_tokens": 1}])
    assert wrong.status_code == 404 and wrong.json()["error"]["param"] == "prompts[2].model"


def test_figures_of_each(http, both, tiny, capital):
    http.post(f"{both.base}/v1/completions", json=after(tiny[1]["sequences"][0]))
    http.post(f"{both.base}/v1/chat/completions", json=capital.request())
    lines = http.get(f"{both.base}/metrics").text.splitlines()
    for name in ("demo", "tiny"):
        counted = [line for line in lines if line.startswith(f'worker_candle_generation_tokens_total{{model_name="{name}"}} ')]
        assert len(counted) == 1 and float(counted[0].split()[-1]) > 0
        assert f'worker_candle_healthy{{model_name="{name}"}} 1' in lines
    types = [line for line in lines if line.startswith("# TYPE ")]
    assert len(types) == len(set(types)) > 20
    # The lines of a metric stand together, below its heading.
    metric = None
    for line in lines:
        metric = line.split()[2] if line.startswith("#") else metric
        assert line.startswith("#") or re.sub("(_bucket|_sum|_count)$", "", line.split("{")[0]) in (metric, metric.removesuffix("_count"))


def test_keys_and_names_of_the_settings(http, tiny, tmp_path):
    golden = tiny[1]
    keys = tmp_path / "keys.yaml"
    keys.write_text("- {name: small, key: sk-small, models: [second]}\n- {name: all, key: sk-all}\n")
    env = {"MODEL_NAME": f"demo,{tiny[0]}", "SERVED_MODEL_NAME": "first,second", "API_KEYS_FILE": str(keys)}
    with Server("serve", env=env) as server:
        def post(key: str, **body):
            return http.post(f"{server.base}/v1/completions", json=body, headers={"x-api-key": key})

        names = lambda key: [m["id"] for m in http.get(f"{server.base}/v1/models", headers={"x-api-key": key}).json()["data"]]  # noqa: E731
        assert names("sk-all") == ["first", "second"] and names("sk-small") == ["second"]
        asked = {**after(golden["sequences"][0]), "model": "second"}
        assert post("sk-small", **asked).json()["model"] == post("sk-all", **asked).json()["model"] == "second"
        # The models' own names work besides, and are no way round.
        assert post("sk-small", **{**asked, "model": "tiny"}).status_code == 200
        for model in ("first", "demo", None, "default"):
            answer = post("sk-small", prompt="Hi", max_tokens=2, model=model)
            assert answer.status_code == 403 and "`first`" in answer.json()["error"]["message"], answer.text
            assert post("sk-all", prompt="Hi", max_tokens=2, model=model).json()["model"] == "first"
        check = {"prompts": [{"model": "first", "prompt": "x", "max_tokens": 1}]}
        assert http.post(f"{server.base}/api/v1/token_check", json=check, headers={"x-api-key": "sk-small"}).status_code == 403


def test_a_queue_worker(queue, worker, tiny, capital):
    golden = tiny[1]
    queue.give([{"id": "one", "input": after(golden["sequences"][0])}, {"id": "two", "input": capital.request(model="demo")}])
    queue.give([{"id": "three", "input": {"openai_route": "/v1/models"}}, {"id": "four", "input": capital.request(model="third")}])
    program = worker(MODEL=f"demo,{tiny[0]}")
    wait_for(lambda: len(queue.requests("job-done")) == 4, "four answers")
    expect_golden(queue.result("one")["output"], golden["sequences"][0], golden["config"]["vocab_size"])
    assert queue.result("two")["output"]["choices"][0]["message"]["content"] == capital.answer
    assert [model["id"] for model in queue.result("three")["output"]["data"]] == ["demo", "tiny"]
    assert "This server serves: demo, tiny." in queue.result("four")["error"]
    program.terminate()
    assert program.wait() == 0


def test_sigterm_waits_for_all(tiny, story):
    golden = tiny[1]
    with Server("http", "demo", str(tiny[0])) as server:
        long = {"stream": True, "ignore_eos": True, "temperature": 1, "n": 4, "max_tokens": 500}
        length = golden["config"]["max_position_embeddings"] - len(golden["sequences"][2]["ids"]) - 1
        short = {"model": "tiny", "prompt": golden["sequences"][2]["ids"], **long, "max_tokens": min(length, 500)}

        def begun(path: str, body: dict):
            context = httpx.stream("POST", f"{server.base}{path}", json=body, timeout=120)
            lines = context.__enter__().iter_lines()
            assert next(lines).startswith("data: ")
            return context, lines

        streams = [begun("/v1/chat/completions", story.request(**long)), begun("/v1/completions", short)]
        server.terminate()
        for context, lines in streams:
            frames = [line for line in lines if line]
            context.__exit__(None, None, None)
            reasons = [choice["finish_reason"] for frame in frames[:-1] for choice in json.loads(frame[6:])["choices"] if choice["finish_reason"]]
            assert frames[-1] == "data: [DONE]" and reasons == ["length"] * 4
        assert server.wait() == 0


def test_ready_when_all_are(tmp_path, capital):
    """The first is in the binary, the second comes from a hub that makes it wait."""
    with Hub("Some-Org/Demo-Model", demo_files()) as hub:
        hub.gate.clear()
        env = {"HF_ENDPOINT": hub.base, "HF_HOME": str(tmp_path), "MODEL": "demo,Some-Org/Demo-Model"}
        planned = run("check", env=env)
        assert planned.process.returncode == 0 and "model: Some-Org/Demo-Model is not on this machine" in planned.stdout
        assert "memory: it is planned when all models are here" in planned.stdout and not kv_bytes(planned.stdout)
        with Server("http", env=env, ready=False) as server:
            wait_for(lambda: any("resolve" in path for path in hub.asked), "the download")
            assert server.ping() == 204
            ask = lambda model: httpx.post(f"{server.base}/v1/chat/completions", json=capital.request(model=model), timeout=60)  # noqa: E731
            refused = ask("demo")
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "model_loading"
            hub.gate.set()
            server.wait_ready()
            for model in ("demo", "Some-Org/Demo-Model", "Demo-Model"):
                assert ask(model).json()["choices"][0]["message"]["content"] == capital.answer
            assert ask("Demo-Model").json()["model"] == "Some-Org/Demo-Model"


def kv_bytes(report: str) -> list[float]:
    return [float(size) * (1 << 20) for size in re.findall(r"KV cache: ([0-9.]+) MiB", report)]


def test_check_plans_them_together(tiny):
    folder = str(tiny[0])
    alone, small = run("check", "demo"), run("check", folder)
    together = run("check", "demo", folder)
    assert together.process.returncode == 0, together.log
    assert together.stdout.index("model: demo from") < together.stdout.index(f"model: {folder} from")
    assert kv_bytes(together.stdout) == kv_bytes(alone.stdout) + kv_bytes(small.stdout), "there is enough for what both can use"
    given = run("check", "--model", "demo", "--model", folder, "--kv-cache-gb", "0.03")
    one, other = kv_bytes(given.stdout)
    assert one + other <= 0.03 * GIB and min(one, other) > 0.012 * GIB, "half each"
    # Either would fit in by itself.
    total = int(re.search(r"memory: [0-9.]+ MiB of ([0-9.]+)\.", given.stdout)[1]) / 1024
    most = run("check", "demo", folder, env={"KV_CACHE_GB": str(total * 1.2)})
    assert most.process.returncode == 1 and f"demo: KV_CACHE_GB={total * 1.2}" in most.stdout and "other models of" in most.stdout, most.log


def test_what_cannot_be_is_refused_by_name(tiny, tmp_path):
    folder = str(tiny[0])
    twin = tmp_path / "tiny"
    twin.symlink_to(tiny[0])
    for arguments, env, words in [
        (["check"], {"SERVED_MODEL_NAME": "one"}, "SERVED_MODEL_NAME: 1 for 2 models"),
        (["check"], {"TOKENIZER": "/x"}, "TOKENIZER: MODEL names several models"),
        (["check"], {"REVISION": "abc"}, "REVISION: MODEL names several models"),
        (["bench", "--prompt-tokens", "4"], {}, f"MODEL: bench takes one model; name one of demo, {folder}"),
        (["http", "--port", "0"], {"MODEL": f"{folder},{twin}"}, 'MODEL: two models would be served as "tiny"'),
        (["http", "--port", "0"], {"MODEL": "demo,/no/such/model", "HF_HUB_OFFLINE": "1"}, "/no/such/model: "),
        (["http", "--port", "0"], {"MAX_MODEL_LEN": "1024"}, f"{folder}: MAX_MODEL_LEN=1024 is more than the"),
        (["check"], {"MODEL": '["demo", 1]'}, "MODEL: begins like a JSON list"),
        (["check"], {"MODEL": " , "}, "names no model"),
    ]:
        program = run(*arguments, env={"MODEL": f"demo,{folder}", **env})
        assert program.process.returncode == 1 and words in program.log, program.log


def test_a_file_of_requests(tiny, tmp_path, capital):
    golden = tiny[1]
    lines = [
        {"custom_id": str(number), "url": "/v1/completions", "body": after(golden["sequences"][number % 3])}
        if number % 2
        else {"custom_id": str(number), "url": "/v1/chat/completions", "body": capital.request(model="demo")}
        for number in range(20)
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    program = run("run-batch", "-i", str(source), "-o", str(target), "--model", "demo", "--model", str(tiny[0]))
    assert program.process.returncode == 0, program.log
    for line in map(json.loads, target.read_text().splitlines()):
        number, body = int(line["custom_id"]), line["response"]["body"]
        if number % 2:
            expect_golden(body, golden["sequences"][number % 3], golden["config"]["vocab_size"])
        else:
            assert body["choices"][0]["message"]["content"] == capital.answer
