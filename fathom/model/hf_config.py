"""config.json in and out: the spellings that `transformers`, vLLM, SGLang and llama.cpp read and write.

Keys that would change the mathematics are refused by name, never dropped; what means nothing for the forward pass
(null, false, empty, bookkeeping, generation settings) is never refused.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fathom.config import ConfigError, check, from_json
from fathom.model.rope_scaling import read_rope_scaling, write_rope_scaling

if TYPE_CHECKING:
    from fathom.model.config import ModelConfig

# Keys of which one value alone is implemented here. Absent means that value.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_interleave": True,
}
_FIXED_ELSEWHERE = {"mlp_bias": False, "partial_rotary_factor": 1.0, "is_causal": True, "use_rope": True}
"""The same, of keys that only other programs write."""

_SAME: dict[str, dict[str, Any]] = {
    "deepseek_v3": {},
    "kimi_k2": {},
    "joyai_llm_flash": {},
    "glm4_moe_lite": {
        "vocab_size": 154880, "hidden_size": 2048, "intermediate_size": 10240, "moe_intermediate_size": 1536,
        "num_hidden_layers": 47, "num_attention_heads": 20, "n_routed_experts": 64, "num_experts_per_tok": 4,
        "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.8, "q_lora_rank": 768, "qk_nope_head_dim": 192,
        "v_head_dim": 256, "max_position_embeddings": 202752, "rms_norm_eps": 1e-5, "first_k_dense_replace": 1,
    },
    "youtu": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 32,
        "num_attention_heads": 16, "max_position_embeddings": 131072, "bos_token_id": 128000, "eos_token_id": 128001,
        "tie_word_embeddings": True, "n_routed_experts": 0, "first_k_dense_replace": sys.maxsize,
    },
    "deepseek_v2": {
        "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False, "routed_scaling_factor": 1.0,
        "n_group": 1, "topk_group": 1,
    },
}  # fmt: skip
"""What config.json may call itself, and what absent keys then mean, where not DeepSeek-V3's values (`transformers`)."""

_RELATIVES = {
    "deepseek_v32": "DeepSeek-V3.2, whose indexer chooses the tokens that attention sees",
    "deepseek_v4": "DeepSeek-V4, with hyper-connections and compressed sparse attention",
    "glm_moe_dsa": "GLM-5, whose indexer chooses the tokens that attention sees",
    "glm5": "GLM-5, with linear attention, and an indexer that chooses the tokens that attention sees",
    "kimi_k25": "Kimi-K2.5, with a vision tower around its language model",
    "kimi_k3": "Kimi-K3, with linear attention in most layers and a vision tower",
    "kimi_linear": "Kimi-Linear, with linear attention in most layers",
    "longcat": "LongCat, with two attentions a layer and experts that compute nothing",
    "mistral": "Mistral, whose scores grow with the position (Mistral-Large-3 and its successors)",
    "glm4_moe": "GLM-4.5, with grouped-query attention",
    "bailing": "Ling or Ring, with grouped-query or linear attention",
    "pangu": "openPangu, which also normalises behind attention and experts",
    "openpangu": "openPangu, which also normalises behind attention and experts",
    "deepseek_vl": "DeepSeek-VL2, with a vision tower around its language model",
    "deepseek_ocr": "DeepSeek-OCR, with a vision tower around its language model",
}
"""Models that look like this architecture and are not, by how their model_type begins."""

_PARTS = {
    "index_topk": _RELATIVES["deepseek_v32"],
    "hc_mult": _RELATIVES["deepseek_v4"],
    "compress_ratios": _RELATIVES["deepseek_v4"],
    "zero_expert_num": _RELATIVES["longcat"],
    "ngram_vocab_size_ratio": "LongCat with embeddings of n-grams beside those of tokens",
    "emb_neighbor_num": "LongCat with embeddings of n-grams beside those of tokens",
    "linear_attn_config": "a model with linear attention in some layers",
    "llama_4_scaling": _RELATIVES["mistral"],
    "vision_config": "a model with a vision tower around its language model",
    "text_config": "a larger model around a language model",
    "language_config": "a larger model around a language model",
}
"""Keys that only such models have."""

