"""Model directories: round trips, and what other programs need in what is written."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fathom.checkpoint.hf.model import load_model, save_model
from fathom.data.tokenizer import load_tokenizer, train_tokenizer
from fathom.engine.engine import Engine
from fathom.engine.sampling.sampler import SamplingParams
from fathom.model.config import ModelConfig
from fathom.model.rope_scaling import YarnScaling
from tests.checkpoint.directories import (
    EMBEDDING,
    INDEX,
    assert_same_model,
    bfloat16_model,
    edit_json,
    stored,
)
from tests.model.configs import lively_model, model_configs, tiny

pytestmark = pytest.mark.filterwarnings("error")


# ---------------------------------------------------------------------------------------------- round trips


@settings(max_examples=12, deadline=None)
@given(model_configs(), st.sampled_from([1, 2000, 10**9]), st.booleans(), st.integers(0, 2**32 - 1))
def test_a_round_trip_keeps_every_bit(
    tmp_path_factory: pytest.TempPathFactory,
    config: ModelConfig,
    max_shard_size: int,
    bfloat16: bool,
    seed: int,
) -> None:
    """MTP modules, tied heads, shards of one tensor each; biases keep float32 under bfloat16 weights."""
    directory = tmp_path_factory.mktemp("round") / "trip"
    model = bfloat16_model(config, seed) if bfloat16 else lively_model(config, seed)
    save_model(model, directory, max_shard_size=max_shard_size)
    again = load_model(directory, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    assert_same_model(again, model)
    assert (again.lm_head.weight is again.embed_tokens.weight) == config.tie_word_embeddings
    assert not again.training
    assert not list(directory.parent.glob(".*")), "something temporary was left behind"


def test_weights_are_split_into_shards_with_an_index(tmp_path: Path) -> None:
    model = lively_model(tiny(num_nextn_predict_layers=1))
    save_model(model, tmp_path / "many", max_shard_size=6000)
    save_model(model, tmp_path / "one")
    assert not (tmp_path / "one" / INDEX).exists()
    files = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 5
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    for file in files:
        tensors = load_file(tmp_path / "many" / file)
        assert {name for name, home in index["weight_map"].items() if home == file} == set(tensors)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 6000
    together, apart = stored(tmp_path / "one"), stored(tmp_path / "many")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in together.values())
    assert together.keys() == apart.keys()
    assert all(torch.equal(tensor, apart[name]) for name, tensor in together.items())


def test_loading_converts_weights_and_leaves_biases_alone(tmp_path: Path) -> None:
    model = bfloat16_model(tiny())
    save_model(model, tmp_path / "model")
    wide = load_model(tmp_path / "model", dtype=torch.float64)
    assert wide.layers[2].mlp.experts.down_proj.dtype == torch.float64
    bias_E = wide.routers()[0].e_score_correction_bias
    assert bias_E.dtype == torch.float32
    assert torch.equal(bias_E, model.routers()[0].e_score_correction_bias)


# ------------------------------------------------------------------------------------------ what is written


def expected_names(config: ModelConfig) -> set[str]:
    """The released checkpoints' names, written down independently."""
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    attention = ["kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]
    attention += ["q_proj"] if config.q_lora_rank is None else ["q_a_proj", "q_a_layernorm", "q_b_proj"]
    projections = ("gate_proj", "up_proj", "down_proj")
    for i in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        layer = f"model.layers.{i}."
        names |= {f"{layer}{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")}
        names |= {f"{layer}self_attn.{part}.weight" for part in attention}
        if i < config.first_k_dense_replace:
            names |= {f"{layer}mlp.{p}.weight" for p in projections}
        else:
            names |= {f"{layer}mlp.gate.weight", f"{layer}mlp.gate.e_score_correction_bias"}
            names |= {f"{layer}mlp.shared_experts.{p}.weight" for p in projections}
            experts = range(config.n_routed_experts)
            names |= {f"{layer}mlp.experts.{j}.{p}.weight" for j in experts for p in projections}
        if i >= config.num_hidden_layers:
            extra = ["enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head", "embed_tokens"]
            names |= {f"{layer}{part}.weight" for part in extra}
    return names


