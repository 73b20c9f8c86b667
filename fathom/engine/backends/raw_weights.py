"""The weight tensors of one layer as they are stored, for the backends that run a whole model themselves.

A matrix is what is stored: its values, and scales where it is quantised.
"""

from typing import NamedTuple

from torch import Tensor

from fathom.model.block import Block
from fathom.model.moe import MoE
from fathom.quantization.weight_only import stored

Matrix = tuple[Tensor, Tensor | None]
"""Values (…, rows, columns), and scales where they are quantised."""


class LayerWeights(NamedTuple):
    """A layer's weights under short names; those a layer does not have are absent."""

    matrices: dict[str, Matrix]
    vectors: dict[str, Tensor]


def layer_weights(block: Block) -> LayerWeights:
    """The weights of a layer, or of the layer inside an MTP module."""
    attention, mlp = block.self_attn, block.mlp
    matrices = {
        "kv_a": stored(attention.kv_a_proj_with_mqa, "weight"),
        "kv_b": stored(attention.kv_b_proj, "weight"),
        "o": stored(attention.o_proj, "weight"),
    }
    vectors: dict[str, Tensor] = {
        "input_norm": block.input_layernorm.weight,
        "kv_a_norm": attention.kv_a_layernorm.weight,
        "post_norm": block.post_attention_layernorm.weight,
    }
    if attention.config.q_lora_rank is None:
        matrices["q_b"] = stored(attention.q_proj, "weight")
    else:
        matrices["q_a"] = stored(attention.q_a_proj, "weight")
        vectors["q_a_norm"] = attention.q_a_layernorm.weight
        matrices["q_b"] = stored(attention.q_b_proj, "weight")
    if isinstance(mlp, MoE):
        matrices["router"] = stored(mlp.gate, "weight")
        vectors["bias"] = mlp.gate.e_score_correction_bias
        matrices["gate_up"] = stored(mlp.experts, "gate_up_proj")
        matrices["down"] = stored(mlp.experts, "down_proj")
    shared = mlp.shared_experts if isinstance(mlp, MoE) else mlp
    matrices["gate"] = stored(shared.gate_proj, "weight")
    matrices["up"] = stored(shared.up_proj, "weight")
    matrices["out"] = stored(shared.down_proj, "weight")
    return LayerWeights(matrices, vectors)
