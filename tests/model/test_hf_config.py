"""config.json in and out: every dialect is read, nothing unknown slips in, what is written other programs read."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.config import ConfigError
from fathom.model.config import ModelConfig
from fathom.model.rope_scaling import YarnScaling
from tests.model.configs import assert_says, model_configs, tiny

YARN = {"factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}

# --- reading


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model_type", "deepseek_v2", ["deepseek_v3"]),
        ("hidden_act", "gelu", ["silu"]),
        ("scoring_func", "softmax", ["sigmoid"]),
        ("topk_method", "group_limited_greedy", ["noaux_tc"]),
        ("moe_layer_freq", 2, ["1"]),
        ("attention_bias", True, ["False"]),
        ("attention_dropout", 0.1, ["0.0"]),
        ("rope_interleave", False, ["True"]),
        ("num_key_value_heads", 1, ["num_attention_heads (3)"]),
        ("hidden_size", 24.0, ["an integer"]),
        ("hidden_size", True, ["an integer"]),
        ("hidden_size", "24", ["an integer"]),
        ("hidden_size", None, ["int"]),
        ("rms_norm_eps", "1e-6", ["a finite number"]),
        ("rms_norm_eps", float("inf"), ["a finite number"]),
        ("routed_scaling_factor", float("nan"), ["a finite number"]),
        ("norm_topk_prob", 1, ["true or false"]),
        ("eos_token_id", [], ["at least one"]),
    ],
)
def test_values_that_mean_something_else_are_refused(key: str, value: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict({**tiny().to_dict(), key: value})
    assert_says(error, key, repr(value), *words)


@pytest.mark.parametrize(("key", "meant"), [("n_routed_expert", "n_routed_experts"), ("sliding_window", "")])
def test_unknown_keys_are_refused_not_dropped(key: str, meant: str) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict({**tiny().to_dict(), key: 7})
    assert_says(error, key, 7, "refused", meant)


MEANINGLESS = {
    "_attn_implementation_autoset": False, "_commit_hash": "abc", "pruned_heads": {}, "prefix": None,
    "is_decoder": True, "sliding_window": None, "unsloth_fixed": True, "unsloth_version": "2025.9.1",
    "tie_encoder_decoder": False, "torchscript": False, "layer_types": ["full_attention"] * 3, "temperature": 0.6,
    "tf_legacy_loss": False, "cross_attention_hidden_size": None, "task_specific_params": None, "top_k": 50,
    "tokenizer_class": "PreTrainedTokenizerFast", "sep_token_id": None, "top_p": 0.9, "do_sample": True,
    "max_length": 20, "num_beams": 1, "num_beam_groups": 1, "repetition_penalty": 1.0, "typical_p": 1.0,
    "bad_words_ids": None, "length_penalty": 1.0, "id2label": {"0": "LABEL_0"}, "partial_rotary_factor": 1.0,
    "mlp_layer_types": ["dense", "sparse", "sparse"], "quantization_config": {}, "a_key_of_tomorrow": False,
    "another_one": [], "vision_config": None, "index_topk": None,
}  # fmt: skip
"""What `transformers` of any version, Unsloth and others write into a config.json without changing the model."""


@pytest.mark.parametrize("key", MEANINGLESS)
def test_what_means_nothing_is_not_refused(key: str) -> None:
    assert ModelConfig.from_dict({**tiny().to_dict(), key: MEANINGLESS[key]}) == tiny()


def test_an_unused_sliding_window_means_nothing() -> None:
    unused = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
    assert ModelConfig.from_dict({**tiny().to_dict(), **unused}) == tiny()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sliding_window": 128}, ["sliding_window", 128]),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, ["layer_types"]),
        ({"mlp_layer_types": ["dense", "sparse", "dense"]}, ["mlp_layer_types", "'sparse' for all others"]),
        ({"mlp_layer_types": ["dense", "dense", "sparse"]}, ["first_k_dense_replace is 1", "2, as mlp_layer_types"]),
        ({"mlp_layer_types": ["dense"]}, ["mlp_layer_types is ['dense']"]),
        ({"mlp_layer_types": 3}, ["mlp_layer_types is 3"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5"]),
        ({"is_causal": False}, ["is_causal is False"]),
        ({"is_encoder_decoder": True}, ["is_encoder_decoder"]),
        ({"architectures": ["DeepseekV3ForSequenceClassification"]}, ["architectures", "causal language model"]),
        ({"vision_config": {"depth": 2}}, ["vision_config", "vision tower"]),
        ({"llama_4_scaling": {"beta": 0.1}}, ["llama_4_scaling"]),
        ({"zero_expert_num": 256}, ["zero_expert_num", 256]),
        ({"hc_mult": 4}, ["hc_mult", 4, "DeepSeek-V4", "hyper-connections"]),
        ({"compress_ratios": [4, 128]}, ["compress_ratios", "DeepSeek-V4"]),
        ({"emb_neighbor_num": 4}, ["emb_neighbor_num", "n-grams"]),
        ({"linear_attn_config": {"short_conv_kernel_size": 4}}, ["linear_attn_config", "linear attention"]),
        ({"index_n_heads": 64}, ["index_n_heads", 64]),
        ({"swiglu_limit": 7.0}, ["swiglu_limit", 7.0]),
        ({"attn_output_gate": True}, ["attn_output_gate"]),
        ({"model_type": "longcat_flash_ngram"}, ["longcat_flash_ngram", "LongCat", "two attentions"]),
        ({"model_type": "deepseek_v4"}, ["DeepSeek-V4", "compressed sparse attention"]),
        ({"model_type": "glm_moe_dsa"}, ["GLM-5", "indexer"]),
        ({"model_type": "kimi_k3"}, ["Kimi-K3", "linear attention"]),
        ({"model_type": "mistral4"}, ["Mistral", "scores grow"]),
        ({"model_type": "glm4_moe"}, ["GLM-4.5", "grouped-query"]),
        ({"first_k_dense_replace": 3, "n_routed_experts": None}, ["n_routed_experts is None", "0 where no layer"]),
    ],
)
def test_what_changes_the_mathematics_is_refused_by_name(changes: dict[str, Any], words: list[object]) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict({**tiny().to_dict(), **changes})
    assert_says(error, *words)


def test_null_experts_of_a_dense_model_are_none() -> None:
    """As Youtu-LLM's class in `transformers` has no experts at all."""
    raw = tiny().to_dict()
    for key in ("first_k_dense_replace", "scoring_func", "topk_method"):
        raw.pop(key, None)
    config = ModelConfig.from_dict(
        {**raw, "model_type": "youtu", "n_routed_experts": None, "num_nextn_predict_layers": 0}
    )
    assert config.n_routed_experts == 0 and config.first_k_dense_replace == config.num_hidden_layers


