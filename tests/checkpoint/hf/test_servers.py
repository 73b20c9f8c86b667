"""What vLLM and SGLang require of config.json and of tensor names, rule by rule from their loading code.

- vLLM: vllm/model_executor/models/deepseek_v2.py at commit 002d6073 (config keys, main model), and deepseek_mtp.py at
  03356f8c (MTP layers).
- SGLang: python/sglang/srt/models/deepseek_common/deepseek_weight_loader.py at commit 0201c04e.

Both fuse some matrices and load the others unchanged: here a tensor's name is mapped to the slot it is loaded into, and
the slots of a model are derived from its configuration. Every slot must be filled exactly once, and no tensor be left
over. Neither program runs here: both need a GPU.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fathom.checkpoint.hf.directory import stored_tensors
from fathom.checkpoint.hf.model import save_model
from fathom.checkpoint.hf.safetensors_io import StoredTensor
from fathom.checkpoint.hf.save import Storage
from fathom.model.config import ModelConfig
from fathom.model.rope_scaling import YarnScaling
from tests.model.configs import lively_model, tiny

YARN = YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)
CONFIGS = {
    "V3": tiny(num_nextn_predict_layers=1, rope_scaling=YARN),
    "without query compression": tiny(q_lora_rank=None, num_nextn_predict_layers=1, n_group=1, topk_group=1),
    "tied": tiny(tie_word_embeddings=True, n_shared_experts=2),
    "two modules": tiny(num_nextn_predict_layers=2),
}
Found = tuple[ModelConfig, dict[str, Any], dict[str, StoredTensor]]


@pytest.fixture(scope="module", params=[(n, s) for n in CONFIGS for s in ("bf16", "fp8")], ids="-".join)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """A configuration, its config.json and its tensors as they were written."""
    name, storage = request.param
    directory: Path = tmp_path_factory.mktemp("served") / "model"
    kind: Storage = storage
    save_model(lively_model(CONFIGS[name]), directory, storage=kind, max_shard_size=30_000)
    return CONFIGS[name], json.loads((directory / "config.json").read_text()), stored_tensors(directory)


# -------------------------------------------------------------------------------------------------- config.json


def test_config_keys_that_vllm_reads_without_a_default_or_with_a_wrong_one(found: Found) -> None:
    config, raw, _ = found
    assert raw["architectures"] == ["DeepseekV3ForCausalLM"]  # the class it is loaded by
    assert raw["topk_method"] == "noaux_tc"  # absent: no correction bias is made, and ours has no place to go
    assert raw["scoring_func"] == "sigmoid"  # absent: softmax
    assert raw["hidden_act"] == "silu"  # anything else is an error
    assert raw["norm_topk_prob"] == config.norm_topk_prob
    assert (raw["n_group"], raw["topk_group"]) == (config.n_group, config.topk_group)
    assert raw["routed_scaling_factor"] == config.routed_scaling_factor  # absent: 1.0
    for key in ("n_routed_experts", "n_shared_experts", "first_k_dense_replace", "num_experts_per_tok", "vocab_size"):
        assert raw[key] == getattr(config, key)
    assert raw.get("moe_layer_freq", 1) == 1
    assert "q_lora_rank" in raw
    rope = raw["rope_parameters"]
    assert rope["rope_type"] == ("default" if config.rope_scaling is None else "yarn")
    if config.rope_scaling is not None:
        assert {"factor", "mscale", "mscale_all_dim"} <= rope.keys()  # the attention scale is made of them
    assert "index_topk" not in raw and "llama_4_scaling" not in raw  # would make it another model


def test_config_keys_that_sglang_reads(found: Found) -> None:
    config, raw, _ = found
    # Layers beyond num_hidden_layers are skipped by the main model only where this number says that there are some.
    assert raw["num_nextn_predict_layers"] == config.num_nextn_predict_layers
    assert {"q_lora_rank", "n_routed_experts", "num_hidden_layers", "architectures"} <= raw.keys()


def test_fp8_is_declared_as_both_read_it(found: Found) -> None:
    _, raw, tensors = found
    has_fp8 = any(tensor.dtype == "F8_E4M3" for tensor in tensors.values())
    if not has_fp8:
        assert "quantization_config" not in raw
        return
    quantization = raw["quantization_config"]
    assert quantization["quant_method"] == "fp8" and quantization["activation_scheme"] == "dynamic"
    assert quantization["weight_block_size"] == [128, 128]


# ------------------------------------------------------------------------------------------------ tensor names

MATRIX = "weight", "weight_scale_inv"


def slots(config: ModelConfig, fp8: bool, layers: range, prefix: str, fused: str) -> Iterator[str]:
    """Where the tensors of decoder layers are loaded: parameter, and which part of a fused one."""
    kinds = MATRIX if fp8 else MATRIX[:1]

    def linear(module: str, parts: tuple[str, ...] = ("",)) -> Iterator[str]:
        yield from (f"{module}.{kind}{part}" for kind in kinds for part in parts)

    for i in layers:
        layer = prefix.format(i)
        yield from (f"{layer}.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm"))
        attention = f"{layer}.self_attn"
        yield f"{attention}.kv_a_layernorm.weight"
        yield from (slot for part in ("kv_b_proj", "o_proj") for slot in linear(f"{attention}.{part}"))
        if config.q_lora_rank is None:
            yield from (slot for part in ("q_proj", "kv_a_proj_with_mqa") for slot in linear(f"{attention}.{part}"))
        else:
            yield f"{attention}.q_a_layernorm.weight"
            yield from linear(f"{attention}.q_b_proj")
            yield from linear(f"{attention}.{fused}", ("[0]", "[1]"))
        dense = i < config.first_k_dense_replace
        swiglu = f"{layer}.mlp" if dense else f"{layer}.mlp.shared_experts"
        yield from linear(f"{swiglu}.gate_up_proj", ("[0]", "[1]"))
        yield from linear(f"{swiglu}.down_proj")
        if not dense:
            yield from (f"{layer}.mlp.gate.{part}" for part in ("weight", "e_score_correction_bias"))
            for expert in range(config.n_routed_experts):
                yield from (f"{layer}.mlp.experts.w13_{kind}[{expert}.{p}]" for kind in kinds for p in ("w1", "w3"))
                yield from (f"{layer}.mlp.experts.w2_{kind}[{expert}.w2]" for kind in kinds)


def slot(name: str, config: ModelConfig, fused: str) -> str:
    """The slot that a tensor of a decoder layer is loaded into, whatever its prefix."""
    expert = re.fullmatch(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.(\w+)", name)
    if expert is not None:
        part = {"gate": "w1", "up": "w3", "down": "w2"}[expert[3]]
        return f"{expert[1]}.{'w2' if part == 'w2' else 'w13'}_{expert[4]}[{expert[2]}.{part}]"
    for part, (whole, number) in {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}.items():
        if f".{part}." in name:
            return name.replace(part, whole) + f"[{number}]"
    if config.q_lora_rank is not None:
        for number, part in enumerate(("q_a_proj", "kv_a_proj_with_mqa")):
            if f".{part}." in name:
                return name.replace(part, fused) + f"[{number}]"
    return name


def layer_of(name: str) -> int | None:
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return None if match is None else int(match[1])


def assert_filled(loaded: list[str], expected: list[str]) -> None:
    counts = Counter(loaded)
    assert not counts - Counter(expected), "tensors without a slot, or twice in one"
    assert not Counter(expected) - counts, "slots that nothing is loaded into"


@pytest.mark.parametrize("fused", ["fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa"], ids=["vllm", "sglang"])
def test_the_main_model_is_filled(found: Found, fused: str) -> None:
    config, _, tensors = found
    fp8 = any(name.endswith("_scale_inv") for name in tensors)
    depth = config.num_hidden_layers
    main = [name for name in tensors if (layer_of(name) or 0) < depth]
    expected = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]  # neither ties the head
    expected += slots(config, fp8, range(depth), "model.layers.{}", fused)
    assert_filled([slot(name, config, fused) for name in main], expected)


def test_vllms_mtp_model_is_filled(found: Found) -> None:
    """It shares nothing with the main model: copies of embedding and head are loaded from the MTP layers."""
    config, _, tensors = found
    fp8, fused = any(name.endswith("_scale_inv") for name in tensors), "fused_qkv_a_proj"
    depth, modules = config.num_hidden_layers, config.num_nextn_predict_layers
    own = ("enorm", "hnorm", "eh_proj", "shared_head")
    loaded = []
    for name in tensors:
        layer = layer_of(name)
        if layer is None or layer < depth:
            continue
        prefix = f"model.layers.{layer}."
        if "embed_tokens" in name:
            loaded += ["model.embed_tokens.weight"] if layer == depth else []  # the first layer's serves all
        elif any(part in name for part in own):
            loaded.append(name)
        else:
            loaded.append(slot(name.replace(prefix, f"{prefix}mtp_block."), config, fused))
    layers = range(depth, depth + modules)
    expected = list(slots(config, fp8, layers, "model.layers.{}.mtp_block", fused))
    parts = ("enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head")
    expected += [f"model.layers.{i}.{part}.weight" for i in layers for part in parts]
    assert_filled(loaded, expected + (["model.embed_tokens.weight"] if modules else []))


def test_sglangs_drafter_is_filled_by_one_module(found: Found) -> None:
    """It drafts with exactly one module, and uses embedding and head of the main model."""
    config, _, tensors = found
    if config.num_nextn_predict_layers != 1:
        pytest.skip("SGLang requires one MTP module")
    fp8, fused = any(name.endswith("_scale_inv") for name in tensors), "fused_qkv_a_proj_with_mqa"
    prefix = f"model.layers.{config.num_hidden_layers}"
    loaded = []
    for name in tensors:
        if not name.startswith(prefix + ".") or "shared_head.head" in name or "embed_tokens" in name:
            continue
        own = any(part in name for part in ("shared_head.norm", "eh_proj", "enorm", "hnorm"))
        loaded.append(slot(name.replace(prefix, "model" if own else "model.decoder"), config, fused))
    depth = config.num_hidden_layers
    expected = list(slots(config, fp8, range(depth, depth + 1), "model.decoder", fused))
    expected += [f"model.{part}.weight" for part in ("enorm", "hnorm", "eh_proj", "shared_head.norm")]
    assert_filled(loaded, expected)


def test_types_that_are_loaded_without_conversion(found: Found) -> None:
    """Biases are float32 in vLLM; SGLang joins q_a_proj and kv_a_proj_with_mqa, so their types must agree."""
    _, _, tensors = found
    for name, tensor in tensors.items():
        if name.endswith(("e_score_correction_bias", "_scale_inv")):
            assert tensor.dtype == "F32", name
        if name.endswith("q_a_proj.weight"):
            assert tensor.dtype == tensors[name.replace("q_a_proj", "kv_a_proj_with_mqa")].dtype, name
