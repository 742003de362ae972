"""What the tests of clients share: the demo model's weather tool, its JSON answer, and settings that keep clients off the network."""
from __future__ import annotations

import gc
import os

import pytest

# Read when the libraries are imported. They would fetch a price list, and send traces to their makers.
os.environ.update(
    LITELLM_LOCAL_MODEL_COST_MAP="True",
    OPENAI_AGENTS_DISABLE_TRACING="1",
    LANGSMITH_TRACING="false",
    ANONYMIZED_TELEMETRY="false",
)

KEY = "the-key"


@pytest.fixture(scope="session")
def locked():
    """A server that wants a key."""
    from harness.program import Server

    with Server("serve", "--model", "demo", env={"API_KEY": KEY}) as server:
        yield server


@pytest.fixture(params=["direct", "queue"])
def locked_door(request, locked) -> str:
    return locked.doors()[request.param]


@pytest.fixture(autouse=True)
def no_garbage_collection_in_a_request():
    """A framework may leave a stream unread. If Python collects it while httpcore holds the lock of its connections, closing the stream waits
    for that lock for ever: so it is collected between tests alone."""
    gc.disable()
    yield
    gc.enable()
    gc.collect()
    # What is left need not be looked at again: the frameworks are large.
    gc.freeze()
