"""`fathom serve`: load a model, listen, and shut down gracefully."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
import uvicorn
from rich.console import Console

from fathom.checkpoint.hf.directory import model_directory
from fathom.checkpoint.hf.model import load_model
from fathom.config import ConfigError
from fathom.data.tokenizer import Tokenizer, load_tokenizer
from fathom.engine.engine import Engine
from fathom.model.quantize import quantized
from fathom.quantization.integer import Precision
from fathom.runtime.hardware import install_allocator
from fathom.serve.app import make_app
from fathom.serve.engine_thread import EngineThread
from fathom.serve.http_protocol import Protocol
from fathom.serve.service import Service
from fathom.serve.status import describe

KEY_VARIABLE = "FATHOM_API_KEY"

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServeCommand:
    """Serve a model over the OpenAI protocol, with a web page."""

    path: tyro.conf.Positional[str]
    """Model directory, or name on the Hugging Face hub."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for access from other machines, which should then require a key."""
    port: int = 8000
    """0: a free one."""
    name: str | None = None
    """The model's name in requests and responses; none: that of its directory."""
    api_key: tuple[str, ...] = ()
    """Accepted API keys, beside those in the variable FATHOM_API_KEY, which other users of the machine cannot see."""
    allow_origin: tuple[str, ...] = ()
    """Web sites, such as https://example.org, whose pages may send requests (CORS)."""
    allow_host: tuple[str, ...] = ()
    """Further accepted Host headers; a server on a loopback address accepts only its own name otherwise."""
    device: str | None = None
    """cpu, cuda, cuda:1, …; none: a GPU if there is one."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type of the weights and the cache."""
    quantize: Precision | None = None
    """Weight-only quantisation."""
    speculative: bool = True
    """Speculative decoding by the MTP module, where it is faster."""
    drafts: int | None = None
    """Draft tokens at every step; none: adaptive draft length."""
    max_batch: int = 32
    """Requests in a batch."""
    max_waiting: int = 256
    """Requests in the queue; more get status 429."""
    cache_tokens: int | None = None
    """Capacity of the cache in tokens; none: 4096 for each of max_batch."""
    prefill_budget: int | None = None
    """Prefill tokens per step while other requests decode; none: 512, on a GPU 2048."""
    deadline: float = 600.0
    """Time limit of a request in seconds."""
    largest_body: int = 4 << 20
    """Largest request body in bytes."""
    drain: int = 60
    """Seconds for running requests to finish after SIGTERM."""
    inspector: Path | None = None
    """A page made by `fathom inspect`, served at /inspect without a key."""


def serve(command: ServeCommand) -> int:
    """Serve until a signal; returns the exit status: 0, or 1 where the engine failed.

    Raises ConfigError, ValueError or OSError where the model cannot be loaded or the port not opened.
    """
    _check(command)
    inspector = None if command.inspector is None else command.inspector.read_bytes()
    console = Console(stderr=True, highlight=False)
    listening = listen(command.host, command.port)
    device = _device(command)
    if device.type == "cpu":
        install_allocator()
    directory = model_directory(command.path)
    tokenizer = load_tokenizer(directory)
    console.print(f"loading    {directory}", soft_wrap=True)
    # In a thread that ends: OpenMP keeps a team of threads for every thread that has computed, and with more of them
    # than processors the engine's team would sleep at each barrier of a step instead of spinning.
    with ThreadPoolExecutor(1) as loading:
        engine = loading.submit(_engine, command, device, directory, tokenizer).result()
        if device.type == "cuda":
            console.print("preparing  the CUDA graphs of decoding (the first time on a machine takes longest)")
        loading.submit(engine.warm_up).result()
    compiled = engine.compile_seconds
    if compiled:
        console.print(f"prepared   the CUDA graphs of decoding in {compiled:.0f} s")
    name = command.name or Path(command.path).absolute().name
    server: uvicorn.Server

    def on_failure(error: BaseException) -> None:
        console.print(
            f"error: the engine failed ({type(error).__name__}: {error}); the server shuts down", style="bold red"
        )
        server.should_exit = True

    engine_thread = EngineThread(engine, on_failure)
    service = Service(engine, engine_thread, name, command.deadline)
    description = describe(engine.model.config, name, engine, service.template is not None)
    description["inspector"] = inspector is not None
    keys = [*command.api_key, *os.environ.get(KEY_VARIABLE, "").split()]
    app = make_app(service, description, keys, command.allow_origin, _hosts(command), command.largest_body, inspector)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=command.drain,
            timeout_keep_alive=30,
            http=Protocol,
            ws="none",
        )
    )
    port = listening.getsockname()[1]
    shown = f"[{command.host}]" if ":" in command.host else command.host
    console.print(f"serving    {name} at http://{shown}:{port}{'' if keys else ' (no API key)'}", soft_wrap=True)
    with _quiet_signals():
        asyncio.run(server.serve(sockets=[listening]))
    if engine_thread.failure is None:
        return 0
    sys.excepthook(type(engine_thread.failure), engine_thread.failure, engine_thread.failure.__traceback__)
    return 1


def _device(command: ServeCommand) -> torch.device:
    name = command.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device is {name!r}; it must be a torch device such as cpu, cuda or cuda:1") from error


def _engine(command: ServeCommand, device: torch.device, directory: Path, tokenizer: Tokenizer) -> Engine:
    model = load_model(directory, torch.float32 if command.dtype == "float32" else torch.bfloat16, device)
    if command.quantize is not None:
        model = quantized(model, command.quantize)
    return Engine(
        model,
        tokenizer,
        speculative=command.speculative if command.drafts is None else command.drafts,
        max_batch=command.max_batch,
        cache_tokens=command.cache_tokens,
        prefill_budget=command.prefill_budget,
        max_waiting=command.max_waiting,
    )


def _check(command: ServeCommand) -> None:
    if not 0 <= command.port < 65536:
        raise ConfigError(f"--port is {command.port}; it must be from 0 to 65535")
    if command.drafts is not None and not (command.speculative and 1 <= command.drafts <= 16):
        raise ConfigError(
            f"--drafts is {command.drafts}; it must be from 1 to 16, and not together with --no-speculative"
        )
    for name in ("deadline", "largest_body", "drain"):
        if getattr(command, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(command, name)}; it must be above 0")
    if any(not key.isascii() or not key.isprintable() or " " in key or not key for key in command.api_key):
        raise ConfigError("--api-key must consist of printable ASCII characters without blanks")


def _hosts(command: ServeCommand) -> list[str]:
    """Against DNS rebinding: a web site could let its own name resolve to this machine, past the same-origin policy."""
    if command.host not in _LOOPBACK:
        return list(command.allow_host) or ["*"]
    return ["127.0.0.1", "[::1]", "localhost", *command.allow_host]


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


@contextlib.contextmanager
def _quiet_signals() -> Iterator[None]:
    """uvicorn drains at a signal and raises it again afterwards; here a drained server exits with status 0."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
