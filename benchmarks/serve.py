"""A server under load: throughput, time to first token and per token, by number of clients.

    python benchmarks/serve.py runs/demo/model --json serve.json
    python benchmarks/serve.py runs/demo/model --against http://127.0.0.1:9000   # another server with the same model

Starts `fathom serve`, and lets 1, 8, 32 and 128 clients ask it. Each sends its next request when the last was answered,
after a pause drawn from an exponential distribution, so that they do not march in step. Prompts and lengths are drawn
alike for everybody. The engine by itself is measured on the same requests, all at once: what HTTP adds is the
difference. `--against` asks another server of OpenAI's protocol the same; it must be running.
"""

import argparse
import asyncio
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import torch
from rich.console import Console
from rich.table import Table

import fathom
from fathom.infer.engine import Engine, Request

CLIENTS = (1, 8, 32, 128)
PAUSE = 0.05
"""Seconds between a client's requests, on average."""


@dataclass
class Load:
    """What a number of clients saw."""

    name: str
    clients: int
    tokens_per_second: float
    first_p50: float
    first_p99: float
    each_p50: float
    each_p99: float
    failed: int


@dataclass
class Asked:
    """One request and when its tokens came."""

    prompt: list[int]
    length: int
    sent: float = 0.0
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0


def requests(count: int, vocabulary: int, context: int, seed: int) -> list[Asked]:
    """Ragged: prompts of 16 to 256 tokens, answers of 16 to 128, as far as they fit."""
    rng = random.Random(seed)
    longest = min(256, context // 2)
    return [
        Asked(
            [rng.randrange(300, vocabulary) for _ in range(rng.randint(16, longest))],
            rng.randint(16, min(128, context // 4)),
        )
        for _ in range(count)
    ]


async def ask(client: httpx.AsyncClient, model: str, asked: Asked) -> None:
    body = {"model": model, "prompt": asked.prompt, "max_tokens": asked.length, "temperature": 0, "stream": True}
    body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
    asked.sent = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            asked.last = time.perf_counter()
            if chunk["choices"] and not asked.first:
                asked.first = asked.last
            if chunk.get("usage"):
                asked.tokens = chunk["usage"]["completion_tokens"]


async def load(url: str, model: str, clients: int, waiting: list[Asked]) -> tuple[float, int]:
    """Seconds and failures until all are answered."""
    failed = 0
    queue = iter(waiting)

    async def one(seed: int) -> None:
        nonlocal failed
        rng = random.Random(seed)
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            for asked in queue:
                try:
                    await ask(client, model, asked)
                except httpx.HTTPError:
                    failed += 1
                await asyncio.sleep(rng.expovariate(1 / PAUSE))

    began = time.perf_counter()
    await asyncio.gather(*(one(seed) for seed in range(clients)))
    return time.perf_counter() - began, failed


def measured(name: str, url: str, model: str, clients: int, waiting: list[Asked]) -> Load:
    seconds, failed = asyncio.run(load(url, model, clients, waiting))
    done = [asked for asked in waiting if asked.tokens > 1]
    first = sorted(asked.first - asked.sent for asked in done)
    each = sorted((asked.last - asked.first) / (asked.tokens - 1) for asked in done)
    tokens = sum(asked.tokens for asked in done)
    return Load(name, clients, tokens / seconds, *_quantiles(first), *_quantiles(each), failed)


def _quantiles(values: list[float]) -> tuple[float, float]:
    return statistics.median(values), values[min(len(values) - 1, int(0.99 * len(values)))]


def engine_alone(path: Path, dtype: torch.dtype, clients: int, waiting: list[Asked]) -> float:
    """Tokens per second with the same requests, `clients` of them in the engine at any time, without HTTP."""
    engine = Engine(fathom.load_model(path, dtype), None, max_batch=32)
    queue, running = iter(waiting), set()
    began = time.perf_counter()
    tokens = 0
    while True:
        while len(running) < clients and (asked := next(queue, None)) is not None:
            params = fathom.SamplingParams(max_tokens=asked.length, ignore_eos=True)
            running.add(engine.submit(Request(asked.prompt, params)))
        if not running:
            return tokens / (time.perf_counter() - began)
        for update in engine.step():
            tokens += len(update.tokens)
        running = {handle for handle in running if not handle.finished}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model directory")
    parser.add_argument("--against", help="address of another server")
    parser.add_argument("--model-there", help="the model's name at that server")
    parser.add_argument("--quick", action="store_true", help="fewer requests, up to 32 clients")
    parser.add_argument("--json", type=Path, help="write the rows here")
    chosen = parser.parse_args()
    port = 8765
    command = [sys.executable, "-m", "fathom", "serve", str(chosen.model), "--port", str(port), "--name", "model"]
    url = f"http://127.0.0.1:{port}"
    config = json.loads((chosen.model / "config.json").read_text())
    rows: list[Load] = []
    with subprocess.Popen([*command, "--max-waiting", "256"], stderr=subprocess.DEVNULL) as server:
        try:
            _wait(url, server)
            targets = [("fathom serve", url, "model")]
            if chosen.against:
                targets.append((chosen.against, chosen.against, chosen.model_there or "model"))
            for clients in CLIENTS[:3] if chosen.quick else CLIENTS:
                count = max(12, clients * (2 if chosen.quick else 4))
                for name, address, model in targets:
                    waiting = requests(count, config["vocab_size"], config["max_position_embeddings"], clients)
                    rows.append(measured(name, address, model, clients, waiting))
        finally:
            server.terminate()
    for clients in CLIENTS[:3] if chosen.quick else CLIENTS:
        waiting = requests(
            max(12, clients * (2 if chosen.quick else 4)),
            config["vocab_size"],
            config["max_position_embeddings"],
            clients,
        )
        rate = engine_alone(chosen.model, torch.bfloat16, clients, waiting)
        rows.append(Load("engine alone", clients, rate, *[float("nan")] * 4, 0))
    table = Table("", "clients", "tokens/s", "first token p50 / p99, ms", "per token p50 / p99, ms", "failed")
    for row in rows:
        first = f"{row.first_p50 * 1e3:.0f} / {row.first_p99 * 1e3:.0f}"
        each = f"{row.each_p50 * 1e3:.1f} / {row.each_p99 * 1e3:.1f}"
        alone = row.first_p50 != row.first_p50
        cells = ("", "") if alone else (first, each)
        table.add_row(row.name, str(row.clients), f"{row.tokens_per_second:,.0f}", *cells, str(row.failed))
    Console().print(table)
    if chosen.json:
        machine = {"processor": platform.processor(), "torch": torch.__version__, "fathom": fathom.__version__}
        chosen.json.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def _wait(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if server.poll() is not None:
            sys.exit("the server did not start")
        try:
            httpx.get(f"{url}/health", timeout=5)
            return
        except httpx.HTTPError:
            time.sleep(0.1)


if __name__ == "__main__":
    main()
