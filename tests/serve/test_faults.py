"""Faults around a server: clients that disconnect or flood it, a failing engine, signals."""

import asyncio
import json
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.random_model import save_random_model
from tests.serve.running import Running, running

pytest.importorskip("starlette", reason="the server needs starlette")
pytest.importorskip("llguidance", reason="the server needs llguidance")
pytestmark = pytest.mark.slow

FLAGS = ("--dtype", "float32", "--name", "small")
LONG = {"prompt": "f", "max_tokens": 480, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("random"))


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With tight limits: two requests run, two wait, bodies are small."""
    log = tmp_path_factory.mktemp("log") / "server.txt"
    narrow = ("--max-batch", "2", "--max-waiting", "2", "--largest-body", "20000")
    with running(model, log, *FLAGS, *narrow) as server:
        yield server


SLOW = """
import sys, time
from fathom.engine.engine import Engine
step_phases, count = Engine.step_phases, 0
def slow(self):
    global count
    count += 1
    if FAIL and count > 5:
        raise RuntimeError("made to fail by a test")
    time.sleep(0.02)
    return step_phases(self)
Engine.step_phases = slow
from fathom.cli import main
main()
"""
"""A server with slow steps, so that a test can act in the middle of a response."""


def slow_start(fail: bool = False) -> list[str]:
    return [sys.executable, "-c", SLOW.replace("FAIL", str(fail)), "serve"]


def now(server: Running) -> Any:
    return httpx.get(f"{server.address}/fathom/status").json()["now"]


def until_idle(server: Running, seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while (status := now(server))["running"] or status["waiting"] or status["pages_used"]:
        assert time.monotonic() < deadline, status
        time.sleep(0.02)


async def post(client: httpx.AsyncClient, server: Running, **body: object) -> httpx.Response:
    return await client.post(f"{server.address}/v1/completions", json=body, timeout=60)


def test_a_full_queue_returns_429_with_retry_after(server: Running) -> None:
    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient() as client:
            return list(await asyncio.gather(*(post(client, server, **LONG) for _ in range(10))))

    replies = asyncio.run(ask())
    assert {reply.status_code for reply in replies} == {200, 429}
    for reply in replies:
        if reply.status_code == 429:
            assert int(reply.headers["Retry-After"]) > 0
            assert reply.json()["error"]["type"] == "rate_limit_error"
    until_idle(server)


def test_all_choices_are_queued_or_none(server: Running) -> None:
    """Two choices do not fit into a queue of two where one waits; more than two never do, so that is no 429."""

    async def ask() -> list[int]:
        async with httpx.AsyncClient() as client:
            replies = await asyncio.gather(*(post(client, server, **LONG, n=2) for _ in range(6)))
            return [reply.status_code for reply in replies]

    assert set(asyncio.run(ask())) == {200, 429}
    until_idle(server)
    for body in ({"n": 3}, {"prompt": ["a", "b"], "n": 2}):
        reply = httpx.post(f"{server.address}/v1/completions", json={**LONG, **body})
        assert reply.status_code == 400 and "queue holds 2" in reply.text
    until_idle(server)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_frees_its_pages(model: Path, tmp_path: Path, stream: bool) -> None:
    with running(model, tmp_path / "log.txt", *FLAGS, start=slow_start()) as server:
        host, port = server.address.removeprefix("http://").split(":")
        body = json.dumps({**LONG, "stream": stream}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            deadline = time.monotonic() + 5
            while not now(server)["running"]:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        until_idle(server, 2)  # the answer itself takes ten seconds


def test_a_client_that_does_not_read_delays_no_other(server: Running) -> None:
    host, port = server.address.removeprefix("http://").split(":")
    facts = {"routing": True, "drafts": True}
    body = json.dumps({**LONG, "stream": True, "logprobs": 20, "fathom": facts}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect((host, int(port)))
        connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        for _ in range(3):
            reply = httpx.post(f"{server.address}/v1/completions", json={"prompt": "g", "max_tokens": 20}, timeout=10)
            assert reply.status_code == 200
        until_idle(server)


def test_body_limit_holds_whatever_the_content_length(server: Running) -> None:
    url = f"{server.address}/v1/completions"
    large = b'{"prompt": "' + b"a" * 30000 + b'"}'
    kind = {"Content-Type": "application/json"}
    assert httpx.post(url, content=large, headers=kind).status_code == 413

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(large), 1000):
            yield large[start : start + 1000]

    reply = httpx.post(url, content=chunks(), headers=kind)  # chunked: without Content-Length
    assert reply.status_code == 413 and reply.json()["error"]["code"] == "body_too_large"


def test_unlisted_hosts_and_origins_are_refused(server: Running) -> None:
    assert httpx.get(f"{server.address}/fathom/status", headers={"Host": "evil.example"}).status_code == 400
    reply = httpx.get(f"{server.address}/fathom/status", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in reply.headers
    assert "default-src 'self'" in reply.headers["content-security-policy"]
    for path in ("/page/../server.py", "/page/%2e%2e%2fserver.py", "/page//etc/passwd"):
        assert httpx.get(server.address + path).status_code == 404


def test_keys(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FATHOM_API_KEY", "second")
    with running(model, tmp_path / "log.txt", *FLAGS, "--api-key", "first") as server:
        url = f"{server.address}/v1/models"
        for wrong in ({}, {"Authorization": "Bearer no"}, {"Authorization": "first"}, {"Authorization": "Basic first"}):
            reply = httpx.get(url, headers=wrong)
            assert reply.status_code == 401 and reply.json()["error"]["type"] == "authentication_error"
        for key in ("first", "second"):
            assert httpx.get(url, headers={"Authorization": f"Bearer {key}"}).status_code == 200
        for path in ("/metrics", "/fathom/status", "/openapi.json"):
            assert httpx.get(server.address + path).status_code == 401
        for path in ("/", "/health", "/page/main.js"):
            assert httpx.get(server.address + path).status_code == 200
        assert "first" not in (tmp_path / "log.txt").read_text()


def test_a_deadline_ends_a_request(model: Path, tmp_path: Path) -> None:
    with running(model, tmp_path / "log.txt", *FLAGS, "--deadline", "0.5", start=slow_start()) as server:
        reply = httpx.post(f"{server.address}/v1/completions", json=LONG, timeout=30)
        assert reply.status_code == 408 and "0.5 s" in reply.json()["error"]["message"]
        until_idle(server)
        with httpx.stream("POST", f"{server.address}/v1/completions", json={**LONG, "stream": True}) as streamed:
            lines = [line for line in streamed.iter_lines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "deadline"
        until_idle(server)


def test_sigterm_drains_and_exits_with_0(model: Path, tmp_path: Path) -> None:
    with running(model, tmp_path / "log.txt", *FLAGS, start=slow_start()) as server:
        body = {**LONG, "max_tokens": 60, "stream": True}
        with httpx.stream("POST", f"{server.address}/v1/completions", json=body, timeout=30) as streamed:
            lines = streamed.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(10) == 0


def test_an_engine_that_fails_ends_the_server_with_a_message(model: Path, tmp_path: Path) -> None:
    with running(model, tmp_path / "log.txt", *FLAGS, start=slow_start(fail=True)) as server:
        reply = httpx.post(f"{server.address}/v1/completions", json=LONG, timeout=30)
        assert reply.status_code == 503 and "made to fail" not in reply.text
        assert server.process.wait(10) == 1
        log = server.log.read_text()
        assert "the engine failed (RuntimeError: made to fail by a test)" in log


def test_a_port_in_use_is_named(model: Path, server: Running, tmp_path: Path) -> None:
    port = server.address.rpartition(":")[2]
    with (
        pytest.raises(RuntimeError, match=f"cannot listen on 127.0.0.1 port {port}"),
        running(model, tmp_path / "log.txt", "--port", port),
    ):
        pass


def endless(kind: str) -> Iterator[bytes]:
    """A megabyte outside of a body."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    if kind == "line":
        yield b"GET /"
        yield from [b"a" * 1000] * 1000
    elif kind == "header":
        yield head + b"X-Long: "
        yield from [b"a" * 1000] * 1000
    elif kind == "headers":
        yield head
        yield from [b"X-Many: " + b"a" * 990 + b"\r\n"] * 1000
    else:
        yield head + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
        yield from [b"X-Many: " + b"a" * 990 + b"\r\n"] * 1000


@pytest.mark.parametrize("kind", ["line", "header", "headers", "trailers"])
def test_request_line_headers_and_trailers_have_a_limit(server: Running, kind: str) -> None:
    host, port = server.address.removeprefix("http://").split(":")
    sent = 0
    with socket.create_connection((host, int(port)), 10) as connection:
        answer = b""
        try:
            for data in endless(kind):
                connection.sendall(data)
                sent += len(data)
                time.sleep(0.001)
            answer = connection.recv(1 << 16)
        except OSError:  # it was closed on us
            pass
    assert sent < 900_000 or answer.startswith(b"HTTP/1.1 400"), (sent, answer)
    assert httpx.get(f"{server.address}/health").status_code == 200
    until_idle(server)


@pytest.mark.oracle
def test_responses_conform_to_the_openapi_document(server: Running) -> None:
    """schemathesis generates requests from the document, valid and invalid ones."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from hypothesis import HealthCheck, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
    schema = schemathesis.openapi.from_url(f"{server.address}/openapi.json")
    asked = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            nonlocal asked
            asked += 1
            case.call_and_validate(base_url=server.address, checks=checks, timeout=60)

        ask()
    assert asked > 60
    until_idle(server)
