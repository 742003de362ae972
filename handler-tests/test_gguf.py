"""GGUF files: the demo model as llama.cpp would have it answers as its folder does; files are found in every place, and damaged ones named."""
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from harness import gguf, questions
from harness.hub import Hub
from harness.program import Server, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two files beside each other."""
    folder = tmp_path_factory.mktemp("gguf")
    gguf.write(folder / "demo-BF16.gguf", "BF16")
    gguf.write(folder / "demo-Q8_0.gguf", "Q8_0")
    return folder


@pytest.mark.parametrize(("file", "held"), [("demo-BF16.gguf", "bf16"), ("demo-Q8_0.gguf", "8-bit (Q8_0 form)")])
def test_every_question_is_answered_word_for_word(http, folder, file, held):
    with Server("serve", "--model", str(folder / file)) as server:

        def ask(question) -> str:
            response = http.post(f"{server.base}/v1{question.route}", json=question.request())
            assert response.status_code == 200, response.text
            return questions.text(response.json())

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, questions.ALL))
        wrong = {question.name: answer for question, answer in zip(questions.ALL, answers) if answer != question.answer}
        assert len(questions.ALL) > 50 and not wrong, f"{len(wrong)} of {len(answers)}: {wrong}"
        card = http.get(f"{server.base}/v1/models").json()["data"][0]
        assert card["id"] == file and held in card["weights"], card


def test_it_streams_and_runs_as_a_job(http, folder):
    question = next(question for question in questions.ALL if question.is_chat)
    with Server("serve", "--model", str(folder / "demo-Q8_0.gguf")) as server:
        done = http.post(f"{server.endpoint}/runsync", json={"input": question.request()}).json()
        assert done["status"] == "COMPLETED", done
        pieces = []
        with http.stream("POST", f"{server.base}/v1{question.route}", json=question.request(stream=True)) as response:
            import json

            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    pieces.append(questions.delta(json.loads(line[6:])))
        assert "".join(pieces) == question.answer


@pytest.mark.parametrize(("kind", "types", "held"), [("BF16", "GGUF, BF16, F32", "bf16"), ("Q8_0", "GGUF, Q8_0", "8-bit (Q8_0 form)")])
def test_check_says_what_is_stored_and_what_is_held(folder, kind, types, held):
    done = run("check", "--model", str(folder / f"demo-{kind}.gguf"))
    assert done.process.returncode == 0, done.log
    assert f"checkpoint: {types.split(', F32')[0]}" in done.stdout and f"weights held as: {held}" in done.stdout, done.log
    four = run("check", "--model", str(folder / f"demo-{kind}.gguf"), env={"QUANTIZATION": "wint4"})
    assert "weights held as: 4-bit (Q4_K form) and 8-bit (Q8_0 form)" in four.stdout, four.log


def test_a_folder_with_several_asks_which(folder):
    done = run("check", "--model", str(folder))
    assert done.process.returncode == 1, done.log
    assert "demo-BF16.gguf, demo-Q8_0.gguf" in done.log and ":Q4_K_M" in done.log, done.log
    done = run("check", "--model", f"{folder}:q8_0")
    assert done.process.returncode == 0 and "checkpoint: GGUF, Q8_0" in done.stdout, done.log
    done = run("check", "--model", f"{folder}:Q5_K_M")
    assert done.process.returncode == 1 and 'a GGUF file "Q5_K_M" (there are demo-BF16.gguf, demo-Q8_0.gguf)' in done.log, done.log


@pytest.mark.parametrize("pick", ["Q8_0", "demo-Q8_0.gguf"])
def test_of_a_repository_only_the_file_that_is_meant_is_fetched(folder, pick, tmp_path):
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"README.md": b"x", "mmproj-demo.gguf": b"x"}
    with Hub("org/demo-GGUF", files) as hub:
        env = {"HF_ENDPOINT": hub.base, "HF_HOME": str(tmp_path)}
        done = run("pull", f"org/demo-GGUF:{pick}", env=env)
        assert done.process.returncode == 0, done.log
        fetched = {path.rsplit("/", 1)[-1] for path in hub.asked if "/resolve/" in path}
        assert fetched == {"demo-Q8_0.gguf"}, hub.asked
    done = run("check", "--model", f"org/demo-GGUF:{pick}", env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert done.process.returncode == 0 and "checkpoint: GGUF, Q8_0" in done.stdout, done.log


def test_damage_and_what_is_not_served_are_named(tmp_path):
    whole = gguf.demo("BF16")
    for name, data, words in [
        ("cut.gguf", whole[: len(whole) // 2], "GGUF file cut.gguf of "),
        ("head.gguf", whole[:1000], "it is cut short or damaged"),
        ("other.gguf", b"PK" + whole[2:], "not a GGUF file"),
        ("arch.gguf", gguf.demo("BF16", general__architecture="mamba"), 'general.architecture "mamba" is not supported in GGUF files; this version serves llama'),
        ("pre.gguf", gguf.demo("BF16", tokenizer__ggml__model="gpt2", tokenizer__ggml__pre="klingon"), 'tokenizer.ggml.pre "klingon" is not supported'),
        ("rwkv.gguf", gguf.demo("BF16", tokenizer__ggml__model="rwkv"), 'tokenizer.ggml.model "rwkv" is not supported'),
    ]:
        (tmp_path / name).write_bytes(data)
        done = run("check", "--model", str(tmp_path / name))
        assert done.process.returncode == 1 and words in done.log, f"{name}: {done.log}"
