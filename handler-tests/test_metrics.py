"""`/metrics`: what Prometheus would scrape."""
from __future__ import annotations

import re

import pytest

from harness.program import Server

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
