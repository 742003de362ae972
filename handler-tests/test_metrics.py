"""`/metrics`: what Prometheus would scrape."""
from __future__ import annotations

import re

import pytest

from harness.program import Server, wait_for

LINE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)\{(.*)\} (\S+)$')


def scrape(http, server) -> dict[str, float]:
    """Every line of the text as `name{label="value",…}` without the model's name."""
    answer = http.get(f"{server.base}/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = {}
    for line in answer.text.splitlines():
        if line.startswith("#"):
            continue
        name, labels, value = LINE.match(line).groups()
        labels = [label for label in labels.split(",") if not label.startswith("model_name=")]
        values[name + (f"{{{','.join(labels)}}}" if labels else "")] = float(value)
    return values


@pytest.fixture(scope="module")
def quiet():
    """A server that only these tests use."""
    with Server("http", "--model", "demo", "--api-key", "secret", "--metrics-prefix", "vllm:") as server:
        yield server


def test_counts_and_times(http, quiet, capital):
    before = scrape(http, quiet)
    assert before["vllm:num_requests_running"] == before["vllm:num_requests_waiting"] == 0
    answers = [
        http.post(f"{quiet.base}/v1/chat/completions", json=capital.request(), headers={"authorization": "Bearer secret"}).json()
        for _ in range(3)
    ]
    after = scrape(http, quiet)
    grown = {name: after[name] - before[name] for name in after}
    assert grown["vllm:prompt_tokens_total"] == sum(answer["usage"]["prompt_tokens"] for answer in answers)
    tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
    assert grown["vllm:generation_tokens_total"] == tokens
    assert grown['vllm:request_success_total{finished_reason="stop"}'] == 3
    assert grown["vllm:time_to_first_token_seconds_count"] == 3
    assert grown["vllm:inter_token_latency_seconds_count"] == tokens - 3
    assert grown["vllm:e2e_request_latency_seconds_sum"] >= grown["vllm:time_to_first_token_seconds_sum"] > 0
    assert grown["vllm:prefix_cache_queries_total"] == grown["vllm:prompt_tokens_total"]
    cached = sum(answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers)
    assert grown["vllm:prefix_cache_hits_total"] == cached


def test_each_ended_request_is_in_every_histogram(http, quiet, capital):
    """Those that a stop string has ended, too: they are no cancelled ones."""
    headers = {"authorization": "Bearer secret"}
    request = {"prompt": "Once upon a time", "max_tokens": 400, "n": 2, "temperature": 1, "ignore_eos": True}
    before = scrape(http, quiet)
    first = http.post(f"{quiet.base}/v1/completions", json={**request, "seed": 1}, headers=headers).json()
    text = first["choices"][0]["text"]
    stop = next(letter for letter in text[5:] if letter.isascii() and letter.isalpha())
    second = http.post(f"{quiet.base}/v1/completions", json={**request, "seed": 1, "n": 1, "stop": stop}, headers=headers).json()
    assert (second["choices"][0]["finish_reason"], second["choices"][0]["text"]) == ("stop", text[: text.index(stop)])

    def grown() -> dict[str, float]:
        after = scrape(http, quiet)
        return {name: after[name] - before[name] for name in after}

    wait_for(lambda: grown()['vllm:request_success_total{finished_reason="stop"}'] == 1, "the stop string's sequence to be counted")
    grown = grown()
    assert grown['vllm:request_success_total{finished_reason="length"}'] == 2
    assert grown['vllm:request_success_total{finished_reason="abort"}'] == 0
    times = ("prefill_time", "decode_time", "inference_time", "time_per_output_token")
    for name in ("e2e_request_latency_seconds", "request_prompt_tokens", "request_generation_tokens", "request_params_max_tokens",
                 *(f"request_{name}_seconds" for name in times)):
        assert grown[f"vllm:{name}_count"] == 3, name
    both = grown["vllm:request_prefill_time_seconds_sum"] + grown["vllm:request_decode_time_seconds_sum"]
    assert grown["vllm:request_inference_time_seconds_sum"] == pytest.approx(both)
    # Of two requests, one with two choices.
    assert (grown["vllm:request_params_n_count"], grown["vllm:request_params_n_sum"]) == (2, 3)


def test_load(http, quiet):
    assert http.get(f"{quiet.base}/load").json() == {"server_load": 0}
    body = {"prompt": "Once", "max_tokens": 900, "n": 16, "temperature": 1, "ignore_eos": True, "stream": True}
    with http.stream("POST", f"{quiet.base}/v1/completions", json=body, headers={"authorization": "Bearer secret"}) as stream:
        pieces = stream.iter_text()
        next(pieces)
        assert http.get(f"{quiet.base}/load").json() == {"server_load": 16}
    wait_for(lambda: http.get(f"{quiet.base}/load").json() == {"server_load": 0}, "the engine to be idle")


def test_our_own_names_in_serve(http, server):
    values = scrape(http, server)
    assert values["worker_candle_healthy"] == 1
    assert 0 <= values["worker_candle_kv_cache_usage_perc"] <= 1


def test_histograms_are_cumulative(http, quiet):
    values = scrape(http, quiet)
    buckets = [value for name, value in values.items() if name.startswith("vllm:step_time_seconds_bucket")]
    assert buckets == sorted(buckets) and buckets[-1] == values["vllm:step_time_seconds_count"]


def test_a_prefix_that_is_none(capital):
    from harness.program import run

    program = run("check", "--model", "demo", "--metrics-prefix", "a b")
    assert program.process.returncode != 0 and "--metrics-prefix" in program.log
