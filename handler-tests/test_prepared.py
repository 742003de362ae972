"""PREPARED_CACHE: the second start maps what the first one wrote, and answers the same."""
from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from harness import questions
from harness.program import REPOSITORY, Server, run, wait_for

DEMO = REPOSITORY / "handler-tests" / "fixtures" / "demo-model"
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The demo model in a folder; a small one, which has a copy only where a folder is named for it."""
    folder = tmp_path_factory.mktemp("model")
    for name in MODEL_FILES:
        shutil.copy(DEMO / name, folder)
    return folder


def answers(server, http) -> list[str]:
    asked = [questions.BY_NAME[name] for name in list(questions.BY_NAME)[:8]]
    return [questions.text(http.post(f"{server.base}/v1{question.route}", json=question.request()).json()) for question in asked]


def expected() -> list[str]:
    return [question.answer for question in list(questions.BY_NAME.values())[:8]]


@pytest.mark.parametrize("strategy", ["BF16", "wint8", "wint4"])
def test_the_second_start_maps_the_copy_of_the_first(http, model, tmp_path, strategy):
    settings = {"PREPARED_CACHE": str(tmp_path / "new" / "folder"), "QUANTIZATION": strategy, "SERVED_MODEL_NAME": "demo"}
    with Server("http", "--model", str(model), env=settings) as first:
        assert answers(first, http) == expected()
        copy = wait_for(lambda: next(iter((tmp_path / "new" / "folder").glob("*.prepared")), None), "the copy")
        log = wait_for(lambda: "prepared copy" in first.log and first.log, "its line in the log")
    assert str(copy) in log and "converts nothing" in log
    with Server("http", "--model", str(model), env=settings) as second:
        assert answers(second, http) == expected()
    assert f"weights mapped from the prepared copy {copy}" in second.log
    assert [str(copy)] == [str(path) for path in copy.parent.iterdir()]
    seen = run("check", "--model", str(model), env=settings)
    assert f"prepared copy: {copy} (" in seen.stdout, seen.log


def test_a_damaged_copy_costs_nothing_but_time(http, model, tmp_path):
    settings = {"PREPARED_CACHE": str(tmp_path), "SERVED_MODEL_NAME": "demo"}
    with Server("http", "--model", str(model), env=settings):
        copy = wait_for(lambda: next(iter(tmp_path.glob("*.prepared")), None), "the copy")
    whole = copy.read_bytes()
    copy.write_bytes(whole[:5000] + b"damage" + whole[5006:])
    with Server("http", "--model", str(model), env=settings) as server:
        assert answers(server, http) == expected()
        wait_for(lambda: copy.read_bytes() == whole, "a new copy")
    assert f"the prepared copy {copy} is not used: part 0 of" in server.log


def test_a_folder_that_cannot_be_made(http, model, tmp_path):
    (tmp_path / "file").write_text("")
    settings = {"PREPARED_CACHE": str(tmp_path / "file" / "below"), "SERVED_MODEL_NAME": "demo"}
    with Server("http", "--model", str(model), env=settings) as server:
        assert answers(server, http) == expected()
        wait_for(lambda: "no prepared copy" in server.log, "a line in the log")


def test_off(model, tmp_path):
    with Server("http", "--model", str(model), env={"PREPARED_CACHE": "off", "SERVED_MODEL_NAME": "demo"}) as server:
        assert "prepared copy" not in server.log
    assert "prepared copy: none" in run("check", "--model", str(model), "--prepared-cache", "off").stdout


def test_bench_writes_none_beside_what_it_measures(model, tmp_path):
    done = run("bench", "--model", str(model), "--prompt-tokens", "8", "--output-tokens", "64", "--prepared-cache", str(tmp_path), within=240)
    assert done.process.returncode == 0 and not list(tmp_path.iterdir()), done.log


def test_bench_measures_both_kinds_of_start(model, tmp_path):
    done = run("bench", "--model", str(model), "--cold-start", "--prepared-cache", str(tmp_path), within=240)
    assert done.process.returncode == 0, done.log
    assert "first start:" in done.stdout and "with a prepared copy:" in done.stdout and done.stdout.count("reading:") == 2
