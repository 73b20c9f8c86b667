"""Listening, and a graceful shutdown, at a signal or where the engine fails."""

import asyncio
import functools
import logging
import resource
import signal
import socket
import time

import uvicorn
from rich.console import Console
from starlette.types import ASGIApp

from fathom.config import ConfigError
from fathom.serve.engine_thread import EngineThread
from fathom.serve.http_protocol import Connections, Protocol

_MOST_CONNECTIONS = 1024
_ACCEPTED_AT_ONCE = 100
"""Connections that asyncio accepts before the protocol can close any; some of these, and files, are open as well."""
_LOG_RECORDS_PER_SECOND = 5


def serve(app: ASGIApp, engine_thread: EngineThread, listening: socket.socket, drain: int) -> None:
    """Serve until a signal; running requests then have `drain` seconds. Raises RuntimeError if the engine fails."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = descriptors == resource.RLIM_INFINITY
    connections = Connections(_MOST_CONNECTIONS if unlimited else min(_MOST_CONNECTIONS, descriptors // 2))
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=drain,
            timeout_keep_alive=30,
            backlog=_ACCEPTED_AT_ONCE,
            http=functools.partial(Protocol, connections),  # type: ignore[arg-type]
            ws="none",
        )
    )
    few = FewRecords(_LOG_RECORDS_PER_SECOND)
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).addFilter(few)

    def on_failure(error: BaseException) -> None:
        message = f"error: the engine failed ({type(error).__name__}: {error}); the server shuts down"
        Console(stderr=True).print(message, style="bold red", markup=False, highlight=False)
        server.should_exit = True

    engine_thread.on_failure = on_failure
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn drains at a signal and raises it again afterwards; here a drained server exits with status 0.
        signal.signal(number, lambda *_: None)
    asyncio.run(server.serve(sockets=[listening]))
    if engine_thread.failure is not None:
        raise RuntimeError("the engine failed") from engine_thread.failure


def listen(host: str, port: int) -> socket.socket:
    """A bound TCP socket. Raises ConfigError where the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # By name: asyncio switches Nagle's algorithm off only where the protocol is said to be TCP, and with it a response
    # whose headers and body are written one after the other waits 40 ms for the client's delayed acknowledgement.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    return listening


class FewRecords(logging.Filter):
    """Lets a number of records through each second, so that clients cannot fill the disk with a log of their mistakes.

    How many were left out stands in the next one.
    """

    def __init__(self, per_second: int) -> None:
        super().__init__()
        self._per_second = per_second
        self._second = 0
        self._records = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """As logging specifies."""
        second = int(time.monotonic())
        if second != self._second:
            left_out = max(self._records - self._per_second, 0)
            if left_out:
                record.msg, record.args = f"{record.getMessage()} ({left_out} records were left out before)", None
            self._second, self._records = second, 0
        self._records += 1
        return self._records <= self._per_second
