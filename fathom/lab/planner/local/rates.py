"""What this machine does in a second, measured when asked: products at their shapes, passes over memory, overhead.

Nothing here knows a model: a rate is that of an operation at a size. Products that fathom/ops gives to one thread
are measured on one thread, with as many of them at once as there are threads elsewhere in the sum.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import cycle
from statistics import median
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fathom.data.batch import next_token_batch
from fathom.distributed.ranks import Ranks
from fathom.model.transformer import Model
from fathom.ops import cpu
from fathom.ops.attention import expanded_attention
from fathom.ops.linear import product, wgrad
from fathom.ops.loss import linear_cross_entropy
from fathom.ops.norm import rms_norm
from fathom.ops.rope import Rope
from fathom.ops.swiglu import swiglu
from fathom.presets import nano
from fathom.runtime.precision import bfloat16_is_emulated
from fathom.train.optim import NEWTON_SCHULZ_STEPS, orthogonalize
from fathom.train.pretrain import pretrain_step
from fathom.train.setup import state_around

_REPEATS = 5
_PATIENCE = 0.2
"""Seconds after which a measurement that repeats stops."""
_UNCACHED = 64 << 20
"""Bytes of operands that no cache holds."""
_NUMBERS = (4096, 256)
"""Tokens and width that the passes over memory are timed with."""


class Overhead(NamedTuple):
    """Seconds that a training step takes whatever its size: Python, autograd, the starting of operations."""

    batch: float
    """A micro-batch's embedding, head and losses, forward and backward."""
    layer: float
    """A layer, forward and backward."""
    step: float
    """Clipping, optimizers and balancing, for what belongs to no layer."""
    layer_step: float
    """The same for a layer's parameters."""


