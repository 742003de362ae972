"""Commands, one-shot jobs, exit codes."""
from __future__ import annotations

import json
import os
import subprocess

import httpx
import pytest

from harness import questions
from harness.program import REPOSITORY, Server, binary, run

DEMO = {"MODEL": "demo"}


def lines(program) -> list:
    return [json.loads(line) for line in program.stdout.splitlines() if line]


def one_shot(given, **env: str):
    return run("--test_input", json.dumps({"input": given}), env={**DEMO, **env})


def test_one_job_from_the_command_line(capital):
    done = one_shot(capital.request())
    assert done.process.returncode == 0, done.log
    (output,) = lines(done)
    assert questions.text(output) == capital.answer


def test_a_stream_is_printed_piece_by_piece(story):
    done = one_shot(story.request(stream=True))
    assert done.process.returncode == 0, done.log
    assert "".join(questions.delta(chunk) for chunk in lines(done)) == story.answer
    routed = one_shot({"openai_route": "/v1/chat/completions", "openai_input": story.request(stream=True)})
    assert routed.stdout.rstrip().endswith("data: [DONE]")


def test_one_job_from_a_file(tmp_path, capital):
    (tmp_path / "test_input.json").write_text(json.dumps({"id": "from-file", "input": capital.request()}))
    done = run(env=DEMO, cwd=tmp_path)
    assert done.process.returncode == 0 and questions.text(lines(done)[0]) == capital.answer


def test_the_flag_beats_the_file_and_the_platform(tmp_path, capital):
    (tmp_path / "test_input.json").write_text('{"input": {"messages": []}}')
    env = {**DEMO, "RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1:9/job-take/$ID", "RUNPOD_WEBHOOK_POST_OUTPUT": "http://127.0.0.1:9/job-done/$ID"}
    done = run("--test_input", json.dumps({"input": capital.request()}), env=env, cwd=tmp_path)
    assert done.process.returncode == 0 and questions.text(lines(done)[0]) == capital.answer


def test_the_shipped_test_input_runs():
    done = run(env=DEMO, cwd=REPOSITORY)
    assert done.process.returncode == 0, done.log
    assert lines(done)


@pytest.mark.parametrize("job", ["{}", '{"input": null}', "[]", "7", "{not json", '{"input": {}}', '{"input": {"messages": []}}', '{"input": {"prompt": 7}}'])
def test_a_job_that_fails(job, tmp_path):
    done = run("--test_input", job, env=DEMO)
    assert done.process.returncode == 1 and "panicked" not in done.log and done.log.strip()
    (tmp_path / "test_input.json").write_text(job)
    assert run(env=DEMO, cwd=tmp_path).process.returncode == 1


def test_a_failed_job_prints_its_error():
    done = one_shot({"messages": []})
    (error,) = lines(done)
    assert (error["error"]["status"], error["error"]["param"]) == (400, "messages")


def test_nothing_to_do():
    done = run()
    assert done.process.returncode == 2
    assert "Usage" in done.log and "serve" in done.log


def test_help_and_version():
    done = run("--help")
    assert done.process.returncode == 0
    for word in ("serve", "gateway", "http", "pull", "bench", "check", "--model", "--max-model-len", "--port"):
        assert word in done.stdout
    assert run("--version").stdout.startswith("worker-candle ")
    assert run("serve", "--help").process.returncode == 0


def test_flags_and_commands_that_do_not_exist():
    for arguments in (["--no-such-flag"], ["frobnicate"], ["serve", "--no-such-flag"], ["pull"]):
        done = run(*arguments)
        assert done.process.returncode == 2 and done.stderr, arguments


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MAX_MODEL_LEN", "many"),
        ("MAX_NUM_SEQS", "0"),
        ("MAX_CONCURRENCY", "-1"),
        ("PORT", "99999"),
        ("KV_CACHE_GB", "x"),
        ("NATIVE_OUTPUT_FORMAT", "xml"),
        ("ANY_MODEL_NAME", "perhaps"),
        ("RUNPOD_LOG_LEVEL", "loud"),
        ("OVERRIDE_GENERATION_CONFIG", "{"),
        ("TENSOR_PARALLEL_SIZE", "0"),
        ("PIPELINE_PARALLEL_SIZE", "2"),
        ("QUANTIZATION", "wint2"),
        ("BLOCK_SIZE", "7"),
    ],
)
@pytest.mark.parametrize("mode", ["serve", "check"])
def test_a_bad_setting_stops_the_start_and_is_named(mode, variable, value):
    done = run(mode, env={**DEMO, variable: value})
    assert done.process.returncode == 1 and variable in done.stderr + done.stdout, done.log


def test_all_mistakes_are_told_at_once():
    done = run("serve", env={**DEMO, "MAX_MODEL_LEN": "many", "ANY_MODEL_NAME": "perhaps"})
    assert done.process.returncode == 1 and "MAX_MODEL_LEN" in done.stderr and "ANY_MODEL_NAME" in done.stderr


