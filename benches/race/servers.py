"""The two servers, one at a time, and the rows that only a server has: first tokens under load, and of a second turn."""
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from programs import NotAvailable

LONG_PROMPT = 4096
CHAT_EVERY = 1.5  # seconds between two short chats while the long prompt is computed
LONG_PROMPTS = 2  # long prompts in one round
SLOTS = 16
SLOT_CONTEXT = LONG_PROMPT + 512
HISTORY = 2000  # tokens of the first turn
ANSWER = 32  # tokens of its answer
WAIT = 3600  # seconds until a server must be ready: --prefix may make it wait


class Server:
    """A server process in a group of its own; leaving the block ends the group."""

    def __init__(self, command, env=None, health="/health"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.command, self.env, self.health = [str(part).replace("{port}", str(self.port)) for part in command], env, health

    def __enter__(self):
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(self.command, env=self.env, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True)
        until = time.monotonic() + WAIT
        while time.monotonic() < until and self.process.poll() is None:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", self.health)
                if connection.getresponse().status == 200:
                    return self
            except OSError:
                pass
            time.sleep(0.1)
        self.__exit__()
        self.log.seek(0)
        raise NotAvailable(f"{Path(self.command[0]).name} did not start: " + self.log.read().decode(errors="replace").strip()[-300:])

    def __exit__(self, *_):
        for kind in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, kind)
                self.process.wait(10)
                return
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                return

    def stream(self, path, body):
        """Seconds to the first text, the whole text, and the usage, of one streamed answer."""
        begin = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request("POST", path, json.dumps(dict(body, stream=True, stream_options={"include_usage": True})), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{self.url}{path} answered {response.status}: {response.read(500).decode(errors='replace')}")
        first, text, usage = None, "", {}
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices", []):
                piece = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                if piece and first is None:
                    first = time.monotonic() - begin
                text += piece
        connection.close()
        # A first token may be half a character; then its text comes with a later one. No text at all: the end counts.
        return first if first is not None else time.monotonic() - begin, text, usage


def our_server(ours, weights):
    return Server([*ours.prefix, ours.binary, "http", "--host", "127.0.0.1", "--port", "{port}"], ours.env(weights), "/ping")


def llama_server(llama, gguf, template):
    """Its own batch sizes; a slot of its own for each sequence, so that attention reads no other sequence's cache."""
    command = [*llama.prefix, llama.folder / "llama-server", "-m", gguf, "-t", llama.threads, "-tb", llama.threads, "--host", "127.0.0.1", "--port", "{port}",
               "-np", SLOTS, "--no-kv-unified", "-c", SLOTS * SLOT_CONTEXT, "--jinja", "--chat-template-file", template, "--no-webui"]
    return Server(command)


def words(rng, count):
    return " ".join("".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 9))) for _ in range(count))


def chat(server, messages, max_tokens):
    return server.stream("/v1/chat/completions", {"messages": messages, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True})


def ttft_under_load(server):
    """Milliseconds to the first text of each short chat that was sent while a long prompt was computed."""
    rng, times, failures = random.Random(), [], []
    chat(server, [{"role": "user", "content": words(rng, 4)}], 4)  # pages touched, threads awake

    def one(question):
        try:
            times.append(chat(server, [{"role": "user", "content": question}], 4)[0] * 1e3)
        except Exception as error:  # reported below: a thread's exception would be lost
            failures.append(error)

    for _ in range(LONG_PROMPTS):
        prompt, done = [rng.randrange(300, 1300) for _ in range(LONG_PROMPT)], threading.Event()

        def long():
            try:
                server.stream("/v1/completions", {"prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True})
            except Exception as error:
                failures.append(error)
            done.set()

        threads = [threading.Thread(target=long)]
        threads[0].start()
        while not done.wait(CHAT_EVERY / 2 if len(threads) == 1 else CHAT_EVERY):
            threads.append(threading.Thread(target=one, args=(words(rng, 4),)))
            threads[-1].start()
        for thread in threads:
            thread.join()
    if failures:
        raise RuntimeError(f"{len(failures)} requests failed, the first with: {failures[0]}")
    return times


def percentile(values, share):
    values = sorted(values)
    return values[max(0, -(-len(values) * share // 100) - 1)]


def two_turns(server):
    """First and second turn's milliseconds to the first text, and how many of the second's prompt tokens were cached."""
    rng = random.Random()
    probe = words(rng, 200)
    tokens = chat(server, [{"role": "user", "content": probe}], 1)[2]["prompt_tokens"]
    messages = [{"role": "user", "content": words(rng, HISTORY * 200 // tokens)}]
    first, _, usage = chat(server, messages, ANSWER)
    # Plain words stand for the answer: the noise that random weights write is ten times as long when it is tokenized again.
    messages += [{"role": "assistant", "content": words(rng, ANSWER * 200 // tokens)}, {"role": "user", "content": words(rng, 4)}]
    second, _, again = chat(server, messages, 4)
    cached = (again.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    print(f"two turns: {usage['prompt_tokens']} then {again['prompt_tokens']} prompt tokens, {cached} cached", file=sys.stderr)
    return first * 1e3, second * 1e3, cached
