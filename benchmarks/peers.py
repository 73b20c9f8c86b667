"""The same shapes as `transformers` builds them, for benchmarks/side.py: its DeepSeek-V3, and a dense Llama.

Only the processes that measure `transformers` import this file.
"""

from dataclasses import fields

import transformers
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from fathom.model.config import ModelConfig

transformers.logging.set_verbosity_error()

_NAMED_OTHERWISE = {"num_nextn_predict_layers", "rope_theta", "rope_scaling"}


def mixture(shape: ModelConfig) -> nn.Module:
    """Its DeepSeek-V3, without MTP modules: it has none to train.

    Autocast does not reach grouped matmuls, so under it they stay in float32; even so they are faster than its loop
    over experts in bfloat16.
    """
    names = {f.name for f in fields(shape)} - _NAMED_OTHERWISE
    config = DeepseekV3Config(
        **{name: getattr(shape, name) for name in names},
        num_key_value_heads=shape.num_attention_heads,
        num_mtp_layers=0,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        use_cache=False,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
    )
    return DeepseekV3ForCausalLM(config)


def dense(shape: ModelConfig) -> nn.Module:
    """A Llama of the shape's width, depth and heads; every layer is as wide as the shape's dense ones."""
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_attention_heads,
        max_position_embeddings=shape.max_position_embeddings,
        initializer_range=shape.initializer_range,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)