# Keys that say nothing about the forward pass: bookkeeping, file formats, serving, training and generation settings.
_IGNORED = frozenset([
    "architectures", "auto_map", "name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache",
    "return_dict", "is_decoder", "chunk_size_feed_forward", "id2label", "label2id", "num_labels", "problem_type",
    "tokenizer_class", "sep_token_id", "decoder_start_token_id", "attn_implementation", "output_router_logits",
    "output_attentions", "output_hidden_states", "router_aux_loss_coef", "aux_loss_alpha", "seq_aux",
    "pretraining_tp", "ep_size", "head_dim", "qk_head_dim", "num_local_experts", "embedding_initializer_range",
    "gradient_checkpointing", "quantization_config", "compression_config", "task_specific_params", "temperature",
    "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "do_sample", "max_length",
    "min_length", "max_new_tokens", "min_new_tokens", "max_time", "num_beams", "num_beam_groups",
    "num_return_sequences", "early_stopping", "diversity_penalty", "repetition_penalty", "encoder_repetition_penalty",
    "length_penalty", "penalty_alpha", "guidance_scale", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "force_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "renormalize_logits", "exponential_decay_length_penalty",
    "output_scores", "output_logits", "return_dict_in_generate", "cache_implementation", "cache_config",
    "max_cache_len", "stop_strings", "token_healing", "sequence_bias", "prompt_lookup_num_tokens",
    "max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "prefill_chunk_size", "use_mtp",
])  # fmt: skip
_IGNORED_PREFIXES = ("_", "unsloth_")


def from_dict(cls: type[ModelConfig], raw: dict[str, Any]) -> ModelConfig:
    """The content of a config.json; raises ConfigError for a key whose meaning is not implemented here."""
    raw = dict(raw)
    _check_quantization(raw)
    _settle_layers(raw)
    _settle_model_type(raw)
    rope_scaling = read_rope_scaling(raw)
    _split_eos(raw)
    for key, only in (_FIXED | _FIXED_ELSEWHERE).items():
        value = raw.pop(key, None)
        check(value in (only, None), key, value, f"{only!r}: nothing else is implemented")
    # Checkpoints without MTP modules often leave the key out; `transformers` has a second name for it.
    modules = raw.pop("num_mtp_layers", 0)
    raw.setdefault("num_nextn_predict_layers", modules)
    raw.setdefault("initializer_range", 0.02)
    _settle_dense(raw)
    kv_heads = raw.pop("num_key_value_heads", None)
    known = {field.name for field in dataclasses.fields(cls)}
    for key, value in raw.items():
        if key not in known | _IGNORED and not key.startswith(_IGNORED_PREFIXES) and not _means_nothing(value):
            raise ConfigError(_unknown(key, value, known))
    config = from_json(cls, {key: raw[key] for key in known & raw.keys()}, where="")
    heads = config.num_attention_heads
    check(
        kv_heads in (None, heads),
        "num_key_value_heads",
        kv_heads,
        f"num_attention_heads ({heads}): grouped heads are not implemented",
    )
    return dataclasses.replace(config, rope_scaling=rope_scaling)