@pytest.mark.parametrize(
    ("key", "given", "named"),
    [
        ("quantization_config", {"quant_method": "awq", "bits": 4}, "awq"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq"),
        ("quantization_config", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt NVFP4"),
        ("quantization_config", {"quant_method": "compressed-tensors", "format": "pack-quantized"}, "pack-quantized"),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": None}, "weight_block_size is None"),
        ("quantization", {"group_size": 64, "bits": 4}, "group_size"),
        ("compression_config", {"format": "int-quantized"}, "int-quantized"),
    ],
)
def test_other_quantised_formats_are_refused_by_name(key: str, given: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict({**tiny().to_dict(), key: given})
    assert_says(error, key, named)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.sampled_from([10**9, 2**63, 10**40, 0.5, float("nan"), "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "factor", "x"]), inner),
    max_leaves=4,
)


@settings(max_examples=300, deadline=1000)
@given(st.dictionaries(st.sampled_from([*tiny().to_dict(), *MEANINGLESS, "text_config", "what"]), JSON, max_size=3))
def test_any_value_is_read_or_refused_with_a_reason(changes: dict[str, Any]) -> None:
    try:
        ModelConfig.from_dict({**tiny().to_dict(), **changes})
    except ConfigError as error:
        assert len(str(error)) < 2000


def test_the_model_type_must_be_given() -> None:
    raw = tiny().to_dict()
    del raw["model_type"]
    with pytest.raises(ConfigError, match="model_type is missing"):
        ModelConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"type": "linear", "factor": 2.0}, ["rope_scaling.type", "linear", "'yarn' or 'default'"]),
        ({"type": "yarn", "factor": 2.0}, ["rope_scaling: original_max_position_embeddings: missing"]),
        ({"type": "yarn", **YARN, "factor": "40"}, ["rope_scaling: factor", "'40'", "a finite number"]),
        ({"type": "yarn", **YARN, "truncate": False}, ["rope_scaling.truncate", False, True]),
        ({"type": "yarn", **YARN, "attention_factor": 1.2}, ["rope_scaling.attention_factor", 1.2]),
        ({"type": "yarn", **YARN, "long_factor": [1.0]}, ["rope_scaling: long_factor: unknown key"]),
        ({"type": "default", "factor": 2.0}, ["factor", "only rope_type and rope_theta"]),
        ([1, 2], ["rope_scaling", [1, 2], "null or an object"]),
        ("yarn", ["rope_scaling", "yarn", "null or an object"]),
    ],
)
def test_rotary_settings_that_are_not_ours_are_refused(rope: Any, words: list[object]) -> None:
    raw = {k: v for k, v in tiny().to_dict().items() if not k.startswith("rope_")}
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict({**raw, "rope_scaling": rope})
    assert_says(error, *words)


