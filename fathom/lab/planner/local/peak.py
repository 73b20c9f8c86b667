"""The most memory a step of our training takes on this machine, above the program itself.

Weights and moments stay. What autograd keeps (saved.py) grows to the losses and shrinks as gradients take its place;
the peak is the worst moment of that walk, or the optimizer's. Two things come on top that no tensor shows: products
that oneDNN has prepared, one for every shape it met, and the threads' own buffers (fathom/ops/linear/matmul.h). Holes
between tensors, of which fathom/runtime/arena leaves few, are not planned for.
"""

from dataclasses import dataclass

import torch

from fathom.lab.planner.local.saved import Shape, Stage, stages
from fathom.lab.planner.local.step import matrices, muon_batches
from fathom.ops.attention import query_block
from fathom.train.run import Run

PREPARED_BYTES = 580_000
"""What oneDNN keeps for one prepared bfloat16 product: 552 KB where neither factor is transposed, 596 KB for a weight's
gradient (malloc's own count before and after, torch 2.13), and 8 to 22 KB of machine code. float32 products keep
nothing."""
PREPARED_MOST = 1024
"""oneDNN forgets the oldest beyond so many."""


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
    """What exists only then: a chunk of logits, gradients of activations, or matrices that Muon orthogonalises."""
    prepared: int
    """oneDNN's prepared products."""
    buffers: int
    """Each thread's room for an expert or an attention head."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


def peak(run: Run, shape: Shape) -> Peak:
    """The peak of a step of `run`, whose micro-batches have `shape`."""
    counts = shape.config.parameter_counts()
    numbers = counts.total + counts.mtp - _biases(shape)
    moments = _moments(run, shape, numbers)
    worst = max(moments, key=lambda moment: moment.in_use)
    copies = (1 if run.optimizer.name == "muon" else 2) + (1 if run.optimizer.ema_decay else 0)
    return Peak(
        weights=4 * numbers,
        moments=4 * copies * numbers,
        gradients=worst.gradients,
        kept=worst.kept,
        passing=worst.passing,
        prepared=prepared_bytes(run, shape),
        buffers=torch.get_num_threads() * _thread_bytes(shape),
    )


@dataclass(frozen=True)
class _Moment:
    """Bytes that exist at a moment beside weights and moments."""

    gradients: int
    kept: int
    passing: int

    @property
    def in_use(self) -> int:
        return self.gradients + self.kept + self.passing


def _thread_bytes(shape: Shape) -> int:
    """A thread's buffers grow to the largest expert and the longest head that it has had (ops/cpu/products.h)."""
    config, length, c = shape.config, shape.length, shape.itemsize
    d, f, x, v = config.hidden_size, config.moe_intermediate_size, config.qk_head_dim, config.v_head_dim
    # An untrained router sends nearly everything to one expert now and then.
    expert = c * (shape.tokens * (2 * d + 4 * f) + max(2 * f, shape.tokens if shape.own else 0) * d)
    blocks = query_block(length, shape.dtype) * length
    head = c * (length * (3 * x + 2 * x + v) + 2 * blocks) + 4 * 2 * blocks
    # Slots are shared between experts and heads, but for the gradients that heads add up in float32.
    return max(expert, head) + length * (x + v) * 4


def _biases(shape: Shape) -> int:
    """The correction biases are counted with the parameters and never have a gradient."""
    config = shape.config
    return (config.num_moe_layers + config.num_nextn_predict_layers) * config.n_routed_experts


def _moments(run: Run, shape: Shape, numbers: int) -> list[_Moment]:
    """Every moment that could be the worst."""
    walk = stages(shape)
    micro_batches = run.train.batch_size // run.train.micro_batch_size
    # From the second micro-batch on the gradients of the first are there all along.
    there = 4 * numbers if micro_batches > 1 else 0
    kept = sum(stage.bytes for stage in walk)
    moments = [_Moment(there, kept - _last_head(walk), logits_bytes(shape) + _last_head(walk))]
    made = 0
    for stage in reversed(walk):
        made += 4 * stage.weights
        moments.append(_Moment(there or made, kept, stage.passing))
        kept -= stage.bytes
    moments.append(_Moment(4 * numbers, 0, _muon_bytes(run, shape)))
    return moments


def _muon_bytes(run: Run, shape: Shape) -> int:
    """What Muon holds at its worst, in bfloat16: directions that wait for the rest of their batch, and a batch's two
    iterates and two grams, or the largest stack's directions before (in float32) and after they are narrowed.

    Nothing for AdamW, which updates in place.
    """
    if run.optimizer.name != "muon":
        return 0
    batches = muon_batches(shape)
    waiting = {(short, long): short * long * counts[-1] for (short, long), counts in batches.items()}
    config = shape.config
    stack = 2 * config.n_routed_experts * config.moe_intermediate_size * config.hidden_size
    return 2 * max(
        sum(waiting.values()) - waiting[short, long] + max(count * short * (2 * long + 2 * short), 3 * stack)
        for (short, long), counts in batches.items()
        for count in counts
    )


def _last_head(walk: list[Stage]) -> int:
    """The last loss's own gradients, which are made while its logits exist."""
    return walk[-1].bytes


def logits_bytes(shape: Shape) -> int:
    """A chunk of logits; for torch's products once more, transposed, and the head and its gradient narrowed."""
    config = shape.config
    chunk = min(shape.tokens, max(256, (1 << 23) // config.vocab_size))
    if shape.own:
        return chunk * config.vocab_size * shape.itemsize
    head = config.vocab_size * config.hidden_size
    return (2 * chunk * config.vocab_size + 2 * head) * shape.itemsize


def prepared_bytes(run: Run, shape: Shape) -> int:
    """oneDNN's products: six for every padded height of an expert's rows, three for every matrix, and attention's.

    Where the kernels make those themselves, Muon's alone.
    """
    if shape.itemsize == 4:
        return 0
    config = shape.config
    products = 3 * len(muon_batches(shape)) if run.optimizer.name == "muon" else 0
    if not shape.own:
        sparse = config.num_moe_layers + config.num_nextn_predict_layers
        products += 6 * len(expert_heights(shape)) if sparse else 0
        blocks = -(-shape.length // query_block(shape.length, shape.dtype))
        products += 3 * (len(matrices(shape)) + 1) + 6 * blocks
    return min(PREPARED_MOST, products) * PREPARED_BYTES


def expert_heights(shape: Shape) -> set[int]:
    """Heights that the padded rows of an expert take, over many steps (fathom/ops/moe/experts.py): from one to all
    tokens.

    Loads of an untrained router lie anywhere between, and each is met sooner or later.
    """
    config, loads = shape.config, range(1, shape.tokens + 1)
    pads = shape.tokens * config.num_experts_per_tok >= 32 * config.n_routed_experts
    return {_padded(load) for load in loads} if pads else set(loads)


def _padded(load: int) -> int:
    multiple = max(16, (1 << (load.bit_length() - 1)) // 16)
    return -(-load // multiple) * multiple
