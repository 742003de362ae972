"""`run-batch`, and batches as jobs."""
from __future__ import annotations

import json
import time

from harness import questions
from harness.program import Program, binary, run, wait_for

ASKED = ["capital-france", "story", "complete-fox"]


def line(name: str) -> dict:
    question = questions.BY_NAME[name]
    url = "/v1/chat/completions" if "messages" in question.body else "/v1/completions"
    most = 400 if "messages" in question.body else 50
    return {"custom_id": name, "method": "POST", "url": url, "body": {**question.body, "temperature": 0, "max_tokens": most}}


def long(number: int) -> dict:
    body = {"prompt": "Once", "ignore_eos": True, "max_tokens": 300}
    return {"custom_id": f"long-{number}", "method": "POST", "url": "/v1/completions", "body": body}


def written(path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def batch(tmp_path, lines: list[str], within: float = 120) -> Program:
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    return run("run-batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--model", "demo", within=within)


def test_every_line_is_answered(tmp_path):
    program = batch(tmp_path, [json.dumps(line(name)) for name in ASKED])
    assert program.process.returncode == 0, program.log
    answers = {answer["custom_id"]: answer for answer in written(tmp_path / "out.jsonl")}
    for name in ASKED:
        response = answers[name]["response"]
        assert response["status_code"] == 200 and answers[name]["error"] is None
        assert questions.text(response["body"]) == questions.BY_NAME[name].answer


def test_broken_lines_stop_nothing(tmp_path):
    lines = ["{broken", json.dumps(line(ASKED[0])), json.dumps({**line(ASKED[0]), "custom_id": "t", "url": "/v1/nothing"}), json.dumps(line(ASKED[0]))]
    assert batch(tmp_path, lines).process.returncode == 1
    answers = written(tmp_path / "out.jsonl")
    by_line = {answer["error"]["line"]: answer["error"]["code"] for answer in answers if answer["error"]}
    assert by_line == {1: "invalid_json_line", 4: "duplicate_custom_id"}
    assert {answer["custom_id"]: answer["response"]["status_code"] for answer in answers if answer["response"]} == {ASKED[0]: 200, "t": 404}
    # Nothing is done again, and what had failed still counts.
    assert batch(tmp_path, lines).process.returncode == 1
    assert len(written(tmp_path / "out.jsonl")) == len(answers)


def test_a_killed_run_is_taken_up(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(long(number)) + "\n" for number in range(60)))
    arguments = ["run-batch", "-i", str(source), "-o", str(output), "--model", "demo", "--max-concurrency", "2"]
    program = Program([binary(), *arguments])
    wait_for(lambda: output.exists() and output.read_text().count("\n") >= 2, "the first answers")
    program.kill()
    before = output.read_text().count("\n")
    assert before < 60, "killed too late to show anything"
    with output.open("a") as file:
        file.write('{"id": "batch_req_half", "custom_id": "long-5')
    again = run(*arguments, within=300)
    assert again.process.returncode == 0, again.log
    answers = written(output)
    assert sorted(answer["custom_id"] for answer in answers) == sorted(f"long-{number}" for number in range(60))
    assert f"{before} before" in again.stdout


def test_what_cannot_be_run(tmp_path):
    (tmp_path / "in.jsonl").write_text("")
    (tmp_path / "other.txt").write_text("not a batch\n")
    for arguments in (["-i", "missing", "-o", "out"], ["-i", "in.jsonl", "-o", "in.jsonl"], ["-i", "in.jsonl", "-o", "other.txt"]):
        program = run("run-batch", *arguments, "--model", "demo", cwd=tmp_path)
        assert program.process.returncode == 1, program.log
    assert (tmp_path / "other.txt").read_text() == "not a batch\n"
    assert run("run-batch", "-i", "in.jsonl", cwd=tmp_path).process.returncode == 2
    assert run("run-batch", "-i", "in.jsonl", "-o", "out", "--model", "demo", cwd=tmp_path).process.returncode == 0, "nothing to do"


def test_a_batch_as_a_job(http, server):
    lines = [line(name) for name in ASKED]
    for given in ({"batch": lines}, {"input_file_content": "\n".join(json.dumps(one) for one in lines)}):
        job = http.post(f"{server.endpoint}/runsync", json={"input": given}).json()
        assert [answer["custom_id"] for answer in job["output"]] == ASKED, job
        assert questions.text(job["output"][1]["response"]["body"]) == questions.BY_NAME["story"].answer
    job = http.post(f"{server.endpoint}/run", json={"input": {"batch": lines, "stream": True}}).json()["id"]
    streamed, end = [], time.monotonic() + 60
    while time.monotonic() < end:
        part = http.get(f"{server.endpoint}/stream/{job}").json()
        streamed += [item["output"] for item in part["stream"]]
        if part["status"] == "COMPLETED":
            break
    assert sorted(answer["custom_id"] for answer in streamed) == sorted(ASKED)
