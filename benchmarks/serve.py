"""The server under load, against `transformers serve` and llama.cpp's server on the same weights.

    python benchmarks/serve.py                        # bench-small with random weights
    python benchmarks/serve.py bench-medium --seconds 60    # another preset; takes 16 GB of memory
    python benchmarks/serve.py runs/demo/model        # a trained model, so that drafts are accepted
    python benchmarks/serve.py MODEL --quick          # up to 32 clients, shorter
    python benchmarks/serve.py MODEL --json FILE      # rows {name, ours, peer, ratio, floor, goal} as well

Starts the servers itself, each with its own best settings for this machine, and sends each in turn the same prompts
and lengths (benchmarks/load.py). `llama-server` is taken from the PATH or from --llama-server; without one that peer is
left out. What HTTP costs is measured apart: 32 requests at any time, of the same lengths, through the server and by its
engine alone, in turn (benchmarks/served.py).
"""

import argparse
import itertools
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import load
import psutil
import served
import torch

import fathom
from fathom import presets
from fathom.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer, train_tokenizer
from fathom.model.transformer import Model

CLIENTS = (1, 8, 32, 128)
MAX_BATCH = served.AT_A_TIME
SECONDS = 15.0
HEAD = """| clients | | tokens/s | first token p50 / p99, ms | per token p50 / p99, ms | answered | failed |
| ---: | --- | ---: | ---: | ---: | ---: | ---: |"""
ROUNDS = 24
"""Of the server and its engine alone in turn; a fifth of them where they take long."""


class Server(NamedTuple):
    """One that runs."""

    name: str
    address: tuple[str, int]
    body: load.Body
    process: psutil.Process
    child: subprocess.Popen[bytes]

    def until_idle(self) -> None:
        """Wait for cancelled requests to end: queued ones may all start before the server notices."""
        for _ in range(300):
            if self.process.cpu_percent(1.0) < 10:
                return
        sys.exit(f"{self.name} is still busy five minutes after its clients disconnected")


# ------------------------------------------------------------------------------------------------------ the servers


def ours(request: load.LoadRequest) -> dict[str, Any]:
    body = {
        "prompt": request.prompt,
        "max_tokens": request.length,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    return body | {"stream_options": {"include_usage": True}}


def theirs(model: Path) -> load.Body:
    """`transformers serve` has neither ignore_eos nor stream_options; without EOS ids the length is full."""
    config = json.dumps({"eos_token_id": None, "do_sample": False})

    def body(request: load.LoadRequest) -> dict[str, Any]:
        common = {"prompt": request.prompt, "max_tokens": request.length, "stream": True}
        return common | {"model": str(model), "generation_config": config}

    return body


@contextmanager
def started(name: str, command: list[str], body: load.Body, spoken_to: bool = False) -> Iterator[Server]:
    port = _free_port()
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE if spoken_to else None
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            [*command, "--port", str(port)], stdin=pipe, stdout=pipe or log, stderr=log, env=environment
        ) as process,
    ):
        try:
            server = Server(name, ("127.0.0.1", port), body, psutil.Process(process.pid), process)
            for _ in range(600):
                if process.poll() is not None:
                    log.seek(0)
                    sys.exit(f"{name} did not start: {log.read().decode(errors='replace')[-2000:]}")
                if _answers(server.address):
                    break
                time.sleep(0.2)
            yield server
        finally:
            process.terminate()
            process.wait()


def our_server(model: Path) -> Any:
    command = [sys.executable, "-m", "fathom", "serve", str(model), "--max-batch", str(MAX_BATCH)]
    return started("fathom serve", command, ours)


def asked_server(model: Path) -> Any:
    """Ours, with an engine that also takes requests without HTTP."""
    command = [sys.executable, served.__file__, str(model), "--max-batch", str(MAX_BATCH)]
    return started("fathom serve", command, ours, spoken_to=True)


def transformers_server(model: Path) -> Any:
    """Without continuous batching, which in 5.23 fails with MLA: its cache takes values as wide as keys."""
    script = Path(sys.executable).with_name("transformers")
    command = [str(script), "serve", str(model), "--device", "cpu", "--dtype", "bfloat16", "--host", "127.0.0.1"]
    return started("transformers serve", command, theirs(model))


