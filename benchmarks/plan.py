"""`fathom plan --gpu cpu` against a longer run on this machine: `python benchmarks/plan.py` (a GPU: --gpu cuda).

Every case is planned, from three steps of each size, and then trained for more steps by the trainer's own
`pretrain_step`; plan and run are processes of their own. Memory is a process's peak (a GPU: its tensors'). Tokens are
random, routers untrained. Cases of more than four micro-batches test the extrapolation.
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

from fathom import presets
from fathom.config import from_json, to_json
from fathom.data.batch import next_token_batch
from fathom.distributed.ranks import Ranks
from fathom.files import atomic_write
from fathom.lab.planner.local import local_json, peak_memory, plan_local
from fathom.runtime.hardware import install_allocator
from fathom.train.pretrain import pretrain_step
from fathom.train.run import OptimizerConfig, Run, TrainConfig
from fathom.train.setup import build_state
from fathom.train.step import TrainState

_STEPS, _WARM_UP = 20, 5


def cpu_cases() -> dict[str, Run]:
    """Presets, and shapes that differ from them in one thing each."""
    nano, small = presets.nano(), presets.bench_small()
    plain = replace(nano.model, num_nextn_predict_layers=0, num_hidden_layers=9)
    return {
        "nano (Muon)": nano,
        "nano, AdamW": replace(nano, optimizer=replace(nano.optimizer, name="adamw")),
        "nano, 8 micro-batches of 2 x 256": _sized(nano, 8, 2, 256),
        "nano, 9 layers, no MTP, 4 x 1024": _sized(replace(nano, model=plain), 1, 4, 1024),
        "bench-small": small,
        "bench-small, 8 micro-batches of 1 x 2048": _sized(small, 8, 1, 2048),
        "bench-small, activation checkpointing": replace(
            small, train=replace(small.train, activation_checkpointing=True)
        ),
        "bench-small, Muon, 4 x 512": _sized(replace(small, optimizer=nano.optimizer), 1, 4, 512),
    }


def gpu_cases() -> dict[str, Run]:
    """The models of benchmarks/train_gpu.py, and the smaller one with one thing changed at a time."""
    from train_gpu import specs  # needs a GPU's Triton

    stack, whole = (
        Run(
            model=spec.shape,
            train=TrainConfig(
                batch_size=spec.micro_batches * spec.micro_batch,
                micro_batch_size=spec.micro_batch,
                sequence_length=spec.length,
                compute_dtype="bfloat16",
                compile="on",
            ),
            optimizer=OptimizerConfig(name="adamw"),
        )
        for name, spec in specs().items()
        if name.endswith(": fathom")
    )
    return {
        "4 layers of 16b-a3b, 16 x 4096": stack,
        "1B-A0.2B, 16 x 4096": whole,
        "1B-A0.2B, Muon": replace(whole, optimizer=replace(whole.optimizer, name="muon")),
        "1B-A0.2B, 32 x 1024": _sized(whole, 2, 16, 1024),
        "1B-A0.2B, activation checkpointing": replace(whole, train=replace(whole.train, activation_checkpointing=True)),
        "1B-A0.2B, one MTP module": replace(whole, model=replace(whole.model, num_nextn_predict_layers=1)),
    }


def _sized(run: Run, micro_batches: int, sequences: int, length: int) -> Run:
    sizes = {"batch_size": micro_batches * sequences, "micro_batch_size": sequences, "sequence_length": length}
    return replace(run, train=replace(run.train, **sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the planner with longer runs on this machine.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE, too")
    parser.add_argument("--only", default="", metavar="TEXT", help="measure the cases with TEXT in their name")
    parser.add_argument("--gpu", choices=("cpu", "cuda"), default="cpu", help="as `fathom plan` takes it")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.gpu)
    if options.child:
        what, text = options.child
        run = from_json(Run, json.loads(text))
        print(json.dumps(_planned(run, device) if what == "plan" else _measured(run, device)))
        return
    if options.gpu == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    cases = cpu_cases() if options.gpu == "cpu" else gpu_cases()
    rows = [_row(name, run, options.gpu) for name, run in cases.items() if options.only in name]
    Console(width=120).print(_table(rows))
    if options.json:
        atomic_write(options.json, json.dumps(rows, indent=1) + "\n")


def _row(name: str, run: Run, gpu: str) -> dict[str, Any]:
    planned = _child("plan", run, gpu)
    settled = replace(run, train=replace(run.train, **planned["settled"]))
    return {"case": name, "plan": planned, "measured": _child("run", settled, gpu)}


def _child(what: str, run: Run, gpu: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--gpu", gpu, "--child", what, json.dumps(to_json(run))]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("case", "activations", "memory: plan", "run", "off by", "step: plan", "run", "off by")
    for row in rows:
        plan, memory, seconds = row["plan"], row["measured"]["memory"], row["measured"]["seconds"]
        table.add_row(
            row["case"],
            plan["settled"]["compute_dtype"],
            f"{plan['memory']['peak'] / 1e6:,.0f} MB",
            f"{memory / 1e6:,.0f} MB",
            f"{plan['memory']['peak'] / memory - 1:+.1%}",
            f"{plan['step']['seconds'] * 1e3:,.0f} ms",
            f"{seconds * 1e3:,.0f} ms",
            f"{plan['step']['seconds'] / seconds - 1:+.1%}",
        )
    return table


# -------------------------------------------------------------------------------------------------- the child processes


def _planned(run: Run, device: torch.device) -> dict[str, Any]:
    """The plan, and the choices that it made for the run."""
    plan = plan_local(run, device)
    train = plan.run.train
    return local_json(plan) | {"settled": {"compute_dtype": train.compute_dtype, "compile": train.compile}}


def _measured(run: Run, device: torch.device) -> dict[str, float]:
    """Bytes and seconds of the run's steps; the first few warm up."""
    install_allocator()  # as `fathom train` does
    ranks = Ranks(0, 1, device)
    state, seconds = build_state(run, ranks), []
    for turn in range(_WARM_UP + _STEPS):
        if turn == _WARM_UP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds.append(_step(state, run, turn, ranks))
    return {"memory": peak_memory(device), "seconds": median(seconds[_WARM_UP:])}


def _step(state: TrainState, run: Run, turn: int, ranks: Ranks) -> float:
    train, modules = run.train, run.model.num_nextn_predict_layers
    width, generator = train.sequence_length + 1 + modules, torch.Generator().manual_seed(1000 + turn)
    tokens_BW = torch.randint(run.model.vocab_size, (train.batch_size, width), generator=generator).to(ranks.device)
    batches = [next_token_batch(part, modules) for part in tokens_BW.split(train.micro_batch_size)]
    began = time.perf_counter()
    pretrain_step(state, batches, train.batch_size, run, ranks)
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
