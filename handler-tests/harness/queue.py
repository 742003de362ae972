"""A RunPod job queue that does what a script says: the second opinion on the worker's protocol.

It is written against the platform's protocol, independently of the endpoint inside the binary. It records every request and misbehaves on
demand: odd statuses, hanging, cut connections, repeated jobs, refused results.
"""
from __future__ import annotations

import json
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from .program import wait_for


@dataclass
class Reply:
    """An answer as it goes out. `cut` closes the connection in the middle of it; `hang` waits before it."""

    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"
    hang: float = 0
    cut: bool = False

    @staticmethod
    def json(value, **more) -> Reply:
        return Reply(body=json.dumps(value, ensure_ascii=False).encode(), **more)


@dataclass
class Seen:
    """A request of the worker. `verb` is the third path segment (`job-take`), `tail` what follows it, decoded."""

    method: str
    line: str
    headers: dict[str, str]
    body: bytes
    at: float = field(default_factory=time.monotonic)

    @property
    def segments(self) -> list[str]:
        return [unquote(part) for part in urlsplit(self.line).path.strip("/").split("/")]

    @property
    def verb(self) -> str:
        return self.segments[2]

    @property
    def tail(self) -> list[str]:
        return self.segments[3:]

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.line).query, keep_blank_values=True)

    @property
    def json(self):
        return json.loads(self.body)


class ScriptedQueue:
    """`takes`, `dones`, `streams` and `pings` hold the replies to come; when one is empty, takes are held and answered with 204, everything else with 200."""

    def __init__(self, hold: float = 2, routes: tuple[str, ...] = ("job-take", "job-take-batch", "job-stop", "job-done", "job-stream", "ping")):
        self.hold, self.routes = hold, routes
        self.takes, self.dones, self.streams, self.pings = deque(), deque(), deque(), deque()
        self.to_stop: deque[str] = deque()
        self.seen: list[Seen] = []
        self.lock = threading.Lock()
        self.closed = threading.Event()
        queue = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_request(self):
                length = int(self.headers.get("content-length") or 0)
                seen = Seen(self.command, self.path, {key.lower(): value for key, value in self.headers.items()}, self.rfile.read(length))
                with queue.lock:
                    queue.seen.append(seen)
                queue.answer(self, queue.reply(seen))

            do_GET = do_POST = handle_request

            def log_message(self, *_):
                pass

        class Listener(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_):
                """The worker hangs up on held polls when it ends; that is no error."""

        self.server = Listener(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()

    # ---- answers

    def answer(self, handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        if reply.hang:
            self.closed.wait(reply.hang)
        if reply.cut and not reply.body:
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
            return
        handler.send_response(reply.status)
        if reply.body or reply.status != 204:
            handler.send_header("content-type", reply.content_type)
            handler.send_header("content-length", str(len(reply.body) + (100 if reply.cut else 0)))
        handler.end_headers()
        handler.wfile.write(reply.body)
        if reply.cut:
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True

    def reply(self, seen: Seen) -> Reply:
        if seen.verb not in self.routes:
            return Reply(404, b'{"error":"not found"}')
        if seen.verb in ("job-take", "job-take-batch"):
            return self.next(self.takes, wait=True) or Reply(204)
        if seen.verb == "job-stop":
            stops = self.next(self.to_stop, wait=True)
            return Reply.json({"jobsToStop": [stops]}) if stops else Reply(204)
        script = {"job-done": self.dones, "job-stream": self.streams, "ping": self.pings}[seen.verb]
        return self.next(script) or Reply(200, b"{}")

    def next(self, script: deque, wait: bool = False):
        end = time.monotonic() + self.hold
        while True:
            with self.lock:
                if script:
                    return script.popleft()
            if not wait or time.monotonic() > end or self.closed.wait(0.02):
                return None

    # ---- what tests say and ask

    def give(self, *jobs) -> None:
        """Each take from now on gets the next of these: a job, a list of jobs, or a Reply."""
        with self.lock:
            self.takes.extend(job if isinstance(job, Reply) else Reply.json(job) for job in jobs)

    def requests(self, *verbs: str) -> list[Seen]:
        with self.lock:
            return [seen for seen in self.seen if seen.verb in verbs]

    def done(self, job_id: str, within: float = 60) -> Seen:
        """The last post of this job's result."""

        def posts():
            return [seen for seen in self.requests("job-done") if seen.tail[-1] == job_id]

        return wait_for(posts, f"the result of {job_id}", within)[-1]

    def result(self, job_id: str, within: float = 60) -> dict:
        return self.done(job_id, within).json

    def chunks(self, job_id: str) -> list:
        """What was streamed for this job, in order."""
        return [seen.json["output"] for seen in self.requests("job-stream") if seen.tail[-1] == job_id]

    def variables(self, worker: str = "pod-1") -> dict[str, str]:
        """The environment the platform gives a worker."""
        base = f"{self.base}/v2/ep"
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=NVIDIA+RTX+A5000",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=NVIDIA+RTX+A5000",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=NVIDIA+RTX+A5000",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID?gpu=NVIDIA+RTX+A5000",
            "RUNPOD_PING_INTERVAL": "1000",
            "RUNPOD_AI_API_KEY": "the-worker-key",
            "RUNPOD_POD_ID": worker,
        }
