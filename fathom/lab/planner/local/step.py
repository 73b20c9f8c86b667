"""How long a step of our training takes on this machine: products at measured rates, passes over memory, the optimizer.

The parts follow the code: what fathom/model multiplies on all threads, what fathom/ops gives to a thread each, what
lies between. Every rate is measured (rates.py); none is adjusted to a model.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from math import prod

import torch

from fathom.lab.planner.local.rates import Machine, Overhead
from fathom.lab.planner.local.saved import Shape
from fathom.model.transformer import Model
from fathom.train.optim import BATCH_NUMBERS, muon_groups
from fathom.train.run import Run

_ADAMW_BYTES = 28
"""Per parameter: weight, gradient and two moments read, all but the gradient written, in float32."""
_CLIP_BYTES = 12
"""Per parameter: the gradient read for its norm, then read and scaled."""
_MUON_BYTES = 44
"""Per parameter: momentum and mixed direction made, weight decayed and moved."""
_NARROW_BYTES = 12
"""Per weight and micro-batch under bfloat16: read and narrowed forward, its gradient read and widened backward."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by part; they add up to `total`."""

    projections: float
    """Products of the layers' matrices, on all threads."""
    experts: float
    """Routed experts' products, a thread each."""
    attention: float
    """From queries and latents to the heads' output, a thread each."""
    head: float
    """The losses' products and cross-entropy."""
    passes: float
    """Everything that reads and writes activations and weights and multiplies no matrices."""
    overhead: float
    """Python, autograd and the starting of operations: what a step costs that computes nothing."""
    optimizer: float
    """Clipping and the update."""

    @property
    def total(self) -> float:
        """All of them."""
        return sum(vars(self).values())


def step_time(run: Run, shape: Shape, machine: Machine) -> StepTime:
    """One step of `run`: its micro-batches, then the update."""
    times = run.train.batch_size // run.train.micro_batch_size
    again = 1 + shape.recompute / 3  # a forward pass is a third of the products
    return StepTime(
        projections=times * again * _projections(shape, machine),
        experts=times * again * _experts(shape, machine),
        attention=times * again * _attention(shape, machine),
        head=times * _head(shape, machine),
        passes=times * again * _passes(shape, machine),
        overhead=_overhead(times, again, blocks(shape)[0], machine.overhead(run.optimizer.name)),
        optimizer=_optimizer(run, shape, machine),
    )


def _overhead(times: int, again: float, layers: int, overhead: Overhead) -> float:
    """Of `times` micro-batches, each of whose layers runs `again` times, and of one update."""
    each = overhead.batch + again * layers * overhead.layer
    return times * each + overhead.step + layers * overhead.layer_step


def blocks(shape: Shape) -> tuple[int, int]:
    """(all layers, those with experts), MTP modules included."""
    config = shape.config
    modules = config.num_nextn_predict_layers
    return config.num_hidden_layers + modules, config.num_moe_layers + modules


def matrices(shape: Shape) -> Counter[tuple[int, int]]:
    """(inputs, outputs) of every matrix that all tokens pass through, and how often it occurs, without the head."""
    config = shape.config
    layers, sparse = blocks(shape)
    d, heads = config.hidden_size, config.num_attention_heads
    width, values = heads * config.qk_head_dim, heads * (config.qk_nope_head_dim + config.v_head_dim)
    found = Counter[tuple[int, int]]()
    if config.q_lora_rank is None:
        found[d, width] += layers
    else:
        found[d, config.q_lora_rank] += layers
        found[config.q_lora_rank, width] += layers
    found[d, config.cache_width] += layers
    found[config.kv_lora_rank, values] += layers
    found[heads * config.v_head_dim, d] += layers
    for inner, count in (
        (config.intermediate_size, config.first_k_dense_replace),
        (config.n_shared_experts * config.moe_intermediate_size, sparse),
    ):
        found[d, inner] += 2 * count
        found[inner, d] += count
    found[2 * d, d] += config.num_nextn_predict_layers
    return found


def _projections(shape: Shape, machine: Machine) -> float:
    """Three products a matrix: forward, and backward to its input and to itself. Routers' are float32 ones."""
    config, n = shape.config, shape.tokens
    routers, d, e = blocks(shape)[1], config.hidden_size, config.n_routed_experts
    gate = machine.product(n, d, e, wide=True) + machine.product(n, e, d, wide=True)
    seconds = routers * (gate + machine.product(e, n, d, transposed=True, wide=True)) if routers else 0.0
    for (inputs, outputs), count in matrices(shape).items():
        forward, to_input = machine.product(n, inputs, outputs), machine.product(n, outputs, inputs)
        seconds += count * (forward + to_input + machine.product(outputs, n, inputs, transposed=True))
    return seconds


