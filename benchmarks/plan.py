"""`fathom plan --gpu cpu` against this machine, memory and step time: `python benchmarks/plan.py` (a GPU: --gpu cuda).

Every case is planned here and then trained for a few steps by the trainer's own `pretrain_step` in a process of its
own. Memory is the most that process held in a step (VmHWM) above what it held when a tiny model had taken two steps:
code, kernels and threads are there by then. Tokens are random, routers untrained.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from side import KNOWS_PEAK_MEMORY

from fathom import presets
from fathom.config import atomic_write, from_json, to_json
from fathom.data.batch import next_token_batch
from fathom.distributed.ranks import Ranks
from fathom.lab.planner.local.report import plan_here
from fathom.model.transformer import Model
from fathom.runtime.hardware import keep_freed_memory
from fathom.train.pretrain import pretrain_step
from fathom.train.run import Run
from fathom.train.setup import state_around
from fathom.train.step import TrainState

_STEPS, _WARM_UP = 30, 10
_ONE = Ranks(0, 1, torch.device("cpu"))


def cases() -> dict[str, Run]:
    """Presets, and shapes that differ from them in one thing each."""
    nano, small = presets.nano(), presets.bench_small()
    wide = replace(nano, model=replace(nano.model, hidden_size=512, moe_intermediate_size=256, intermediate_size=1408))
    many = replace(small, model=replace(small.model, n_routed_experts=128))
    plain = replace(nano.model, num_nextn_predict_layers=0, num_hidden_layers=9)
    queries = replace(small.model, hidden_size=320, q_lora_rank=None, num_hidden_layers=5, moe_intermediate_size=192)
    return {
        "nano (Muon)": nano,
        "nano, AdamW": replace(nano, optimizer=replace(nano.optimizer, name="adamw")),
        "nano, 2 x 256": _sized(nano, 2, 256),
        "nano, width 512": wide,
        "bench-small": small,
        "bench-small, 1 x 2048": _sized(small, 1, 2048),
        "bench-small, 128 experts, 4 x 512": _sized(many, 4, 512),
        "bench-small, recomputed": replace(small, train=replace(small.train, activation_checkpointing=True)),
        "bench-small, Muon, 4 x 512": _sized(replace(small, optimizer=nano.optimizer), 4, 512),
        "nano, 9 layers, no MTP, 4 x 1024": _sized(replace(nano, model=plain), 4, 1024),
        "width 320, 5 layers, whole queries, 12 x 256": _sized(replace(small, model=queries), 12, 256),
    }


def _sized(run: Run, batch: int, length: int) -> Run:
    return replace(run, train=replace(run.train, batch_size=batch, micro_batch_size=batch, sequence_length=length))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compare the planner with this machine; about eleven minutes, on a GPU two."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE, too")
    parser.add_argument("--only", default="", metavar="WORDS", help="measure the cases that have WORDS in their name")
    parser.add_argument("--gpu", choices=("cpu", "cuda"), default="cpu", help="as `fathom plan` takes it")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_measured(from_json(Run, json.loads(options.child)))))
        return
    if options.gpu == "cuda":
        if not torch.cuda.is_available():
            parser.error("there is no CUDA device here")
        from plan_gpu import rows_on_gpu  # needs a GPU's Triton

        rows = rows_on_gpu(options.only)
    elif KNOWS_PEAK_MEMORY:
        rows = [_row(name, run) for name, run in cases().items() if options.only in name]
    else:
        parser.error("this system does not tell a process's peak memory (Linux does)")
    Console(width=120).print(_table(rows))
    if options.json:
        atomic_write(options.json, json.dumps(rows, indent=1) + "\n")


def _row(name: str, run: Run) -> dict[str, Any]:
    plan = plan_here(run, torch.device("cpu"))
    command = [sys.executable, __file__, "--child", json.dumps(to_json(plan.run))]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    measured = json.loads(answer.stdout)
    return {
        "case": name,
        "type": plan.run.train.compute_dtype,
        "memory": plan.peak.total,
        "seconds": plan.time.total,
        "measured": measured,
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("case", "activations", "memory: plan", "measured", "off by", "step: plan", "measured", "off by")
    for row in rows:
        memory, seconds = row["measured"]["memory"], row["measured"]["seconds"]
        table.add_row(
            row["case"],
            row["type"],
            f"{row['memory'] / 1e6:,.0f} MB",
            f"{memory / 1e6:,.0f} MB",
            f"{row['memory'] / memory - 1:+.1%}",
            f"{row['seconds'] * 1e3:,.0f} ms",
            f"{seconds * 1e3:,.0f} ms",
            f"{row['seconds'] / seconds - 1:+.1%}",
        )
    return table


# ------------------------------------------------------------------------------------------------ the measured process


def _measured(run: Run) -> dict[str, float]:
    """Bytes and seconds of the run's steps; the first few warm up and count for memory alone."""
    keep_freed_memory()  # as `fathom train` does
    _take_steps(_tiny(run), 2)
    before = _status("VmRSS")
    seconds = _take_steps(run, _STEPS)
    return {"memory": _status("VmHWM") - before, "seconds": median(seconds[_WARM_UP:])}


def _tiny(run: Run) -> Run:
    model = replace(presets.nano().model, vocab_size=256, hidden_size=64, num_hidden_layers=2)
    train = replace(run.train, batch_size=2, micro_batch_size=2, sequence_length=64)
    return replace(run, model=model, train=train)


def _take_steps(run: Run, steps: int) -> list[float]:
    torch.manual_seed(0)
    state = state_around(Model(run.model).train(), run, _ONE)
    return [_step(state, run, turn) for turn in range(steps)]


def _step(state: TrainState, run: Run, turn: int) -> float:
    train, modules = run.train, run.model.num_nextn_predict_layers
    width, draw = train.sequence_length + 1 + modules, torch.Generator().manual_seed(turn)
    tokens_BW = torch.randint(run.model.vocab_size, (train.batch_size, width), generator=draw)
    batches = [next_token_batch(part, modules) for part in tokens_BW.split(train.micro_batch_size)]
    began = time.perf_counter()
    pretrain_step(state, batches, train.batch_size, run, _ONE)
    return time.perf_counter() - began


def _status(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


if __name__ == "__main__":
    main()
