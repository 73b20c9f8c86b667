"""One side of benchmarks/train.py, as a separate process: it builds a model and takes steps on request.

`python benchmarks/side.py SPEC`, where SPEC is a `Spec` as JSON. It writes lines of JSON to standard output: one
with the model's sizes when it is ready, then one for each line on standard input: «step TURN», «peak» or «bandwidth».

Shapes: B rows, S inputs, W = S + 1 + M tokens of a row (M MTP modules).
"""

import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple, TextIO

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fathom.config import from_json
from fathom.data.batch import next_token_batch
from fathom.model.config import ModelConfig
from fathom.model.transformer import Model
from fathom.runtime.hardware import install_allocator
from fathom.train.loss import PretrainLoss
from fathom.train.optim import build_optimizers
from fathom.train.run import OptimizerConfig

_LEARNING_RATE = 1e-4
_BALANCE_ALPHA = 1e-4
_MTP_WEIGHT = 0.3
_BIAS_STD = 0.05
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

_PEAK_RESET = Path("/proc/self/clear_refs")
HAS_PEAK_MEMORY = os.access(_PEAK_RESET, os.W_OK)
"""Whether the system reports a process's peak memory within a step (Linux does)."""


@dataclass(frozen=True)
class Spec:
    """What a side trains, and how."""

    program: Literal["fathom", "transformers-moe", "transformers-llama"]
    shape: ModelConfig
    """The model, its experts and MTP modules; a Llama takes the dense part of it."""
    batch: int
    """Sequences per step."""
    length: int
    """Tokens per sequence."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the activations; weights are float32."""
    allocator: Literal["tuned", "default"] = "tuned"
    """tuned: as `fathom train` sets it (an arena for tensors); default: glibc's."""
    compile: bool = False
    """Compile the layers (fathom only)."""


class Trained(NamedTuple):
    """A model and its training."""

    model: nn.Module
    optimizers: list[Optimizer]
    loss: Callable[[Tensor], Tensor]
    """From tokens (B, W) to the loss that is differentiated."""


def main() -> None:
    answers = own_stdout()
    spec = from_json(Spec, json.loads(sys.argv[1]), where="spec")
    if spec.allocator == "tuned":
        install_allocator()  # as `fathom train` does
    build = _builder(spec)
    machine = Machine()
    before = memory("VmRSS")
    trained = build(spec)
    tilt_routers(trained.model)
    answer(answers, _sizes(trained.model))
    for line in sys.stdin:
        request, *arguments = line.split()
        if request == "step":
            answer(answers, _step(trained, _tokens(spec, turn=int(arguments[0])), before))
        else:
            answer(answers, {"peak": machine.flops, "bandwidth": machine.bandwidth}[request]())


def own_stdout() -> TextIO:
    """Standard output for answers only: what libraries print there goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def answer(answers: TextIO, content: Any) -> None:
    print(json.dumps(content), file=answers, flush=True)


# ------------------------------------------------------------------------------------------------------ the two sides


def _builder(spec: Spec) -> Callable[[Spec], Trained]:
    """The side's constructor; imports everything needed, so that memory measured from here on is the model's."""
    if spec.program == "fathom":
        return _build_ours
    import peers  # a dependency of the tests only

    make = peers.mixture if spec.program == "transformers-moe" else peers.dense
    return lambda spec: _around_peer(make, spec)


def _build_ours(spec: Spec) -> Trained:
    torch.manual_seed(0)
    model = Model(spec.shape).train()
    if spec.compile:
        for block in (*model.layers, *model.mtp):  # as `fathom train` compiles them
            block.compile(dynamic=False)
    pretrain_loss = PretrainLoss(model, _BALANCE_ALPHA, _DTYPES[spec.dtype])

    def loss(tokens_BW: Tensor) -> Tensor:
        batch = next_token_batch(tokens_BW, spec.shape.num_nextn_predict_layers)
        return pretrain_loss(batch, batch.target_weights(), _MTP_WEIGHT, fraction=1.0).total

    config = OptimizerConfig(name="adamw", learning_rate=_LEARNING_RATE)
    return Trained(model, build_optimizers(model, config), loss)


def _around_peer(make: Callable[[ModelConfig], nn.Module], spec: Spec) -> Trained:
    torch.manual_seed(0)
    model = make(spec.shape).train()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=spec.dtype == "bfloat16")

    def loss(tokens_BW: Tensor) -> Tensor:
        tokens_BS = tokens_BW[:, : spec.length]
        with autocast:
            return model(input_ids=tokens_BS, labels=tokens_BS).loss

    return Trained(model, [torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, fused=True)], loss)


@torch.no_grad()
def tilt_routers(model: nn.Module) -> None:
    """Small correction biases, the same in both programs: experts' loads are uneven, as in training."""
    generator = torch.Generator().manual_seed(0)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.empty(buffer.shape).normal_(std=_BIAS_STD, generator=generator))


