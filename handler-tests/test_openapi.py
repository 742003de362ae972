"""`/openapi.json` and `/docs`: the document is valid, its examples do what they say, and nothing made after it breaks the server."""
from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from harness.program import Server

# Requests that are made up for each operation: few in the suite, more by hand.
EXAMPLES = os.environ.get("SCHEMATHESIS_EXAMPLES", "4")


@pytest.fixture(scope="module")
def document(http, server) -> dict:
    return http.get(f"{server.base}/openapi.json").json()


def operations(document: dict):
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if method in ("get", "post", "delete"):
                yield method, path, operation


def test_the_document_is_valid_at_every_address(http, server, document):
    assert list(OpenAPIV31SpecValidator(document).iter_errors()) == []
    assert len(list(operations(document))) > 25
    for address in (f"{server.base}/openai/openapi.json", f"{server.endpoint}/openai/openapi.json"):
        assert http.get(address).json() == document, address
    job = http.post(f"{server.endpoint}/runsync", json={"input": {"openai_route": "/openapi.json"}}).json()
    assert job["output"] == document


def test_every_example_has_the_status_that_it_states(http, server, document):
    response = http.post(f"{server.base}/v1/responses", json={"input": "Hello", "max_output_tokens": 1}).json()
    model = http.get(f"{server.base}/v1/models").json()["data"][0]["id"]
    made = 0
    for method, path, operation in operations(document):
        address = server.base + path.replace("{model}", model).replace("{id}", response["id"])
        if "requestBody" not in operation:
            if method == "get":
                assert http.get(address).status_code == 200, path
            continue
        for name, example in operation["requestBody"]["content"]["application/json"]["examples"].items():
            answer = http.post(address, json=example["value"])
            assert answer.status_code == example["x-status"], (path, name, answer.text)
            assert str(answer.status_code) in operation["responses"], (path, name)
            made += 1
    assert made > 25


def test_the_page_needs_nothing_else(http, server):
    for address in (f"{server.base}/docs", f"{server.base}/openai/docs"):
        page = http.get(address)
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        # No address of another host, but for links that are followed by hand.
        assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page.text), "the page loads from elsewhere"


def test_open_where_the_rest_wants_a_key(http):
    with Server("http", "--model", "demo", env={"API_KEY": "k"}) as server:
        assert http.get(f"{server.base}/v1/models").status_code == 401
        for path in ("/openapi.json", "/docs", "/openai/docs"):
            assert http.get(server.base + path).status_code == 200, path


def test_no_request_made_after_the_document_breaks_the_server(tmp_path):
    """More by `SCHEMATHESIS_EXAMPLES=100`."""
    pytest.importorskip("schemathesis", reason="wants Python 3.10")
    with Server("http", "--model", "demo", env={"DEFAULT_MAX_TOKENS": "4", "MAX_MODEL_LEN": "256", "MAX_N": "4"}) as server:
        command = [os.path.join(os.path.dirname(sys.executable), "schemathesis"), "run", f"{server.base}/openapi.json", "--url", server.base]
        command += ["--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"]
        command += ["--phases", "examples,fuzzing", "--max-examples", EXAMPLES, "--seed", "1", "--request-timeout", "60", "--workers", "2"]
        command += ["--generation-database", "none", "--no-color", "--suppress-health-check", "all"]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=3600)
        assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
        assert "operations" in run.stdout.lower(), run.stdout[-2000:]
