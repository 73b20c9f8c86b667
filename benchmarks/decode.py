"""Decoding against the programs one would use instead, on the same weights and tokens.

    python benchmarks/decode.py                     # everything: 10 GB of disk, 16 GB of memory
    python benchmarks/decode.py --quick             # bench-small and the demo's model
    python benchmarks/decode.py --json FILE         # rows {name, ours, peer, ratio, floor, goal}, too
    python benchmarks/decode.py --device cuda       # on a GPU, where llama.cpp is left out

One process holds all programs, with the same allocator setting, and lets them take their steps in turn, so that a
drifting machine meets all alike; figures are medians. Memory's bandwidth is measured in the same turns. llama.cpp is
measured where llama-cpp-python is installed. Presets have random weights; what depends on trained ones (drafts that are
accepted, bits per byte) is measured on the model that `make demo` leaves in runs/demo, or whatever --demo names.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import transformers
from decoders import Asked, Fathom, LlamaCpp, Steps, Transformers, llama_cpp, random_prompts
from llama_drafting import LlamaDrafting
from rich.console import Console
from rich.table import Table
from side import cpu_model

from fathom import presets
from fathom.checkpoint.gguf.writer import save_gguf
from fathom.checkpoint.hf.model import load_model, save_model
from fathom.config import from_json
from fathom.data.dataset import TokenRows
from fathom.data.tokenize import TokenizedCorpus, open_tokenized
from fathom.engine.backends.compiled import CompiledBackend
from fathom.engine.engine import Engine
from fathom.engine.sampling.sampler import SamplingParams
from fathom.eval.bits import evaluate
from fathom.files import atomic_write
from fathom.model.config import ModelConfig
from fathom.model.quantize import quantized
from fathom.model.transformer import Model
from fathom.runtime.hardware import install_allocator, matmul_flops
from fathom.train.run import Run
from fathom.train.setup import open_rows

PROMPT, LONG, LONGEST = 512, 2048, 16384
STEPS, ROUNDS = 8, 5
"""Steps per turn, and turns per program; the first turn is not counted."""

DRAFTED = 128
"""Tokens that every sequence is continued by where drafting is measured."""


class Row(NamedTuple):
    """One comparison. Where the goal lies below the floor, less is better."""

    name: str
    ours: float
    peer: float
    ratio: float
    floor: float | None = None
    goal: float | None = None


def against(name: str, ours: float, peer: float, floor: float | None = None, goal: float | None = None) -> Row:
    return Row(name, ours, peer, ours / peer, floor, goal)


# ------------------------------------------------------------------------------------------------------ measuring


def in_turn(sides: dict[str, Steps]) -> dict[str, float]:
    """Median seconds of each side's steps."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(ROUNDS):
        for name, steps in sides.items():
            seconds = [next(steps) for _ in range(STEPS)]
            # The first step of a turn finds the caches full of another program's weights and its threads asleep.
            found[name] += seconds[1:] if turn else []
    for steps in sides.values():
        steps.close()  # type: ignore[attr-defined]
    return {name: median(seconds) for name, seconds in found.items()}


def whole(sides: dict[str, Callable[[], float]], rounds: int = 3) -> dict[str, float]:
    """Median seconds of each side's whole runs, the first not counted where there are several."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name, side in sides.items():
            seconds = side()
            found[name] += [seconds] if turn or rounds == 1 else []
    return {name: median(seconds) for name, seconds in found.items()}


def reading(device: torch.device) -> Steps:
    """Seconds in which a gibibyte is read: by all threads in a sum, or copied on a GPU (half read, half written)."""
    if device.type == "cuda":
        yield from _copying(device)
    numbers = torch.ones(1 << 28)
    while True:
        began = time.perf_counter()
        numbers.sum()
        yield time.perf_counter() - began


def _copying(device: torch.device) -> Steps:
    source, target = torch.ones(2, 1 << 31, dtype=torch.uint8, device=device)
    while True:
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(device)
        yield (time.perf_counter() - began) / 4


def needed_bytes(config: ModelConfig, batch: int) -> float:
    """What a step must read: the weights it is expected to use, in bfloat16, and the cache, each once."""
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    layers = config.num_moe_layers
    share = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch
    routed = layers * expert * config.n_routed_experts * share
    others = config.parameter_counts().active_matrices - layers * expert * config.num_experts_per_tok
    cache = batch * PROMPT * config.num_hidden_layers * config.cache_width
    return 2 * (routed + others + cache)


# -------------------------------------------------------------------------------------------------- random weights


def random_model(config: ModelConfig, device: torch.device) -> Model:
    """In bfloat16."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return Model(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


