"""FLOPs, memory traffic and saved activations of each layer per token, from which time and memory are computed.

FLOPs follow `ModelConfig.flops_per_token` (docs: spec of model FLOPs); bytes between matmuls are counted read by
read and write by write, as separate kernels would move them.

Letters: D hidden, H heads, X = P+R, P and R key widths, V value, C latent, Q query rank, K experts per token, F expert
width.
"""

from dataclasses import dataclass

from fathom.lab.planner.layout import Layout
from fathom.model.config import ModelConfig


@dataclass(frozen=True)
class Layer:
    """A layer, an MTP module's input projection or the head; everything per token but the parameters."""

    name: str
    weights: int
    """Active matrix weights whose matmuls are quantised under FP8."""
    exact: int
    """Active matrix weights whose matmuls are never quantised: router, head, eh_proj."""
    remade: int
    """Of `weights`, those whose forward matmul selective recomputation repeats."""
    scores: int
    """Forward FLOPs of causal attention at the layout's length."""
    scores_backward: int
    """The same for backward, five matmuls instead of two."""
    forward_bytes: int
    """Read and written between matmuls, forward."""
    backward_bytes: int
    """The same for backward."""
    shared_parameters: int
    """Parameters that every data parallel rank holds."""
    expert_parameters: int
    """Parameters of the routed experts."""
    routed_weights: int = 0
    """Of `weights`, those of a token's routed experts."""

    @property
    def routed(self) -> bool:
        """Whether the layer has routed experts."""
        return self.routed_weights > 0


def layers(config: ModelConfig, layout: Layout) -> list[Layer]:
    """Embedding, layers, head, then every MTP module and its use of the head, in order."""
    d, words, modules = config.hidden_size, config.vocab_size, config.num_nextn_predict_layers
    # Logits are cast to float32, read for the loss, and their gradient is written in bfloat16; the final norm.
    softmax = (6 * words + 7 * d, 10 * words + 14 * d)
    head, own = words * d, 0 if config.tie_word_embeddings else words * d
    result = [_plain("embedding", 0, words * d, (4 * d, 8 * d))]
    result += [
        _layer(config, layout, moe=index >= config.first_k_dense_replace) for index in range(config.num_hidden_layers)
    ]
    result.append(_plain("head", head, own + d, softmax))
    for _ in range(modules):
        result.append(_plain("mtp input", 2 * d * d, 2 * d * d + 2 * d, (16 * d, 32 * d)))  # two norms, joined
        result.append(_layer(config, layout, moe=True))
        result.append(_plain("mtp head", head, d, softmax))  # the main head's own weights, a norm of its own
    return result


def _plain(name: str, exact: int, parameters: int, passes: tuple[int, int]) -> Layer:
    return Layer(name, 0, exact, 0, 0, 0, *passes, parameters, 0)


def _layer(config: ModelConfig, layout: Layout, moe: bool) -> Layer:
    d, heads, f = config.hidden_size, config.num_attention_heads, config.moe_intermediate_size
    attention = sum(inputs * outputs for inputs, outputs in attention_matrices(config))
    norms = 2 * d + (config.q_lora_rank or 0) + config.kv_lora_rank
    expert = 3 * d * f
    active = (
        (config.num_experts_per_tok + config.n_shared_experts) * expert if moe else 3 * d * config.intermediate_size
    )
    gate = config.n_routed_experts * d if moe else 0
    kept = (config.n_shared_experts * expert + gate) if moe else active
    scores = heads * layout.length * (config.qk_head_dim + config.v_head_dim)
    backward = heads * layout.length * (3 * config.qk_head_dim + 2 * config.v_head_dim)
    forward_bytes, backward_bytes = _passes(config, moe)
    rank = config.q_lora_rank
    up_query = 0 if rank is None else rank * heads * config.qk_head_dim
    return Layer(
        name="moe" if moe else "dense",
        weights=attention + active,
        exact=gate,
        remade=up_query + config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim),
        scores=scores,
        scores_backward=backward,
        forward_bytes=forward_bytes,
        backward_bytes=backward_bytes,
        shared_parameters=attention + norms + kept + (config.n_routed_experts if moe and not config.is_v2 else 0),
        expert_parameters=config.n_routed_experts * expert if moe else 0,
        routed_weights=config.num_experts_per_tok * expert if moe else 0,
    )


def attention_matrices(config: ModelConfig) -> list[tuple[int, int]]:
    """(inputs, outputs) of a layer's projections."""
    d, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    width = heads * config.qk_head_dim
    query = [(d, width)] if rank is None else [(d, rank), (rank, width)]
    values = heads * (config.qk_nope_head_dim + config.v_head_dim)
    return [*query, (d, config.cache_width), (config.kv_lora_rank, values), (heads * config.v_head_dim, d)]


def _passes(config: ModelConfig, moe: bool) -> tuple[int, int]:
    """Bytes per token read and written between matmuls, forward and backward: bfloat16, and its casts to FP8."""
    d, heads, k = config.hidden_size, config.num_attention_heads, config.num_experts_per_tok
    x, v, pv = config.qk_head_dim, config.v_head_dim, config.qk_nope_head_dim + config.v_head_dim
    wide = (k + config.n_shared_experts) * config.moe_intermediate_size if moe else config.intermediate_size
    latents = (config.q_lora_rank or 0) + config.kv_lora_rank
    norms = 7 * (2 * d + latents)  # read, written, read again and written in FP8
    rotary = heads * (4 * x + 2 * pv + 2 * x + 2 * v)  # queries in place; keys and values taken apart
    outputs = 3 * heads * v + 2 * 6 * d  # heads' output cast; two residual sums
    active = 5 * wide  # gate and up read, the product written in FP8
    moved = (4 * d + 2 * k * d + 2 * (k + 1) * d) if moe else 0  # router; rows laid out by expert; added up again
    forward = norms + rotary + outputs + active + moved
    # Weight gradients need inputs and outputs again, cast and transposed: two bytes read, one written.
    matrices = attention_matrices(config)
    transposed = 3 * (sum(i + o for i, o in matrices) + 2 * d * (k + config.n_shared_experts if moe else 1) + 3 * wide)
    remade = norms + active
    return forward, 2 * forward + transposed + remade


def kept_bytes(config: ModelConfig, layout: Layout, moe: bool) -> int:
    """Bytes of activations per token and layer saved for the backward pass, before tensor parallelism."""
    d, heads, k = config.hidden_size, config.num_attention_heads, config.num_experts_per_tok
    if layout.recompute == "full":
        return 2 * d
    a = 1 if layout.precision == "fp8" else 2  # inputs of matmuls are saved in the matmuls' type
    latents = (config.q_lora_rank or 0) + config.cache_width
    kept = 2 * 2 * d + 2 * latents  # both norms' inputs, the latents before their norms
    kept += 2 * heads * config.v_head_dim + 4 * heads  # attention's output and its softmax's logarithms
    wide = (k + config.n_shared_experts) * config.moe_intermediate_size if moe else config.intermediate_size
    kept += 2 * a * wide  # gate and up
    kept += k * a * d + 4 * config.n_routed_experts + 12 * k if moe else 0  # rows received, scores, choices
    if layout.recompute == "none":
        kept += a * (2 * d + (config.q_lora_rank or 0) + config.kv_lora_rank)  # outputs of the norms
        kept += 2 * heads * (2 * config.qk_head_dim + config.v_head_dim)  # queries, keys, values
        kept += a * wide  # output of SwiGLU
    return kept