def test_empty_and_none_are_unset():
    done = run("check", env={**DEMO, "MAX_MODEL_LEN": "", "MAX_NUM_SEQS": "None", "QUANTIZATION": ""})
    assert done.process.returncode == 0, done.log


def test_settings_without_effect_are_mentioned_once():
    done = run("check", env={**DEMO, "ENFORCE_EAGER": "true", "SWAP_SPACE": "4"})
    assert done.process.returncode == 0 and done.log.count("ENFORCE_EAGER") == 1 and done.log.count("SWAP_SPACE") == 1


def test_check():
    done = run("check", "--model", "demo", "--max-model-len", "512", env={"HF_TOKEN": "hf_secret_token", "API_KEY": "secret-key"})
    assert done.process.returncode == 0, done.log
    assert "512" in done.stdout and "demo" in done.stdout
    assert "hf_secret_token" not in done.log and "secret-key" not in done.log


def test_a_model_that_cannot_be_had_offline():
    for arguments in (["serve"], ["http", "--port", "0"], ["check"], ["--test_input", '{"input":{"prompt":"x"}}']):
        done = run(*arguments, env={"MODEL": "nobody/no-such-model", "HF_HUB_OFFLINE": "1", "PORT": "0"})
        assert done.process.returncode == 1, arguments
        assert "nobody/no-such-model" in done.log and "--model demo" in done.log and "panicked" not in done.log


def test_bench():
    done = run("bench", "--model", "demo", "--prompt-tokens", "32", "--output-tokens", "8", "--concurrency", "1,2", "--json", within=240)
    assert done.process.returncode == 0, done.log
    rows = lines(done)
    keys = (
        "prompt_tokens output_tokens concurrency prefill_tok_s decode_tok_s ttft_ms itl_ms peak_rss_mb limit_share weights threads device"
    ).split()
    assert [row["concurrency"] for row in rows] == [1, 2]
    assert all(set(keys) <= set(row) and row["decode_tok_s"] > 0 and set(row["ttft_ms"]) == {"p50", "p95", "p99"} for row in rows)


def test_bench_of_more_sequences_than_rows():
    env = {"MAX_NUM_SEQS": "2", "MAX_WAITING": "3"}
    arguments = ("bench", "--model", "demo", "--prompt-tokens", "32", "--output-tokens", "8", "--json", "--concurrency")
    done = run(*arguments, "5", env=env, within=240)
    assert done.process.returncode == 0, done.log
    assert lines(done)[0]["concurrency"] == 5 and lines(done)[0]["limit_share"] > 0
    done = run(*arguments, "1,6", env=env, within=240)
    assert done.process.returncode == 1
    assert "--concurrency 6" in done.log and "MAX_NUM_SEQS=2" in done.log and "MAX_WAITING=3" in done.log


def test_bench_of_a_server(server):
    done = run("bench", "--model", "demo", "--url", server.base, "--prompt-tokens", "32", "--output-tokens", "512", "--concurrency", "2", "--json", within=240)
    assert done.process.returncode == 0, done.log
    # So many tokens are not all in the first piece, however busy the machine is.
    assert lines(done)[0]["decode_tok_s"] > 0


def test_cold_start():
    done = run("bench", "--model", "demo", "--cold-start", within=240)
    assert done.process.returncode == 0 and done.stdout.strip(), done.log


def test_cold_start_measures_what_the_flags_ask_for():
    """A flag that no server can start with is seen by the server that is started."""
    done = run("bench", "demo", "--cold-start", "--kv-cache-gb", "100000", within=240)
    assert done.process.returncode == 1 and "KV_CACHE_GB=100000" in done.log, done.log
    done = run("bench", "demo", "--cold-start", "--json", "--quantization", "wint4", "--api-key", "one", "--api-key", "two", within=240)
    assert done.process.returncode == 0 and lines(done)[0]["cold_start"]["first_token_ms"]["median"] > 0, done.log


def test_a_reader_that_has_seen_enough():
    environment = {"PATH": os.environ["PATH"], "HOME": "/tmp", **DEMO}
    command = f"set -o pipefail; '{binary()}' check --device cpu | head -1"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1 and done.stderr == "", done
    # Many times more lines than a pipe holds at once.
    job = json.dumps({"input": {"prompt": "Once", "max_tokens": 900, "ignore_eos": True, "stream": True, "n": 8, "temperature": 1}})
    command = f"set -o pipefail; '{binary()}' --test_input '{job}' | head -1"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "panicked" not in done.stderr, done


def test_a_plain_model_several_names_and_several_keys():
    with Server("serve", "demo", "--served-model-name", "a", "b", "--api-key", "one", "--api-key", "two") as server:
        for key, name in (("one", "a"), ("two", "b")):
            headers = {"authorization": f"Bearer {key}"}
            answer = httpx.post(f"{server.base}/v1/completions", json={"model": name, "prompt": "Once", "max_tokens": 1}, headers=headers, timeout=60)
            assert answer.status_code == 200, answer.text
        assert httpx.get(f"{server.base}/v1/models", headers={"authorization": "Bearer three"}).status_code == 401
