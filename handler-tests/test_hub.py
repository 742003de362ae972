"""Where models come from: a folder, the cache, the platform's model store, a hub."""
from __future__ import annotations

import httpx
import pytest

from harness import questions
from harness.hub import COMMIT, Hub, demo_files
from harness.program import Server, run

NAME = "Some-Org/Demo-Model"


@pytest.fixture
def hub():
    with Hub(NAME, demo_files()) as hub:
        yield hub


def env(hub: Hub, tmp_path, **more: str) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.base, "HF_HOME": str(tmp_path / "hf"), **more}


def answers(server: Server, question, name: str | None = None) -> None:
    models = httpx.get(f"{server.base}/v1/models", timeout=60).json()["data"]
    if name:
        assert models[0]["id"] == name
    answer = httpx.post(f"{server.base}/v1/chat/completions", json=question.request(), timeout=60)
    assert questions.text(answer.json()) == question.answer


def test_pull_then_serve_offline(hub, tmp_path, capital):
    done = run("pull", NAME, env=env(hub, tmp_path))
    assert done.process.returncode == 0, done.log
    asked = len(hub.asked)
    with Server("http", "--model", NAME, env=env(hub, tmp_path, HF_HUB_OFFLINE="1")) as server:
        answers(server, capital, NAME)
    assert len(hub.asked) == asked, "offline asks nobody"


def test_start_downloads_what_is_missing(hub, tmp_path, capital):
    with Server("http", "--model", NAME, env=env(hub, tmp_path)) as server:
        answers(server, capital, NAME)


def test_a_download_that_breaks_goes_on(hub, tmp_path, capital):
    hub.cuts.add("model.safetensors")
    with Server("http", "--model", NAME, env=env(hub, tmp_path)) as server:
        answers(server, capital, NAME)
    assert not hub.cuts, "it did break"


def test_a_model_from_modelscope(hub, tmp_path, capital):
    settings = {"MODEL_SOURCE": "modelscope", "MODELSCOPE_ENDPOINT": hub.base, "HF_HOME": str(tmp_path / "hf")}
    hub.cuts.add("model.safetensors")
    with Server("http", "--model", NAME, env=settings) as server:
        answers(server, capital, NAME)
    assert not hub.cuts, "it did break"
    assert all("/models/" in path for path in hub.asked), hub.asked
    asked = len(hub.asked)
    with Server("http", "--model", NAME, env={**settings, "HF_HUB_OFFLINE": "1"}) as server:
        answers(server, capital, NAME)
    assert len(hub.asked) == asked, "offline asks nobody"


def test_pull_into_a_folder(hub, tmp_path, capital):
    folder = tmp_path / "model"
    done = run("pull", NAME, "--to", str(folder), env=env(hub, tmp_path))
    assert done.process.returncode == 0, done.log
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == hub.files
    with Server("http", "--model", str(folder), env={"HF_HUB_OFFLINE": "1"}) as server:
        answers(server, capital)


def test_a_private_model(tmp_path, capital):
    with Hub(NAME, demo_files(), token="hf_very_secret") as hub:
        refused = run("pull", NAME, env=env(hub, tmp_path))
        assert refused.process.returncode == 1 and "HF_TOKEN" in refused.log
        wrong = run("pull", NAME, env=env(hub, tmp_path, HF_TOKEN="hf_wrong_secret"))
        assert wrong.process.returncode == 1 and "hf_wrong_secret" not in wrong.log
        done = run("pull", NAME, env=env(hub, tmp_path, HF_TOKEN="hf_very_secret"))
        assert done.process.returncode == 0 and "hf_very_secret" not in done.log


def test_a_model_that_is_not_there(hub, tmp_path):
    done = run("http", "--model", "Some-Org/Nothing", "--port", "0", env=env(hub, tmp_path))
    assert done.process.returncode == 1 and "Some-Org/Nothing" in done.log
    assert "panicked" not in done.log


def test_a_hub_that_is_not_there(tmp_path):
    done = run("pull", NAME, env={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)})
    assert done.process.returncode == 1 and NAME in done.log


def test_a_model_without_its_weights(tmp_path):
    files = demo_files()
    del files["model.safetensors"]
    with Hub(NAME, files) as hub:
        done = run("pull", NAME, env=env(hub, tmp_path))
        assert done.process.returncode == 1 and "safetensors" in done.log


@pytest.mark.parametrize("stored", ["models--some-org--demo-model", "models--Some-Org--Demo-Model"], ids=["lower", "exact"])
@pytest.mark.parametrize("refs", [True, False], ids=["refs", "no-refs"])
def test_the_platform_s_model_store(tmp_path, capital, stored, refs):
    """RunPod's cache on the network volume may lower-case the repository's name; clients know it by its own."""
    repository = tmp_path / "huggingface-cache/hub" / stored
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for name, content in demo_files().items():
        blob = repository / "blobs" / name.replace(".", "-")
        blob.write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
    if refs:
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text(COMMIT)
    with Server("http", "--model", NAME, env={"BASE_PATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}) as server:
        answers(server, capital, NAME)


def test_a_broken_model_is_named(tmp_path):
    for name, content in demo_files().items():
        (tmp_path / name).write_bytes(content[:1000] if name == "model.safetensors" else content)
    done = run("http", "--model", str(tmp_path), "--port", "0")
    assert done.process.returncode == 1 and "model.safetensors" in done.log and "panicked" not in done.log
