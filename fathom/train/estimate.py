"""What a run will need, before it starts: memory and time, and a refusal with advice where memory is too small."""

from dataclasses import dataclass

import torch

from fathom.train.gpu_memory import gpu_memory
from fathom.train.run import Run

_ASSUMED_MFU = 0.5
"""Fraction of the measured matmul peak that a step is assumed to reach before one has been timed."""


@dataclass(frozen=True)
class Estimate:
    """What a run needs on each rank."""

    weights: int
    """Bytes of float32 weights, gradients, moments and, where they are kept, bfloat16 copies and the moving average."""
    activations: int
    """Bytes of one micro-batch: what it saves for its backward pass, and temporaries at the peak."""
    flops: int
    """Model FLOPs of the whole run, MTP included, over all ranks."""
    tokens: int
    """Training tokens of the whole run."""

    @property
    def memory(self) -> int:
        """Bytes at the peak of a step."""
        return self.weights + self.activations

    def seconds(self, peak_flops: float) -> float:
        """Expected duration at the assumed MFU; `peak_flops` is that of all ranks together."""
        return self.flops / (peak_flops * _ASSUMED_MFU)


def estimate(run: Run, compute_dtype: torch.dtype, sequences: int, device: torch.device) -> Estimate:
    """Needs of a run of `sequences` training sequences, from the configuration alone."""
    tokens = sequences * run.train.sequence_length
    weights, activations = (_on_gpu if device.type == "cuda" else _on_cpu)(run, compute_dtype)
    return Estimate(
        weights=weights,
        activations=activations,
        flops=tokens * run.model.flops_per_token(run.train.sequence_length, mtp=True),
        tokens=tokens,
    )


def _on_gpu(run: Run, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of weights and what belongs to them, and of activations."""
    memory = gpu_memory(run, dtype.itemsize)
    activations = memory.kept + memory.passing + memory.workspaces
    return memory.total - activations, activations


def _on_cpu(run: Run, dtype: torch.dtype) -> tuple[int, int]:
    """The same."""
    counts = run.model.parameter_counts()
    moments = 1 if run.optimizer.name == "muon" else 2
    copies = 2 + moments + (1 if run.optimizer.ema_decay else 0)
    return 4 * copies * (counts.total + counts.mtp), _activation_bytes(run, dtype)


def _activation_bytes(run: Run, dtype: torch.dtype) -> int:
    """Tensors saved per token and layer: the residual stream and norms, latents, heads, probabilities, experts."""
    config, train = run.model, run.train
    heads, length = config.num_attention_heads, train.sequence_length
    attention = heads * (2 * config.qk_head_dim + 2 * config.v_head_dim) + 2 * config.cache_width
    # They are saved for short sequences alone (fathom/ops/attention).
    probabilities = heads * length * 3 // 4 if length <= 1024 else 0
    width = config.moe_intermediate_size
    routed = config.num_experts_per_tok * 2 * width + config.hidden_size
    experts = routed + 3 * config.n_shared_experts * width
    dense = 3 * config.intermediate_size
    sparse = config.num_moe_layers + config.num_nextn_predict_layers
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    elements = layers * (6 * config.hidden_size + attention + probabilities)
    elements += sparse * experts + config.first_k_dense_replace * dense
    if train.activation_checkpointing:  # every layer's input, and one layer in full
        elements = config.num_hidden_layers * config.hidden_size + elements // layers
    tokens = train.micro_batch_size * length
    # The loss holds one chunk of logits and the head's gradient.
    head = 4 * config.vocab_size * (config.hidden_size + 2 * 1024)
    return tokens * elements * dtype.itemsize + head


def memory_refusal(run: Run, needs: Estimate, free: int) -> str | None:
    """Why the run will not fit, with advice; None when it will."""
    if needs.memory <= free:
        return None
    gib = 2**30
    message = (
        f"this run needs about {needs.memory / gib:.1f} GiB ({needs.weights / gib:.1f} for weights, gradients and "
        f"moments, {needs.activations / gib:.1f} for one micro-batch's activations) and {free / gib:.1f} GiB are free"
    )
    if needs.weights > free:
        return f"{message}: take a smaller model, or more memory"
    if run.train.micro_batch_size > 1:
        return f"{message}: lower train.micro-batch-size ({run.train.micro_batch_size}); the batch is accumulated"
    if not run.train.activation_checkpointing:
        return f"{message}: set train.activation_checkpointing, which keeps less for the backward pass"
    return f"{message}: lower train.sequence-length ({run.train.sequence_length})"
