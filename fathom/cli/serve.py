"""`fathom serve`: a model over the OpenAI protocol, with a web page."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from fathom.cli.load import Dtype, load_for_ids
from fathom.config import ConfigError
from fathom.engine.engine import Engine
from fathom.quantization.integer import Precision

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
    dtype: Dtype = "bfloat16"
    """Data type of the weights and the cache."""
    quantize: Precision | None = None
    """Weight-only quantisation."""
    reasoning_parser: Literal["auto", "think", "none"] = "auto"
    """Separate reasoning between think tags from the answer; auto: where the chat template has such tags."""
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

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigError(f"--port is {self.port}; it must be from 0 to 65535")
        if self.drafts is not None and not (self.speculative and 1 <= self.drafts <= 16):
            raise ConfigError(
                f"--drafts is {self.drafts}; it must be from 1 to 16, and not together with --no-speculative"
            )
        for name in ("deadline", "largest_body", "drain"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be above 0")
        if any(not key.isascii() or not key.isprintable() or " " in key or not key for key in self.api_key):
            raise ConfigError("--api-key must consist of printable ASCII characters without blanks")

    @property
    def hosts(self) -> list[str]:
        """Accepted Host headers, against DNS rebinding: a web site could let its own name resolve to this machine."""
        if self.host not in _LOOPBACK:
            return list(self.allow_host) or ["*"]
        return ["127.0.0.1", "[::1]", "localhost", *self.allow_host]


def run(words: list[str]) -> None:
    command = tyro.cli(ServeCommand, args=words, prog="fathom serve")
    try:
        from fathom.serve.app import make_app
        from fathom.serve.engine_thread import EngineThread
        from fathom.serve.server import listen, serve
        from fathom.serve.service import Service
    except ModuleNotFoundError as error:
        raise ConfigError(f"fathom serve needs {error.name}: pip install 'fathom-lm[serve]'") from error
    inspector = None if command.inspector is None else command.inspector.read_bytes()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    listening = listen(command.host, command.port)
    engine = _warm_engine(command, console)
    engine_thread = EngineThread(engine)
    name = command.name or Path(command.path).absolute().name
    keys = [*command.api_key, *os.environ.get(KEY_VARIABLE, "").split()]
    service = Service(engine, engine_thread, name, command.deadline, command.reasoning_parser)
    app = make_app(service, keys, command.allow_origin, command.hosts, command.largest_body, inspector)
    host = f"[{command.host}]" if ":" in command.host else command.host
    address = f"http://{host}:{listening.getsockname()[1]}"
    console.print(f"serving    {name} at {address}{'' if keys else ' (no API key)'}")
    serve(app, engine_thread, listening, command.drain)


def _warm_engine(command: ServeCommand, console: Console) -> Engine:
    """Load and warm up in a thread that ends.

    OpenMP keeps a team of threads for every thread that has computed, and with more of them than processors the
    engine's team would sleep at each barrier of a step instead of spinning.
    """
    console.print(f"loading    {command.path}")
    with ThreadPoolExecutor(1) as loading:
        engine = loading.submit(_engine, command, console).result()
        if engine.model.embed_tokens.weight.is_cuda:
            console.print("preparing  the CUDA graphs of decoding (the first time on a machine takes longest)")
        loading.submit(engine.warm_up).result()
    if engine.compile_seconds:
        console.print(f"prepared   the CUDA graphs of decoding in {engine.compile_seconds:.0f} s")
    return engine


def _engine(command: ServeCommand, console: Console) -> Engine:
    model, tokenizer, missing = load_for_ids(command.path, command.dtype, command.quantize, command.device)
    if tokenizer is None:
        console.print(
            f"warning: {missing}; served without a tokenizer: prompts and answers are token ids", markup=False
        )
    return Engine(
        model,
        tokenizer,
        speculative=command.speculative if command.drafts is None else command.drafts,
        max_batch=command.max_batch,
        cache_tokens=command.cache_tokens,
        prefill_budget=command.prefill_budget,
        max_waiting=command.max_waiting,
    )
