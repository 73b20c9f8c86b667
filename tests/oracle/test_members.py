"""Models that are DeepSeek-V3 under another name, or without experts, against their own classes in `transformers`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    YoutuConfig,
    YoutuForCausalLM,
)

from fathom.checkpoint.hf.model import load_model, save_model
from tests.checkpoint.directories import edit_json
from tests.model.configs import enliven
from tests.oracle.peers import PLAIN, quietly

pytestmark = pytest.mark.oracle

ATTENTION = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3,
    "num_key_value_heads": 3, "kv_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
EXPERTS = {
    "moe_intermediate_size": 12, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 1.8,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e5, "factor": 32.0, "original_max_position_embeddings": 16, "beta_fast": 1.0,
    "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
ALL_DENSE = {"first_k_dense_replace": 3, "num_mtp_layers": 0}
MEMBERS = {
    "GLM-4.7-Flash": (Glm4MoeLiteForCausalLM, Glm4MoeLiteConfig, EXPERTS | {"q_lora_rank": 10}),
    "GLM-4.7-Flash, two dense layers": (
        Glm4MoeLiteForCausalLM, Glm4MoeLiteConfig,
        EXPERTS | {"q_lora_rank": 10, "mlp_layer_types": ["dense", "dense", "sparse"]},
    ),
    "Youtu-LLM": (YoutuForCausalLM, YoutuConfig, {"q_lora_rank": 10, "tie_word_embeddings": True}),
    "GigaChat3-10B-A1.8B": (
        DeepseekV3ForCausalLM, DeepseekV3Config,
        EXPERTS | {"q_lora_rank": None, "first_k_dense_replace": 1, "num_mtp_layers": 0, "rope_parameters": YARN},
    ),
    "all layers dense": (DeepseekV3ForCausalLM, DeepseekV3Config, EXPERTS | ALL_DENSE | {"q_lora_rank": 10}),
    "no experts": (
        DeepseekV3ForCausalLM, DeepseekV3Config,
        ALL_DENSE | {"q_lora_rank": None, "n_routed_experts": 0, "n_group": None, "num_experts_per_tok": None},
    ),
    "more dense layers than layers": (
        DeepseekV3ForCausalLM, DeepseekV3Config,
        EXPERTS | ALL_DENSE | {"q_lora_rank": 10, "first_k_dense_replace": 7},
    ),
}  # fmt: skip


@torch.no_grad()
def peer_logits(model: Any, tokens_BS: Tensor) -> Tensor:
    return model(tokens_BS, use_cache=False).logits


@pytest.mark.parametrize("name", MEMBERS)
def test_its_checkpoint_gives_the_same_logits_there_and_back(name: str, tmp_path: Path) -> None:
    model_class, config_class, settings = MEMBERS[name]
    theirs = model_class(config_class(**ATTENTION | settings, **PLAIN)).eval()
    enliven(theirs, seed=3, std=0.15)
    tokens_BS = torch.arange(2, 40).view(2, 19)
    expected_BSO = peer_logits(theirs, tokens_BS)
    with quietly():
        theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    torch.testing.assert_close(ours(tokens_BS).logits_BSO, expected_BSO, atol=1e-5, rtol=1e-5)
    save_model(ours, tmp_path / "ours")
    with quietly():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32, **PLAIN).eval()
    assert type(again) is DeepseekV3ForCausalLM
    torch.testing.assert_close(peer_logits(again, tokens_BS), expected_BSO, atol=1e-5, rtol=1e-5)


def test_joyai_llm_flash_is_deepseek_v3_by_another_name(tmp_path: Path) -> None:
    """`transformers` has no class of its own for it: the same weights under the two names give the same logits."""
    theirs = DeepseekV3ForCausalLM(
        DeepseekV3Config(**ATTENTION | EXPERTS, q_lora_rank=10, num_mtp_layers=0, first_k_dense_replace=1, **PLAIN)
    ).eval()
    enliven(theirs, seed=4, std=0.15)
    tokens_BS = torch.arange(2, 40).view(2, 19)
    theirs.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", model_type="joyai_llm_flash")
    torch.testing.assert_close(load_model(tmp_path)(tokens_BS).logits_BSO, peer_logits(theirs, tokens_BS))
