"""`fathom plan --gpu cuda` against the GPU that is here, for benchmarks/plan.py.

Every case is planned and then trained for a few steps by the trainer's own `pretrain_step`, one after another in this
process. Memory is the most that torch's allocator handed out in a step. Tokens are random, routers slightly tilted.
"""

import gc
import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from side import tilt_routers
from train_gpu import specs

from fathom.data.batch import Batch, next_token_batch
from fathom.distributed.ranks import Ranks
from fathom.lab.planner.local.gpu_rates import GpuMachine
from fathom.lab.planner.local.gpu_step import gpu_step_time
from fathom.lab.planner.local.report import shape_of
from fathom.model.transformer import Model
from fathom.train.gpu_memory import gpu_memory
from fathom.train.pretrain import pretrain_step
from fathom.train.run import OptimizerConfig, Run, TrainConfig
from fathom.train.setup import state_around

_WARM_UP, _COUNTED = 3, 4
_ALONE = Ranks(0, 1, torch.device("cuda", 0))


def cases() -> dict[str, Run]:
    """The models of benchmarks/train_gpu.py, and the smaller one with one thing changed at a time."""
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
    short = replace(whole.train, batch_size=32, micro_batch_size=16, sequence_length=1024)
    return {
        "4 layers of 16b-a3b, 16 x 4096": stack,
        "1B-A0.2B, 16 x 4096": whole,
        "1B-A0.2B, Muon": replace(whole, optimizer=replace(whole.optimizer, name="muon")),
        "1B-A0.2B, 32 x 1024": replace(whole, train=short),
        "1B-A0.2B, recomputed": replace(whole, train=replace(whole.train, activation_checkpointing=True)),
        "1B-A0.2B, an MTP module": replace(whole, model=replace(whole.model, num_nextn_predict_layers=1)),
    }


def rows_on_gpu(words: str) -> list[dict[str, Any]]:
    """A row, as benchmarks/plan.py prints them, for every case with `words` in its name."""
    machine, rows = GpuMachine(torch.bfloat16), []
    for name, run in cases().items():
        if words not in name:
            continue
        memory, planned = gpu_memory(run, 2), gpu_step_time(run, shape_of(run), machine)
        measured = _measured(run)
        row = {"case": name, "type": run.train.compute_dtype, "memory": memory.total, "seconds": planned.total}
        rows.append(row | {"measured": measured, "parts": {"memory": vars(memory), "step": vars(planned)}})
        print(f"{name}: {planned.total * 1e3:.0f} ms planned, {measured['seconds'] * 1e3:.0f} measured", flush=True)
    return rows


def _measured(run: Run) -> dict[str, float]:
    """Bytes and seconds of the run's steps; the first few warm up."""
    torch._dynamo.reset()  # another size would else be compiled for any
    gc.collect()
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    with _ALONE.device:
        model = Model(run.model).train()
    tilt_routers(model)
    state = state_around(model, run, _ALONE)
    seconds = []
    for turn in range(_WARM_UP + _COUNTED):
        if turn == _WARM_UP:
            torch.cuda.reset_peak_memory_stats()
        batches = _batches(run, turn)
        torch.cuda.synchronize()
        began = time.perf_counter()
        pretrain_step(state, batches, run.train.batch_size, run, _ALONE)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {"memory": torch.cuda.max_memory_allocated(), "seconds": median(seconds[_WARM_UP:])}


def _batches(run: Run, turn: int) -> list[Batch]:
    train, modules = run.train, run.model.num_nextn_predict_layers
    width = train.sequence_length + 1 + modules
    draw = torch.Generator().manual_seed(turn)
    tokens_BW = torch.randint(run.model.vocab_size, (train.batch_size, width), generator=draw).to(_ALONE.device)
    return [next_token_batch(part, modules) for part in tokens_BW.split(train.micro_batch_size)]
