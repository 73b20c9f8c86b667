"""A load for servers of OpenAI's protocol: requests arrive by a Poisson process, whether or not others are answered.

As in guidellm's Poisson profile, at most so many are on their way at one time; what arrives meanwhile waits here. The
client shares the processor with what it measures, so it only keeps bytes and when they came (one thread, plain
sockets), and reads them afterwards; guidellm 0.8.1 took three quarters of one of two cores at 32 clients.
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

Body = Callable[["Asked"], dict[str, Any]]
"""How a server wants to be asked."""


@dataclass
class Asked:
    """One request, and what came of it."""

    prompt: str
    length: int
    """Tokens it asks for."""
    sent: float = 0.0
    came: list[tuple[float, bytes]] = field(default_factory=list)
    over: bool = False
    """The answer has ended."""

    def read(self) -> "Answer":
        """Afterwards: take the bytes apart."""
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
    """When its chunks came."""

    sent: float
    times: list[float]
    tokens: int | None
    """None where it was cut off."""
    good: bool


class Seen(NamedTuple):
    """What the load saw; times in seconds, their median and 99th percentile."""

    tokens_per_second: float
    first: tuple[float, float]
    each: tuple[float, float]
    answered: int
    failed: int


def arrivals(clients: int, rate: float = RATE) -> Iterator[float]:
    """Seconds after the beginning at which requests arrive."""
    rng, at = random.Random(clients), 0.0
    while True:
        yield at
        at += rng.expovariate(rate) if rate < float("inf") else 0.0


def run(
    address: tuple[str, int], body: Body, waiting: Iterable[Asked], clients: int, seconds: float, rate: float = RATE
) -> list[Asked]:
    """Ask for so long (inf: until all are answered); returns those that were sent, the last perhaps cut off."""
    selector = selectors.DefaultSelector()
    times, queue = arrivals(clients, rate), iter(waiting)
    began = time.perf_counter()
    arrival = began + next(times)
    sent: list[Asked] = []
    running, empty = 0, False
    while time.perf_counter() - began < seconds and (running or not empty):
        while running < clients and not empty and arrival <= time.perf_counter():
            asked = next(queue, None)
            if asked is None:
                empty = True
                break
            arrival = began + next(times)
            selector.register(_send(address, body(asked), asked), selectors.EVENT_READ, asked)
            sent.append(asked)
            running += 1
        pause = arrival - time.perf_counter() if running < clients and not empty else 0.2
        for key, _ in selector.select(max(pause, 0.0)):
            data = key.fileobj.recv(65536)  # type: ignore[union-attr]
            key.data.came.append((time.perf_counter(), data))
            if not data:
                key.data.over = True
                running -= 1
                selector.unregister(key.fileobj)
                key.fileobj.close()  # type: ignore[union-attr]
    for key in list(selector.get_map().values()):
        key.fileobj.close()  # type: ignore[union-attr]
    selector.close()
    return sent


def summary(sent: Sequence[Asked], seconds: float) -> Seen:
    """Of answers cut off at the end, the chunks count as many tokens each as in those that are complete."""
    answers = [asked.read() for asked in sent]
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


def _send(address: tuple[str, int], body: dict[str, Any], asked: Asked) -> socket.socket:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address[0]}\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(address)
    asked.sent = time.perf_counter()
    connection.sendall(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
    return connection


def _quantiles(values: list[float]) -> tuple[float, float]:
    if not values:
        return float("nan"), float("nan")
    ordered = sorted(values)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
