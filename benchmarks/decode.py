"""Decoding against the programs one would use instead, on the same weights and tokens.

    python benchmarks/decode.py                     # bench-small and bench-medium (4 GB of disk, 14 GB of memory)
    python benchmarks/decode.py --quick             # bench-small alone
    python benchmarks/decode.py --json FILE         # rows {name, ours, peer, ratio, floor, goal} as well

One process holds all programs, with the same allocator setting, and lets them take their steps in turn, so that a
drifting machine meets all alike; figures are medians. llama.cpp is measured where llama-cpp-python is installed, one
sequence at a time. Weights are random: nothing is drafted here.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import transformers
from rich.console import Console
from rich.table import Table

from fathom import presets
from fathom.checkpoint.huggingface import load_model, save_model
from fathom.infer.core import Core
from fathom.infer.sampler import SamplingParams
from fathom.model.config import ModelConfig
from fathom.model.transformer import Model
from fathom.train.hardware import keep_freed_memory

try:
    import llama_cpp

    from fathom.checkpoint.gguf import save_gguf
except ImportError:
    llama_cpp = None

PROMPT, LONG = 512, 2048
STEPS, ROUNDS = 8, 4
"""Steps per turn, and turns per program."""

Steps = Iterator[float]
"""Seconds of one step after another."""


class Goal(NamedTuple):
    """What a row should reach."""

    floor: float
    goal: float


GOALS = {
    ("bench-medium", "transformers", 1): Goal(3.3, 5),
    ("bench-medium", "transformers", 8): Goal(3.5, 5.5),
    ("bench-medium", "llama.cpp bf16", 1): Goal(1.0, 1.5),
    ("bench-medium", "the bound", 1): Goal(0.55, 0.8),
    ("bench-medium", "the bound", 8): Goal(0.46, 0.7),
    ("bench-small", "transformers", 1): Goal(5, 10),
    ("bench-small", "transformers", 8): Goal(5, 12),
    ("bench-medium", "prefill, transformers", 1): Goal(1.3, 2.5),
    ("bench-medium", "prefill, llama.cpp bf16", 1): Goal(2, 4),
}


def prompts(config: ModelConfig, count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    ids: list[list[int]] = torch.randint(2, config.vocab_size, (count, length), generator=generator).tolist()
    return ids


# ---------------------------------------------------------------------------------------------- the three programs


def our_steps(model: Model, batch: int) -> Steps:
    core = Core(model, speculative=False, max_batch=batch)
    params = SamplingParams(max_tokens=1000, ignore_eos=True)
    handles = [core.submit(prompt, params) for prompt in prompts(model.config, batch, PROMPT)]
    while not all(handle.token_ids for handle in handles):
        core.step()
    while True:
        began = time.perf_counter()
        core.step()
        yield time.perf_counter() - began


def our_prefill(model: Model) -> float:
    core = Core(model, speculative=False, max_batch=1)
    handle = core.submit(prompts(model.config, 1, LONG)[0], SamplingParams(max_tokens=2, ignore_eos=True))
    began = time.perf_counter()
    while not handle.token_ids:
        core.step()
    return time.perf_counter() - began


@torch.no_grad()
def their_steps(model: Any, config: ModelConfig, batch: int) -> Steps:
    ids_BS = torch.tensor(prompts(config, batch, PROMPT))
    output = model(ids_BS, use_cache=True, logits_to_keep=1)
    while True:
        began = time.perf_counter()
        next_B1 = output.logits[:, -1:].argmax(-1)
        output = model(next_B1, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
        yield time.perf_counter() - began


@torch.no_grad()
def their_prefill(model: Any, config: ModelConfig) -> float:
    ids_BS = torch.tensor(prompts(config, 1, LONG))
    began = time.perf_counter()
    model(ids_BS, use_cache=True, logits_to_keep=1).logits.argmax(-1).item()
    return time.perf_counter() - began


def llama_steps(program: Any, config: ModelConfig) -> Steps:
    program.reset()
    program.eval(prompts(config, 1, PROMPT)[0])
    token = 5
    while True:
        began = time.perf_counter()
        program.eval([token])
        token = int(program.scores[0].argmax())
        yield time.perf_counter() - began


def llama_prefill(program: Any, config: ModelConfig) -> float:
    program.reset()
    began = time.perf_counter()
    program.eval(prompts(config, 1, LONG)[0])
    return time.perf_counter() - began


# ------------------------------------------------------------------------------------------------------ measuring


def in_turn(sides: dict[str, Steps]) -> dict[str, float]:
    """Median seconds of each side's steps, the first turn not counted."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(ROUNDS + 1):
        for name, steps in sides.items():
            seconds = [next(steps) for _ in range(STEPS)]
            # The first step of a turn finds the caches full of another program's weights and its threads asleep.
            found[name] += seconds[1:] if turn else []
    return {name: median(seconds) for name, seconds in found.items()}


