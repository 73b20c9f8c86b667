"""GGUF files read back with the gguf package: every weight, every key, refusals, and failed writes."""

import json
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fathom.data.tokenizer import EOS, FIM_SUFFIX, PAD, USER, Tokenizer, train_tokenizer
from fathom.model.config import ModelConfig
from fathom.model.layers import LATENT_NORM_EPS
from fathom.model.rope_scaling import YarnScaling
from fathom.model.transformer import Model
from tests.model.configs import lively_model, model_configs, tiny

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")

from fathom.checkpoint.gguf import tensors as gguf_tensors  # noqa: E402
from fathom.checkpoint.gguf import writer as ours  # noqa: E402
from fathom.checkpoint.gguf.writer import DType, save_gguf, write_gguf  # noqa: E402
from fathom.checkpoint.hf.safetensors_io import CheckpointError  # noqa: E402
from fathom.checkpoint.hf.weights import ModelWeights  # noqa: E402

ARCH = "deepseek2"
GGMLType = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["def main(x):\n    return x + 1024\n" * 3, "你好 naïve 🙂 " * 3], 300)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Keys, tensors as float32, and the types they are stored in."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    for tensor in reader.tensors:
        assert tensors[tensor.name].shape == tuple(reversed(tensor.shape.tolist()))
    return keys, tensors, {t.name: t.tensor_type for t in reader.tensors}


# ---------------------------------------------------------------------------------------------------- weights