class Programs(NamedTuple):
    """Every program with one preset's weights."""

    config: ModelConfig
    model: Model
    fathom: Fathom
    transformers: Transformers
    llama: LlamaCpp | None
    device: torch.device

    @classmethod
    def around(cls, name: str, folder: Path, device: torch.device) -> "Programs":
        config = presets.ALL[name]().model
        save_model(random_model(config, device), folder / name)
        model = load_model(folder / name, torch.bfloat16, device)
        peer = llama(model, folder, "bf16")
        return cls(config, model, Fathom(model), Transformers(folder / name, device), peer, device)


def llama(model: Model, folder: Path, kind: Any) -> LlamaCpp | None:
    """llama.cpp with the model's weights, where it is installed."""
    if llama_cpp is None or model.embed_tokens.weight.is_cuda:
        return None
    save_gguf(model, None, folder / f"{kind}.gguf", kind)
    return LlamaCpp(folder / f"{kind}.gguf", f"llama.cpp {kind}")


def decoding(name: str, programs: Programs, batch: int, wanted: dict[str, tuple[float, float]]) -> Iterator[Row]:
    """Steps of `batch` sequences against the peers and the bound; `wanted` has floor and goal by peer."""
    prompts = random_prompts(programs.config.vocab_size, [PROMPT] * batch)
    peers = [side for side in (programs.transformers, programs.llama) if side is not None]
    sides = {side.name: side.steps(prompts) for side in (programs.fathom, *peers)} | {
        "the bound": reading(programs.device)
    }
    seconds = in_turn(sides)
    seconds["the bound"] *= needed_bytes(programs.config, batch) / 2**30
    ours = batch / seconds.pop("fathom")
    for peer, took in seconds.items():
        row = f"{name}, decode, batch {batch}, against {peer}"
        yield against(row, ours, batch / took, *wanted.get(peer, (None, None)))


def reading_prompts(name: str, programs: Programs, wanted: dict[str, tuple[float, float]]) -> Iterator[Row]:
    [prompt] = random_prompts(programs.config.vocab_size, [LONG])
    peers = [side for side in (programs.transformers, programs.llama) if side is not None]
    seconds = whole({side.name: lambda side=side: side.prefill(prompt) for side in (programs.fathom, *peers)})
    ours = LONG / seconds.pop("fathom")
    for peer, took in seconds.items():
        yield against(f"{name}, prefill {LONG}, against {peer}", ours, LONG / took, *wanted.get(peer, (None, None)))


def eight_bits(programs: Programs, folder: Path) -> Iterator[Row]:
    peer = llama(programs.model, folder, "q8_0")
    if peer is None:
        yield from fewer_bits(programs)
        return
    prompts = random_prompts(programs.config.vocab_size, [PROMPT])
    packed = Fathom(quantized(programs.model, "int8"))
    seconds = in_turn({"ours": packed.steps(prompts), "peer": peer.steps(prompts)})
    yield against(
        "bench-medium, int8, batch 1, against llama.cpp q8_0", 1 / seconds["ours"], 1 / seconds["peer"], 1, 1.8
    )


def fewer_bits(programs: Programs) -> Iterator[Row]:
    """Steps in 8 and 4 bits against bfloat16, where there is no other program to compare with."""
    for batch in (1, 32):
        prompts = random_prompts(programs.config.vocab_size, [PROMPT] * batch)
        sides = {"bfloat16": programs.fathom.steps(prompts)}
        for precision in ("int8", "int4"):
            sides[precision] = Fathom(quantized(programs.model, precision)).steps(prompts)
        seconds = in_turn(sides)
        plain = batch / seconds.pop("bfloat16")
        for precision, took in seconds.items():
            yield against(f"bench-medium, {precision}, batch {batch}, against bfloat16", batch / took, plain)


def crowd(programs: Programs) -> Iterator[Row]:
    """32 requests with prompts of 32 to 256 tokens and 16 to 64 tokens to generate, all at once."""
    lengths = torch.randint(32, 257, (32,), generator=torch.Generator().manual_seed(1)).tolist()
    wanted = torch.randint(16, 65, (32,), generator=torch.Generator().manual_seed(2)).tolist()
    prompts = random_prompts(programs.config.vocab_size, lengths)
    requests = [Asked(prompt, tokens) for prompt, tokens in zip(prompts, wanted, strict=True)]
    tokens = sum(wanted)
    sides: dict[str, Callable[[], float]] = {"fathom": lambda: programs.fathom.serve(requests)}
    if programs.llama is not None:
        several = programs.llama
        sides["llama.cpp bf16"] = lambda: several.serve(requests)
    seconds = whole(sides)
    statics = whole({str(size): lambda size=size: programs.transformers.serve(requests, size) for size in (16, 32)}, 1)
    best = min(statics, key=lambda size: statics[size])
    ours = tokens / seconds.pop("fathom")
    name = "bench-medium, 32 requests, against"
    yield against(f"{name} transformers in batches of {best}", ours, tokens / statics[best], 5, 10)
    for peer, took in seconds.items():
        yield against(f"{name} {peer}", ours, tokens / took, 1.2, 2)


