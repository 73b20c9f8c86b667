"""Listening, and a graceful shutdown, at a signal or where the engine fails."""

import asyncio
import signal
import socket

import uvicorn
from rich.console import Console
from starlette.types import ASGIApp

from fathom.config import ConfigError
from fathom.serve.engine_thread import EngineThread
from fathom.serve.http_protocol import Protocol


def serve(app: ASGIApp, engine_thread: EngineThread, listening: socket.socket, drain: int) -> None:
    """Serve until a signal; running requests then have `drain` seconds. Raises RuntimeError if the engine fails."""
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=drain,
            timeout_keep_alive=30,
            http=Protocol,
            ws="none",
        )
    )

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
