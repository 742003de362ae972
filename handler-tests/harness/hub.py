"""A model hub on loopback, as far as downloads need one: the model's file list, and files by range; as Hugging Face has them and as ModelScope does."""
from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from .program import REPOSITORY

DEMO = REPOSITORY / "handler-tests/fixtures/demo-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# What a repository of this model would hold; the rest of the folder is about its making.
NAMES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def demo_files() -> dict[str, bytes]:
    return {name: (DEMO / name).read_bytes() for name in NAMES if (DEMO / name).exists()}


class Hub:
    """`gate` holds back file contents while it is not set; `cuts` names files whose next download breaks in the middle."""

    def __init__(self, repository: str, files: dict[str, bytes], token: str | None = None):
        self.repository, self.files, self.token = repository, files, token
        self.gate = threading.Event()
        self.gate.set()
        self.cuts: set[str] = set()
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.asked.append(self.path)
                hub.handle(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        class Listener(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):
                pass

        self.server = Listener(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.gate.set()
        self.server.shutdown()
        self.server.server_close()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.split("?")[0]
        if self.token and request.headers.get("authorization") != f"Bearer {self.token}":
            return self.send(request, 401, b'{"error":"Invalid credentials in Authorization header"}')
        if re.fullmatch(rf"/api/models/{self.repository}(/revision/(main|{COMMIT}))?", path):
            siblings = [{"rfilename": name} for name in self.files]
            return self.send(request, 200, json.dumps({"id": self.repository, "sha": COMMIT, "siblings": siblings}).encode())
        # ModelScope's way of saying the same.
        if path == f"/api/v1/models/{self.repository}/repo/files":
            files = [{"Path": name, "Size": len(data), "Type": "blob", "Sha256": hashlib.sha256(data).hexdigest()} for name, data in self.files.items()]
            return self.send(request, 200, json.dumps({"Code": 200, "Success": True, "Data": {"Files": files}}).encode())
        match = re.fullmatch(rf"(?:/models)?/{self.repository}/resolve/(?:main|master|{COMMIT})/(.+)", path)
        if not match or match[1] not in self.files:
            return self.send(request, 404, b'{"error":"Entry not found"}')
        self.gate.wait()
        name, content = match[1], self.files[match[1]]
        headers = {"etag": f'"{hashlib.sha256(content).hexdigest()}"', "x-repo-commit": COMMIT, "accept-ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range") or "")
        if not wanted:
            return self.send(request, 200, content, headers, cut=name in self.cuts)
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        headers["content-range"] = f"bytes {first}-{last}/{len(content)}"
        part = content[first : last + 1]
        cut = name in self.cuts and len(part) > 1
        if cut:
            self.cuts.discard(name)
        self.send(request, 206, part, headers, cut)

    def send(self, request, status: int, body: bytes, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        request.send_response(status)
        for name, value in {"content-length": str(len(body)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        if cut:
            self.cuts.clear()
            request.wfile.write(body[: len(body) // 2])
            request.close_connection = True
        else:
            request.wfile.write(body)
