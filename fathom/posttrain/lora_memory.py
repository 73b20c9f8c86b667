"""GPU memory of a training step with adapters, counted from the configuration alone, as fathom/train/gpu_memory.py
does for the training of all weights.

Letters: R rank, O outputs, I inputs; c bytes of a weight or an activation.
"""

import math
from dataclasses import dataclass

from fathom.model.config import ModelConfig
from fathom.ops.loss import chunk_tokens
from fathom.posttrain.config import LoraConfig
from fathom.posttrain.lora import adaptable_shapes
from fathom.train.gpu_memory import WORKSPACES, backward_bytes, layer_bytes

_FLOAT32 = 4


@dataclass(frozen=True)
class LoraMemory:
    """Bytes at the peak of a step, by part; they add up to `total`."""

    weights: int
    """The frozen model, in the activations' type, with a float32 head."""
    adapters: int
    """A and B, their gradients and AdamW's two moments, in float32."""
    sums: int
    """Adapted weights that exist at that moment, and the gradients of one layer's."""
    kept: int
    """Activations saved for the backward pass."""
    passing: int
    """Temporaries: a layer's gradients, or a chunk of logits."""
    workspaces: int
    """The libraries'."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


def lora_memory(
    config: ModelConfig, lora: LoraConfig, tokens: int, itemsize: int = 2, activation_checkpointing: bool = True
) -> LoraMemory:
    """The peak of a step with adapters on one GPU, for micro-batches of so many tokens.

    `itemsize` is that of weights and activations, 2 (bfloat16) or 4 (float32). MTP modules run and are never
    recomputed. The head is frozen, so it has no gradient.
    """
    counts, c = config.parameter_counts(), itemsize
    layers, modules = config.num_hidden_layers, config.num_nextn_predict_layers
    adapted = _adapted_elements(config, lora)
    largest = max(adapted.values())
    in_modules = sum(elements for layer, elements in adapted.items() if layer >= layers)
    alive = max(largest, in_modules) if activation_checkpointing else sum(adapted.values())

    sparse, dense = layer_bytes(config, c, moe=True), layer_bytes(config, c, moe=False)
    one_layer = max(sparse if config.num_moe_layers else 0, dense if config.first_k_dense_replace else 0)
    if activation_checkpointing:
        kept = layers * config.hidden_size * c + one_layer
    else:
        kept = config.num_moe_layers * sparse + config.first_k_dense_replace * dense
    kept += modules * (sparse + (2 * c + 2 * _FLOAT32) * config.hidden_size)
    kept += (1 + modules) * (c + _FLOAT32) * config.hidden_size  # the last norms' inputs, and what the head takes
    # Logits of a chunk, their log-softmax and its gradient (fathom/ops/loss).
    chunk = min(tokens, chunk_tokens(config.vocab_size, "cuda")) * config.vocab_size * 3 * _FLOAT32
    return LoraMemory(
        weights=c * (counts.total + counts.mtp) + (_FLOAT32 - c) * config.vocab_size * config.hidden_size,
        adapters=4 * _FLOAT32 * _adapter_elements(config, lora),
        sums=c * (alive + largest),
        kept=tokens * kept,
        passing=max(chunk, backward_bytes(config, c, tokens, frozen=not lora.experts)),
        workspaces=WORKSPACES,
    )


def lora_memory_refusal(needs: LoraMemory, free: int, activation_checkpointing: bool) -> str | None:
    """Why a run with adapters will not fit, with advice; None when it will."""
    if needs.total <= free:
        return None
    gib = 2**30
    message = (
        f"this run needs about {needs.total / gib:.1f} GiB ({needs.weights / gib:.1f} for frozen weights, "
        f"{needs.adapters / gib:.1f} for adapters, {needs.kept / gib:.1f} for activations) and {free / gib:.1f} GiB "
        "are free"
    )
    if not activation_checkpointing:
        return f"{message}: set train.activation_checkpointing, which keeps less for the backward pass"
    return f"{message}: lower train.micro-batch-tokens, or leave lora.experts out"


def _adapter_elements(config: ModelConfig, lora: LoraConfig) -> int:
    """A (…, R, I) and B (…, O, R) of every adapted weight (…, O, I)."""
    shapes = adaptable_shapes(config, lora.experts).values()
    return sum(lora.rank * math.prod(shape[:-2]) * sum(shape[-2:]) for shape in shapes)


def _adapted_elements(config: ModelConfig, lora: LoraConfig) -> dict[int, int]:
    """Elements of the adapted weights of each layer, MTP module k being layer num_hidden_layers + k."""
    found: dict[int, int] = {}
    for name, shape in adaptable_shapes(config, lora.experts).items():
        kind, number, *_ = name.split(".")
        layer = int(number) + (config.num_hidden_layers if kind == "mtp" else 0)
        found[layer] = found.get(layer, 0) + math.prod(shape)
    return found
