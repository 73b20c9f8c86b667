"""Models related to DeepSeek-V3, by their own config.json: those that load, at a tiny size, and those that are refused.

The fields are those of the released files, written down by hand, sizes and bookkeeping included.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from fathom.checkpoint.convert import convert
from fathom.checkpoint.hf.model import CheckpointError, load_config, load_model, save_model
from fathom.checkpoint.info import weight_bytes
from fathom.config import ConfigError
from fathom.data.tokenizer import train_tokenizer
from fathom.engine.generate import generate
from fathom.model.config import ModelConfig
from fathom.train.run import Run
from tests.model.configs import lively_model, tiny

COMMON = {
    "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "hidden_act": "silu",
    "initializer_range": 0.02, "kv_lora_rank": 512, "moe_intermediate_size": 2048, "moe_layer_freq": 1,
    "pretraining_tp": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "seq_aux": True,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128,
}  # fmt: skip
V3 = COMMON | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "norm_topk_prob": True, "rms_norm_eps": 1e-06,
}  # fmt: skip
YARN = {
    "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096, "type": "yarn",
}  # fmt: skip
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
R1 = V3 | {
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0, "eos_token_id": 1,
    "ep_size": 1, "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432,
    "max_position_embeddings": 163840, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "quantization_config": FP8, "rope_scaling": YARN,
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "topk_group": 4, "transformers_version": "4.46.3",
    "vocab_size": 129280,
}  # fmt: skip
MOONLIGHT = V3 | {
    "bos_token_id": 163584, "eos_token_id": 163585, "pad_token_id": 163839, "ep_size": 1, "first_k_dense_replace": 1,
    "hidden_size": 2048, "intermediate_size": 11264, "max_position_embeddings": 8192, "moe_intermediate_size": 1408,
    "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "num_attention_heads": 16, "num_experts_per_tok": 6,
    "num_hidden_layers": 27, "num_key_value_heads": 16, "num_nextn_predict_layers": 0, "q_lora_rank": None,
    "rms_norm_eps": 1e-05, "rope_theta": 50000.0, "routed_scaling_factor": 2.446, "topk_group": 1,
    "vocab_size": 163840,
}  # fmt: skip
KIMI_K2 = R1 | {
    "model_type": "kimi_k2", "bos_token_id": 163584, "eos_token_id": 163585, "first_k_dense_replace": 1,
    "max_position_embeddings": 131072, "n_group": 1, "topk_group": 1, "n_routed_experts": 384,
    "num_attention_heads": 64, "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "rope_theta": 50000.0,
    "rope_scaling": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0}, "routed_scaling_factor": 2.827,
    "vocab_size": 163840,
}  # fmt: skip
V2_LITE = COMMON | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "bos_token_id": 100000,
    "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10944,
    "max_position_embeddings": 163840, "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64,
    "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6,
    "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None, "rms_norm_eps": 1e-06,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}, "rope_theta": 10000,
    "routed_scaling_factor": 1.0, "scoring_func": "softmax", "topk_group": 1, "topk_method": "greedy",
    "vocab_size": 102400,
}  # fmt: skip
V2 = V2_LITE | {
    "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_group": 8, "topk_group": 3,
    "n_routed_experts": 160, "num_attention_heads": 128, "num_key_value_heads": 128, "num_hidden_layers": 60,
    "q_lora_rank": 1536, "routed_scaling_factor": 16.0, "topk_method": "group_limited_greedy",
}  # fmt: skip
RELEASED = {
    "DeepSeek-V3, R1": R1,
    "DeepSeek-V3.1": R1 | {"quantization_config": FP8 | {"scale_fmt": "ue8m0"}},
    "Moonlight-16B-A3B": MOONLIGHT,
    "Kimi-K2": KIMI_K2,
    "DeepSeek-V2-Lite": V2_LITE,
    "DeepSeek-V2": V2,
}
SMALL = {
    "vocab_size": 70, "hidden_size": 24, "intermediate_size": 40, "moe_intermediate_size": 12, "kv_lora_rank": 14,
    "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "num_attention_heads": 3, "num_key_value_heads": 3,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        # Billions, by the models' own pages.
        ("DeepSeek-V3, R1", 671.0, 37.5),
        ("DeepSeek-V3.1", 671.0, 37.5),
        ("Moonlight-16B-A3B", 16.0, 3.0),
        ("Kimi-K2", 1026.0, 32.9),
        ("DeepSeek-V2-Lite", 15.7, 2.7),
        ("DeepSeek-V2", 235.7, 21.4),
    ],
)
def test_released_configurations_have_the_published_sizes(name: str, total: float, active: float) -> None:
    counts = ModelConfig.from_dict(json.loads(json.dumps(RELEASED[name]))).parameter_counts()
    assert counts.total / 1e9 == pytest.approx(total, rel=0.01)
    assert counts.active / 1e9 == pytest.approx(active, rel=0.05)


@pytest.mark.parametrize("name", RELEASED)
def test_a_tiny_model_of_each_is_loaded_converted_and_saved(name: str, tmp_path: Path) -> None:
    """All options of the released configuration at small widths: 32 to 384 experts in their released groups."""
    raw = {**RELEASED[name], **SMALL, "num_hidden_layers": 2, "first_k_dense_replace": 1}
    raw["q_lora_rank"] = None if raw["q_lora_rank"] is None else 10
    del raw["torch_dtype"]
    config = ModelConfig.from_dict(raw)
    model = lively_model(config)
    save_model(model, tmp_path / "model")
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(raw))  # its own spelling of the same
    convert(tmp_path / "model", tmp_path / "fp8", "fp8", verify=True)
    again = load_model(tmp_path / "model")
    assert again.config == config == load_config(tmp_path / "fp8")
    tokens_BS = torch.arange(12)[None]
    assert torch.equal(again(tokens_BS).logits_BSO, model(tokens_BS).logits_BSO)
    softmax = "V2" in name
    assert written["model_type"] == ("deepseek_v2" if softmax else "deepseek_v3")
    assert any("correction_bias" in key for key, _ in model.named_buffers()) != softmax
    assert weight_bytes(config)["fp32"] == 4 * (config.parameter_counts().total + config.parameter_counts().mtp)


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_v2_generates_what_its_logits_say(method: str) -> None:
    """The engine, whose C++ implements V3's router only, against the model's own logits."""
    tokenizer = train_tokenizer(["the cat sat on the mat"] * 3, 280)
    groups = {"n_group": 4, "topk_group": 2} if method == "group_limited_greedy" else {"n_group": 1, "topk_group": 1}
    config = tiny(vocab_size=280, scoring_func="softmax", topk_method=method, norm_topk_prob=False, **groups)
    model = lively_model(config)
    ids = tokenizer.encode("the cat")
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids])).logits_BSO[0, -1].argmax()))
    expected = tokenizer.decode(ids[-6:])
    assert generate(model, tokenizer, "the cat", 6, temperature=0.0).endswith(expected)


def test_v2_is_not_trained() -> None:
    config = tiny(scoring_func="softmax", topk_method="greedy", norm_topk_prob=False, n_group=1, topk_group=1)
    with pytest.raises(ConfigError, match=r"model\.topk_method is 'greedy'"):
        replace(Run(), model=replace(config, max_position_embeddings=4096))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scoring_func": "sigmoid"}, ["model_type is 'deepseek_v2'", "deepseek_v3"]),
        ({"topk_method": "noaux_tc"}, ["scoring_func", "sigmoid"]),
        ({"norm_topk_prob": True}, ["norm_topk_prob is True", "false"]),
        ({"n_group": 8}, ["n_group is 8", "greedy"]),
        ({"num_nextn_predict_layers": 1}, ["num_nextn_predict_layers is 1"]),
        ({"mlp_bias": True}, ["mlp_bias is True"]),
        ({"topk_method": "best"}, ["topk_method: got 'best'", "group_limited_greedy"]),
    ],
)
def test_settings_that_programs_interpret_differently_are_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict({**V2_LITE, **changes})
    for word in words:
        assert word in str(error.value)


V32 = R1 | {"model_type": "deepseek_v32", "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048}
V4 = {"model_type": "deepseek_v4", "hc_mult": 4, "hidden_size": 4096, "scoring_func": "sqrtsoftplus"}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (V32, ["'deepseek_v32'", "DeepSeek-V3.2", "indexer"]),
        (V32 | {"model_type": "deepseek_v3"}, ["index_topk is 2048", "DeepSeek-V3.2", "indexer"]),
        (V4, ["'deepseek_v4'", "DeepSeek-V4", "hyper-connections"]),
        ({"model_type": "kimi_k25", "text_config": KIMI_K2}, ["'kimi_k25'", "vision"]),
        (V4 | {"model_type": "deepseek_v4_flash"}, ["'deepseek_v4_flash'", "DeepSeek-V4"]),
        (V32 | {"model_type": "glm_moe_dsa"}, ["'glm_moe_dsa'", "GLM-5", "indexer"]),
        ({"model_type": "glm5_next", "text_config": {}}, ["'glm5_next'", "GLM-5"]),
        ({"model_type": "kimi_k3", "text_config": {}}, ["'kimi_k3'", "Kimi-K3", "linear attention"]),
        ({"model_type": "longcat_flash"}, ["'longcat_flash'", "LongCat"]),
        ({"model_type": "mistral3", "text_config": {}}, ["'mistral3'", "Mistral-Large-3"]),
        (R1 | {"text_config": KIMI_K2}, ["text_config", "larger model"]),
        ({"model_type": ["deepseek_v3"]}, ["model_type is ['deepseek_v3']", "'deepseek_v3'"]),
        ({"model_type": "llama"}, ["'llama'", "'deepseek_v3'", "'deepseek_v2'", "'kimi_k2'"]),
    ],
)
def test_related_architectures_are_refused_by_name(raw: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path)
    for word in [str(tmp_path / "config.json"), *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("changes", [{"model_type": "deepseek_v4"}, {"quantization_config": {"quant_method": "awq"}}])
def test_a_model_on_the_hub_is_refused_before_its_weights_are_fetched(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(R1 | changes))
    fetched: list[str] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download_to(tmp_path, fetched))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model("org/model")
    assert fetched == ["*.json"]


def test_of_a_model_on_the_hub_only_what_the_index_lists_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repositories often hold the same weights a second time, consolidated or in another format."""
    save_model(lively_model(tiny()), tmp_path, max_shard_size=40_000)
    shards = {file.name for file in tmp_path.glob("*.safetensors")}
    fetched: list[str] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download_to(tmp_path, fetched))
    load_model("org/model")
    assert len(shards) > 1 and {name for name in fetched if name.endswith(".safetensors")} == shards


def download_to(directory: Path, fetched: list[str]) -> Callable[..., str]:
    """Stands for the hub: everything is in `directory` already; the requested patterns are noted."""

    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert ignore_patterns == ["*/*"]
        fetched.extend(allow_patterns)
        return str(directory)

    return download


def test_a_quantisation_beside_the_configuration_is_refused_by_name(tmp_path: Path) -> None:
    """As NVIDIA's NVFP4 releases have it."""
    (tmp_path / "config.json").write_text(json.dumps(ModelConfig().to_dict()))
    quantized = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(quantized))
    with pytest.raises(CheckpointError, match="NVFP4"):
        load_config(tmp_path)