def _experts(shape: Shape, machine: Machine) -> float:
    """Six products an expert at the mean load, shared among the threads."""
    config = shape.config
    d, f = config.hidden_size, config.moe_intermediate_size
    rows = max(1, shape.rows // config.n_routed_experts)
    products = (
        machine.product(rows, d, 2 * f, alone=True)
        + machine.product(rows, f, d, alone=True)
        + machine.product(rows, d, f, alone=True)
        + machine.product(rows, 2 * f, d, alone=True)
        + machine.product(d, rows, f, alone=True, transposed=True)
        + machine.product(2 * f, rows, d, alone=True, transposed=True)
    )
    return blocks(shape)[1] * config.n_routed_experts * products / machine.threads


def _attention(shape: Shape, machine: Machine) -> float:
    """Measured whole, some heads at once: from queries and latents to the heads' output, and back."""
    config = shape.config
    widths = (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim)
    heads = blocks(shape)[0] * shape.batch * config.num_attention_heads
    return heads * machine.attention(shape.length, *widths)


def _head(shape: Shape, machine: Machine) -> float:
    config = shape.config
    d, words = config.hidden_size, config.vocab_size
    chunk = min(shape.tokens, max(256, (1 << 23) // words))
    products = machine.product(chunk, d, words) + machine.product(chunk, words, d)
    products += machine.product(words, chunk, d, transposed=True)
    each = products + chunk * words * machine.cross_entropy
    heads = 1 + config.num_nextn_predict_layers
    return heads * (shape.tokens / chunk * each + 3 * 4 * d * words / machine.bandwidth)


def _passes(shape: Shape, machine: Machine) -> float:
    """Norms, activations, residual sums, gathers, and the narrowing of weights."""
    config, n = shape.config, shape.tokens
    layers, sparse = blocks(shape)
    d, rank = config.hidden_size, config.q_lora_rank or 0
    normed = n * (layers * (2 * d + rank + config.kv_lora_rank) + d * (1 + 3 * config.num_nextn_predict_layers))
    active = config.first_k_dense_replace * n * config.intermediate_size
    active += sparse * (n * config.n_shared_experts + shape.rows) * config.moe_intermediate_size
    # Two residual sums, forward and backward; tokens gathered to rows and summed again.
    copied = layers * n * 2 * 4 * d + sparse * shape.rows * 6 * d + sparse * n * (8 * d + 12 * config.n_routed_experts)
    narrowed = 0 if shape.itemsize == 4 else _NARROW_BYTES * _narrowed(shape)
    return normed * machine.norm + active * machine.activation + copied * machine.copy + narrowed / machine.bandwidth


def _narrowed(shape: Shape) -> int:
    """Weights whose narrowing no measured product contains: all, or the experts', which lay in a cache there."""
    config, counts = shape.config, shape.config.parameter_counts()
    if not shape.own:
        return counts.total + counts.mtp
    return blocks(shape)[1] * config.n_routed_experts * 3 * config.hidden_size * config.moe_intermediate_size


def _optimizer(run: Run, shape: Shape, machine: Machine) -> float:
    counts = shape.config.parameter_counts()
    numbers = counts.total + counts.mtp
    clip = _CLIP_BYTES * numbers / machine.bandwidth
    average = 12 * numbers / machine.bandwidth if run.optimizer.ema_decay else 0.0
    if run.optimizer.name == "adamw":
        return clip + average + _ADAMW_BYTES * numbers / machine.bandwidth
    return clip + average + _MUON_BYTES * numbers / machine.bandwidth + _orthogonalizing(shape, machine)


@cache
def muon_batches(shape: Shape) -> dict[tuple[int, int], list[int]]:
    """By (short, long) side, how many of the layers' and experts' matrices Muon orthogonalises at once, by batch."""
    with torch.device("meta"):
        groups = muon_groups(Model(shape.config))
    batches: dict[tuple[int, int], list[int]] = {}
    growing = Counter[tuple[int, int]]()
    for group in groups:
        parts = group.get("parts", 1)
        for parameter in group["params"]:
            *stack, rows, columns = parameter.shape
            short, long = sorted((rows // parts, columns))
            growing[short, long] += parts * prod(stack)
            if growing[short, long] * short * long >= BATCH_NUMBERS:
                batches.setdefault((short, long), []).append(growing.pop((short, long)))
    for sides, count in growing.items():
        batches.setdefault(sides, []).append(count)
    return batches


def _orthogonalizing(shape: Shape, machine: Machine) -> float:
    return sum(
        machine.orthogonalized(count, *sides) for sides, counts in muon_batches(shape).items() for count in counts
    )
