"""The most memory a step of our training takes on this machine, above the program itself.

Weights and moments stay. What autograd keeps (saved.py) grows to the losses and shrinks as gradients take its place;
the peak is the worst moment of that walk. Three things come on top that no tensor shows: products that oneDNN has
prepared, one for every shape it met, the threads' own buffers (fathom/ops/cpu/products.h), and holes in the heap.
"""

from dataclasses import dataclass

import torch

from fathom.study.plan.here.saved import Shape, Stage, stages
from fathom.train.run import Run

PREPARED_BYTES = 570_000
"""What oneDNN keeps for one prepared bfloat16 product: 552 KB where neither factor is transposed, 600 KB for a weight's
gradient (malloc's own count before and after, torch 2.13). float32 products keep nothing."""
PREPARED_MOST = 1024
"""oneDNN forgets the oldest beyond so many."""
LOAD_SPREAD = (1 / 16, 4)
"""An expert's load, relative to the mean, lies between these while a router is untrained; every padded height between
is met sooner or later, and each is prepared for six products (two forward, four backward)."""
HEAP_HOLES = 0.25
"""Freed memory between pieces in use when most is needed, as a share of the most that activations take in a step:
moments and prepared products are made in the midst of activations and keep what is freed around them from joining up,
and gradients are larger than most of what they could fill. Measured between 0.2 and 0.8 (docs/planning.md)."""


@dataclass(frozen=True)
class Peak:
    """Bytes at the worst moment of a step, by part; they add up to `total`."""

    weights: int
    """float32 masters."""
    moments: int
    """The optimizer's, and the moving average where one is kept."""
    gradients: int
    """float32, those that exist at that moment."""
    kept: int
    """What autograd keeps at that moment."""
    passing: int
    """What exists only then: a chunk of logits, or gradients of activations."""
    prepared: int
    """oneDNN's prepared products."""
    buffers: int
    """Each thread's room for an expert or an attention head."""
    holes: int
    """Freed memory between pieces in use."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


def peak(run: Run, shape: Shape) -> Peak:
    """The peak of a step of `run`, whose micro-batches have `shape`."""
    counts = shape.config.parameter_counts()
    numbers = counts.total + counts.mtp - _biases(shape)
    moments = _moments(run, shape, numbers)
    gradients, kept, passing = max(moments, key=sum)
    copies = (1 if run.optimizer.kind == "muon" else 2) + (1 if run.optimizer.ema_decay else 0)
    return Peak(
        weights=4 * numbers,
        moments=4 * copies * numbers,
        gradients=gradients,
        kept=kept,
        passing=passing,
        prepared=prepared_bytes(shape),
        buffers=torch.get_num_threads() * _thread_bytes(shape),
        holes=int(HEAP_HOLES * max(moment[1] + moment[2] for moment in moments)),
    )


def _thread_bytes(shape: Shape) -> int:
    """A thread's buffers grow to the largest expert and the longest head that it has had."""
    config, length = shape.config, shape.length
    d, f, x, v = config.hidden_size, config.moe_intermediate_size, config.qk_head_dim, config.v_head_dim
    most = int(LOAD_SPREAD[1] * shape.tokens * config.num_experts_per_tok / config.n_routed_experts)
    rows = min(shape.tokens, most)
    expert = rows * (2 * d + 4 * f) + 2 * f * d
    head = 4 * length * x + 2 * length * v + 2 * min(512, max(256, length // 8)) * length
    # Slots are shared between experts and heads, but for the gradients that heads add up in float32.
    return max(expert, head) * shape.itemsize + length * (x + v) * 4


def _biases(shape: Shape) -> int:
    """The correction biases are counted with the parameters and never have a gradient."""
    config = shape.config
    return (config.num_moe_layers + config.num_nextn_predict_layers) * config.n_routed_experts


def _moments(run: Run, shape: Shape, numbers: int) -> list[tuple[int, int, int]]:
    """(gradients, kept, passing) at every moment that could be the worst."""
    walk = stages(shape)
    micro_batches = run.train.batch_size // run.train.micro_batch_size
    # From the second micro-batch on the gradients of the first are there all along.
    there = 4 * numbers if micro_batches > 1 else 0
    kept = sum(stage.bytes for stage in walk)
    moments = [(there, kept - _last_head(walk), logits_bytes(shape) + _last_head(walk))]
    made = 0
    for stage in reversed(walk):
        made += 4 * stage.weights
        moments.append((there or made, kept, stage.passing))
        kept -= stage.bytes
    moments.append((4 * numbers, 0, 0))
    return moments


def _last_head(walk: list[Stage]) -> int:
    """The last loss's own gradients, which are made while its logits exist."""
    return walk[-1].bytes


def logits_bytes(shape: Shape) -> int:
    """A chunk of logits, once more transposed for the head's gradient, and the head in the activations' type."""
    config = shape.config
    chunk = min(shape.tokens, max(256, (1 << 23) // config.vocab_size))
    head = config.vocab_size * config.hidden_size
    return (2 * chunk * config.vocab_size + 2 * head) * shape.itemsize


def prepared_bytes(shape: Shape) -> int:
    """oneDNN's products: six for every padded height of an expert's rows, a few dozen for everything else."""
    if shape.itemsize == 4:
        return 0
    config = shape.config
    sparse = config.num_moe_layers + config.num_nextn_predict_layers
    products = 6 * len(expert_heights(shape)) if sparse else 0
    # Three products for each kind of matrix, five for each block of queries.
    products += 3 * (8 + 3 * bool(config.first_k_dense_replace) + 2) + 5 * max(1, shape.length // 256)
    return min(PREPARED_MOST, products) * PREPARED_BYTES


def expert_heights(shape: Shape) -> set[int]:
    """Heights that the padded rows of an expert take, over many steps (fathom/ops/experts.py)."""
    config = shape.config
    mean = shape.tokens * config.num_experts_per_tok / config.n_routed_experts
    low, high = (int(mean * share) for share in LOAD_SPREAD)
    pads = shape.tokens * config.num_experts_per_tok >= 32 * config.n_routed_experts
    loads = range(max(1, low), min(shape.tokens, high) + 1)
    return {_padded(load) for load in loads} if pads else set(loads)


def _padded(load: int) -> int:
    multiple = max(16, (1 << (load.bit_length() - 1)) // 16)
    return -(-load // multiple) * multiple
