"""TLS on the public port: both doors, clients that speak something else or nothing at all, drain, new certificates, bad files."""
from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import threading

import httpx
import openai
import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from harness.program import Server, free_port, run, wait_for

KEY = "secret-one"


class Pair:
    """A certificate for 127.0.0.1 by an authority of its own, in files."""

    def __init__(self, folder):
        self.authority = trustme.CA()
        self.issued = self.authority.issue_cert("127.0.0.1")
        self.certificate, self.key = folder / "certificate.pem", folder / "key.pem"
        self.write(self.certificate, self.key)

    def write(self, certificate, key) -> None:
        """Each is put in place at once."""
        chain = b"".join(blob.bytes() for blob in self.issued.cert_chain_pems)
        for path, text in ((certificate, chain), (key, self.issued.private_key_pem.bytes())):
            path.with_suffix(".new").write_bytes(text)
            os.replace(path.with_suffix(".new"), path)

    @property
    def flags(self) -> list[str]:
        return ["--ssl-certfile", str(self.certificate), "--ssl-keyfile", str(self.key)]

    def trust(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        return context


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    return Pair(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def secure(pair):
    """`serve` with TLS and a key: its own worker, which comes over loopback, needs the key too."""
    with Server("serve", "--model", "demo", *pair.flags, env={"API_KEY": KEY}, tls=pair.trust()) as server:
        yield server


@pytest.fixture(scope="module")
def trusting(pair):
    with httpx.Client(verify=pair.trust(), timeout=120, headers={"authorization": f"Bearer {KEY}"}) as client:
        yield client


def raw(server, timeout: float = 30) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=timeout)


def hung_up(stream: socket.socket) -> bytes:
    """What comes until the other end hangs up."""
    heard = b""
    try:
        while more := stream.recv(4096):
            heard += more
    except ConnectionResetError:
        pass
    return heard


def is_answered(server, trust: ssl.SSLContext) -> bool:
    return httpx.get(f"{server.base}/ping", verify=trust).status_code == 200


@pytest.mark.parametrize("which", ["direct", "queue"])
def test_the_sdk_whole_and_streamed(secure, trusting, which, capital):
    client = openai.OpenAI(api_key=KEY, base_url=secure.doors()[which], http_client=trusting, max_retries=0)
    question = {"model": "demo", "messages": capital.body["messages"], "temperature": 0}
    assert client.chat.completions.create(**question).choices[0].message.content == capital.answer
    chunks = client.chat.completions.create(**question, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == capital.answer


def test_native_jobs(secure, trusting, capital):
    answer = trusting.post(f"{secure.endpoint}/runsync", json={"input": capital.request()}).json()
    assert answer["status"] == "COMPLETED" and answer["output"]["choices"][0]["message"]["content"] == capital.answer


def test_whoever_does_not_trust_it_or_speaks_no_tls_gets_nothing(secure, pair):
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
        httpx.get(f"{secure.base}/ping")
    for said in (b"GET /ping HTTP/1.1\r\nhost: x\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"x" * 70_000, b"\0" * 200):
        with raw(secure) as stream:
            try:
                stream.sendall(said)
            except ConnectionError:
                pass
            heard = hung_up(stream)
            assert b"HTTP" not in heard and len(heard) < 16, "an alert at most"
    assert is_answered(secure, pair.trust())
    # The key is asked for as ever.
    assert httpx.get(f"{secure.base}/v1/models", verify=pair.trust()).status_code == 401


def test_versions_and_protocols(secure, pair):
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = pair.trust()
        context.minimum_version = context.maximum_version = version
        context.set_alpn_protocols(["h2", "http/1.1"])
        with context.wrap_socket(raw(secure), server_hostname="127.0.0.1") as stream:
            assert stream.selected_alpn_protocol() == "http/1.1" and stream.version() == version.name.replace("_", ".")
    context.set_alpn_protocols(["h2"])
    with pytest.raises(ssl.SSLError), context.wrap_socket(raw(secure), server_hostname="127.0.0.1") as stream:
        stream.recv(1)


def test_http_and_gateway(pair, tmp_path):
    both = tmp_path / "both.pem"
    both.write_bytes(pair.key.read_bytes() + pair.certificate.read_bytes())
    health = free_port()
    with Server("http", "--model", "demo", env={"SSL_CERTFILE": str(both), "PORT_HEALTH": str(health)}, tls=pair.trust()) as server:
        assert httpx.get(f"http://127.0.0.1:{health}/ping").status_code == 200, "the platform's probes speak plain HTTP"
        assert httpx.get(f"{server.base}/v1/models", verify=server.tls).json()["data"][0]["id"] == "demo"
        assert f"OpenAI API at {server.base}/v1" in server.stderr
    with Server("gateway", *pair.flags, tls=pair.trust()) as server:
        assert httpx.get(f"{server.base}/v2/any/health", verify=server.tls).status_code == 200
        wait_for(lambda: f"RUNPOD_WEBHOOK_GET_JOB='{server.base}/v2/local/job-take/$ID?gpu=local'" in server.stdout, "its variables")


def test_silent_connections_end_before_and_after_the_handshake(pair):
    with Server("gateway", *pair.flags, "--header-timeout", "1", "--keep-alive-timeout", "2", tls=pair.trust()) as server:
        silent, half = raw(server), raw(server)
        half.sendall(b"\x16\x03\x01\x02\x00\x01")
        greeted = server.tls.wrap_socket(raw(server), server_hostname="127.0.0.1")
        kept = http.client.HTTPSConnection("127.0.0.1", server.port, context=server.tls, timeout=30)
        kept.request("GET", "/ping")
        assert kept.getresponse().read() is not None
        for stream in (silent, half, greeted, kept.sock):
            hung_up(stream)
        assert is_answered(server, server.tls)
    # For ever is for requests: a handshake that never comes ends all the same, and until then it keeps nobody out.
    env = {"HEADER_TIMEOUT": "0", "MAX_CONNECTIONS": "3"}
    with Server("gateway", *pair.flags, env=env, tls=pair.trust()) as server:
        crowd = [raw(server) for _ in range(40)]
        assert is_answered(server, server.tls)
        for stream in crowd:
            hung_up(stream)


def test_sigterm_lets_a_stream_end(pair, story):
    with Server("serve", "--model", "demo", *pair.flags, tls=pair.trust()) as server:
        waiting = raw(server)
        body = story.request(stream=True, ignore_eos=True, max_tokens=600, n=8, temperature=1)
        with httpx.stream("POST", f"{server.base}/v1/chat/completions", json=body, verify=server.tls, timeout=120) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            server.terminate()
            frames = [line for line in lines if line.startswith("data: ")]
        assert frames[-1] == "data: [DONE]"
        reasons = [choice["finish_reason"] for frame in frames[:-1] for choice in json.loads(frame[6:])["choices"] if choice["finish_reason"]]
        assert reasons == ["length"] * 8
        assert server.wait() == 0, "nor does a connection without a handshake hold it up"
        waiting.close()


def test_a_new_certificate_is_taken_over(tmp_path):
    first = Pair(tmp_path)
    (tmp_path / "other").mkdir()
    second = Pair(tmp_path / "other")
    with Server("http", "--model", "demo", *first.flags, env={"ENABLE_SSL_REFRESH": "true"}, tls=first.trust()) as server:
        kept = httpx.Client(verify=first.trust())
        assert kept.get(f"{server.base}/ping").status_code == 200
        first.key.write_text("nothing")

        def complained():
            assert is_answered(server, first.trust()), "the old one is in force"
            return f"SSL_KEYFILE={first.key}: no private key in it" in server.stderr

        wait_for(complained, "the line about the broken file")
        second.write(first.certificate, first.key)

        def taken_over():
            try:
                return is_answered(server, second.trust())
            except httpx.ConnectError:
                return False

        wait_for(taken_over, "the new certificate")
        with pytest.raises(httpx.ConnectError):
            is_answered(server, first.trust())
        assert kept.get(f"{server.base}/ping").status_code == 200, "connections that are open stay"
        kept.close()


def test_files_that_are_wrong_stop_the_start_and_are_named(pair, tmp_path):
    other = Pair(tmp_path)
    private = serialization.load_pem_private_key(other.key.read_bytes(), None)
    locked = tmp_path / "locked.pem"
    form, best = serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"password")
    locked.write_bytes(private.private_bytes(serialization.Encoding.PEM, form, best))
    certificate = str(pair.certificate)
    for given, words in [
        ({"SSL_CERTFILE": certificate, "SSL_KEYFILE": str(other.key)}, f"SSL_KEYFILE: {other.key}: the key is not that of the certificate in {certificate}"),
        ({"SSL_CERTFILE": certificate, "SSL_KEYFILE": str(locked)}, f"SSL_KEYFILE: {locked}: the key is encrypted"),
        ({"SSL_CERTFILE": certificate, "SSL_KEYFILE": "/no/key"}, "SSL_KEYFILE: /no/key: No such file"),
        ({"SSL_CERTFILE": certificate}, f"SSL_CERTFILE: {certificate}: no private key in it"),
        ({"SSL_CERTFILE": str(pair.key), "SSL_KEYFILE": str(pair.key)}, f"SSL_CERTFILE: {pair.key}: no certificate in it"),
        ({"SSL_KEYFILE": str(pair.key)}, "SSL_KEYFILE: a key without its certificate"),
        ({"SSL_KEYFILE_PASSWORD": "password"}, "SSL_KEYFILE_PASSWORD: the key of SSL_KEYFILE is read as it is"),
        ({"SSL_CA_CERTS": certificate}, "SSL_CA_CERTS: clients are asked for keys"),
    ]:
        for command in (["check"], ["http"]):
            program = run(*command, "--model", "demo", "--port", "0", env=given)
            assert program.process.returncode == 1 and words in program.stderr, program.log
    cold = run("bench", "demo", "--cold-start", *pair.flags)
    assert cold.process.returncode == 1 and "SSL_CERTFILE: a cold start is measured over plain HTTP" in cold.stderr
    shown = run("check", "--model", "demo", *pair.flags)
    assert shown.process.returncode == 0 and f"SSL_CERTFILE = {certificate}  [flag]" in shown.stdout


def test_many_at_once(secure, pair, capital):
    """Each on a connection of its own, half of them streams."""
    answers = []

    def ask(number: int) -> None:
        body = {**capital.request(), "model": "demo", "stream": number % 2 == 1}
        answer = httpx.post(f"{secure.base}/v1/chat/completions", json=body, verify=pair.trust(), headers={"x-api-key": KEY}, timeout=120)
        answers.append(answer.status_code == 200 and (number % 2 == 0 or answer.text.endswith("data: [DONE]\n\n")))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 16