# ---------------------------------------------------------------------------------------------------------- one step


def _tokens(spec: Spec, turn: int) -> Tensor:
    """New random tokens for every turn, the same for every side, so that routing differs from step to step."""
    width = spec.length + 1 + spec.shape.num_nextn_predict_layers
    draw = torch.Generator().manual_seed(turn)
    # Whole columns are drawn in order: sides that need one more share the others.
    return torch.randint(spec.shape.vocab_size, (width, spec.batch), generator=draw).T.contiguous()


def _step(trained: Trained, tokens_BW: Tensor, before: int) -> dict[str, float | None]:
    """Seconds of the two halves of a step, its loss, and the most memory above what must be held between steps."""
    if HAS_PEAK_MEMORY:
        _PEAK_RESET.write_text("5")  # proc(5): the peak so far becomes the present size
    began = time.perf_counter()
    for optimizer in trained.optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss = trained.loss(tokens_BW)
    loss.backward()
    middle = time.perf_counter()
    for optimizer in trained.optimizers:
        optimizer.step()
    ended = time.perf_counter()
    above = memory("VmHWM") - before - _held(trained) if HAS_PEAK_MEMORY else None
    if not math.isfinite(loss.item()):
        raise RuntimeError(f"the loss is {loss.item()}: such a step measures nothing")
    return {"fb": middle - began, "optimizer": ended - middle, "loss": loss.item(), "memory": above}


def _held(trained: Trained) -> int:
    """Bytes of weights, gradients, moments and buffers."""
    weights = list(trained.model.parameters())
    gradients = [p.grad for p in weights if p.grad is not None]
    moments = [t for o in trained.optimizers for state in o.state.values() for t in state.values()]
    return sum(t.nbytes for t in (*weights, *gradients, *moments, *trained.model.buffers()))


def memory(name: str) -> int:
    """Bytes of a line of the process's status: VmRSS now, VmHWM at the peak; 0 where there is none."""
    if not HAS_PEAK_MEMORY:
        return 0
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def _sizes(model: nn.Module) -> dict[str, int]:
    """The number of all parameters, and of those in linear layers."""
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    return {"parameters": sum(p.numel() for p in model.parameters()), "linear": linear}


# ------------------------------------------------------------------------------------------------------- the machine


def machine_facts() -> dict[str, Any]:
    """Where something was measured, for a table's footer and its JSON; None for what is not installed."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "transformers": version("transformers") if find_spec("transformers") else None,
    }


def cpu_model() -> str:
    """The processor's name, if the system has it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


class Machine:
    """Throughput of the machine, measured between the steps. Its matrices are allocated before memory is measured."""

    def __init__(self) -> None:
        self._a, self._b = (torch.randn(2048, 2048).bfloat16() for _ in range(2))
        self._product = self._a @ self._b

    def flops(self) -> float:
        """FLOP/s of a large square matmul in bfloat16."""
        return 2 * 2048**3 / _timed(lambda: torch.mm(self._a, self._b, out=self._product))

    def bandwidth(self) -> float:
        """Bytes per second read from memory, in a sum of 1 GiB."""
        return self._gibibyte.nbytes / _timed(self._gibibyte.sum)

    @cached_property
    def _gibibyte(self) -> Tensor:
        return torch.ones(2**28)


def _timed(call: Callable[[], object]) -> float:
    """Median seconds of three calls, after one to warm up."""
    times = []
    for _ in range(4):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return median(times[1:])


if __name__ == "__main__":
    main()
