"""What a client may hold: connections, unfinished requests, bodies, responses that it does not read."""

import asyncio
import json
import logging
import resource
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the server needs starlette")
import httpx
import uvicorn

from fathom.serve import http_protocol
from fathom.serve.http_protocol import MAX_HEADER_BYTES, Connections, Protocol
from fathom.serve.server import FewRecords
from tests.serve.random_model import save_random_model
from tests.serve.running import Running, running

psutil = pytest.importorskip("psutil", reason="memory is read by psutil")

MOST = 4
SECONDS = 0.4


class Application:
    """/quick responds, /slow waits for the client to leave, /large exceeds any buffer; a body returns as its size."""

    def __init__(self) -> None:
        self.responding = 0
        self.left = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left += 1
                return
            size += len(message.get("body", b""))
            more = message["more_body"]
        if scope["path"] == "/slow":
            self.responding += 1
            while (await receive())["type"] != "http.disconnect":
                pass
            self.left += 1
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-size", b"%d" % size)]})
        if scope["path"] == "/large":
            for _ in range(100):
                await send({"type": "http.response.body", "body": bytes(1 << 17), "more_body": True})
            self.left += 1
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Listening:
    """The application behind the protocol, in a thread, with a limit of MOST connections."""

    def __init__(self) -> None:
        self.app, self.connections = Application(), Connections(MOST)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.server = uvicorn.Server(
            uvicorn.Config(
                self.app,
                http=partial(Protocol, self.connections),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                log_level="critical",
                timeout_keep_alive=1,
                timeout_graceful_shutdown=1,
            )
        )

    def run(self) -> None:
        asyncio.run(self.server.serve(sockets=[self.socket]))

    def connect(self) -> socket.socket:
        connection = socket.create_connection(self.socket.getsockname(), 5)
        connection.settimeout(5)
        return connection

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listening]:
    monkeypatch.setattr(http_protocol, "CLIENT_SECONDS", SECONDS)
    server = Listening()
    thread = threading.Thread(target=server.run)
    thread.start()
    server.until(lambda: server.server.started)
    yield server
    server.server.should_exit = True
    thread.join()


def get(path: str, close: bool = False) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n{'Connection: close' if close else 'X: y'}\r\n\r\n".encode()


def post(body: bytes, length: int | None = None) -> bytes:
    return b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (length or len(body)) + body


def everything(connection: socket.socket) -> bytes:
    """Until the server closes it."""
    parts = []
    try:
        while part := connection.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


@pytest.mark.parametrize(
    "begun", [b"POST /body HTT", b"POST /body HTTP/1.1\r\nHost: x\r\nX-", post(b"12", 100), get("/quick") + b"GET"]
)
def test_an_unfinished_request_has_a_deadline(listening: Listening, begun: bytes) -> None:
    with listening.connect() as connection:
        began = time.monotonic()
        connection.sendall(begun)
        answer = everything(connection)
        assert SECONDS * 0.9 < time.monotonic() - began < SECONDS + 2
    if not begun.startswith(b"GET"):
        assert answer.startswith(b"HTTP/1.1 408")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
    listening.until(lambda: not listening.connections.waiting and not listening.server.server_state.connections)


@pytest.mark.parametrize("drop", [b"\r\n", b"X", b""])
def test_drops_do_not_prolong_it(listening: Listening, drop: bytes) -> None:
    with listening.connect() as connection:
        began = time.monotonic()
        try:
            while time.monotonic() < began + 4:
                connection.send(drop)
                time.sleep(SECONDS / 8)
                connection.settimeout(0.001)
                try:
                    if not connection.recv(100):
                        break
                except TimeoutError:
                    continue
        except ConnectionError:
            pass
        assert time.monotonic() - began < SECONDS + 2


def test_bodies_that_come_in_parts_are_whole(listening: Listening) -> None:
    with listening.connect() as connection:
        request = post(bytes(300_000))
        for start in range(0, len(request), 70_000):
            connection.sendall(request[start : start + 70_000])
            time.sleep(SECONDS / 10)
        assert b"x-size: 300000" in connection.recv(1 << 16)
        time.sleep(SECONDS * 1.5)  # an idle connection has its own, longer time
        connection.sendall(get("/quick", close=True))
        assert everything(connection).startswith(b"HTTP/1.1 200")


def test_a_new_connection_takes_the_place_of_the_longest_idle_one(listening: Listening) -> None:
    with ExitStack() as open_ones:
        idle = [open_ones.enter_context(listening.connect()) for _ in range(30)]
        listening.until(lambda: len(listening.server.server_state.connections) <= MOST)
        with listening.connect() as connection:
            connection.sendall(get("/quick", close=True))
            assert everything(connection).startswith(b"HTTP/1.1 200")
        assert everything(idle[0]) == b""


def test_requests_in_progress_are_not_closed_for_new_connections(listening: Listening) -> None:
    with ExitStack() as open_ones:
        busy = [open_ones.enter_context(listening.connect()) for _ in range(MOST)]
        for connection in busy:
            connection.sendall(get("/slow"))
        listening.until(lambda: listening.app.responding == MOST)
        for _ in range(3):
            with listening.connect() as connection:
                answer = everything(connection)
            assert answer.startswith(b"HTTP/1.1 503")
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_many_connections"
        assert listening.app.left == 0
    listening.until(lambda: listening.app.left == MOST)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("more", [1, 3])
def test_a_client_that_pipelines_and_leaves_is_noticed(listening: Listening, together: bool, more: int) -> None:
    with listening.connect() as connection:
        if together:
            connection.sendall(get("/slow") + get("/quick") * more)
        else:
            connection.sendall(get("/slow"))
            listening.until(lambda: listening.app.responding == 1)
            for _ in range(more):
                connection.sendall(get("/quick"))
        listening.until(lambda: listening.app.responding == 1)
        assert listening.app.left == 0
    listening.until(lambda: listening.app.left == 1)