def once_each(sides: dict[str, Callable[[], float]]) -> dict[str, float]:
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(3):
        for name, side in sides.items():
            seconds = side()
            found[name] += [seconds] if turn else []
    return {name: median(seconds) for name, seconds in found.items()}


def bandwidth() -> float:
    """Bytes per second at which a gigabyte is read (a sum by all threads), the best of several."""
    numbers = torch.ones(1 << 28)
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - began)
    return 4 * len(numbers) / best


def bound(config: ModelConfig, batch: int, speed: float) -> float:
    """Least seconds of a step: the weights it needs in bfloat16 and the cache, each read once."""
    counts = config.parameter_counts()
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    layers = config.num_hidden_layers - config.first_k_dense_replace
    share = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch
    routed = layers * expert * config.n_routed_experts * share
    others = counts.active_matrices - layers * expert * config.num_experts_per_tok
    cache = batch * PROMPT * config.num_hidden_layers * config.cache_width
    return 2 * (routed + others + cache) / speed


def measure(name: str, folder: Path) -> list[dict[str, Any]]:
    config = presets.ALL[name]().model
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    save_model(Model(config), folder / name)
    torch.set_default_dtype(torch.float32)
    model = load_model(folder / name, torch.bfloat16)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        folder / name, dtype=torch.bfloat16, experts_implementation="grouped_mm"
    ).eval()
    program: Any = None
    if llama_cpp is not None:
        save_gguf(model, None, folder / f"{name}.gguf", "bf16")
        program = llama_cpp.Llama(
            str(folder / f"{name}.gguf"), n_ctx=4096, n_batch=LONG, n_threads=torch.get_num_threads(), verbose=False
        )
    rows = []
    for batch in (1, 8):
        sides = {"fathom": our_steps(model, batch), "transformers": their_steps(peer, config, batch)}
        if program is not None and batch == 1:
            sides["llama.cpp bf16"] = llama_steps(program, config)
        seconds = in_turn(sides)
        seconds["the bound"] = bound(config, batch, bandwidth())
        ours = batch / seconds.pop("fathom")
        rows += [row(name, f"decode, batch {batch}", key, batch, ours, batch / s) for key, s in seconds.items()]
    prefills = {"fathom": lambda: our_prefill(model), "transformers": lambda: their_prefill(peer, config)}
    if program is not None:
        prefills["llama.cpp bf16"] = lambda: llama_prefill(program, config)
    seconds = once_each(prefills)
    ours = LONG / seconds.pop("fathom")
    rows += [row(name, f"prefill {LONG}", f"prefill, {key}", 1, ours, LONG / s) for key, s in seconds.items()]
    return rows


def row(model: str, what: str, peer: str, batch: int, ours: float, theirs: float) -> dict[str, Any]:
    wanted = GOALS.get((model, peer, batch))
    return {
        "name": f"{model}, {what}, against {peer.removeprefix('prefill, ')}",
        "ours": ours,
        "peer": theirs,
        "ratio": ours / theirs,
        "floor": wanted.floor if wanted else None,
        "goal": wanted.goal if wanted else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="bench-small alone")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args()
    keep_freed_memory()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = []
    console = Console()
    for name in ("bench-small",) if options.quick else ("bench-small", "bench-medium"):
        console.print(f"measuring {name} …", style="dim")
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(name, Path(folder))
    table = Table("tokens per second", "fathom", "peer", "ratio", "floor", "goal", box=None)
    for found in rows:
        wanted = [f"{found[key]:g}" if found[key] else "" for key in ("floor", "goal")]
        table.add_row(found["name"], f"{found['ours']:.1f}", f"{found['peer']:.1f}", f"{found['ratio']:.2f}", *wanted)
    console.print(table)
    console.print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, {bandwidth() / 1e9:.0f} GB/s read; bfloat16, "
        f"{PROMPT} tokens of context"
    )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