def expected_layer(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """One layer's tensors under llama.cpp's names, from our state dictionary, written independently of the package."""
    heads, nope, experts = config.num_attention_heads, config.qk_nope_head_dim, config.n_routed_experts
    width, latent = config.moe_intermediate_size, config.kv_lora_rank
    scale = (config.rms_norm_eps / LATENT_NORM_EPS) ** 0.5
    up = state["self_attn.kv_b_proj.weight"].reshape(heads, -1, latent)
    down = state["self_attn.kv_a_proj_with_mqa.weight"]
    found = {
        "attn_norm.weight": state["input_layernorm.weight"],
        "ffn_norm.weight": state["post_attention_layernorm.weight"],
        "attn_kv_a_norm.weight": state["self_attn.kv_a_layernorm.weight"],
        "attn_kv_a_mqa.weight": torch.cat((down[:latent] * scale, down[latent:])),
        "attn_k_b.weight": torch.stack([up[h, :nope].T for h in range(heads)]),
        "attn_v_b.weight": torch.stack([up[h, nope:] for h in range(heads)]),
        "attn_output.weight": state["self_attn.o_proj.weight"],
    }
    if config.q_lora_rank is None:
        found["attn_q.weight"] = state["self_attn.q_proj.weight"]
    else:
        found["attn_q_a.weight"] = state["self_attn.q_a_proj.weight"] * scale
        found["attn_q_a_norm.weight"] = state["self_attn.q_a_layernorm.weight"]
        found["attn_q_b.weight"] = state["self_attn.q_b_proj.weight"]
    if "mlp.gate.weight" in state:
        stacked = state["mlp.experts.gate_up_proj"]
        found |= {
            "ffn_gate_inp.weight": state["mlp.gate.weight"],
            "exp_probs_b.bias": state["mlp.gate.e_score_correction_bias"],
            "ffn_gate_exps.weight": torch.stack([stacked[e, :width] for e in range(experts)]),
            "ffn_up_exps.weight": torch.stack([stacked[e, width:] for e in range(experts)]),
            "ffn_down_exps.weight": state["mlp.experts.down_proj"],
        }
        dense, suffix = "mlp.shared_experts.", "_shexp"
    else:
        dense, suffix = "mlp.", ""
    found |= {f"ffn_{kind}{suffix}.weight": state[f"{dense}{kind}_proj.weight"] for kind in ("gate", "up", "down")}
    for name in ("enorm", "hnorm", "eh_proj"):
        if f"{name}.weight" in state:
            found[f"nextn.{name}.weight"] = state[f"{name}.weight"]
            found["nextn.shared_head_norm.weight"] = state["shared_head.norm.weight"]
    return found


def expected_tensors(model: Model) -> dict[str, Tensor]:
    config = model.config
    expected = {"token_embd.weight": model.embed_tokens.weight, "output_norm.weight": model.norm.weight}
    if not config.tie_word_embeddings:
        expected["output.weight"] = model.lm_head.weight
    modules = 0 if config.q_lora_rank is None else min(config.num_nextn_predict_layers, 1)
    for number, layer in enumerate([*model.layers, *list(model.mtp)[:modules]]):
        tensors = expected_layer(layer.state_dict(), config)
        expected |= {f"blk.{number}.{name}": tensor for name, tensor in tensors.items()}
    return {name: tensor.detach() for name, tensor in expected.items()}


@pytest.mark.filterwarnings("ignore:num_nextn_predict_layers")
@settings(max_examples=25, deadline=None)
@given(model_configs(), st.integers(0, 2**32 - 1))
def test_every_weight_is_in_the_file(tmp_path_factory: pytest.TempPathFactory, config: ModelConfig, seed: int) -> None:
    model = lively_model(replace(config, rope_scaling=None), seed)
    path = tmp_path_factory.mktemp("weights") / "model.gguf"
    save_gguf(model, None, path, "f32")
    keys, tensors, types = read(path)
    expected = expected_tensors(model)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.allclose(tensor, expected[name], rtol=1e-6, atol=0), name
    assert set(types.values()) == {GGMLType.F32}
    layers = {int(name.split(".")[1]) for name in tensors if name.startswith("blk.")}
    assert layers == set(range(keys[f"{ARCH}.block_count"]))


WIDE = tiny(
    hidden_size=64, intermediate_size=40, moe_intermediate_size=32, kv_lora_rank=32, q_lora_rank=32,
    qk_nope_head_dim=32, v_head_dim=16, num_attention_heads=2, num_nextn_predict_layers=1,
)  # fmt: skip
EXACT = ("norm.weight", "enorm.weight", "hnorm.weight", "ffn_gate_inp.weight", "exp_probs_b.bias")


def test_bfloat16_weights_are_stored_unchanged_in_bfloat16_files(tmp_path: Path) -> None:
    model = lively_model(WIDE, dtype=torch.bfloat16)
    save_gguf(model, None, tmp_path / "model.gguf")
    keys, tensors, types = read(tmp_path / "model.gguf")
    assert keys["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16
    for name, expected in expected_tensors(model).items():
        assert types[name] is (GGMLType.F32 if name.endswith(EXACT) else GGMLType.BF16), name
        assert torch.equal(tensors[name], expected.float()), name


def test_q8_0_rounds_blocks_of_32_and_leaves_other_rows_in_bfloat16(tmp_path: Path) -> None:
    model = lively_model(WIDE)
    save_gguf(model, None, tmp_path / "model.gguf", "q8_0")
    keys, tensors, types = read(tmp_path / "model.gguf")
    assert keys["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert keys["general.quantization_version"] == gguf.GGML_QUANT_VERSION
    for name, expected in expected_tensors(model).items():
        tensor = tensors[name]
        if name.endswith(EXACT):
            assert types[name] is GGMLType.F32 and torch.equal(tensor, expected), name
        elif expected.shape[-1] % 32:
            assert types[name] is GGMLType.BF16 and torch.equal(tensor, expected.bfloat16().float()), name
        else:
            assert types[name] is GGMLType.Q8_0, name
            blocks = expected.reshape(-1, 32)
            # half a step of the block, and the step itself is a float16
            allowed = blocks.abs().amax(1, keepdim=True) / 127 * 0.5 + blocks.abs() * 2**-10
            assert ((tensor.reshape(-1, 32) - blocks).abs() <= allowed).all(), name
    assert types["blk.0.ffn_down.weight"] is GGMLType.BF16  # rows of 40


def test_a_rescaled_matrix_stays_in_float32(tmp_path: Path) -> None:
    """Rounding it again would cost more than llama.cpp's single epsilon does."""
    save_gguf(lively_model(replace(WIDE, rms_norm_eps=1e-5)), None, tmp_path / "model.gguf", "q8_0")
    _, _, types = read(tmp_path / "model.gguf")
    assert types["blk.0.attn_q_a.weight"] is types["blk.3.attn_kv_a_mqa.weight"] is GGMLType.F32
    assert types["blk.0.attn_q_b.weight"] is GGMLType.Q8_0


@pytest.mark.parametrize("dtype", ["f32", "bf16", "q8_0"])
def test_one_chunk_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: gguf_tensors.DType) -> None:
    written: list[weakref.ref[Any]] = []
    encode = gguf_tensors.encode

    def watched(tensor: Tensor, ggml_type: Any) -> Any:
        assert all(array() is None for array in written[:-1])
        data = encode(tensor, ggml_type)
        written.append(weakref.ref(data))
        return data

    monkeypatch.setattr(gguf_tensors, "encode", watched)
    model = lively_model(WIDE)
    save_gguf(model, None, tmp_path / "model.gguf", dtype)
    stacks = 3 * len(model.routers())  # written one expert at a time
    assert len(written) == len(expected_tensors(model)) + stacks * (WIDE.n_routed_experts - 1)


# --------------------------------------------------------------------------------------------------- metadata


def test_metadata_keys_match_the_configuration(tmp_path: Path) -> None:
    yarn = YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)
    config = tiny(num_nextn_predict_layers=1, rope_scaling=yarn, rope_theta=50000.0, n_shared_experts=2)
    save_gguf(lively_model(config), None, tmp_path / "name.gguf", "f32")
    keys, _, _ = read(tmp_path / "name.gguf")
    general = {"type": "model", "name": "name", "architecture": ARCH, "file_type": 0, "quantization_version": 2}
    about = {
        "vocab_size": 61, "context_length": 128, "embedding_length": 24, "block_count": 4, "nextn_predict_layers": 1,
        "leading_dense_block_count": 1, "feed_forward_length": 40, "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.head_count": 3, "attention.head_count_kv": 1, "attention.key_length": 18,
        "attention.value_length": 14, "attention.key_length_mla": 10, "attention.value_length_mla": 5,
        "attention.kv_lora_rank": 14, "attention.q_lora_rank": 10, "expert_feed_forward_length": 12, "expert_count": 8,
        "expert_used_count": 3, "expert_shared_count": 2, "expert_weights_scale": 2.5, "expert_weights_norm": True,
        "expert_gating_func": 2, "expert_group_count": 4, "expert_group_used_count": 2, "rope.dimension_count": 4,
        "rope.freq_base": 50000.0, "rope.scaling.type": "yarn", "rope.scaling.factor": 40.0,
        "rope.scaling.original_context_length": 4096, "rope.scaling.attn_factor": 1.0,
        "rope.scaling.yarn_log_multiplier": 0.1,
    }  # fmt: skip
    expected = {f"general.{k}": v for k, v in general.items()} | {f"{ARCH}.{k}": v for k, v in about.items()}
    expected["tokenizer.ggml.model"] = "none"
    assert keys == {k: float(np.float32(v)) if isinstance(v, float) else v for k, v in expected.items()}


def test_keys_of_absent_features(tmp_path: Path) -> None:
    """Without query compression the rank is 0; groups that do not restrict, and absent MTP modules, have no keys."""
    config = tiny(q_lora_rank=None, topk_group=4, norm_topk_prob=False)
    save_gguf(lively_model(config), None, tmp_path / "model.gguf")
    keys, _, _ = read(tmp_path / "model.gguf")
    assert keys[f"{ARCH}.attention.q_lora_rank"] == 0 and keys[f"{ARCH}.expert_weights_norm"] is False
    absent = ("nextn_predict_layers", "expert_group_count", "expert_group_used_count", "rope.scaling.type")
    assert not any(f"{ARCH}.{key}" in keys for key in absent)


def test_modules_that_llama_cpp_cannot_use_are_left_out_with_a_warning(tmp_path: Path) -> None:
    cases = [({"q_lora_rank": None, "num_nextn_predict_layers": 1}, 0), ({"num_nextn_predict_layers": 3}, 1)]
    for changes, kept in cases:
        model = lively_model(tiny(**changes))
        with pytest.warns(UserWarning, match="num_nextn_predict_layers"):
            save_gguf(model, None, tmp_path / "model.gguf")
        keys, tensors, _ = read(tmp_path / "model.gguf")
        assert keys.get(f"{ARCH}.nextn_predict_layers", 0) == kept
        assert sum(name.endswith("nextn.eh_proj.weight") for name in tensors) == kept


# --------------------------------------------------------------------------------------------------- tokenizer


def test_the_tokenizer_is_in_the_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    size = tokenizer.vocab_size + 2
    save_gguf(lively_model(tiny(vocab_size=size)), tokenizer, tmp_path / "model.gguf")
    keys, _, _ = read(tmp_path / "model.gguf")
    found = {name.removeprefix("tokenizer.ggml."): value for name, value in keys.items() if name.startswith("tok")}
    content = json.loads(tokenizer.tokenizer_json)
    special = {token["id"] for token in content["added_tokens"]}
    assert [tokenizer.token_id(token) for token in found["tokens"][:-2]] == list(range(tokenizer.vocab_size))
    assert len(set(found["tokens"])) == size
    types = [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(size - 2)]
    assert found["token_type"] == types + [gguf.TokenType.UNUSED] * 2
    assert [tuple(merge.split(" ")) for merge in found["merges"]] == [tuple(m) for m in content["model"]["merges"]]
    assert (found["model"], found["pre"]) == ("gpt2", "deepseek-v3")
    assert found["bos_token_id"] == tokenizer.bos_id
    assert (found["eos_token_id"], found["padding_token_id"]) == (tokenizer.token_id(EOS), tokenizer.token_id(PAD))
    assert found["fim_suf_token_id"] == tokenizer.token_id(FIM_SUFFIX)
    assert (found["add_bos_token"], found["add_eos_token"]) == (True, False)
    assert keys["tokenizer.chat_template"] == tokenizer.config["chat_template"]


def changed(tokenizer: Tokenizer, change: Callable[[dict[str, Any]], Any]) -> Tokenizer:
    content = json.loads(tokenizer.tokenizer_json)
    change(content)
    return Tokenizer(json.dumps(content), tokenizer.config)


def test_the_spellings_of_deepseeks_own_file_are_accepted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Line breaks unescaped, merges as single strings, an empty normalizer, role tokens not declared special."""

    def respell(content: dict[str, Any]) -> None:
        for step in content["pre_tokenizer"]["pretokenizers"][:-1]:
            step["pattern"]["Regex"] = step["pattern"]["Regex"].replace(r"\r", "\r").replace(r"\n", "\n")
        content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
        content["normalizer"] = {"type": "Sequence", "normalizers": []}
        for token in content["added_tokens"]:
            token["special"] = token["content"] != USER
        number = len(content["model"]["vocab"])
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        content["added_tokens"].append({"id": number, "content": "<think>", **plain})

    model = lively_model(tiny(vocab_size=tokenizer.vocab_size + 1))
    save_gguf(model, changed(tokenizer, respell), tmp_path / "theirs.gguf")
    theirs, _, _ = read(tmp_path / "theirs.gguf")
    save_gguf(model, tokenizer, tmp_path / "ours.gguf")
    mine, _, _ = read(tmp_path / "ours.gguf")
    assert theirs["tokenizer.ggml.merges"] == mine["tokenizer.ggml.merges"]
    assert theirs["tokenizer.ggml.token_type"][:-1] == mine["tokenizer.ggml.token_type"][:-1]
    assert theirs["tokenizer.ggml.tokens"][-1] == "<think>"
    assert theirs["tokenizer.ggml.token_type"][-1] == gguf.TokenType.USER_DEFINED


def other_digits(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,2}"


def one_step(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_digits, "pre_tokenizer"),
        (one_step, "pre_tokenizer"),
        (lambda content: content.update(normalizer={"type": "NFC"}), "normalizer is NFC"),
        (lambda content: content["model"].update(ignore_merges=True), "model is BPE with options"),
        (lambda content: content["model"].update(merges=[]), "no merges"),
    ],
)
def test_a_tokenizer_that_would_split_text_differently_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, change: Callable[[dict[str, Any]], Any], named: str
) -> None:
    model = lively_model(tiny(vocab_size=tokenizer.vocab_size))
    with pytest.raises(ValueError, match=named):
        save_gguf(model, changed(tokenizer, change), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------- refusals and failures


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 26}, "q_lora_rank is 10"),
        ({"num_hidden_layers": 27}, "q_lora_rank is 10"),
        ({"num_hidden_layers": 48, "vocab_size": 128256}, "q_lora_rank is 10"),
        ({"num_hidden_layers": 512}, "num_hidden_layers is 512"),
        ({"n_routed_experts": 1028}, "n_routed_experts is 1028"),
        ({"rope_scaling": YarnScaling(4.0, 16, beta_fast=16.0)}, "rope_scaling.beta_fast is 16"),
        ({"rope_scaling": YarnScaling(4.0, 16, beta_slow=2.0)}, "rope_scaling.beta_slow is 2"),
        ({"rope_scaling": YarnScaling(4.0, 6)}, "rope_scaling.original_max_position_embeddings is 6"),
    ],
)
def test_what_llama_cpp_would_run_differently_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    model = Model(tiny())
    model.config = tiny(**changes)
    with pytest.raises(ValueError, match=named):
        save_gguf(model, None, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_depths_of_the_lite_models_are_accepted_without_query_compression(tmp_path: Path) -> None:
    save_gguf(lively_model(tiny(num_hidden_layers=27, q_lora_rank=None)), None, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").is_file()


@pytest.mark.parametrize(("dtype", "least", "most"), [("f32", 0, 0), ("bf16", 1e-4, 2**-8), ("q8_0", 1e-4, 0.02)])
def test_a_file_is_verified_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: DType, least: float, most: float
) -> None:
    weights = ModelWeights(lively_model(tiny(hidden_size=64, num_nextn_predict_layers=1)))
    found = write_gguf(weights, None, tmp_path / "model.gguf", dtype, verify=True)
    assert found is not None and least <= found.relative_error <= most
    assert found.tensors == len(gguf.GGUFReader(tmp_path / "model.gguf").tensors)

    def disturbed(weights: Any, tensor: Any, dtype: DType) -> Iterator[Any]:
        """Flip one bit of one tensor on its way to the disk."""
        for chunk in gguf_tensors.encoded_chunks(weights, tensor, dtype):
            if tensor.name == "blk.1.attn_output.weight":
                chunk = chunk.copy()
                chunk.view(np.uint8).reshape(-1)[7] ^= 1
            yield chunk

    monkeypatch.setattr(ours, "encoded_chunks", disturbed)
    with pytest.raises(CheckpointError, match=r"attn_output\.weight: what was written differs from the source"):
        write_gguf(weights, None, tmp_path / "other.gguf", dtype, verify=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf"]


def test_bad_arguments_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = lively_model(tiny())
    with pytest.raises(ValueError, match="dtype is 'q4_0'; it must be one of f32, bf16, q8_0"):
        save_gguf(model, None, tmp_path / "model.gguf", "q4_0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a directory; a GGUF model is a file"):
        save_gguf(model, None, tmp_path)
    with pytest.raises(ValueError, match=f"vocab_size is 61; the tokenizer needs at least {tokenizer.vocab_size}"):
        save_gguf(model, tokenizer, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["write_kv_data_to_file", "write_padding", "os.replace"])
@pytest.mark.parametrize("earlier", [None, b"the model of yesterday"])
def test_a_failed_write_leaves_an_earlier_file_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, earlier: bytes | None
) -> None:
    path = tmp_path / "model.gguf"
    if earlier is not None:
        path.write_bytes(earlier)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if stage == "os.replace" else gguf.GGUFWriter, stage.removeprefix("os."), full)
    with pytest.raises(OSError, match="No space left"):
        save_gguf(lively_model(tiny()), None, path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([] if earlier is None else [earlier])


def test_an_earlier_file_is_replaced_and_directories_are_created(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "model.gguf"
    save_gguf(lively_model(tiny(), seed=1), None, path)
    save_gguf(lively_model(tiny(), seed=2), None, path, "f32")
    _, tensors, _ = read(path)
    assert torch.equal(tensors["token_embd.weight"], lively_model(tiny(), seed=2).embed_tokens.weight)
    assert [file.name for file in path.parent.iterdir()] == ["model.gguf"]
