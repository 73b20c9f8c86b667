"""GPU memory of a training step, counted from the configuration alone.

The counts follow the compiled layers: torch.compile saves for the backward pass what matmuls need and recomputes the
rest. docs/planning.md compares them with measurements.

Letters: D hidden, H heads, X key width, V value width, C latent, R rope width, Q query rank, E experts, K experts per
token, F expert width, I dense width, O vocabulary; c bytes of an activation.
"""

from dataclasses import dataclass

from fathom.model.config import ModelConfig
from fathom.ops.loss import chunk_tokens
from fathom.train.run import Run

_FLOAT32, _INT64 = 4, 8
WORKSPACES = 2 * (32 << 20)
"""cuBLAS workspaces of the thread that runs forward and of the one that runs backward (torch on Hopper)."""


@dataclass(frozen=True)
class GpuMemory:
    """Bytes at the peak of a step, by part; they add up to `total`."""

    weights: int
    """float32 master weights."""
    copies: int
    """bfloat16 copies of the matrices, to compute with."""
    moments: int
    """The optimizer's, and the EMA where there is one."""
    gradients: int
    """Those that exist at that moment."""
    kept: int
    """Saved for the backward pass."""
    passing: int
    """Temporaries of that moment: logits, a layer's gradients, or matrices that Muon orthogonalises."""
    workspaces: int
    """The libraries'."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


def gpu_memory(run: Run, itemsize: int) -> GpuMemory:
    """The peak of a step of `run` on one GPU; `itemsize` is an activation's, 2 (bfloat16) or 4 (float32)."""
    config, counts = run.model, run.model.parameter_counts()
    elements = counts.total + counts.mtp
    matrices = elements - _without_copy(config)
    copies = itemsize * matrices if itemsize < _FLOAT32 else 0
    passes = -(-run.train.batch_size // run.train.micro_batch_size)
    # The first micro-batch's gradients stay in the activations' type until the second's (fathom/train/bf16_weights.py).
    whole = _FLOAT32 * elements
    before = {1: 0, 2: itemsize * matrices + _FLOAT32 * (elements - matrices)}.get(passes, whole)
    kept, last, losses = _kept(run, itemsize)
    moments = [
        (before, kept, losses),
        (before, kept, last),
        (whole if passes > 1 else itemsize * elements, 0, last),
        (whole, 0, _muon_bytes(run)),
    ]
    gradients, kept, passing = max(moments, key=sum)
    return GpuMemory(
        weights=_FLOAT32 * elements,
        copies=copies,
        moments=_moment_bytes(run, elements),
        gradients=gradients,
        kept=kept,
        passing=passing,
        workspaces=WORKSPACES,
    )


def _without_copy(config: ModelConfig) -> int:
    """Elements of the parameters that have no bfloat16 copy: embedding, routers (and norms, too few to count)."""
    sparse = config.num_moe_layers + config.num_nextn_predict_layers
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return embedding + sparse * config.n_routed_experts * config.hidden_size


def _moment_bytes(run: Run, elements: int) -> int:
    """Two moments per element for AdamW; one for Muon."""
    config = run.model
    adamw = elements
    if run.optimizer.name == "muon":
        adamw = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return _FLOAT32 * (elements + adamw + (elements if run.optimizer.ema_decay else 0))


def _kept(run: Run, c: int) -> tuple[int, int, int]:
    """Bytes that all layers save; that one layer's backward pass needs beside these; and that the losses need."""
    config, train = run.model, run.train
    n, d = train.micro_batch_size * train.sequence_length, config.hidden_size
    vocab_size, modules = config.vocab_size, config.num_nextn_predict_layers
    sparse, dense = layer_bytes(config, c, moe=True), layer_bytes(config, c, moe=False)
    last = backward_bytes(config, c, n)
    if train.activation_checkpointing:
        kept = n * config.num_hidden_layers * d * c
        last += n * max(sparse if config.num_moe_layers else 0, dense if config.first_k_dense_replace else 0)
    else:
        kept = n * (config.num_moe_layers * sparse + config.first_k_dense_replace * dense)
    # Norms outside the layers save their input in float32; a hidden state goes on to the head.
    norm = _FLOAT32 * d
    kept += n * (norm + c * d) * (1 + modules)
    # A module's two inputs, concatenated; and its layer, which is never recomputed.
    kept += n * modules * (sparse + 2 * norm + 2 * c * d)
    head = vocab_size * d
    losses = modules * (n * d + head) * c  # earlier heads' gradients
    chunk = min(n, chunk_tokens(vocab_size, "cuda"))
    losses += (n * d + head + chunk * vocab_size) * c + _FLOAT32 * head
    return kept, last, losses


def layer_bytes(config: ModelConfig, c: int, moe: bool) -> int:
    """Bytes per token that a compiled layer saves, its input included."""
    d, heads, k = config.hidden_size, config.num_attention_heads, config.num_experts_per_tok
    elements = 4 * d  # input, both norms' outputs, attention's result
    elements += heads * (2 * config.qk_head_dim + config.qk_nope_head_dim + 2 * config.v_head_dim)
    elements += config.cache_width + config.kv_lora_rank + 2 * (config.q_lora_rank or 0)
    wide = 3 * _FLOAT32 + heads * _FLOAT32  # norms' and the softmax's statistics
    if not moe:
        return c * (elements + 3 * config.intermediate_size) + wide
    width = config.moe_intermediate_size
    # Tokens sorted by expert and their gate and up are saved, the activation is not.
    elements += k * (2 * width + d) + 3 * config.n_shared_experts * width
    wide += 2 * config.n_routed_experts * _FLOAT32 + k * (4 * _INT64 + 3 * _FLOAT32)
    return c * elements + wide


def backward_bytes(config: ModelConfig, c: int, n: int, frozen: bool = False) -> int:
    """The most that a layer's backward pass needs while all activations are alive: its feed-forward's gradients.

    `frozen`: without those of the feed-forward's weights.
    """
    d, k, f = config.hidden_size, config.num_experts_per_tok, config.moe_intermediate_size
    trained = 0 if frozen else 1
    if not config.num_moe_layers:
        return c * (n * (d + 3 * config.intermediate_size) + trained * 3 * d * config.intermediate_size)
    # Gradients of the rows, of the activation, of gate and up, and the activation; later those of the weights.
    return c * (n * d + max(n * k * (d + 4 * f), trained * 3 * config.n_routed_experts * d * f))


def _muon_bytes(run: Run) -> int:
    """Muon's temporaries for the largest stack of experts: two iterates and two Gram matrices, or its directions in
    float32 and in bfloat16."""
    if run.optimizer.name != "muon":
        return 0
    config = run.model
    short, long = sorted((config.moe_intermediate_size, config.hidden_size))
    return 2 * config.n_routed_experts * short * max(4 * long + 4 * short, 6 * long)