@settings(max_examples=15, deadline=None)
@given(model_configs())
def test_tensors_carry_the_released_names(tmp_path_factory: pytest.TempPathFactory, config: ModelConfig) -> None:
    directory = tmp_path_factory.mktemp("names") / "model"
    model = lively_model(config)
    save_model(model, directory)
    tensors = stored(directory)
    # A model whose layers are all dense still has experts in its MTP modules.
    assert set(tensors) == expected_names(config)
    for k in range(config.num_nextn_predict_layers):
        layer = f"model.layers.{config.num_hidden_layers + k}."
        assert torch.equal(tensors[layer + "embed_tokens.weight"], tensors[EMBEDDING])
        assert torch.equal(tensors[layer + "shared_head.head.weight"], tensors["lm_head.weight"])
    if config.tie_word_embeddings:
        assert torch.equal(tensors["lm_head.weight"], tensors[EMBEDDING])


def test_stacked_experts_are_written_one_by_one(tmp_path: Path) -> None:
    config = tiny()
    model = lively_model(config)
    save_model(model, tmp_path / "model")
    tensors, experts = stored(tmp_path / "model"), model.layers[1].mlp.experts
    for j in range(config.n_routed_experts):
        prefix = f"model.layers.1.mlp.experts.{j}."
        gate, up = tensors[prefix + "gate_proj.weight"], tensors[prefix + "up_proj.weight"]
        assert gate.shape == up.shape == (config.moe_intermediate_size, config.hidden_size)
        assert torch.equal(torch.cat((gate, up)), experts.gate_up_proj[j])
        assert torch.equal(tensors[prefix + "down_proj.weight"], experts.down_proj[j])


def test_biases_are_written_in_float32_beside_bfloat16_weights(tmp_path: Path) -> None:
    save_model(bfloat16_model(tiny(num_nextn_predict_layers=1)), tmp_path / "model")
    for name, tensor in stored(tmp_path / "model").items():
        wide = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if wide else torch.bfloat16), name


def test_config_json_has_what_vllm_and_llama_cpp_need(tmp_path: Path) -> None:
    yarn = YarnScaling(4.0, 64, mscale=1.0, mscale_all_dim=1.0)
    save_model(bfloat16_model(tiny(rope_scaling=yarn)), tmp_path / "model")
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    expected = {
        "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "topk_method": "noaux_tc",
        "scoring_func": "sigmoid", "moe_layer_freq": 1, "ep_size": 1, "num_key_value_heads": 3,
        "hidden_act": "silu", "attention_bias": False, "dtype": "bfloat16", "torch_dtype": "bfloat16",
        "num_nextn_predict_layers": 0, "tie_word_embeddings": False, "rope_theta": 10000.0,
    }  # fmt: skip
    assert {key: raw[key] for key in expected} == expected
    assert raw["rope_scaling"]["type"] == raw["rope_parameters"]["rope_type"] == "yarn"
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": 1}


def test_each_of_several_eos_tokens_ends_a_completion(tmp_path: Path) -> None:
    """The list is written to both files as it was read, and the engine stops at any of them."""
    tokenizer = train_tokenizer(["the quick brown fox"], 280)
    model = lively_model(tiny(vocab_size=tokenizer.vocab_size))
    params = SamplingParams(max_tokens=12)
    [free] = Engine(model, tokenizer).generate(["the"], params)
    last = free.token_ids[2]
    assert free.token_ids.index(last) == 2
    save_model(model, tmp_path / "model", tokenizer)
    edit_json(tmp_path / "model" / "config.json", eos_token_id=[tokenizer.eos_id, last])
    again = load_model(tmp_path / "model")
    [ended] = Engine(again, tokenizer).generate(["the"], params)
    assert ended.token_ids == free.token_ids[:3] and ended.finish_reason == "stop"
    save_model(again, tmp_path / "again")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "again" / name).read_text())["eos_token_id"] == [tokenizer.eos_id, last]


def test_the_tokenizer_is_saved_with_the_model(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["the quick brown fox", "the lazy dog"], 280)
    save_model(lively_model(tiny(vocab_size=280)), tmp_path / "model", tokenizer)
    again = load_tokenizer(tmp_path / "model")
    assert again.encode("the quick dog") == tokenizer.encode("the quick dog")
    load_model(tmp_path / "model")
