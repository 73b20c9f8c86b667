"""What a step of our training takes of a GPU's memory, counted from the configuration alone.

The counts follow the compiled layers: torch.compile keeps for the backward pass what products need and makes the rest
again. docs/planning.md compares them with measurements.

Letters: D hidden, H heads, X key width, V value width, C latent, R rope width, Q query rank, E experts, K experts per
token, F expert width, I dense width, O vocabulary; c bytes of an activation.
"""

from dataclasses import dataclass

from fathom.model.config import ModelConfig
from fathom.ops.loss import chunk_tokens
from fathom.train.run import Run

_FLOAT32, _INT64 = 4, 8
_WORKSPACES = 2 * (32 << 20)
"""cuBLAS takes so much for the thread that runs forward and the one that runs backward, each (torch on Hopper)."""


@dataclass(frozen=True)
class GpuMemory:
    """Bytes at the worst moment of a step, by part; they add up to `total`."""

    weights: int
    """float32 masters."""
    copies: int
    """The matrices again in bfloat16, to compute with."""
    moments: int
    """The optimizer's, and the moving average where one is kept."""
    gradients: int
    """Those that exist at that moment."""
    kept: int
    """What waits for the backward pass."""
    passing: int
    """What exists only then: logits, a layer's gradients, or matrices that Muon orthogonalises."""
    workspaces: int
    """The libraries'."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


def gpu_memory(run: Run, itemsize: int) -> GpuMemory:
    """The peak of a step of `run` on one GPU; `itemsize` is an activation's, 2 (bfloat16) or 4 (float32)."""
    config, counts = run.model, run.model.parameter_counts()
    numbers = counts.total + counts.mtp
    matrices = numbers - _never_narrow(config)
    copies = itemsize * matrices if itemsize < _FLOAT32 else 0
    passes = -(-run.train.batch_size // run.train.micro_batch_size)
    # The first micro-batch's gradients wait in the activations' type for the second's (fathom/train/bf16_weights.py).
    whole = _FLOAT32 * numbers
    before = {1: 0, 2: itemsize * matrices + _FLOAT32 * (numbers - matrices)}.get(passes, whole)
    kept, last, losses = _kept(run, itemsize)
    moments = [
        (before, kept, losses),
        (before, kept, last),
        (whole if passes > 1 else itemsize * numbers, 0, last),
        (whole, 0, _muon_bytes(run)),
    ]
    gradients, kept, passing = max(moments, key=sum)
    return GpuMemory(
        weights=_FLOAT32 * numbers,
        copies=copies,
        moments=_moment_bytes(run, numbers),
        gradients=gradients,
        kept=kept,
        passing=passing,
        workspaces=_WORKSPACES,
    )


def _never_narrow(config: ModelConfig) -> int:
    """Numbers of the parameters that have no bfloat16 copy: embedding, gates (and norms, too few to count)."""
    sparse = config.num_moe_layers + config.num_nextn_predict_layers
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return embedding + sparse * config.n_routed_experts * config.hidden_size


def _moment_bytes(run: Run, numbers: int) -> int:
    """Two moments a number for AdamW; one for what Muon moves."""
    config = run.model
    adamw = numbers
    if run.optimizer.name == "muon":
        adamw = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return _FLOAT32 * (numbers + adamw + (numbers if run.optimizer.ema_decay else 0))


def _kept(run: Run, c: int) -> tuple[int, int, int]:
    """Bytes that all layers keep; that one layer's backward pass takes beside these; and that the losses take."""
    config, train = run.model, run.train
    n, d = train.micro_batch_size * train.sequence_length, config.hidden_size
    words, modules = config.vocab_size, config.num_nextn_predict_layers
    sparse, dense = layer_bytes(config, c, moe=True), layer_bytes(config, c, moe=False)
    last = _backward_bytes(config, c, n)
    if train.activation_checkpointing:
        kept = n * config.num_hidden_layers * d * c
        last += n * max(sparse if config.num_moe_layers else 0, dense if config.first_k_dense_replace else 0)
    else:
        kept = n * (config.num_moe_layers * sparse + config.first_k_dense_replace * dense)
    # Norms outside the layers keep their input in float32; a state goes on to the head.
    norm = _FLOAT32 * d
    kept += n * (norm + c * d) * (1 + modules)
    # A module's two inputs, joined; and its layer, which is never made again.
    kept += n * modules * (sparse + 2 * norm + 2 * c * d)
    head = words * d
    losses = modules * (n * d + head) * c  # earlier heads' gradients
    chunk = min(n, chunk_tokens(words, "cuda"))
    losses += (n * d + head + chunk * words) * c + _FLOAT32 * head
    return kept, last, losses


def layer_bytes(config: ModelConfig, c: int, moe: bool) -> int:
    """Bytes per token that a compiled layer keeps, its input included."""
    d, heads, k = config.hidden_size, config.num_attention_heads, config.num_experts_per_tok
    numbers = 4 * d  # input, both norms' outputs, attention's result
    numbers += heads * (2 * config.qk_head_dim + config.qk_nope_head_dim + 2 * config.v_head_dim)
    numbers += config.cache_width + config.kv_lora_rank + 2 * (config.q_lora_rank or 0)
    wide = 3 * _FLOAT32 + heads * _FLOAT32  # norms' and the softmax's statistics
    if not moe:
        return c * (numbers + 3 * config.intermediate_size) + wide
    width = config.moe_intermediate_size
    # Rows laid out by expert and their gate and up are kept, the activation between them is not.
    numbers += k * (2 * width + d) + 3 * config.n_shared_experts * width
    wide += 2 * config.n_routed_experts * _FLOAT32 + k * (4 * _INT64 + 3 * _FLOAT32)
    return c * numbers + wide


def _backward_bytes(config: ModelConfig, c: int, n: int) -> int:
    """The most that a layer's backward pass takes while everything is still kept: its feed-forward's gradients."""
    d, k, f = config.hidden_size, config.num_experts_per_tok, config.moe_intermediate_size
    if not config.num_moe_layers:
        return c * (n * (d + 3 * config.intermediate_size) + 3 * d * config.intermediate_size)
    # Gradients of the rows, of the activation, of gate and up, and the activation; later those of the weights.
    return c * (n * d + max(n * k * (d + 4 * f), 3 * config.n_routed_experts * d * f))


def _muon_bytes(run: Run) -> int:
    """What Muon holds for the largest stack of experts: two iterates and two grams, or its directions before they are
    narrowed and after."""
    if run.optimizer.name != "muon":
        return 0
    config = run.model
    short, long = sorted((config.moe_intermediate_size, config.hidden_size))
    return 2 * config.n_routed_experts * short * max(4 * long + 4 * short, 6 * long)
