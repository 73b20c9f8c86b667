"""config.json in and out: every rule says what it wants, nothing unknown slips in, counts are exact."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch.utils.flop_counter import FlopCounterMode

from fathom.config import ConfigError
from fathom.model.config import ModelConfig, YarnScaling
from fathom.model.transformer import Model
from fathom.ops import cpu
from tests.model.configs import lively_model, model_configs, random_tokens, tiny

V3 = ModelConfig()
YARN = {"factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}

POSITIVE = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "max_position_embeddings",
]


def assert_says(error: pytest.ExceptionInfo[ConfigError], *words: object) -> None:
    message = str(error.value)
    for word in words:
        assert str(word) in message, f"{word!r} is not in: {message}"


# ---------------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize("field", POSITIVE)
@pytest.mark.parametrize("value", [0, -3, 2.5])
def test_sizes_are_positive_integers(field: str, value: float) -> None:
    with pytest.raises(ConfigError) as error:
        tiny(**{field: value})
    assert_says(error, field, value, "an integer of at least 1")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"first_k_dense_replace": -1}, ["first_k_dense_replace", -1, "at least 0"]),
        ({"num_nextn_predict_layers": -2}, ["num_nextn_predict_layers", -2, "at least 0"]),
        ({"first_k_dense_replace": 4}, ["first_k_dense_replace", 4, "at most num_hidden_layers (3)"]),
        ({"q_lora_rank": 0}, ["q_lora_rank", 0, "at least 1, or null"]),
        ({"qk_rope_head_dim": 5}, ["qk_rope_head_dim", 5, "even"]),
        ({"n_group": 3}, ["n_group", 3, "divisor of n_routed_experts (8)"]),
        ({"n_group": 8, "topk_group": 8}, ["n_group", 8, "at least 2 experts in each group"]),
        ({"topk_group": 5}, ["topk_group", 5, "at most n_group (4)"]),
        ({"num_experts_per_tok": 5}, ["num_experts_per_tok", 5, "at most 4", "2) groups of 2 experts"]),
        ({"rope_theta": 0.0}, ["rope_theta", 0.0, "a positive number"]),
        ({"rms_norm_eps": -1e-6}, ["rms_norm_eps", -1e-6, "a positive number"]),
        ({"initializer_range": 0.0}, ["initializer_range", 0.0, "a positive number"]),
        ({"routed_scaling_factor": 0.0}, ["routed_scaling_factor", 0.0, "a positive number"]),
        ({"bos_token_id": 61}, ["bos_token_id", 61, "below vocab_size (61)"]),
        ({"eos_token_id": -1}, ["eos_token_id", -1, "below vocab_size (61)"]),
        ({"pad_token_id": 100}, ["pad_token_id", 100, "below vocab_size (61)"]),
    ],
)
def test_every_rule_names_field_value_and_what_is_right(changes: dict[str, Any], words: list[object]) -> None:
    with pytest.raises(ConfigError) as error:
        tiny(**changes)
    assert_says(error, *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"factor": 0.0}, ["rope_scaling.factor", 0.0, "a positive number"]),
        (
            {"original_max_position_embeddings": 0},
            ["original_max_position_embeddings", 0, "positive integer"],
        ),
        ({"beta_fast": 1.0, "beta_slow": 2.0}, ["beta_fast, beta_slow", (1.0, 2.0), "beta_fast the larger"]),
        ({"beta_slow": 0.0}, ["beta_fast, beta_slow", 0.0, "positive"]),
    ],
)
def test_yarn_has_rules_of_its_own(changes: dict[str, Any], words: list[object]) -> None:
    with pytest.raises(ConfigError) as error:
        YarnScaling(**{"factor": 4.0, "original_max_position_embeddings": 64, **changes})
    assert_says(error, *words)


# -------------------------------------------------------------------------------------- reading config.json


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
        ("rms_norm_eps", "1e-6", ["a number"]),
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


def test_the_model_type_must_be_given() -> None:
    raw = tiny().to_dict()
    del raw["model_type"]
    with pytest.raises(ConfigError, match="model_type is missing"):
        ModelConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"type": "linear", "factor": 2.0}, ["rope_scaling.type", "linear", "'yarn' or 'default'"]),
        ({"type": "yarn", "factor": 2.0}, ["rope_scaling.original_max_position_embeddings", "given"]),
        ({"type": "yarn", **YARN, "factor": "40"}, ["rope_scaling.factor", "'40'", "a number"]),
        ({"type": "yarn", **YARN, "truncate": False}, ["rope_scaling.truncate", False, True]),
        ({"type": "yarn", **YARN, "attention_factor": 1.2}, ["rope_scaling.attention_factor", 1.2]),
        ({"type": "yarn", **YARN, "long_factor": [1.0]}, ["rope_scaling", "long_factor", "beta_fast"]),
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
        V3,
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


# -------------------------------------------------------------------------------------- writing config.json


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


# ------------------------------------------------------------------------------------------------- counting


def test_the_released_model_is_counted_exactly() -> None:
    counts = V3.parameter_counts()
    assert counts.total == 671_026_419_200
    assert counts.active == 37_552_297_472
    assert counts.mtp == 11_610_068_224
    assert counts.embedding == 129280 * 7168
    assert counts.active - counts.embedding == 36_625_618_432
    assert counts.active_matrices == 36_624_596_992
    assert counts.mtp - 2 * 7168**2 == 11_507_307_776, "the module without eh_proj"


@settings(max_examples=50, deadline=None)
@given(model_configs())
def test_counts_equal_a_built_model(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Model(config)
    # parameters() yields a tied head once; the correction biases are buffers and count.
    in_modules = sum(t.numel() for t in (*model.mtp.parameters(), *model.mtp.buffers()))
    everything = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    counts = config.parameter_counts()
    assert counts.mtp == in_modules
    assert counts.total == everything - in_modules
    sparse_layers = config.num_moe_layers
    idle = config.n_routed_experts - config.num_experts_per_tok
    assert counts.total - counts.active == sparse_layers * idle * 3 * config.hidden_size * config.moe_intermediate_size


def test_bench_small_costs_123_8_megaflop_per_token() -> None:
    config = ModelConfig(
        vocab_size=8192, hidden_size=384, num_hidden_layers=8, first_k_dense_replace=1, num_attention_heads=6,
        q_lora_rank=192, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
        intermediate_size=1024, n_routed_experts=32, moe_intermediate_size=256, num_experts_per_tok=4,
        n_group=4, topk_group=2, n_shared_experts=1, num_nextn_predict_layers=1,
    )  # fmt: skip
    assert round(config.flops_per_token(512) / 1e6, 1) == 123.8
    attention = 3 * 8 * 6 * (64 + 32 + 64)
    assert config.flops_per_token(1512) - config.flops_per_token(512) == 1000 * attention
    module = config.flops_per_token(512, mtp=True) - config.flops_per_token(512)
    assert module == 6 * config.parameter_counts().active_mtp_matrices + attention * 512 // 8


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"tie_word_embeddings": True}])
def test_flops_equal_torchs_count_of_a_dense_model(changes: dict[str, Any]) -> None:
    """torch counts the masked half of attention as well, so that part is taken from the shapes."""
    config = tiny(first_k_dense_replace=3, **changes)
    batch, length = 2, 16
    model, tokens_BS = lively_model(config), random_tokens(config, batch, length)
    with cpu.disabled(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens_BS)
    heads, widths = config.num_attention_heads, config.qk_head_dim + config.v_head_dim
    attention = 2 * batch * config.num_hidden_layers * heads * length * length * widths
    matrices = config.parameter_counts().active_matrices
    assert counter.get_total_flops() == 2 * batch * length * matrices + attention
    # Training costs three forward passes, causal attention half of the square.
    trained = config.flops_per_token(length) * batch * length
    assert trained == 3 * (counter.get_total_flops() - attention / 2)


def test_active_matrices_of_a_mixture_equal_torchs_count() -> None:
    """The experts' grouped products tell torch's counter what they cost."""
    config = tiny()
    model, tokens_BS = lively_model(config), random_tokens(config, 1, 8)
    with cpu.disabled(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens_BS)
    widths = config.qk_head_dim + config.v_head_dim
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * 64 * widths
    assert counter.get_total_flops() - attention == 2 * 8 * config.parameter_counts().active_matrices