def longer_contexts(programs: Programs) -> Iterator[Row]:
    """Milliseconds that {LONGEST} tokens of context add, over the least that reading or multiplying them takes."""
    config = programs.config
    sides = {
        str(length): programs.fathom.steps(random_prompts(config.vocab_size, [length])) for length in (PROMPT, LONGEST)
    }
    seconds = in_turn(sides | {"read": reading(programs.device)})
    added = LONGEST - PROMPT
    numbers = added * config.num_hidden_layers * config.cache_width
    per_query = 2 * config.num_attention_heads * (config.cache_width + config.kv_lora_rank)
    flops = added * config.num_hidden_layers * per_query
    read = 2 * numbers / 2**30 * seconds["read"]
    computed = flops / matmul_flops(torch.bfloat16, programs.device)
    took = seconds[str(LONGEST)] - seconds[str(PROMPT)]
    name = f"bench-medium, ms that context {PROMPT} to {LONGEST} adds, over its bound"
    yield against(name, took * 1e3, max(read, computed) * 1e3, 2, 1.4)


def latent_attention(device: torch.device) -> Iterator[Row]:
    """Terabytes of latents per second that decoding's attention reads, against a copy, and against a plain matmul.

    Shapes of DeepSeek-V3's cache: with few heads reading bounds it, with all 128 multiplying does.
    """
    from latent_crowd import LatentCrowd  # needs Triton, which comes with torch's CUDA builds

    bytes_per_second = 2**30 / median([next(steps) for steps in [reading(device)] for _ in range(6)])
    flops_per_second = matmul_flops(torch.bfloat16, device)
    for heads, sequences, length in ((16, 128, 8192), (16, 8, 8192), (128, 128, 8192)):
        crowd = LatentCrowd(heads, sequences, length, device)
        seconds = crowd.seconds()
        name = f"latent attention, {heads} heads, {sequences} sequences of {length}: "
        if heads == 16:
            yield against(
                name + "TB/s, against a copy", crowd.bytes / seconds / 1e12, bytes_per_second / 1e12, None, 0.8
            )
        else:
            ratio = crowd.flops / seconds / 1e12, flops_per_second / 1e12
            yield against(name + "TFLOP/s, against a product", *ratio)


def more_experts(device: torch.device) -> Iterator[Row]:
    """A step's milliseconds with 256 experts and with 32, of which a token takes four; tokens are drawn, not greedy."""
    config = replace(
        presets.bench_medium().model, num_hidden_layers=5, num_experts_per_tok=4, num_nextn_predict_layers=0
    )
    sides = {}
    for experts in (32, 256):
        model = random_model(replace(config, n_routed_experts=experts), device)
        sides[str(experts)] = Fathom(model, temperature=1.0).steps(random_prompts(config.vocab_size, [PROMPT]))
    seconds = in_turn(sides)
    yield against("ms per step, 256 experts over 32", seconds["256"] * 1e3, seconds["32"] * 1e3, 1.10, 1.03)


# -------------------------------------------------------------------------------------------------------- drafting


