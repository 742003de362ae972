"""A worker on RunPod's own SDK on our `gateway`: it proves the endpoint faithful."""
from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path

import openai
import pytest
import runpod

from harness import questions
from harness.program import Program, Server, binary, wait_for

SCRIPT = Path(__file__).parent / "workers/sdk_worker.py"
HAS_STOP_CHANNEL = tuple(int(part) for part in runpod.version.get_version().split(".")[:2]) >= (1, 10)
numbers = itertools.count(1)


@pytest.fixture(scope="module")
def variables(gateway) -> dict[str, str]:
    """What `gateway` prints for workers to attach with."""
    return dict(re.findall(r"^export (\w+)='(.*)'$", gateway.stdout, re.M))


@pytest.fixture
def attach(gateway, variables):
    """Starts an SDK worker on an endpoint of its own; gives the client's URL of that endpoint and the worker."""
    started = []

    def start(handler: str, concurrency: int = 1, endpoint: str | None = None):
        endpoint = endpoint or f"ep{next(numbers)}"
        env = {name: value.replace("/v2/local/", f"/v2/{endpoint}/") for name, value in variables.items()}
        env.update(
            {"RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true", "RUNPOD_SKIP_GPU_CHECK": "true", "RUNPOD_PING_INTERVAL": "1000", "RUNPOD_POD_ID": f"sdk-{endpoint}"}
        )
        program = Program([sys.executable, str(SCRIPT), handler, str(concurrency)], env, name=f"SDK worker ({handler})")
        started.append(program)
        return f"{gateway.base}/v2/{endpoint}", program

    yield start
    for program in started:
        program.kill()


def finished(http, url: str, job_id: str) -> dict:
    def state():
        status = http.get(f"{url}/status/{job_id}").json()
        return status["status"] not in ("IN_QUEUE", "IN_PROGRESS") and status

    return wait_for(state, f"{job_id} to end")


def streamed(http, url: str, job_id: str) -> list:
    outputs = []
    while True:
        progress = http.get(f"{url}/stream/{job_id}").json()
        outputs += [chunk["output"] for chunk in progress["stream"]]
        if progress["status"] not in ("IN_QUEUE", "IN_PROGRESS") and not progress["stream"]:
            return outputs


def test_gateway_prints_what_workers_need(variables):
    assert set(variables) >= {
        "RUNPOD_WEBHOOK_GET_JOB",
        "RUNPOD_WEBHOOK_POST_OUTPUT",
        "RUNPOD_WEBHOOK_POST_STREAM",
        "RUNPOD_WEBHOOK_PING",
        "RUNPOD_AI_API_KEY",
        "RUNPOD_POD_ID",
    }


def test_plain_handler(http, attach):
    url, _ = attach("plain")
    answer = http.post(f"{url}/runsync", json={"input": {"text": "näïve 🙂"}}).json()
    assert (answer["status"], answer["output"]["echo"]) == ("COMPLETED", "näïve 🙂")
    assert answer["output"]["id"] == answer["id"] and answer["id"].startswith("sync-")
    assert answer["workerId"].startswith("sdk-") and answer["executionTime"] >= 0 and answer["delayTime"] >= 0


def test_handler_that_raises(http, attach):
    url, _ = attach("plain")
    answer = http.post(f"{url}/runsync", json={"input": {"raise": True}}).json()
    assert answer["status"] == "FAILED"
    assert json.loads(answer["error"])["error_message"] == "the handler raised"
    # And goes on working.
    assert http.post(f"{url}/runsync", json={"input": {"text": "x"}}).json()["status"] == "COMPLETED"


def test_handler_that_returns_an_error(http, attach):
    url, _ = attach("plain")
    answer = http.post(f"{url}/runsync", json={"input": {"fail": True}}).json()
    assert (answer["status"], answer["error"], answer["output"]) == ("FAILED", "the handler said no", {"left": 1})


def test_generator(http, attach):
    url, _ = attach("generator")
    job = http.post(f"{url}/run", json={"input": {"count": 5}}).json()
    assert job["status"] == "IN_QUEUE" and not job["id"].startswith("sync-")
    expected = [{"number": number} for number in range(5)]
    assert streamed(http, url, job["id"]) == expected
    assert finished(http, url, job["id"])["output"] == expected


def test_generator_that_raises(http, attach):
    url, _ = attach("generator")
    job = http.post(f"{url}/run", json={"input": {"count": 2, "raise": True}}).json()
    assert streamed(http, url, job["id"]) == [{"number": 0}, {"number": 1}]
    ended = finished(http, url, job["id"])
    assert ended["status"] == "FAILED" and "the generator raised" in ended["error"]


def test_async_generator_read_by_the_sdk_client(attach, monkeypatch):
    url, _ = attach("async_generator")
    base, endpoint = url.rsplit("/", 1)
    monkeypatch.setattr(runpod, "endpoint_url_base", base)
    job = runpod.Endpoint(endpoint, api_key="any").run({"count": 4})
    pieces = [f"piece {number} é🙂" for number in range(4)]
    assert list(job.stream()) == pieces
    assert job.output(timeout=60) == pieces


