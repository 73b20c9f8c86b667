"""What this machine's GPU does in a second, measured when asked: our own operations, at the sizes that they have.

Shapes: N tokens, R rows of (token, expert) pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import cycle
from typing import Literal

import torch
from torch import Tensor

from fathom.data.batch import next_token_batch
from fathom.distributed.ranks import Ranks
from fathom.model.transformer import Model
from fathom.ops.attention import fused_causal_attention
from fathom.ops.linear.fp32 import fp32_linear
from fathom.ops.loss import linear_cross_entropy
from fathom.ops.moe.experts import dispatch, grouped_matmul, grouped_wgrad
from fathom.presets import nano
from fathom.train.optim import NEWTON_SCHULZ_STEPS, orthogonalize
from fathom.train.pretrain import pretrain_step
from fathom.train.setup import state_around

_DEVICE = torch.device("cuda", 0)
_MILLISECONDS = 20
"""How long an operation is repeated, after a few times that warm up."""
_UNCACHED = 256 << 20
"""Bytes of operands that no cache holds."""


@dataclass
class GpuMachine:
    """Rates of the GPU; each is measured once and kept, so that it can be printed."""

    dtype: torch.dtype
    """Type of the activations."""
    products: dict[str, float] = field(default_factory=dict)
    """FLOP/s of the products measured so far, by shape."""
    hosts: dict[str, tuple[float, float]] = field(default_factory=dict)
    """`host` as far as asked for, by the optimizer's kind."""

    @property
    def name(self) -> str:
        """The device's."""
        return torch.cuda.get_device_name(_DEVICE)

    def product(self, rows: int, inner: int, columns: int, transposed: bool = False) -> float:
        """Seconds of (rows, inner)·(inner, columns); left and right as a weight's gradient has them if `transposed`."""

        def make() -> Callable[[], object]:
            sizes = (inner, rows, inner, columns) if transposed else (rows, inner, columns, inner)
            sets = min(8, 1 + _UNCACHED // (self.dtype.itemsize * (rows * inner + inner * columns)))
            pairs = cycle([(self._random(*sizes[:2]), self._random(*sizes[2:])) for _ in range(sets)])
            if transposed:
                return lambda: _left_transposed(*next(pairs))
            return lambda: torch.nn.functional.linear(*next(pairs))

        name = f"{rows} x {inner} x {columns}" + (", transposed" if transposed else "")
        return self._timed(name, 2 * rows * inner * columns, make)

    def experts(self, experts: int, rows: int, hidden: int, width: int) -> float:
        """Seconds of the six grouped products of routed experts with even loads, forward and backward."""

        def make() -> Callable[[], object]:
            loads_E = torch.full((experts,), rows // experts, device=_DEVICE)
            loads_E[: rows % experts] += 1
            ends_E = loads_E.cumsum(0).to(torch.int32)
            x_RD, hidden_RF, gate_up_RG = (self._random(rows, size) for size in (hidden, width, 2 * width))
            gate_up_EGD, down_EDF = self._random(experts, 2 * width, hidden), self._random(experts, hidden, width)

            def all_six() -> None:
                grouped_matmul(x_RD, gate_up_EGD.transpose(1, 2), ends_E)
                grouped_matmul(hidden_RF, down_EDF.transpose(1, 2), ends_E)
                grouped_matmul(x_RD, down_EDF, ends_E)
                grouped_matmul(gate_up_RG, gate_up_EGD, ends_E)
                grouped_wgrad(gate_up_RG, x_RD, ends_E)
                grouped_wgrad(x_RD, hidden_RF, ends_E)

            return all_six

        return self._timed(f"{experts} experts of {hidden} x {width}, {rows} rows", 18 * rows * hidden * width, make)

    def attention(self, batch: int, length: int, heads: int, key: int, value: int) -> float:
        """Seconds of causal attention between queries, keys and values that are there, forward and backward."""

        def make() -> Callable[[], object]:
            q, k, v = (self._random(batch, length, heads, size).requires_grad_() for size in (key, key, value))
            gradient = self._random(batch, length, heads, value)
            return lambda: torch.autograd.grad(fused_causal_attention(q, k, v, 0.1), (q, k, v), gradient)

        name = f"attention of {batch} x {heads} over {length}, widths {key} and {value}"
        return self._timed(name, 3 * batch * heads * length * length * (key + value), make)

    def router(self, tokens: int, hidden: int, experts: int) -> float:
        """Seconds of a gate's products, forward and backward."""

        def make() -> Callable[[], object]:
            x_ND = self._random(tokens, hidden).requires_grad_()
            weight_ED = torch.randn(experts, hidden, device=_DEVICE, requires_grad=True)
            gradient = torch.randn(tokens, experts, device=_DEVICE)
            return lambda: torch.autograd.grad(fp32_linear(x_ND, weight_ED), (x_ND, weight_ED), gradient)

        return self._timed(f"gate, {tokens} x {hidden} x {experts}", 6 * tokens * hidden * experts, make)

    def head(self, tokens: int, hidden: int, words: int) -> float:
        """Seconds of the head's loss, forward and backward at once."""

        def make() -> Callable[[], object]:
            h_ND, head_OD = self._random(tokens, hidden).requires_grad_(), self._random(words, hidden).requires_grad_()
            targets_N = torch.randint(words, (tokens,), device=_DEVICE)
            return lambda: torch.autograd.grad(linear_cross_entropy(h_ND, head_OD, targets_N), (h_ND, head_OD))

        return self._timed(f"loss of {tokens} x {hidden} x {words}", 6 * tokens * hidden * words, make)

    def orthogonalized(self, count: int, short: int, long: int) -> float:
        """Seconds in which Muon orthogonalises a batch of so many (short, long) matrices."""

        def make() -> Callable[[], object]:
            matrices = torch.randn(count, short, long, device=_DEVICE, dtype=torch.bfloat16)
            return lambda: orthogonalize(matrices)

        flops = NEWTON_SCHULZ_STEPS * 2 * count * short * short * (2 * long + short)
        return self._timed(f"{count} of {short} x {long}, orthogonalised", flops, make)

    def sort(self, tokens: int, choices: int, experts: int) -> float:
        """Seconds in which (token, expert) pairs are sorted by expert."""
        ids_NK = torch.rand(tokens, experts, device=_DEVICE).topk(choices, dim=1).indices
        return seconds_of(lambda: dispatch(ids_NK, experts, self.dtype))

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a second through memory, read and written, adding one large float32 array to another."""
        a, b = torch.ones(1 << 28, device=_DEVICE), torch.ones(1 << 28, device=_DEVICE)
        return 3 * a.nbytes / seconds_of(lambda: a.add_(b))

    def host(self, kind: Literal["adamw", "muon"]) -> tuple[float, float]:
        """Seconds that the host needs for a compiled layer's micro-batch, and for all else of a step with one."""
        if kind not in self.hosts:
            few, many = 2, 6
            times = [seconds_of(_tiny_step(kind, layers)) for layers in (few, many)]
            torch._dynamo.reset()  # another size would else be compiled for any
            layer = (times[1] - times[0]) / (many - few)
            self.hosts[kind] = layer, times[0] - few * layer
        return self.hosts[kind]

    def others(self) -> dict[str, float]:
        """What was measured beside products: bytes a second, and the host's seconds."""
        found = {"bandwidth": self.bandwidth}
        for layer, rest in self.hosts.values():
            found |= {"host_a_layer": layer, "host_a_step": rest}
        return found

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=_DEVICE, dtype=self.dtype)

    def _timed(self, name: str, flops: int, make: Callable[[], Callable[[], object]]) -> float:
        if name not in self.products:
            self.products[name] = flops / seconds_of(make())
            torch.cuda.empty_cache()
        return flops / self.products[name]


def seconds_of(call: Callable[[], object]) -> float:
    """Mean seconds of a call among several that follow on one another, as in training."""

    def milliseconds(times: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / times

    milliseconds(3)
    times = max(3, min(200, int(_MILLISECONDS / max(milliseconds(3), 1e-3))))
    return milliseconds(times) / 1e3


def _left_transposed(left: Tensor, right: Tensor) -> Tensor:
    return left.t() @ right


def _tiny_step(kind: Literal["adamw", "muon"], layers: int) -> Callable[[], object]:
    """The trainer's own step for a model of so many MoE layers that gives the GPU nothing to do."""
    config = replace(nano().model, vocab_size=64, hidden_size=64, moe_intermediate_size=64, n_routed_experts=8)
    config = replace(config, num_hidden_layers=layers, first_k_dense_replace=0, num_nextn_predict_layers=0)
    train = replace(nano().train, batch_size=1, micro_batch_size=1, sequence_length=64)
    train = replace(train, compute_dtype="bfloat16", compile="on")
    run = replace(nano(), model=config, train=train, optimizer=replace(nano().optimizer, name=kind))
    alone = Ranks(0, 1, _DEVICE)
    state = state_around(Model(config).to(_DEVICE).train(), run, alone)
    tokens_BW = torch.zeros(1, train.sequence_length + 1, dtype=torch.int64, device=_DEVICE)
    batches = [next_token_batch(tokens_BW, modules=0)]
    return lambda: pretrain_step(state, batches, 1, run, alone)
