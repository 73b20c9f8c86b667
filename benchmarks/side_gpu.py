"""One side of benchmarks/train_gpu.py, as a separate process: it trains a model on the GPU and reports time and memory.

`python benchmarks/side_gpu.py SPEC`, where SPEC is a `Spec` as JSON. It answers in lines of JSON on standard output:
one when all it needs is imported, and its result when a line on standard input asks for it.

Shapes: B rows, S inputs, W = S + 1 tokens of a row.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from side import answer, own_stdout, tilt_routers
from torch import Tensor, nn
from torch.optim import Optimizer

from fathom.config import from_json
from fathom.data.batch import next_token_batch
from fathom.distributed.ranks import Ranks
from fathom.model.config import ModelConfig
from fathom.model.transformer import Model
from fathom.runtime.hardware import matmul_flops
from fathom.train.pretrain import pretrain_step
from fathom.train.run import OptimizerConfig, Run, TrainConfig
from fathom.train.setup import init_train_state

WARM_UP, COUNTED = 3, 6
"""Steps; those of the warm-up compile, choose kernels and allocate moments."""
_GPU = torch.device("cuda", 0)
_LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Spec:
    """What a side trains, and how."""

    program: Literal["fathom", "transformers"]
    shape: ModelConfig
    micro_batch: int
    """Sequences of a forward and backward pass."""
    micro_batches: int
    """Passes of a step."""
    length: int
    """Tokens of a sequence."""
    compile: bool
    """Compile the layers, one by one."""


class Trained(NamedTuple):
    """A model and its step."""

    model: nn.Module
    optimizers: list[Optimizer]
    step: Callable[[list[Tensor]], float]
    """From the micro-batches' tokens (B, W) to the step's loss, synchronised with the host."""


def main() -> None:
    answers = own_stdout()
    spec = from_json(Spec, json.loads(sys.argv[1]), where="spec")
    build = _ours if spec.program == "fathom" else _importing_peer()
    answer(answers, {"ready": True})
    if sys.stdin.readline():
        answer(answers, _measured(build, spec))


def _importing_peer() -> Callable[[Spec], Trained]:
    import peers  # a dependency of the tests only

    return lambda spec: _peer(peers.mixture, spec)


def _measured(build: Callable[[Spec], Trained], spec: Spec) -> dict[str, Any]:
    peak = matmul_flops(torch.bfloat16, _GPU)
    torch.cuda.empty_cache()
    began = time.perf_counter()
    trained = build(spec)
    tilt_routers(trained.model)
    losses = [trained.step(_tokens(spec, turn)) for turn in range(WARM_UP)]
    torch.cuda.synchronize()
    warmed = time.perf_counter()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for turn in range(WARM_UP, WARM_UP + COUNTED):
        tokens = _tokens(spec, turn)
        torch.cuda.synchronize()
        start = time.perf_counter()
        losses.append(trained.step(tokens))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    if not all(map(math.isfinite, losses)):
        raise RuntimeError(f"the losses are {losses}: such steps measure nothing")
    memory = torch.cuda.max_memory_allocated()
    return {
        "device": torch.cuda.get_device_name(_GPU),
        "torch": torch.__version__,
        "peak": max(peak, matmul_flops(torch.bfloat16, _GPU)),
        "warm_up": warmed - began,
        "seconds": seconds,
        "losses": losses,
        "memory": memory,
        "reserved": torch.cuda.max_memory_reserved(),
        "above": memory - _held(trained),
    }


def _held(trained: Trained) -> int:
    """Bytes of weights, as many gradients, moments and buffers."""
    weights = list(trained.model.parameters())
    moments = [t for o in trained.optimizers for state in o.state.values() for t in state.values()]
    return sum(t.nbytes for t in (*weights, *weights, *moments, *trained.model.buffers()))


def _tokens(spec: Spec, turn: int) -> list[Tensor]:
    """New random tokens for every turn, the same for every side."""
    draw = torch.Generator().manual_seed(turn)
    size = (spec.micro_batches, spec.micro_batch, spec.length + 1)
    return list(torch.randint(spec.shape.vocab_size, size, generator=draw).to(_GPU))


# ------------------------------------------------------------------------------------------------------ the two sides


def _ours(spec: Spec) -> Trained:
    """Fathom as `fathom train` runs it, step and all: float32 weights and moments, bfloat16 activations."""
    torch.manual_seed(0)
    with _GPU:
        model = Model(spec.shape).train()
    sequences = spec.micro_batch * spec.micro_batches
    run = Run(
        model=spec.shape,
        train=TrainConfig(
            batch_size=sequences,
            micro_batch_size=spec.micro_batch,
            sequence_length=spec.length,
            compute_dtype="bfloat16",
            compile="on" if spec.compile else "off",
        ),
        optimizer=OptimizerConfig(learning_rate=_LEARNING_RATE),
    )
    ranks = Ranks(0, 1, _GPU)
    state = init_train_state(model, run, ranks)

    def step(tokens: list[Tensor]) -> float:
        batches = [next_token_batch(tokens_BW, spec.shape.num_nextn_predict_layers) for tokens_BW in tokens]
        return pretrain_step(state, batches, sequences, run, ranks).loss

    return Trained(model, state.optimizers, step)


def _peer(make: Callable[[ModelConfig], nn.Module], spec: Spec) -> Trained:
    """`transformers` with everything in bfloat16, weights and moments, too.

    Autocast over float32 weights, the alternative, leaves its grouped matmuls in float32: a loop over the experts.
    """
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with _GPU:
        model = make(spec.shape).train()
    if spec.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95), fused=True)

    def step(tokens: list[Tensor]) -> float:
        losses = []
        for tokens_BW in tokens:
            tokens_BS = tokens_BW[:, : spec.length]
            loss = model(input_ids=tokens_BS, labels=tokens_BS).loss / len(tokens)
            loss.backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(torch.stack(losses).sum())

    return Trained(model, [optimizer], step)


if __name__ == "__main__":
    main()
