"""Shared fixtures: one `serve` and one `gateway` for the whole session, clients for them, and logs of what failed."""
from __future__ import annotations

import os
import sys

import httpx
import pytest

sys.path.insert(0, os.path.dirname(__file__))

from harness import questions  # noqa: E402
from harness.program import Program, Server, binary  # noqa: E402
from harness.queue import ScriptedQueue  # noqa: E402

LOG_TAIL = 3000


def pytest_configure():
    # Local servers only: whatever proxy the machine uses is not for them.
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        os.environ.pop(name, None)
    if not os.access(os.environ.get("WORKER_CANDLE_BIN", ""), os.X_OK):
        raise pytest.UsageError("WORKER_CANDLE_BIN must name the binary under test; ./handler-tests/run sets it")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A failure shows what the programs that run have said since the test began."""
    report = (yield).get_result()
    if report.failed:
        for program in Program.running:
            report.sections.append((f"log of {program.name}", program.log_since_mark[-LOG_TAIL:]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    for program in Program.running:
        program.mark()


def pytest_sessionfinish():
    for program in list(Program.running):
        program.kill()


@pytest.fixture(scope="session")
def server():
    """`serve --model demo` with default settings."""
    with Server("serve", "--model", "demo") as server:
        yield server


@pytest.fixture(params=["direct", "queue"])
def door(request, server) -> str:
    """The OpenAI base URL: straight into the engine, and through the job queue."""
    return server.doors()[request.param]


@pytest.fixture(scope="session")
def http():
    """For requests as curl would make them."""
    with httpx.Client(timeout=120, limits=httpx.Limits(max_connections=200)) as client:
        yield client


@pytest.fixture(scope="session")
def gateway():
    """The local endpoint without a worker."""
    with Server("gateway") as gateway:
        yield gateway


@pytest.fixture
def queue():
    with ScriptedQueue() as queue:
        yield queue


@pytest.fixture
def worker(queue):
    """Starts the binary as a queue worker on the scripted queue."""
    started = []

    def start(*arguments: str, **env: str) -> Program:
        variables = {"MODEL": "demo", **queue.variables(), **env}
        program = Program([binary(), *arguments], {name: value for name, value in variables.items() if value is not None}, name="queue worker")
        started.append(program)
        return program

    yield start
    for program in started:
        program.kill()


@pytest.fixture(scope="session")
def capital() -> questions.Question:
    """A question with a short answer."""
    return questions.BY_NAME["capital-france"]


@pytest.fixture(scope="session")
def story() -> questions.Question:
    """A question with a long answer."""
    return questions.BY_NAME["story"]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    """For `run`, which adds them up: tests that passed, tests that failed or broke."""
    if "COUNTS_FILE" in os.environ:
        counts = {name: len(terminalreporter.stats.get(name, [])) for name in ("passed", "failed", "error")}
        with open(os.environ["COUNTS_FILE"], "w") as file:
            file.write(f"{counts['passed']} {counts['failed'] + counts['error']}\n")
