"""A load for servers of OpenAI's protocol: requests arrive by a Poisson process, whether or not others are answered.

As in guidellm's Poisson profile, at most so many are on their way at one time; what arrives meanwhile waits here. The
client shares the processor with what it measures, so it only keeps bytes and when they came (one thread, plain
sockets that stay open from one request to the next, as those of the `openai` client do), and reads them afterwards;
guidellm 0.8.1 took three quarters of one of two cores at 32 clients.
"""

import json
import random
import re
import selectors
import socket
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

RATE = 100.0
"""Arrivals per second, more than any of the servers can answer."""

Body = Callable[["LoadRequest"], dict[str, Any]]
"""Makes the request body for a server."""


@dataclass
class LoadRequest:
    """One request and its response."""

    prompt: str
    length: int
    """Tokens to generate."""
    sent: float = 0.0
    came: list[tuple[float, bytes]] = field(default_factory=list)
    over: bool = False
    """The response is complete."""
    reused: bool = False
    """Sent on a connection that had been used before."""

    def read(self) -> "Answer":
        """Parse the bytes, afterwards."""
        raw = b"".join(data for _, data in self.came)
        places = [found.start() for found in re.finditer(rb"data: \{", raw)]
        ends, read = [], 0
        for at, data in self.came:
            read += len(data)
            ends.append((read, at))
        times = [next(at for end, at in ends if end > place) for place in places]
        counted = re.findall(rb'"completion_tokens": ?(\d+)', raw)
        tokens = int(counted[-1]) if counted else None
        good = raw.startswith(b"HTTP/1.1 200") and b'data: {"error"' not in raw
        return Answer(self.sent, times, tokens, good and tokens == self.length if self.over else good or not raw)


class Answer(NamedTuple):
    """A response and the times of its chunks."""

    sent: float
    times: list[float]
    tokens: int | None
    """None where it was cut off."""
    good: bool


class Seen(NamedTuple):
    """The measurements of one load; times in seconds, median and 99th percentile."""

    tokens_per_second: float
    first: tuple[float, float]
    each: tuple[float, float]
    answered: int
    failed: int


def arrivals(clients: int) -> Iterator[float]:
    """Seconds after the beginning at which requests arrive."""
    rng, at = random.Random(clients), 0.0
    while True:
        yield at
        at += rng.expovariate(RATE)


def run(
    address: tuple[str, int], body: Body, waiting: Iterable[LoadRequest], clients: int, seconds: float
) -> list[LoadRequest]:
    """Send requests for so long (inf: until all are complete); returns those sent, the last ones perhaps cut off."""
    selector = selectors.DefaultSelector()
    times, queue, idle = arrivals(clients), iter(waiting), []
    began = time.perf_counter()
    arrival = began + next(times)
    sent: list[LoadRequest] = []
    running, empty = 0, False
    while time.perf_counter() - began < seconds and (running or not empty):
        while running < clients and not empty and arrival <= time.perf_counter():
            request = next(queue, None)
            if request is None:
                empty = True
                break
            arrival = began + next(times)
            before = _open_still(idle)
            connection, request.reused = before or socket.create_connection(address), before is not None
            _send(connection, address[0], body(request), request)
            selector.register(connection, selectors.EVENT_READ, request)
            sent.append(request)
            running += 1
        pause = arrival - time.perf_counter() if running < clients and not empty else 0.2
        for key, _ in selector.select(max(pause, 0.0)):
            connection: socket.socket = key.fileobj  # type: ignore[assignment]
            request, data = key.data, connection.recv(65536)
            if not data and request.reused and not request.came:  # closed as the request was sent: sent again
                selector.unregister(connection)
                connection.close()
                connection, request.reused = socket.create_connection(address), False
                _send(connection, address[0], body(request), request)
                selector.register(connection, selectors.EVENT_READ, request)
                continue
            request.came.append((time.perf_counter(), data))
            request.over = not data or _ends(request.came)
            if request.over:
                running -= 1
                selector.unregister(connection)
                idle.append(connection)
    for connection in [*idle, *(key.fileobj for key in selector.get_map().values())]:
        connection.close()
    selector.close()
    return sent


def summary(sent: Sequence[LoadRequest], seconds: float) -> Seen:
    """Of answers cut off at the end, the chunks count as many tokens each as in those that are complete."""
    answers = [request.read() for request in sent]
    good = [answer for answer in answers if answer.good and answer.times]
    done = [answer for answer in good if answer.tokens]
    per_chunk = sum(answer.tokens or 0 for answer in done) / max(sum(len(answer.times) for answer in done), 1)
    tokens = sum(answer.tokens or len(answer.times) * (per_chunk or 1.0) for answer in good)
    each = [(a.times[-1] - a.times[0]) / (a.tokens - 1) for a in done if a.tokens and a.tokens > 1]
    return Seen(
        tokens / seconds,
        _quantiles([answer.times[0] - answer.sent for answer in good]),
        _quantiles(each),
        len(done),
        sum(not answer.good for answer in answers),
    )


def _send(connection: socket.socket, host: str, body: dict[str, Any], request: LoadRequest) -> None:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    request.sent = time.perf_counter()
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)


def _open_still(idle: list[socket.socket]) -> socket.socket | None:
    """One of these connections that the server has not closed; those it has are dropped."""
    while idle:
        connection = idle.pop()
        try:
            connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return connection
        except OSError:
            pass
        connection.close()
    return None


def _ends(came: list[tuple[float, bytes]]) -> bool:
    """Whether the response is complete."""
    if b"chunked" in came[0][1]:
        # The empty chunk: those of events end with empty lines, and headers may end with a number.
        return b"".join(data for _, data in came[-3:]).endswith(b"\r\n0\r\n\r\n")
    raw = b"".join(data for _, data in came)
    length = re.search(rb"(?i)content-length: (\d+)", raw)
    return length is not None and len(raw) >= raw.find(b"\r\n\r\n") + 4 + int(length[1])


def _quantiles(values: list[float]) -> tuple[float, float]:
    if not values:
        return float("nan"), float("nan")
    ordered = sorted(values)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