def test_several_jobs_at_once(http, attach):
    url, _ = attach("slow", concurrency=4)
    jobs = [http.post(f"{url}/run", json={"input": {"seconds": 2}}).json()["id"] for _ in range(4)]
    times = [finished(http, url, job)["output"] for job in jobs]
    assert max(time["began"] for time in times) < min(time["ended"] for time in times), "all four ran at the same time"


@pytest.mark.skipif(not HAS_STOP_CHANNEL, reason="this SDK has no stop channel")
def test_cancel_reaches_the_worker(http, attach):
    url, worker = attach("slow", concurrency=2)
    job = http.post(f"{url}/run", json={"input": {"seconds": 600}}).json()["id"]
    wait_for(lambda: http.get(f"{url}/status/{job}").json()["status"] == "IN_PROGRESS", "the job to start")
    wait_for(lambda: f"{job} | Started." in worker.stdout or "Jobs in progress: 1" in worker.stdout, "the worker to start it")
    assert http.post(f"{url}/cancel/{job}").json()["status"] == "CANCELLED"
    wait_for(lambda: "Job stopped." in worker.stdout, "the worker to stop it")
    assert http.get(f"{url}/status/{job}").json()["status"] == "CANCELLED"
    assert http.post(f"{url}/runsync", json={"input": {"seconds": 0}}).json()["status"] == "COMPLETED"


def test_openai_clients_reach_an_sdk_worker(gateway, attach):
    url, _ = attach("openai_like", endpoint="theirs")
    with openai.OpenAI(base_url=f"{url}/openai/v1", api_key="any", max_retries=0, timeout=60) as client:
        assert [model.id for model in client.models.list().data] == ["theirs/model"]
        answer = client.chat.completions.create(model="theirs/model", messages=[{"role": "user", "content": "x"}])
        assert answer.choices[0].message.content == "theirs"
        with client.chat.completions.stream(model="theirs/model", messages=[{"role": "user", "content": "x"}]) as stream:
            assert stream.get_final_completion().choices[0].message.content == "theirs"


def test_ours_and_theirs_on_one_endpoint(http, gateway, variables, attach, capital):
    """Both kinds of worker share a queue; each job is answered by one of them, in its own way."""
    url, _ = attach("slow", endpoint="shared")
    ours = {name: value.replace("/v2/local/", "/v2/shared/") for name, value in variables.items()}
    # One job at a time, so that neither can take all of them.
    ours.update({"MODEL": "demo", "MAX_CONCURRENCY": "1", "RUNPOD_POD_ID": "ours"})
    with Program([binary()], ours, name="our worker"):
        wait_for(lambda: http.get(f"{url}/health").json()["workers"]["idle"] == 2, "two workers")
        request = {"input": {**capital.request(), "seconds": 0.2}}
        answered = set()
        for _ in range(20):
            jobs = [http.post(f"{url}/run", json=request).json()["id"] for _ in range(4)]
            for ended in [finished(http, url, job) for job in jobs]:
                assert ended["status"] == "COMPLETED", ended
                if ended["workerId"] == "ours":
                    assert questions.text(ended["output"]) == capital.answer
                else:
                    assert ended["workerId"] == "sdk-shared" and ended["output"]["ended"] > 0
                answered.add(ended["workerId"])
            if len(answered) == 2:
                return
    raise AssertionError(f"only {answered} worked")


def test_gateway_routes_v1_by_model_name(gateway, attach):
    attach("openai_like", endpoint="theirs")
    with openai.OpenAI(base_url=f"{gateway.base}/v1", api_key="any", max_retries=0, timeout=60) as client:
        wait_for(lambda: "theirs/model" in [model.id for model in client.models.list().data], "the model to be listed")
        answer = client.chat.completions.create(model="theirs/model", messages=[{"role": "user", "content": "x"}])
        assert answer.choices[0].message.content == "theirs"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="nobody/none", messages=[{"role": "user", "content": "x"}])


def test_jobs_of_a_lost_worker_are_taken_by_another(http, attach, variables):
    """The SDK worker dies with a job in hand; a new one of the same name, as after a restart, must not leave it hanging forever."""
    url, worker = attach("slow", endpoint="lost")
    job = http.post(f"{url}/run", json={"input": {"seconds": 30}, "policy": {"executionTimeout": 5000}}).json()["id"]
    wait_for(lambda: http.get(f"{url}/status/{job}").json()["status"] == "IN_PROGRESS", "the job to start")
    worker.kill()
    assert finished(http, url, job)["status"] == "TIMED_OUT"
    assert http.post(f"{url}/retry/{job}").json()["status"] == "IN_QUEUE"
    attach("plain", endpoint="lost")
    assert finished(http, url, job)["status"] == "COMPLETED"


def test_two_gateways_do_not_know_each_other(http, gateway):
    job = http.post(f"{gateway.base}/v2/x/run", json={"input": {"text": "x"}}).json()["id"]
    with Server("gateway") as other:
        assert http.get(f"{other.base}/v2/x/status/{job}").status_code == 404
    http.post(f"{gateway.base}/v2/x/purge-queue")