def test_both_rotary_spellings_are_read() -> None:
    plain = {k: v for k, v in tiny().to_dict().items() if not k.startswith("rope_")}
    temperatures = {"mscale": 1.0, "mscale_all_dim": 1.0}
    old = {**plain, "rope_theta": 5000.0, "rope_scaling": {"type": "yarn", **YARN, **temperatures}}
    new = {**plain, "rope_parameters": {"rope_type": "yarn", "rope_theta": 5000.0, **YARN, **temperatures}}
    expected = tiny(rope_theta=5000.0, rope_scaling=YarnScaling(40.0, 4096, 32.0, 1.0, 1.0, 1.0))
    assert ModelConfig.from_dict(old) == ModelConfig.from_dict(new) == expected
    unscaled = {**plain, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    assert ModelConfig.from_dict(unscaled) == ModelConfig.from_dict({**plain, "rope_theta": 5000.0})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_theta": 500.0}, ["rope_theta", 500.0, 10000.0]),
        ({"rope_scaling": {"type": "yarn", **YARN}}, ["rope_scaling", "rope_parameters"]),
    ],
)
def test_spellings_that_contradict_each_other_are_refused(changes: dict[str, Any], words: list[object]) -> None:
    """Programs differ in which of the two they believe."""
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict({**tiny().to_dict(), **changes})
    assert_says(error, *words)


def test_the_released_config_is_read() -> None:
    """deepseek-ai/DeepSeek-V3's config.json, key by key."""
    released = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu",
        "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
        "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
        "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
        "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"type": "yarn", **YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True,
        "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
    }  # fmt: skip
    expected = dataclasses.replace(
        ModelConfig(),
        initializer_range=0.02,
        max_position_embeddings=163840,
        rope_scaling=YarnScaling(40.0, 4096, 32.0, 1.0, 1.0, 1.0),
    )
    assert ModelConfig.from_dict(json.loads(json.dumps(released))) == expected


def test_a_list_of_end_tokens_is_kept() -> None:
    config = ModelConfig.from_dict({**tiny().to_dict(), "eos_token_id": [7, 3, 5]})
    assert (config.eos_token_id, config.other_eos_token_ids) == (7, (3, 5))
    assert config.to_dict()["eos_token_id"] == [7, 3, 5] and "other_eos_token_ids" not in config.to_dict()
    assert ModelConfig.from_dict(config.to_dict()) == config
    for wrong in ([7, 61], [7, -1], [7, "3"], [7, True]):
        with pytest.raises(ConfigError, match="eos_token_id"):
            ModelConfig.from_dict({**tiny().to_dict(), "eos_token_id": wrong})


def test_what_newer_writers_leave_out_means_the_released_values() -> None:
    raw = tiny().to_dict()
    for key in (
        "topk_method",
        "scoring_func",
        "moe_layer_freq",
        "ep_size",
        "num_key_value_heads",
        "torch_dtype",
    ):
        del raw[key]
    assert ModelConfig.from_dict(raw) == tiny()


def test_absent_mtp_modules_are_none() -> None:
    raw = tiny(num_nextn_predict_layers=1).to_dict()
    del raw["num_nextn_predict_layers"]
    assert ModelConfig.from_dict(raw).num_nextn_predict_layers == 0
    assert ModelConfig.from_dict({**raw, "num_mtp_layers": 2}).num_nextn_predict_layers == 2


# --- writing


@settings(max_examples=200, deadline=None)
@given(model_configs())
def test_what_is_written_is_read_back(config: ModelConfig) -> None:
    raw = json.loads(json.dumps(config.to_dict("bfloat16")))
    assert ModelConfig.from_dict(raw) == config
    older = {k: v for k, v in raw.items() if k != "rope_parameters"}
    newer = {k: v for k, v in raw.items() if k not in ("rope_scaling", "rope_theta")}
    assert ModelConfig.from_dict(older) == ModelConfig.from_dict(newer) == config


def test_other_programs_find_their_keys() -> None:
    yarn = YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)
    raw = tiny(rope_scaling=yarn, rope_theta=5000.0).to_dict("bfloat16")
    expected = {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "hidden_act": "silu",
        "num_key_value_heads": 3,
        "ep_size": 1,
        "moe_layer_freq": 1,
        "attention_bias": False,
        "rope_interleave": True,
        "rope_theta": 5000.0,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "num_nextn_predict_layers": 0,
    }
    assert {key: raw[key] for key in expected} == expected
    scaling = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
    assert raw["rope_scaling"] == {"type": "yarn", **scaling}
    assert raw["rope_parameters"] == {"rope_type": "yarn", "rope_theta": 5000.0, **scaling}
    assert set(raw) >= {field.name for field in dataclasses.fields(ModelConfig)} - {"other_eos_token_ids"}


def test_temperatures_not_given_are_not_written() -> None:
    """Elsewhere `mscale_all_dim: 0` and its absence need not mean the same."""
    raw = tiny(rope_scaling=YarnScaling(4.0, 64)).to_dict()
    assert not {"mscale", "mscale_all_dim"} & (set(raw["rope_scaling"]) | set(raw["rope_parameters"]))
