"""How long a step of our training takes on this machine's GPU: products at measured rates, passes, what the host needs.

Passes are counted as torch.compile fuses them: every tensor that a product makes or needs is written and read once.
"""

from fathom.lab.planner.local.gpu_rates import GpuMachine
from fathom.lab.planner.local.saved import Shape
from fathom.lab.planner.local.step import StepTime, blocks, matrices, muon_batches
from fathom.model.config import ModelConfig
from fathom.train.run import Run

_UPDATE_BYTES = 4 + 28 + 6
"""Per number: the gradient's norm; AdamW (weight, gradient and two moments read, all but the gradient written); the
bfloat16 copy."""
_MUON_BYTES = 4 + 44 + 6
"""The same for Muon: momentum and mixed direction made, weight decayed and moved."""


def gpu_step_time(run: Run, shape: Shape, machine: GpuMachine) -> StepTime:
    """One step of `run`: its micro-batches, then the update; the host works beside the GPU."""
    config, n = shape.config, shape.tokens
    times = run.train.batch_size // run.train.micro_batch_size
    layers, sparse = blocks(shape)
    # A forward pass is a third of the products; modules are never made again.
    again = 1 + shape.recompute / 3 * config.num_hidden_layers / layers
    k, d, f, experts = (
        config.num_experts_per_tok,
        config.hidden_size,
        config.moe_intermediate_size,
        config.n_routed_experts,
    )
    heads = (config.num_attention_heads, config.qk_head_dim, config.v_head_dim)
    projections = routed = sorting = 0.0
    for (inputs, outputs), count in matrices(shape).items():
        both = machine.product(n, inputs, outputs) + machine.product(n, outputs, inputs)
        projections += count * (both + machine.product(outputs, n, inputs, transposed=True))
    if sparse:
        projections += sparse * machine.router(n, d, experts)
        routed = sparse * machine.experts(experts, n * k, d, f)
        sorting = sparse * machine.sort(n, k, experts)
    attention = layers * machine.attention(shape.batch, shape.length, *heads)
    head = (1 + config.num_nextn_predict_layers) * machine.head(n, d, config.vocab_size)
    passes = n * pass_bytes(config, shape.itemsize) / machine.bandwidth
    parts = StepTime(
        projections=times * again * projections,
        experts=times * again * routed,
        attention=times * again * attention,
        head=times * head,
        passes=times * again * (passes + sorting) + _gradient_sums(config, times) / machine.bandwidth,
        overhead=0.0,
        optimizer=_optimizer(run, shape, machine),
    )
    layer, rest = machine.host(run.optimizer.name)
    waits = max(0.0, times * again * layers * layer + rest - parts.total)
    return StepTime(**vars(parts) | {"overhead": waits})


def pass_bytes(config: ModelConfig, c: int) -> int:
    """Bytes per token read and written between the products of all layers, forward and backward."""
    modules = config.num_nextn_predict_layers
    sparse, dense = config.num_moe_layers + modules, config.first_k_dense_replace
    # Outside the compiled layers: the embedding and its gradient, and norms whose inputs are widened first.
    outside = config.hidden_size * (4 * 8 + (1 + 3 * modules) * (4 * 10 + 4 * c))
    return c * (sparse * _layer_numbers(config, moe=True) + dense * _layer_numbers(config, moe=False)) + outside


def _layer_numbers(config: ModelConfig, moe: bool) -> int:
    """Numbers per token that a layer's fused passes read and write."""
    d, heads, k = config.hidden_size, config.num_attention_heads, config.num_experts_per_tok
    key, value, nope = config.qk_head_dim, config.v_head_dim, config.qk_nope_head_dim
    latents = config.cache_width + (config.q_lora_rank or 0)
    # Norms and residual sums: x → 2, x and result → 3; backward 8 and 7. Latents' norms: 2 and 3.
    numbers = 20 * d + 5 * latents
    # Queries turned, keys put together; backward taken apart again.
    numbers += heads * (3 * key + nope) + heads * (3 * key + nope + 2 * value)
    if not moe:
        return numbers + 8 * config.intermediate_size  # gate and up read, hidden written; five backward
    width = config.moe_intermediate_size
    # Tokens laid out as rows and added up again, and so their gradients; the activation's 3 numbers, and 6 backward.
    numbers += 6 * k * d + 4 * d + 9 * k * width
    numbers += 8 * config.n_shared_experts * width + 2 * d
    return numbers + 24 * config.n_routed_experts  # scores, balance and their gradients, in float32


def _gradient_sums(config: ModelConfig, times: int) -> int:
    """Bytes of a step's sums of gradients (fathom/train/bf16_weights.py), beside making them."""
    counts = config.parameter_counts()
    return (counts.total + counts.mtp) * (6 if times == 1 else 8 + 10 * (times - 2))


def _optimizer(run: Run, shape: Shape, machine: GpuMachine) -> float:
    counts = shape.config.parameter_counts()
    numbers = counts.total + counts.mtp
    average = 12 * numbers if run.optimizer.ema_decay else 0
    if run.optimizer.name == "adamw":
        return (_UPDATE_BYTES * numbers + average) / machine.bandwidth
    orthogonal = sum(
        machine.orthogonalized(count, *sides) for sides, counted in muon_batches(shape).items() for count in counted
    )
    return orthogonal + (_MUON_BYTES * numbers + average) / machine.bandwidth