@dataclass
class Machine:
    """Rates of this machine; each is measured once and kept, so that it can be printed."""

    dtype: torch.dtype
    """Type of the activations."""
    threads: int = field(default_factory=torch.get_num_threads)
    products: dict[str, float] = field(default_factory=dict)
    """FLOP/s of the products measured so far, by shape."""
    overheads: dict[str, Overhead] = field(default_factory=dict)
    """By the optimizer's kind, as far as asked for."""

    def product(
        self, rows: int, inner: int, columns: int, *, alone: bool = False, transposed: bool = False, wide: bool = False
    ) -> float:
        """Seconds of (rows, inner)·(inner, columns), on all threads or `alone` on one; left `transposed` as it lies.

        A `wide` one is in float32 whatever the activations are.
        """
        said = {"one thread": alone, "transposed": transposed, "float32": wide and self.dtype != torch.float32}
        name = ", ".join([f"{rows} x {inner} x {columns}", *(word for word, so in said.items() if so)])
        dtype = torch.float32 if wide else self.dtype
        flops = 2 * rows * inner * columns
        if name not in self.products:
            # What one thread does for itself it finds in its cache; shared products come from memory.
            sets = 1 if alone else max(1, _UNCACHED // (dtype.itemsize * (rows * inner + inner * columns)))
            operands = cycle([_operands(rows, inner, columns, transposed, dtype) for _ in range(min(sets, 16))])
            with _threads(1 if alone else self.threads):
                self.products[name] = flops / timed(lambda: _multiply(*next(operands), transposed))
        return flops / self.products[name]

    def attention(self, length: int, nope: int, rope: int, value: int) -> float:
        """Seconds that one head of one sequence takes, forward and backward, where every thread has one."""
        name = f"attention over {length}, widths {nope} + {rope} and {value}"
        flops = 6 * length * length * (nope + rope + value) // 2
        if name not in self.products:
            heads = self.threads
            query, keyvalue, key = (
                torch.randn(1, length, *shape).to(self.dtype).requires_grad_()
                for shape in ((heads, nope + rope), (heads, nope + value), (rope,))
            )
            turns = Rope(torch.ones(length, rope // 2), torch.zeros(length, rope // 2))
            gradient = torch.ones(1, length, heads, value, dtype=self.dtype)
            whole = timed(lambda: expanded_attention(query, keyvalue, key, turns, 0.1).backward(gradient))
            self.products[name] = flops * heads / whole
        return flops / self.products[name]

    def orthogonalized(self, count: int, short: int, long: int) -> float:
        """Seconds in which Muon orthogonalises a batch of so many (short, long) matrices."""
        name = f"{count} of {short} x {long}, orthogonalised"
        flops = NEWTON_SCHULZ_STEPS * 2 * count * short * short * (2 * long + short)
        if name not in self.products:
            dtype = torch.float32 if bfloat16_is_emulated(torch.device("cpu")) else torch.bfloat16
            matrices = torch.randn(count, short, long).to(dtype)
            self.products[name] = flops / timed(lambda: orthogonalize(matrices))
        return flops / self.products[name]

    def overhead(self, kind: Literal["adamw", "muon"]) -> Overhead:
        """What a step costs with the optimizer of this kind when there is next to nothing to compute."""
        if kind not in self.overheads:
            few, many = 2, 10
            once = {layers: timed(_tiny_step(kind, layers, 1)) for layers in (few, many)}
            twice = {layers: timed(_tiny_step(kind, layers, 2)) for layers in (few, many)}
            batch = {layers: twice[layers] - once[layers] for layers in (few, many)}
            layer = (batch[many] - batch[few]) / (many - few)
            update = (once[many] - once[few]) / (many - few) - layer
            rest = once[few] - batch[few] - few * update
            self.overheads[kind] = Overhead(batch[few] - few * layer, layer, rest, update)
        return self.overheads[kind]

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a second through memory, read and written, adding one large float32 array to another."""
        a, b = torch.ones(1 << 25), torch.ones(1 << 25)
        return 3 * a.nbytes / timed(lambda: a.add_(b))

    @cached_property
    def norm(self) -> float:
        """Seconds a number of RMSNorm takes, forward and backward."""
        weight = torch.ones(_NUMBERS[1], requires_grad=True)
        return self._pass(lambda x: rms_norm(x, weight, 1e-6))

    @cached_property
    def activation(self) -> float:
        """Seconds a number of SwiGLU takes, forward and backward."""
        return self._pass(lambda x: swiglu(x, x))

    @cached_property
    def copy(self) -> float:
        """Seconds a number takes to be changed in a pass of its own (read, scaled, written)."""
        x = torch.randn(_NUMBERS).to(self.dtype)
        return timed(lambda: x * 0.5) / x.numel()

    @cached_property
    def cross_entropy(self) -> float:
        """Seconds a logit takes between the head's products, forward and backward at once."""
        tokens, width, words = 1024, 8, 8192
        head = torch.randn(words, width, requires_grad=True)
        h, targets = torch.randn(tokens, width).to(self.dtype).requires_grad_(), torch.randint(words, (tokens,))
        return timed(lambda: linear_cross_entropy(h, head, targets)) / (tokens * words)

    @property
    def name(self) -> str:
        """For the table of rates."""
        return f"{self.threads} threads"

    def others(self) -> dict[str, float]:
        """What was measured beside products: bytes a second, and seconds a number or a step."""
        passes = {name: getattr(self, name) for name in ("bandwidth", "norm", "activation", "copy", "cross_entropy")}
        found = {
            f"overhead_{name}": value for each in self.overheads.values() for name, value in each._asdict().items()
        }
        return passes | found

    def _pass(self, function: Callable[[Tensor], Tensor]) -> float:
        x = torch.randn(_NUMBERS).to(self.dtype).requires_grad_()
        gradient = torch.ones_like(x)
        return timed(lambda: function(x).backward(gradient)) / x.numel()


def timed(call: Callable[[], object]) -> float:
    """Median seconds of a few calls, after one that warms up."""
    call()
    times: list[float] = []
    while len(times) < _REPEATS or (sum(times) < _PATIENCE and len(times) < 50):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return median(times)


def _operands(
    rows: int, inner: int, columns: int, transposed: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    left = torch.randn(inner, rows).to(dtype).t() if transposed else torch.randn(rows, inner).to(dtype)
    # All of it is touched here, as in a run, whose memory has long come from the kernel when it is timed.
    # Training multiplies with float32 weights where the kernels narrow them, and makes their gradients in float32.
    wide = torch.float32 if cpu.has_bf16_gemm(dtype) else dtype
    if transposed:
        return left, torch.randn(inner, columns).to(dtype), torch.zeros(rows, columns, dtype=wide)
    return left, torch.randn(columns, inner).to(wide), torch.zeros(rows, columns, dtype=dtype)


def _multiply(left: Tensor, right: Tensor, out: Tensor, transposed: bool) -> None:
    """left·right into a weight's gradient, or left·rightᵀ."""
    if transposed:
        wgrad(left.t(), right, out, adds=False)
    else:
        product(left, right, out)


def _tiny_step(kind: Literal["adamw", "muon"], layers: int, micro_batches: int) -> Callable[[], object]:
    """The trainer's own step for a model of so many MoE layers that is all overhead."""
    config = replace(
        nano().model, vocab_size=64, hidden_size=16, moe_intermediate_size=16, n_routed_experts=2, num_experts_per_tok=1
    )
    config = replace(config, num_hidden_layers=layers, first_k_dense_replace=0, num_nextn_predict_layers=0)
    train = replace(
        nano().train, batch_size=micro_batches, micro_batch_size=1, sequence_length=8, compute_dtype="bfloat16"
    )
    run = replace(nano(), model=config, train=train, optimizer=replace(nano().optimizer, name=kind))
    alone = Ranks(0, 1, torch.device("cpu"))
    state = state_around(Model(config).train(), run, alone)
    tokens_BW = torch.zeros(1, train.sequence_length + 1, dtype=torch.int64)
    batches = [next_token_batch(tokens_BW, modules=0)] * micro_batches
    return lambda: pretrain_step(state, batches, micro_batches, run, alone)


class _threads:  # noqa: N801 (reads as a word: with _threads(1))
    """So many threads for the length of a `with`."""

    def __init__(self, count: int) -> None:
        self._count, self._before = count, torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self._count)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)
