"""config.json in and out: the spellings that `transformers`, vLLM, SGLang and llama.cpp read and write.

Keys that would change the mathematics are refused by name, never dropped; keys that say nothing about the forward pass
are passed over.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fathom.config import ConfigError, check, from_json
from fathom.model.rope_scaling import read_rope_scaling, write_rope_scaling

if TYPE_CHECKING:
    from fathom.model.config import ModelConfig

# Keys of which one value alone is implemented here. Absent means that value.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "moe_layer_freq": (1,),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "rope_interleave": (True,),
}
_FIXED_ELSEWHERE: dict[str, tuple[Any, ...]] = {"mlp_bias": (False,)}
"""The same, of keys that only other programs write."""

# What config.json may call itself. Kimi-K2 is a DeepSeek-V3 under its own name.
_MODEL_TYPES = ("deepseek_v3", "kimi_k2", "deepseek_v2")
_RELATIVES = {
    "deepseek_v32": "DeepSeek-V3.2, whose indexer chooses the tokens that attention sees",
    "deepseek_v4": "DeepSeek-V4, with hyper-connections and compressed sparse attention",
    "kimi_k25": "Kimi-K2.5, with a vision tower around its language model",
    "kimi_linear": "Kimi-Linear, with linear attention in most layers",
}
"""Models that look like this architecture and are not."""
# What these keys of V2 mean when they are absent or null (`transformers`' DeepseekV2Config).
_V2_DEFAULTS = {
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
}

# Keys that say nothing about the forward pass: bookkeeping, file formats, serving and training hints.
_IGNORED = frozenset(
    [
        "architectures",
        "auto_map",
        "_name_or_path",
        "name_or_path",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "pretraining_tp",
        "ep_size",
        "aux_loss_alpha",
        "seq_aux",
        "head_dim",
        "qk_head_dim",
        "quantization_config",
        "output_router_logits",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "is_encoder_decoder",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "problem_type",
        "num_local_experts",
    ]
)


def from_dict(cls: type[ModelConfig], raw: dict[str, Any]) -> ModelConfig:
    """The content of a config.json; raises ConfigError for a key whose meaning is not implemented here."""
    raw = dict(raw)
    _settle_model_type(raw)
    rope_scaling = read_rope_scaling(raw)
    _split_eos(raw)
    for key, allowed in (_FIXED | _FIXED_ELSEWHERE).items():
        if (value := raw.pop(key, None)) is not None:
            choices = " or ".join(map(repr, allowed))
            check(value in allowed, key, value, f"{choices}: nothing else is implemented")
    # Checkpoints without MTP modules often leave the key out; `transformers` has a second name for it.
    modules = raw.pop("num_mtp_layers", 0)
    raw.setdefault("num_nextn_predict_layers", modules)
    raw.setdefault("initializer_range", 0.02)
    kv_heads = raw.pop("num_key_value_heads", None)
    known = {field.name for field in dataclasses.fields(cls)}
    for key, value in raw.items():
        if key not in known | _IGNORED:
            raise ConfigError(_unknown(key, value, known))
    config = from_json(cls, {key: raw[key] for key in known & raw.keys()}, where="")
    matches = kv_heads is None or kv_heads == config.num_attention_heads
    check(matches, "num_key_value_heads", kv_heads, f"num_attention_heads ({config.num_attention_heads})")
    return dataclasses.replace(config, rope_scaling=rope_scaling)


def to_dict(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The content of a config.json that `transformers` 4 and 5, vLLM, SGLang and llama.cpp's converter read."""
    fields = [f.name for f in dataclasses.fields(config) if f.name != "other_eos_token_ids"]
    raw: dict[str, Any] = {
        "architectures": ["DeepseekV2ForCausalLM" if config.is_v2 else "DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v2" if config.is_v2 else "deepseek_v3",
        **{key: allowed[0] for key, allowed in _FIXED.items()},
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


def _settle_model_type(raw: dict[str, Any]) -> None:
    """Take model_type out of `raw`, check that the router fits it, and fill in what DeepSeek-V2 leaves out."""
    kind = raw.pop("model_type", None)
    if kind is None:
        raise ConfigError("model_type is missing: a DeepSeek-V3 config.json says «deepseek_v3»")
    known = " or ".join(map(repr, _MODEL_TYPES))
    if isinstance(kind, str) and kind in _RELATIVES:
        raise ConfigError(f"model_type is {kind!r}: this is {_RELATIVES[kind]}, which is not implemented; {known} are")
    check(kind in _MODEL_TYPES, "model_type", kind, f"{known}: nothing else is implemented")
    if "index_topk" in raw:
        raise ConfigError(f"index_topk is {raw['index_topk']!r}: this is {_RELATIVES['deepseek_v32']}; not implemented")
    if kind == "deepseek_v2":
        for key, value in _V2_DEFAULTS.items():
            if raw.get(key) is None:
                raw[key] = value
        scores = raw["scoring_func"]
        check(scores == "softmax", "model_type", kind, f"'deepseek_v3' when scoring_func is {scores!r}")
        return
    for key, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        found = raw.pop(key, None)
        check(found in (value, None), key, found, f"{value!r} in a {kind}")


def _unknown(key: str, value: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, sorted(known), n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return (
        f"config key {key!r} (value {value!r}) is not one of DeepSeek-V3's: it may change the mathematics, so it is "
        f"refused, not dropped{hint}"
    )


def _split_eos(raw: dict[str, Any]) -> None:
    """Of several end tokens, leave the first under its key in `raw` and the others under ours."""
    if isinstance(given := raw.get("eos_token_id"), list):
        check(bool(given), "eos_token_id", given, "a token id or a list of at least one")
        raw["eos_token_id"], *raw["other_eos_token_ids"] = given