def test_pipelined_requests_are_answered_in_order(listening: Listening) -> None:
    """Cut at every place of the second and third request."""
    requests = [post(b"1"), post(b"12"), post(b"123"), get("/quick", close=True)]
    for cut in range(len(requests[0]), sum(map(len, requests[:3])) + 1, 7):
        with listening.connect() as connection:
            whole = b"".join(requests)
            connection.sendall(whole[:cut])
            time.sleep(0.002)
            connection.sendall(whole[cut:])
            sizes = [line for line in everything(connection).split(b"\r\n") if line.startswith(b"x-size")]
            assert sizes == [b"x-size: 1", b"x-size: 2", b"x-size: 3", b"x-size: 0"], cut


def test_what_comes_ahead_of_a_response_has_a_limit(listening: Listening) -> None:
    with listening.connect() as connection:
        connection.sendall(get("/slow"))
        listening.until(lambda: listening.app.responding == 1)
        connection.sendall(bytes(MAX_HEADER_BYTES))
        time.sleep(0.05)
        assert listening.app.left == 0
        connection.sendall(b"x")
        listening.until(lambda: listening.app.left == 1)


def test_a_response_that_is_not_read_has_a_deadline_and_a_slow_reader_none(listening: Listening) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(listening.socket.getsockname())
        connection.sendall(get("/large"))
        listening.until(lambda: bool(listening.server.server_state.connections))
        listening.until(lambda: not listening.server.server_state.connections)
        assert not listening.connections.waiting
    with listening.connect() as connection:
        connection.sendall(get("/large", close=True))
        read = 0
        while part := connection.recv(1 << 19):
            read += len(part)
            time.sleep(SECONDS / 20)
        assert read > 100 << 17


@pytest.mark.parametrize("upgrade", ["websocket", "h2c"])
def test_an_upgrade_that_is_not_offered_is_ignored(listening: Listening, upgrade: str) -> None:
    """Java's client sends `Upgrade: h2c` with every first request."""
    with listening.connect() as connection:
        head = f"POST /body HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: {upgrade}\r\n".encode()
        connection.sendall(head + b"Content-Length: 5\r\n\r\n12345")
        assert b"x-size: 5" in connection.recv(1 << 16)


def test_few_records_reach_the_log() -> None:
    log, seen = logging.Logger("test"), []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    log.addFilter(FewRecords(3))
    began = time.monotonic()
    while time.monotonic() < began + 1.2:
        log.warning("mistake %d", 7)
        time.sleep(0.001)
    assert 3 <= len(seen) <= 9
    assert any(line.startswith("mistake 7 (") and line.endswith(" records were left out before)") for line in seen)


# --- a whole server

DESCRIPTORS = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
from fathom.cli import main
main()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("connections")
    model = save_random_model(directory / "model")
    start = [sys.executable, "-c", DESCRIPTORS, "serve"]
    with running(model, directory / "log.txt", "--dtype", "float32", start=start) as server:
        yield server


@contextmanager
def many_descriptors(number: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < number:
        pytest.skip(f"this process may not open {number} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(number, before[0]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def address(server: Running) -> tuple[str, int]:
    host, _, port = server.address.removeprefix("http://").partition(":")
    return host, int(port)


@pytest.mark.slow
def test_more_connections_than_descriptors_leave_the_server_reachable(server: Running) -> None:
    with many_descriptors(4096), ExitStack() as open_ones:
        for number in range(1500):
            connection = socket.create_connection(address(server), 10)
            open_ones.enter_context(connection)
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n")
            if number % 500 == 0:
                assert httpx.get(f"{server.address}/health", timeout=5).status_code == 200
        reply = httpx.post(f"{server.address}/v1/completions", json={"prompt": "f", "max_tokens": 4}, timeout=5)
        assert reply.status_code == 200
    assert "out of system resource" not in server.log.read_text()


@pytest.mark.slow
def test_unfinished_bodies_take_little_memory(server: Running) -> None:
    process = psutil.Process(server.process.pid)
    before, length = process.memory_info().rss, 4 << 20
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with ExitStack() as open_ones:
        connections = [open_ones.enter_context(socket.create_connection(address(server), 10)) for _ in range(150)]
        for connection in connections:
            try:
                connection.sendall(head + b"Content-Length: %d\r\n\r\n" % length + bytes(length - 1))
            except ConnectionError:
                continue
        deadline, refused = time.monotonic() + 20, set()
        while len(refused) < 150 - 16:
            assert time.monotonic() < deadline, len(refused)
            answered, _, _ = select.select([one for one in connections if one not in refused], [], [], 1)
            assert all(connection.recv(12) == b"HTTP/1.1 503" for connection in answered)
            refused |= set(answered)
        assert httpx.post(f"{server.address}/tokenize", json={"prompt": "f" * 60_000}).status_code == 200
        assert process.memory_info().rss - before < 200e6
    deadline = time.monotonic() + 5
    while httpx.post(f"{server.address}/tokenize", json={"prompt": "f" * 100_000}).status_code == 503:
        assert time.monotonic() < deadline


@pytest.mark.slow
def test_mistakes_do_not_fill_the_log(server: Running) -> None:
    before = server.log.stat().st_size
    began = time.monotonic()
    for _ in range(500):
        with socket.create_connection(address(server), 10) as connection:
            connection.sendall(b"\x00nonsense\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 400"
    assert server.log.stat().st_size - before < 2000 * (time.monotonic() - began + 1)