def to_dict(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The content of a config.json that `transformers` 4 and 5, vLLM, SGLang and llama.cpp's converter read."""
    fields = [f.name for f in dataclasses.fields(config) if f.name != "other_eos_token_ids"]
    raw: dict[str, Any] = {
        "architectures": ["DeepseekV2ForCausalLM" if config.is_v2 else "DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v2" if config.is_v2 else "deepseek_v3",
        **_FIXED,
        **{name: getattr(config, name) for name in fields},
        "num_key_value_heads": config.num_attention_heads,
        "ep_size": 1,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if config.other_eos_token_ids:
        raw["eos_token_id"] = [config.eos_token_id, *config.other_eos_token_ids]
    return raw | write_rope_scaling(config.rope_scaling, config.rope_theta)


def _check_quantization(raw: dict[str, Any]) -> None:
    """Refuse weights in another quantised format than DeepSeek's FP8 blocks."""
    for key in ("quantization_config", "compression_config", "quantization"):
        given: Any = raw.get(key)
        if _means_nothing(given):
            continue
        check(isinstance(given, dict), key, given, "null or an object")
        if given.get("quant_method") != "fp8":
            named = [str(given[name]) for name in ("quant_method", "quant_algo", "format") if given.get(name)]
            raise ConfigError(
                f"{key} is {' '.join(named) or given!r:.80}: weights in this format are not read; load the model in "
                "bfloat16, or in FP8 blocks as DeepSeek releases it"
            )
        block = given.get("weight_block_size")
        check(block == [128, 128], f"{key}.weight_block_size", block, "[128, 128]: nothing else is implemented")


def _settle_model_type(raw: dict[str, Any]) -> None:
    """Take model_type out of `raw`, check that the router fits it, and fill in what the type's absent keys mean."""
    kind = raw.pop("model_type", None)
    if kind is None:
        raise ConfigError("model_type is missing: a DeepSeek-V3 config.json says «deepseek_v3»")
    known = " or ".join(map(repr, _SAME))
    if not isinstance(kind, str) or kind not in _SAME:
        relatives = [text for start, text in _RELATIVES.items() if str(kind).startswith(start)]
        reason = f"this is {relatives[0]}, which is not implemented; {known} are" if relatives else ""
        raise ConfigError(f"model_type is {kind!r}: {reason or f'it must be {known}: nothing else is implemented'}")
    for key, meaning in _PARTS.items():
        if not _means_nothing(raw.get(key)):
            raise ConfigError(f"{key} is {raw[key]!r:.80}: this is {meaning}; not implemented")
    named = raw.get("architectures") or []
    check(isinstance(named, list), "architectures", named, "a list")
    for name in named:
        task = str(name).partition("For")[2]
        check(task in ("", "CausalLM"), "architectures", name, "a causal language model: no other head is implemented")
    for key, value in _SAME[kind].items():
        if key not in raw or (raw[key] is None and kind in ("deepseek_v2", "youtu")):
            raw[key] = value
    if kind == "deepseek_v2":
        scores = raw["scoring_func"]
        check(scores == "softmax", "model_type", kind, f"'deepseek_v3' when scoring_func is {scores!r}")
        return
    for key, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        found = raw.pop(key, None)
        check(found in (value, None), key, found, f"{value!r} in a {kind}")


def _settle_layers(raw: dict[str, Any]) -> None:
    """Translate what lists say of each layer into the keys that count layers."""
    types = raw.get("layer_types")
    if isinstance(types, list) and all(kind == "full_attention" for kind in types):
        del raw["layer_types"]
    if raw.get("use_sliding_window") is False:
        for key in ("sliding_window", "max_window_layers"):
            raw.pop(key, None)
    types = raw.pop("mlp_layer_types", None)
    if types is not None:
        dense, count = (types.count("dense"), len(types)) if isinstance(types, list) else (0, 0)
        in_order = types == ["dense"] * dense + ["sparse"] * (count - dense)
        right = in_order and raw.get("num_hidden_layers") in (None, count)
        check(right, "mlp_layer_types", types, "'dense' for the first layers and 'sparse' for all others")
        given = raw.setdefault("first_k_dense_replace", dense)
        check(given == dense, "first_k_dense_replace", given, f"{dense}, as mlp_layer_types says")


def _settle_dense(raw: dict[str, Any]) -> None:
    """Where no layer has experts, what is said of experts means nothing."""
    layers, dense = raw.get("num_hidden_layers"), raw.get("first_k_dense_replace")
    if type(layers) is not int or type(dense) is not int or dense < layers:
        return
    raw["first_k_dense_replace"] = layers
    check(raw.get("n_routed_experts", 0) is not None, "n_routed_experts", None, "0 where no layer has experts")
    if not raw.get("num_nextn_predict_layers"):
        for key in ("num_experts_per_tok", "n_group", "topk_group", "moe_intermediate_size", "n_shared_experts"):
            if not raw.get(key):
                raw.pop(key, None)


def _means_nothing(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _unknown(key: str, value: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, sorted(known), n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return (
        f"config key {key!r} (value {value!r:.80}) is not one of DeepSeek-V3's: it may change the mathematics, so it "
        f"is refused, not dropped{hint}"
    )


def _split_eos(raw: dict[str, Any]) -> None:
    """Of several end tokens, leave the first under its key in `raw` and the others under ours."""
    if isinstance(given := raw.get("eos_token_id"), list):
        check(bool(given), "eos_token_id", given, "a token id or a list of at least one")
        raw["eos_token_id"], *raw["other_eos_token_ids"] = given
