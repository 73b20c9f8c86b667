"""The metadata of a GGUF file that describes the architecture, and the models that llama.cpp would run differently."""

import math
import warnings
from typing import Any

import gguf
import torch

from fathom.config import ConfigError
from fathom.model.config import ModelConfig
from fathom.model.rope import mscale, rope_table, softmax_scale
from fathom.model.rope_scaling import YarnScaling


def check_config(config: ModelConfig) -> None:
    """Raise ConfigError for a model that GGUF cannot describe, or that llama.cpp would compute differently."""
    _check(not config.is_v2, "scoring_func", config.scoring_func, "'sigmoid': V2 models in llama.cpp are not tested")
    depth, vocabulary = config.num_hidden_layers, config.vocab_size
    # It recognises three released models without query compression by these sizes, and then ignores q_lora_rank.
    lite = depth in (26, 27) or (depth == 48 and vocabulary == 128256)
    _check(
        config.q_lora_rank is None or not lite,
        "q_lora_rank",
        config.q_lora_rank,
        f"null with {depth} layers and {vocabulary} tokens: llama.cpp mistakes such a model for one without "
        "query compression",
    )
    _check(depth <= 511, "num_hidden_layers", depth, "at most 511")  # 512 with the MTP module
    _check(config.n_routed_experts <= 1024, "n_routed_experts", config.n_routed_experts, "at most 1024")
    if (yarn := config.rope_scaling) is not None:
        # llama.cpp reads these keys for other architectures; for this one they are constants.
        _check(yarn.beta_fast == 32, "rope_scaling.beta_fast", yarn.beta_fast, "32, as llama.cpp assumes")
        _check(yarn.beta_slow == 1, "rope_scaling.beta_slow", yarn.beta_slow, "1, as llama.cpp assumes")
        # Below one turn of the fastest pair, 2π positions, the ends of the ramp are swapped, and llama.cpp differs.
        length = yarn.original_max_position_embeddings
        _check(length >= 7, "rope_scaling.original_max_position_embeddings", length, "at least 7")


def _check(ok: bool, name: str, value: Any, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{name} is {value!r}; for a GGUF file it must be {expected}")


def drafting_modules(config: ModelConfig) -> int:
    """The number of MTP modules that llama.cpp can draft with, 0 or 1; it aborts on any other file."""
    modules = config.num_nextn_predict_layers
    if modules and config.q_lora_rank is None:
        warnings.warn(
            f"num_nextn_predict_layers is {modules}, but llama.cpp drafts only with models that compress queries "
            "(q_lora_rank is null): the file has no MTP module",
            stacklevel=4,
        )
        return 0
    if modules > 1:
        warnings.warn(
            f"num_nextn_predict_layers is {modules}, but llama.cpp drafts with one module: the file has the first",
            stacklevel=4,
        )
    return min(modules, 1)


def add_config(writer: gguf.GGUFWriter, config: ModelConfig, modules: int) -> None:
    """Add the architecture's keys, with `modules` MTP modules."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers + modules)
    if modules:
        writer.add_nextn_predict_layers(modules)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_attention(writer, config)
    _add_experts(writer, config)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling is not None:
        _add_yarn(writer, config, config.rope_scaling)


def _add_attention(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """Absorbed latent attention is multi-query attention: one key of width C+R, whose first C columns are the value."""
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_key_length(config.cache_width)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_q_lora_rank(config.q_lora_rank or 0)  # the key is required


def _add_experts(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(min(config.num_experts_per_tok, config.n_routed_experts))
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    # Choosing all groups is no restriction, and llama.cpp aborts on it.
    if config.topk_group < config.n_group and config.n_routed_experts:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)


def _add_yarn(writer: gguf.GGUFWriter, config: ModelConfig, yarn: YarnScaling) -> None:
    """llama.cpp has two parameters for our two temperatures, divided differently.

    It multiplies cos and sin by a magnitude m, and scores by (m · (1 + 0.1 · multiplier · ln factor))²; we multiply
    cos and sin by m and scores by `softmax_scale`. This solves for the multiplier.
    """
    magnitude = float(rope_table(config, torch.zeros(1, dtype=torch.int64)).cos[0, 0])  # position 0: cos is 1
    sharpening = math.sqrt(softmax_scale(config) * config.qk_head_dim**0.5)
    turn = 0.1 * math.log(yarn.factor)
    multiplier = (sharpening / magnitude - 1) / turn if turn else 0.0
    # m is attn_factor, unless the multiplier is 0: then it is mscale(factor, 1) times as much.
    attn_factor = magnitude if multiplier else magnitude / mscale(yarn.factor, 1.0)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(yarn.factor)
    writer.add_rope_scaling_orig_ctx_len(yarn.original_max_position_embeddings)
    writer.add_rope_scaling_attn_factors(attn_factor)
    writer.add_rope_scaling_yarn_log_mul(0.1 * multiplier)  # this architecture's loader divides by 0.1
