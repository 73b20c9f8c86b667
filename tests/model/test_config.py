"""The rules of a ModelConfig: each error names the field, its value and what would be right."""

from typing import Any

import pytest

from fathom.config import ConfigError
from fathom.model.rope_scaling import YarnScaling
from tests.model.configs import assert_says, tiny

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
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "max_position_embeddings",
]


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
        ({"n_routed_experts": -1}, ["n_routed_experts", -1, "at least 0"]),
        ({"n_routed_experts": 0}, ["n_routed_experts", 0, "at least 1", "2 layers are MoE"]),
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