class Drafting:
    """One engine that continues prompt after prompt, as a server's does, and the time it took after first tokens."""

    def __init__(self, model: Model, speculative: bool | int, batch: int) -> None:
        self._engine = Engine(model, speculative=speculative, max_batch=batch)
        self._clock = self.seconds = self.passes = 0.0
        """Passes: seconds inside the model's own passes."""
        self.tokens = self.forwards = self.drafted = 0
        backend, on_gpu = self._engine.backend, model.embed_tokens.weight.is_cuda
        if not isinstance(backend, CompiledBackend):
            raise RuntimeError("the kernels are not built here; without them decoding is not what this measures")

        def clocked(run: Callable[..., Any]) -> Callable[..., Any]:
            def timed(*arguments: Any) -> Any:
                began = time.perf_counter()
                found = run(*arguments)
                if on_gpu:
                    torch.cuda.synchronize()
                self._clock += time.perf_counter() - began
                return found

            return timed

        for name in ("forward", "forward_mtp", "write_mtp_kv_cache"):
            setattr(backend, name, clocked(getattr(backend, name)))

    def go_on(self, prompts: Sequence[list[int]], counted: bool) -> None:
        params = SamplingParams(max_tokens=DRAFTED, ignore_eos=True)
        handles = [self._engine.submit(prompt, params) for prompt in prompts]
        while not all(handle.token_ids for handle in handles):
            self._engine.step()
        before, clock = sum(len(handle.token_ids) for handle in handles), self._clock
        began = time.perf_counter()
        while self._engine.has_work:
            self._engine.step()
        seconds = time.perf_counter() - began
        if not counted:
            return
        self.seconds += seconds
        self.passes += self._clock - clock
        self.tokens += sum(len(handle.token_ids) for handle in handles) - before
        self.forwards += sum(handle.forwards for handle in handles)
        self.drafted += sum(handle.drafted for handle in handles)


def drafting(name: str, model: Model, prompts: Sequence[list[int]], trained: bool) -> Iterator[Row]:
    """One draft a step, and adaptive draft length, against no drafts; 1 sequence and 8.

    Tokens per step times cost(plain step) / cost(verify + draft) is what drafting could bring at best: with the same
    tokens, the ratio of the seconds spent inside the model's passes.
    """
    for batch in (1, 8):
        engines = {"none": Drafting(model, 0, batch), "one": Drafting(model, 1, batch)}
        if trained:
            engines["adaptive"] = Drafting(model, True, batch)
        groups = [prompts[first : first + batch] for first in range(0, len(prompts), batch)]
        for turn, group in enumerate((*groups, *groups)):
            for engine in engines.values():
                # In the first round engines warm up, and the adaptive one measures what steps cost and yield.
                engine.go_on(group, counted=turn >= len(groups))
        plain, one = engines["none"], engines["one"]
        row = f"{name}, one draft, batch {batch}: speed-up, of what its passes allow"
        yield against(row, plain.seconds / one.seconds, plain.passes / one.passes, 0.85, 0.95)
        if trained:
            adaptive = engines["adaptive"]
            share = f"{adaptive.drafted / adaptive.forwards:.2f} drafts a step (adaptive)"
            rates = adaptive.tokens / adaptive.seconds, plain.tokens / plain.seconds
            yield against(f"{name}, {share}, batch {batch}: tokens/s, against none", *rates, 1, 1.4)


def drafting_peer(model: Model, prompts: Sequence[list[int]], folder: Path) -> Row:
    """One draft a step, one sequence, against llama.cpp's drafting with the same module, which needs a query rank."""
    config = model.config
    save_gguf(model, None, folder / "drafting.gguf", "bf16")
    peer = LlamaDrafting(folder / "drafting.gguf", config.hidden_size, config.vocab_size, 512)
    engine = Drafting(model, 1, 1)
    tokens, seconds = 0, 0.0
    for turn in range(2):
        for prompt in prompts:
            engine.go_on([prompt], counted=turn > 0)
            went = peer.go_on(prompt, DRAFTED - 1)
            if turn:
                tokens, seconds = tokens + len(went.tokens), seconds + went.seconds
    name = "bench-medium, one draft, batch 1: tokens/s, against llama.cpp's draft-mtp"
    return against(name, engine.tokens / engine.seconds, tokens / seconds)


class HeldOut(NamedTuple):
    """The demo's model, its held-out text, and 32 prompts of 128 tokens spread over that."""

    run: Run
    prepared: TokenizedCorpus
    model: Model
    rows: TokenRows
    prompts: list[list[int]]

    @classmethod
    def of(cls, demo: Path, device: torch.device) -> "HeldOut":
        run = from_json(Run, json.loads((demo / "run.json").read_text()), where=str(demo / "run.json"))
        prepared = open_tokenized(demo / "data")
        rows = open_rows(prepared, run, "valid")
        chosen = torch.linspace(0, len(rows) - 1, 32).long().tolist()
        prompts = [rows.sequential(row, 1).tokens_BT[0, :128].tolist() for row in chosen]
        return cls(run, prepared, load_model(demo / "model", torch.bfloat16, device), rows, prompts)