def llama_server(model: Path, folder: Path, binary: str | None) -> Any:
    """None where there is none."""
    program = binary or shutil.which("llama-server")
    if program is None:
        return None
    export = [sys.executable, "-m", "fathom", "export", str(model), "--to", "gguf", "--dtype", "bf16"]
    subprocess.run([*export, "--out", str(folder)], check=True, capture_output=True)
    [weights] = folder.glob("*.gguf")
    threads = str(torch.get_num_threads())
    context = min(1024, context_of(model))
    # No two texts begin alike: keeping what was read would only cost it time.
    flags = ["-t", threads, "-np", str(MAX_BATCH), "-c", str(MAX_BATCH * context), "--cache-ram", "0", "--offline"]
    return started("llama.cpp's server", [program, "-m", str(weights), *flags], ours)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _answers(address: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(address, 5) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            return connection.recv(64).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


# ----------------------------------------------------------------------------------------------------- the requests


def texts() -> list[str]:
    from fathom.data.corpus import DataConfig, read_corpus

    return [document.text for document in itertools.islice(read_corpus(DataConfig(corpus="python-stdlib")), 300)]


def requests(
    tokenizer: Tokenizer, context: int, seed: int, pool: list[str], texts_seed: int | None = None
) -> Iterator[load.LoadRequest]:
    """Ragged: 16 to 256 tokens of Python's library, answers of 16 to 128, as far as they fit; no two alike.

    `seed` draws the lengths, and the texts too unless those have a seed of their own.
    """
    lengths, places = random.Random(seed), random.Random(seed if texts_seed is None else texts_seed)
    longest = min(256, context // 2)
    while True:
        text = places.choice(pool)
        begin = places.randrange(max(1, len(text) - 8 * longest))
        ids = tokenizer.encode(text[begin : begin + 8 * longest], bos=False)[: lengths.randint(16, longest)]
        yield load.LoadRequest(tokenizer.decode(ids), lengths.randint(16, min(128, context // 4)))


def context_of(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text())["max_position_embeddings"])


def random_model(preset: str, folder: Path, pool: list[str]) -> Path:
    config = presets.ALL[preset]().model
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    fathom.save_model(Model(config), folder)
    torch.set_default_dtype(torch.float32)
    save_tokenizer(train_tokenizer(pool, config.vocab_size), folder)
    return folder


# ------------------------------------------------------------------------------------------------------ measuring


def by_itself(server: Server, waiting: list[load.LoadRequest]) -> float:
    """Tokens per second of the server's engine."""
    assert server.child.stdin is not None and server.child.stdout is not None
    server.child.stdin.write(json.dumps([[request.prompt, request.length] for request in waiting]).encode() + b"\n")
    server.child.stdin.flush()
    return float(server.child.stdout.readline())


def through(server: Server, waiting: list[load.LoadRequest]) -> float:
    """Tokens per second through the server."""
    began = time.perf_counter()
    sent = load.run(server.address, server.body, waiting, MAX_BATCH, float("inf"))
    seen = load.summary(sent, time.perf_counter() - began)
    assert not seen.failed, f"{seen.failed} of {len(sent)} requests failed"
    return seen.tokens_per_second


def cost_of_http(server: Server, draw: Any, rounds: int) -> list[tuple[float, float]]:
    """Through the server and by its engine alone, which take turns in going first.

    Lengths are the same, texts are not: the prefix cache of one half would save the other half work.
    """
    pairs: list[tuple[float, float]] = []
    turn, times = 0, 1
    while len(pairs) < rounds:
        began = time.perf_counter()
        halves = [list(itertools.islice(draw(turn, 2 * turn + half), times * MAX_BATCH)) for half in (0, 1)]
        if turn % 2:
            pair = through(server, halves[0]), by_itself(server, halves[1])
        else:
            alone = by_itself(server, halves[1])
            pair = through(server, halves[0]), alone
        if turn:  # the first finds the drafting not settled
            pairs.append(pair)
        elif time.perf_counter() - began < 30:
            times = 2
        else:
            rounds = max(rounds // 5, 3)
        turn += 1
    print("through HTTP / alone:", ", ".join(f"{a:.0f}/{b:.0f}" for a, b in pairs))
    return pairs


def open_rows(clients: int, seen: dict[str, load.Seen]) -> list[dict[str, Any]]:
    rows = []
    mine = seen["fathom serve"]
    for name, peer in seen.items():
        if name == "fathom serve":
            continue
        floor = 3.0 if clients == 32 and name.startswith("transformers") else None
        goal = None if name.startswith("transformers") else 1.0
        shared = {"name": f"tokens/s, {clients} clients, against {name}", "floor": floor, "goal": goal}
        rows.append(shared | {"ours": mine.tokens_per_second, "peer": peer.tokens_per_second})
        for what, one, other in (("first token", mine.first, peer.first), ("per token", mine.each, peer.each)):
            for place, label in enumerate(("p50", "p99")):
                shared = {"name": f"{what} {label}, ms, {clients} clients, against {name}", "floor": None, "goal": None}
                rows.append(shared | {"ours": one[place] * 1e3, "peer": other[place] * 1e3})
    # A ratio above 1 means that ours is better.
    return [row | {"ratio": _ratio(row)} for row in rows]


def http_row(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    http, alone = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = [through / by_itself for through, by_itself in pairs]
    ratio, spread = statistics.median(ratios), statistics.stdev(ratios) / len(ratios) ** 0.5
    print(
        f"through HTTP {http:,.0f} tokens/s, the engine alone {alone:,.0f}: {ratio:.3f}, median of {len(pairs)} pairs"
    )
    print(f"(their mean {statistics.mean(ratios):.3f} ± {spread:.3f})")
    shared = {"name": "tokens/s through HTTP against the engine alone, 32 clients", "floor": 0.97, "goal": 1.0}
    return shared | {"ours": http, "peer": alone, "ratio": ratio}


def _ratio(row: dict[str, Any]) -> float:
    ours, peer = row["ours"], row["peer"]
    return float("nan") if not ours or not peer else ours / peer if "tokens/s" in row["name"] else peer / ours


def shown(clients: int, name: str, seen: load.Seen) -> str:
    """A line of the table, which is also one in Markdown."""
    times = [f"{pair[0] * 1e3:,.1f} / {pair[1] * 1e3:,.1f}" for pair in (seen.first, seen.each)]
    cells = [str(clients), name, f"{seen.tokens_per_second:,.0f}", *times, str(seen.answered), str(seen.failed)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", default="bench-small", help="model directory, or preset with random weights"
    )
    parser.add_argument("--quick", action="store_true", help="up to 32 clients, a third of the time")
    parser.add_argument("--seconds", type=float, help="of each load; a large model reads its first prompts so long")
    parser.add_argument("--clients", type=int, nargs="+", help="how many at a time, in turn")
    parser.add_argument("--llama-server", help="llama.cpp's llama-server")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--only-http", action="store_true", help="only what HTTP costs")
    only.add_argument("--no-http", action="store_true", help="only the servers against each other")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args()
    counts, seconds = (CLIENTS[:3], SECONDS / 3) if options.quick else (CLIENTS, SECONDS)
    counts, seconds = options.clients or counts, options.seconds or seconds
    pool = texts()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        random_weights = options.model in presets.ALL
        model = random_model(options.model, Path(folder, "model"), pool) if random_weights else Path(options.model)
        tokenizer, context = load_tokenizer(model), context_of(model)
        draw = lambda seed, texts_seed=None: requests(tokenizer, context, seed, pool, texts_seed)  # noqa: E731
        if not options.only_http:
            servers = [stack.enter_context(our_server(model)), stack.enter_context(transformers_server(model))]
            if (llama := llama_server(model, Path(folder, "gguf"), options.llama_server)) is not None:
                servers.append(stack.enter_context(llama))
            for server in servers:  # what is made at the first request is made
                load.run(server.address, server.body, itertools.islice(draw(0), 2), 1, 20)
            print(HEAD)
            for clients in counts:
                seen = {}
                for server in servers:
                    sent = load.run(server.address, server.body, draw(clients), clients, seconds)
                    seen[server.name] = load.summary(sent, seconds)
                    print(shown(clients, server.name, seen[server.name]), flush=True)
                    server.until_idle()
                rows += open_rows(clients, seen)
        if not options.no_http:
            stack.close()
            with asked_server(model) as server:
                pairs = cost_of_http(server, draw, ROUNDS // 3 if options.quick else ROUNDS)
            rows.append(http_row(pairs))
    print(versions())
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def versions() -> str:
    import transformers

    processor = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "unknown processor",
    )
    return (
        f"fathom {fathom.__version__}, torch {torch.__version__}, transformers {transformers.__version__}; "
        f"{torch.get_num_threads()} threads, {processor}, {torch.backends.cpu.get_cpu_capability()}; bfloat16"
    )


if __name__ == "__main__":
    main()
