"""What our own training step keeps for its backward pass, tensor by tensor, with the CPU's kernels (fathom/ops).

The list follows the forward pass of fathom/train/loss.py; tests/lab/planner/test_saved.py compares it with what
autograd really saves. Tensors that autograd saves and the model holds anyway (float32 weights) are not counted.

Shapes: B rows, S length, N = B·S tokens, D hidden, H heads, X = P+R, V value, C latent, R rope, Q query rank,
E experts, K experts per token, F expert width, R rows: the (token, expert) pairs sorted by expert and padded.
"""

from dataclasses import dataclass

import torch

from fathom.model.config import ModelConfig
from fathom.ops import cpu
from fathom.ops.attention import query_block

_KEPT_LENGTH = 1024  # fathom/ops/attention keeps probabilities up to here
_PAD = 16  # fathom/ops/moe/experts.py pads an expert's rows in sixteenths of a power of two
_FLOAT32, _INT64 = 4, 8


@dataclass(frozen=True)
class Shape:
    """One micro-batch of our training."""

    config: ModelConfig
    batch: int
    """Sequences in a micro-batch."""
    length: int
    """Tokens of a sequence."""
    itemsize: int
    """Bytes of an activation: 2 (bfloat16) or 4 (float32)."""
    recompute: bool = False
    """Keep each layer's input alone."""

    @property
    def dtype(self) -> torch.dtype:
        """The activations'."""
        return torch.bfloat16 if self.itemsize < _FLOAT32 else torch.float32

    @property
    def own(self) -> bool:
        """Whether the kernels make the products themselves: then nothing is narrowed, padded or prepared for them."""
        return cpu.has_bf16_gemm(self.dtype)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch N."""
        return self.batch * self.length

    @property
    def rows(self) -> int:
        """Rows of the sorted (token, expert) pairs, the padding's share reserved as fathom/ops/moe/experts.py does."""
        pairs, experts = self.tokens * self.config.num_experts_per_tok, self.config.n_routed_experts
        pads = pairs >= 2 * _PAD * experts and not self.own
        return pairs + (experts * _PAD + pairs // _PAD if pads else 0)


@dataclass(frozen=True)
class Stage:
    """A part of the model in the order of the forward pass."""

    name: str
    kept: dict[str, int]
    """Bytes that stay until the stage's backward pass, by what they are."""
    weights: int
    """Numbers of parameters whose gradients its backward pass makes."""
    passing: int = 0
    """Bytes that exist only while its backward pass runs, beside its own kept ones."""

    @property
    def bytes(self) -> int:
        """All that is kept."""
        return sum(self.kept.values())


def stages(shape: Shape) -> list[Stage]:
    """The whole model, forward order: embedding, layers, final norm, MTP modules, losses."""
    config = shape.config
    result = [Stage("embedding", {"tokens": shape.tokens * _INT64}, config.vocab_size * config.hidden_size)]
    for index in range(config.num_hidden_layers):
        moe = index >= config.first_k_dense_replace
        layer = [attention(shape, first=index == 0), experts(shape) if moe else dense(shape)]
        result += [_recomputed(shape, layer)] if shape.recompute else layer
    result.append(_norm(shape, "final norm", config.hidden_size))
    for index in range(config.num_nextn_predict_layers):
        block = attention(shape, first=shape.recompute and index == 0)  # modules are never recomputed
        result += [_mtp_input(shape), block, experts(shape), _norm(shape, "mtp norm", config.hidden_size)]
    heads = 1 + config.num_nextn_predict_layers
    result += [loss(shape, last=index + 1 == heads) for index in range(heads)]
    return result


def saved_bytes(shape: Shape) -> int:
    """All that the forward pass leaves for the backward pass."""
    return sum(stage.bytes for stage in stages(shape))


def attention(shape: Shape, first: bool = False) -> Stage:
    """Norm, projections and the heads' probabilities; the `first` to keep anything keeps the rotary table for all."""
    config, n, c = shape.config, shape.tokens, shape.itemsize
    heads, width = config.num_attention_heads, config.num_attention_heads * config.qk_head_dim
    rank, latent = config.q_lora_rank, config.cache_width
    values = heads * (config.qk_nope_head_dim + config.v_head_dim)
    kept = _norm(shape, "", config.hidden_size).kept | {"normed": n * config.hidden_size * c}
    if rank is None:
        matrices = config.hidden_size * width
    else:
        matrices = config.hidden_size * rank + rank * width
        kept |= {"query latent": n * rank * c, "query statistics": n * _FLOAT32, "query normed": n * rank * c}
    matrices += (
        config.hidden_size * latent + config.kv_lora_rank * values + heads * config.v_head_dim * config.hidden_size
    )
    kept |= {
        "latent": n * latent * c,
        "latent statistics": n * _FLOAT32,
        "latent normed": n * config.kv_lora_rank * c,
        "queries": n * width * c,
        "keys and values": n * values * c,
        "rotated key": n * config.qk_rope_head_dim * c,
        "probabilities": _probabilities(shape) * c,
        "heads' output": n * heads * config.v_head_dim * c,
        "weights narrowed": _narrowed(shape, matrices),
    }
    if first:
        kept["rotary table"] = shape.length * config.qk_rope_head_dim * _FLOAT32
    norms = config.hidden_size + config.kv_lora_rank + (rank or 0)
    # The gradients of queries, keys and values, of the shared key for every head, and of the heads' output.
    passing = n * (width + values + heads * config.v_head_dim + 2 * config.hidden_size) * c
    passing += n * heads * config.qk_rope_head_dim * _FLOAT32
    return Stage("attention", kept, matrices + norms, passing)


def _probabilities(shape: Shape) -> int:
    """Kept probabilities: blocks of queries times the keys up to the block's end; none of long sequences."""
    length = shape.length
    if length > _KEPT_LENGTH:
        return 0
    block = query_block(length, shape.dtype)
    ends = [min(start + block, length) for start in range(0, length, block)]
    numbers = sum((end - start) * end for start, end in zip(range(0, length, block), ends, strict=True))
    return shape.batch * shape.config.num_attention_heads * numbers


def dense(shape: Shape) -> Stage:
    """Norm and a dense layer's SwiGLU."""
    config = shape.config
    kept = _norm(shape, "", config.hidden_size).kept | _swiglu(shape, config.intermediate_size)
    kept["normed"] = shape.tokens * config.hidden_size * shape.itemsize
    passing = shape.tokens * (3 * config.intermediate_size + config.hidden_size) * shape.itemsize
    return Stage("dense", kept, 3 * config.hidden_size * config.intermediate_size + config.hidden_size, passing)


def _swiglu(shape: Shape, width: int) -> dict[str, int]:
    """Gate, up and their product; the three matrices narrowed."""
    numbers = shape.tokens * width * shape.itemsize
    narrowed = _narrowed(shape, 3 * shape.config.hidden_size * width)
    return {"gate": numbers, "up": numbers, "hidden": numbers, "weights narrowed": narrowed}


def experts(shape: Shape) -> Stage:
    """Norm, router, routed experts' pre-activations, shared experts, balance loss."""
    config, n, c = shape.config, shape.tokens, shape.itemsize
    experts, choices, width = config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size
    shared = config.n_shared_experts * width
    kept = _norm(shape, "", config.hidden_size).kept | _swiglu(shape, shared)
    kept |= {
        "normed": n * config.hidden_size * c,
        "router input": n * config.hidden_size * _FLOAT32 if c < _FLOAT32 else 0,
        "scores": n * experts * _FLOAT32,
        "choices": n * choices * _INT64,
        "choices' weights": n * choices * _FLOAT32 + (n * (choices + 1) * _FLOAT32 if config.norm_topk_prob else 0),
        "order": (shape.rows + n * choices) * _INT64 + experts * 4,
        "gate and up of the rows": shape.rows * 2 * width * c,
        "balance": (n + shape.batch * experts) * _FLOAT32,
    }
    matrices = config.hidden_size * (experts + 3 * width * experts + 3 * shared)
    passing = (shape.rows * config.hidden_size + n * (3 * config.hidden_size + shared)) * c
    return Stage("experts", kept, matrices + config.hidden_size, passing)


def loss(shape: Shape, last: bool = True) -> Stage:
    """The chunked head: the hidden states' and the head's gradients, made forward; all heads share one matrix."""
    config = shape.config
    head = config.vocab_size * config.hidden_size
    kept = {
        "gradient of the states": shape.tokens * config.hidden_size * shape.itemsize,
        "of the head": head * _FLOAT32,
    }
    states = shape.tokens * config.hidden_size * shape.itemsize
    # A head that is not the last one to come forward, and so not the first backward, adds to a gradient that exists.
    return Stage(
        "loss", kept, head if last and not config.tie_word_embeddings else 0, states + (0 if last else head * 4)
    )


def _mtp_input(shape: Shape) -> Stage:
    """The two norms and the projection that join state and embedding."""
    config = shape.config
    d, n, c = config.hidden_size, shape.tokens, shape.itemsize
    norms = {
        f"{name} {what}": size
        for name in ("embedding", "state")
        for what, size in (("input", n * d * c), ("statistics", n * _FLOAT32))
    }
    # The state is the final norm's output, saved here alone.
    kept = norms | {"tokens": n * _INT64, "joined": 2 * n * d * c, "weights narrowed": _narrowed(shape, 2 * d * d)}
    return Stage("mtp input", kept, 2 * d * d + 2 * d, 3 * n * d * c)


def _norm(shape: Shape, name: str, width: int) -> Stage:
    """RMSNorm: its input and one number a token."""
    kept = {"input": shape.tokens * width * shape.itemsize, "statistics": shape.tokens * _FLOAT32}
    return Stage(name, kept, width, shape.tokens * width * shape.itemsize)


def _narrowed(shape: Shape, numbers: int) -> int:
    """Under bfloat16 torch's products keep every matrix a second time in the activations' type."""
    return 0 if shape.own or shape.itemsize == _FLOAT32 else numbers * shape.itemsize


def _recomputed(shape: Shape, layer: list[Stage]) -> Stage:
    """A layer that keeps its input alone; while its backward pass runs, all that it would have kept exists again."""
    again = sum(stage.bytes for stage in layer)
    kept = {"input": shape.tokens * shape.config.hidden_size * shape.itemsize}
    return Stage("layer", kept, sum(stage.weights for stage in layer), again + max(stage.passing for stage in layer))