def trained(demo: Path, device: torch.device) -> Iterator[Row]:
    """Drafting on held-out code, and the loss from fewer bits, with the demo's model."""
    run, prepared, model, rows, prompts = HeldOut.of(demo, device)
    yield from drafting("demo's model", model, prompts, trained=True)
    batches = [rows.sequential(row, 1) for row in range(0, len(rows), max(1, len(rows) // 64))]
    size = round(prepared.valid_bytes * len(batches) * run.train.sequence_length / prepared.valid_tokens)
    bits = evaluate(model, batches, size, torch.bfloat16).bits_per_byte
    for precision in ("int8", "int4"):
        fewer = evaluate(quantized(model, precision), batches, size, torch.bfloat16).bits_per_byte
        yield against(f"demo's model, bits per byte in {precision}, against bfloat16", fewer, bits)


# --------------------------------------------------------------------------------------------------------- showing


def settle(device: str) -> None:
    """The same allocator setting for all, and no log lines of the peers'."""
    if device == "cpu":
        install_allocator()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def small(folder: Path, device: torch.device) -> Iterator[Row]:
    programs = Programs.around("bench-small", folder, device)
    yield from decoding("bench-small", programs, 1, {"transformers": (5, 10)})
    yield from decoding("bench-small", programs, 8, {"transformers": (5, 12)})
    yield from reading_prompts("bench-small", programs, {})


def medium(folder: Path, device: torch.device) -> Iterator[Row]:
    programs = Programs.around("bench-medium", folder, device)
    single = {"transformers": (3.3, 5), "llama.cpp bf16": (1.0, 1.5), "the bound": (0.55, 0.8)}
    eight = {"transformers": (3.5, 5.5), "llama.cpp bf16": (1.0, 1.5), "the bound": (0.46, 0.7)}
    yield from decoding("bench-medium", programs, 1, single)
    yield from decoding("bench-medium", programs, 8, eight)
    if device.type == "cuda":
        yield from decoding("bench-medium", programs, 64, {})
    yield from reading_prompts("bench-medium", programs, {"transformers": (1.3, 2.5), "llama.cpp bf16": (2, 4)})
    yield from crowd(programs)
    yield from eight_bits(programs, folder)
    yield from longer_contexts(programs)
    prompts = random_prompts(programs.config.vocab_size, [128] * 8)
    yield from drafting("bench-medium", programs.model, prompts, trained=False)
    if programs.llama is not None:
        yield drafting_peer(programs.model, prompts[:2], folder)


def measured(options: argparse.Namespace, console: Console) -> Iterator[Row]:
    device = torch.device(options.device)
    parts: dict[str, Callable[[Path], Iterator[Row]]] = {"bench-small": lambda folder: small(folder, device)}
    if not options.quick:
        parts["bench-medium"] = lambda folder: medium(folder, device)
        parts["numbers of experts"] = lambda _: more_experts(device)
    if device.type == "cuda":
        parts["latent attention"] = lambda _: latent_attention(device)
    if options.demo.is_dir():
        parts["the demo's model"] = lambda _: trained(options.demo, device)
    else:
        console.print(
            f"no demo in {options.demo}: nothing about trained models is measured (make demo)", style="yellow"
        )
    for name, part in parts.items():
        if options.only in name:
            with tempfile.TemporaryDirectory() as folder:
                for row in part(Path(folder)):
                    console.print(f"{row.name}: {row.ratio:.2f}", style="dim", highlight=False)
                    yield row


def reached(row: Row) -> str:
    if row.floor is None or row.goal is None:
        return ""
    sign = 1 if row.goal > row.floor else -1
    if sign * row.ratio >= sign * row.goal:
        return "[green]goal[/]"
    return "[yellow]floor[/]" if sign * row.ratio >= sign * row.floor else "[red]neither[/]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="bench-small and the demo's model alone")
    parser.add_argument("--only", default="", help="the parts with this in their name: bench-small, demo, …")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to measure (default: cpu)")
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="directory of a demo's run")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, and torch finds no CUDA device here")
    settle(options.device)
    console = Console(width=150)
    rows = list(measured(options, console))
    table = Table("tokens per second, unless said", *("fathom", "peer", "ratio", "floor", "goal", "reached"), box=None)
    for row in rows:
        targets = ["" if target is None else f"{target:g}" for target in (row.floor, row.goal)]
        table.add_row(row.name, f"{row.ours:.4g}", f"{row.peer:.4g}", f"{row.ratio:.2f}", *targets, reached(row))
    console.print(table)
    device = torch.device(options.device)
    read = median([next(steps) for steps in [reading(device)] for _ in range(6)])
    machine = {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bytes_per_second": 2**30 / read,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "llama_cpp": None if llama_cpp is None else llama_cpp.__version__,
        "quick": options.quick,
    }
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()), highlight=False)
    if options.json:
        atomic_write(
            options.json, json.dumps({"machine": machine, "rows": [r._asdict() for r in rows]}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
