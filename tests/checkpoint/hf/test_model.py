"""Model directories: round trips, what other programs write and need, and clear errors for damaged files."""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from fathom.checkpoint.hf import save as writing
from fathom.checkpoint.hf.model import CheckpointError, load_config, load_model, save_model
from fathom.data.tokenizer import load_tokenizer, train_tokenizer
from fathom.engine.engine import Engine
from fathom.engine.sampling.sampler import SamplingParams
from fathom.model.config import ModelConfig
from fathom.model.rope_scaling import YarnScaling
from fathom.model.transformer import Model
from tests.checkpoint.fp8_definition import MODEL, NOT_QUANTIZED, quantize_blocks
from tests.model.configs import lively_model, model_configs, tiny

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def tensors_of(model: Model) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def assert_same_model(found: Model, expected: Model) -> None:
    assert found.config == expected.config
    mine, theirs = tensors_of(found), tensors_of(expected)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def bfloat16_model(config: ModelConfig, seed: int = 0) -> Model:
    """Weights in bfloat16, biases in float32, as models are shipped."""
    model = lively_model(config, seed).bfloat16()
    for router in model.routers():
        noise_E = torch.randn(config.n_routed_experts, generator=torch.Generator().manual_seed(seed))
        router.e_score_correction_bias = 5 + 0.001 * noise_E
    return model


def stored(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory, whatever file they are in."""
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


def edit(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rewrite a single-file directory's tensors."""
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / SINGLE)


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


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


# ------------------------------------------------------------------------------------------------ replacing


def test_saving_over_a_model_replaces_it_and_keeps_other_files(tmp_path: Path) -> None:
    target = tmp_path / "model"
    save_model(lively_model(tiny(), seed=1), target, max_shard_size=6000)
    (target / "README.md").write_text("mine")
    (target / "training_state").mkdir()
    (target / "training_state" / "state.json").write_text("{}")

    for newer, size in (
        (lively_model(tiny(), seed=2), 10**9),
        (lively_model(tiny(vocab_size=70), seed=3), 9000),
    ):
        save_model(newer, target, max_shard_size=size)
        assert_same_model(load_model(target), newer)
        shards = {file.name for file in target.glob("*.safetensors")}
        if size == 10**9:
            assert shards == {SINGLE} and not (target / INDEX).exists()
        else:
            index = json.loads((target / INDEX).read_text())
            assert shards == set(index["weight_map"].values())
    assert (target / "README.md").read_text() == "mine"
    assert (target / "training_state" / "state.json").read_text() == "{}"


@pytest.mark.parametrize("moment", range(1, 5))
def test_a_replacement_killed_at_any_moment_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Killed before the n-th rename: both models are complete, under the target's name or beside it."""
    target = tmp_path / "model"
    old, new = lively_model(tiny(), seed=1), lively_model(tiny(), seed=2)
    save_model(old, target)
    (target / "notes.txt").write_text("mine")
    rename, calls = os.rename, []

    class Killed(BaseException):
        pass

    def killed(*names: Any) -> None:
        calls.append(names)
        if len(calls) >= moment:
            raise Killed
        rename(*names)

    monkeypatch.setattr(os, "rename", killed)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    if moment == 4:
        save_model(new, target)
    else:
        with pytest.raises(Killed):
            save_model(new, target)
    monkeypatch.undo()
    found = {path: load_model(path) for path in tmp_path.iterdir() if any(path.glob("*.safetensors"))}
    if target in found:
        assert_same_model(found[target], old if moment == 1 else new)
    for expected in (old, new):
        assert any(torch.equal(expected.lm_head.weight, model.lm_head.weight) for model in found.values())
    assert [path.read_text() for path in tmp_path.rglob("notes.txt")] == ["mine"]


def test_a_failed_rename_puts_the_old_model_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = lively_model(tiny(), seed=1)
    save_model(old, tmp_path / "model")
    rename, calls = os.rename, []

    def failing(*names: Any) -> None:
        calls.append(names)
        if len(calls) == 2:
            raise OSError("not now")
        rename(*names)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="not now"):
        save_model(lively_model(tiny(), seed=2), tmp_path / "model")
    assert_same_model(load_model(tmp_path / "model"), old)


def test_the_working_directory_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="working directory"):
        save_model(lively_model(tiny()), ".")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("broken", ["ShardWriter", "_write", "write_json"])
def test_a_failed_save_leaves_the_old_model_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool, broken: str
) -> None:
    target = tmp_path / "model"
    old = lively_model(tiny(), seed=1)
    if existing:
        save_model(old, target)
    before = sorted(tmp_path.rglob("*"))
    calls = []

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == (1 if broken == "write_json" else 2):
            raise OSError("the disk is full")
        return original(*args, **kwargs)

    original = getattr(writing, broken)
    monkeypatch.setattr(writing, broken, fail)
    with pytest.raises(OSError, match="the disk is full"):
        save_model(lively_model(tiny(), seed=2), target, max_shard_size=6000)
    assert sorted(tmp_path.rglob("*")) == before
    if existing:
        assert_same_model(load_model(target), old)


def test_saving_onto_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("precious")
    with pytest.raises(ValueError, match="is a file"):
        save_model(lively_model(tiny()), tmp_path / "model")
    assert (tmp_path / "model").read_text() == "precious"


# --------------------------------------------------------------------------------- what others have written


def test_stacked_experts_of_transformers_are_read(tmp_path: Path) -> None:
    model = lively_model(tiny())
    save_model(model, tmp_path / "model")

    def stack(tensors: dict[str, Tensor]) -> None:
        for i in (1, 2):
            prefix = f"model.layers.{i}.mlp.experts."
            experts = model.layers[i].mlp.experts
            for name in [name for name in tensors if name.startswith(prefix)]:
                del tensors[name]
            tensors[prefix + "gate_up_proj"] = experts.gate_up_proj.detach().clone()
            tensors[prefix + "down_proj"] = experts.down_proj.detach().clone()

    edit(tmp_path / "model", stack)
    assert_same_model(load_model(tmp_path / "model"), model)


@pytest.mark.parametrize("tied", [True, False])
def test_only_a_tied_head_may_be_absent(tmp_path: Path, tied: bool) -> None:
    model = lively_model(tiny(tie_word_embeddings=tied))
    save_model(model, tmp_path / "model")
    edit(tmp_path / "model", lambda tensors: tensors.pop("lm_head.weight"))
    if tied:
        assert_same_model(load_model(tmp_path / "model"), model)
    else:
        with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
            load_model(tmp_path / "model")


@pytest.mark.parametrize("name", [EMBEDDING, "lm_head.weight"])
def test_a_tied_head_that_differs_is_refused(tmp_path: Path, name: str) -> None:
    """`transformers` would untie the two, other programs use one of them."""
    save_model(lively_model(tiny(tie_word_embeddings=True)), tmp_path / "model")
    edit(tmp_path / "model", lambda tensors: tensors.update({name: tensors[name] + 1}))
    assert_refused(tmp_path / "model", SINGLE, EMBEDDING.removeprefix("model."), "lm_head.weight", "ties them")


@pytest.mark.parametrize("name", ["embed_tokens.weight", "shared_head.head.weight"])
def test_an_mtp_layer_with_an_embedding_or_head_of_its_own_is_refused(tmp_path: Path, name: str) -> None:
    model = lively_model(tiny(num_nextn_predict_layers=1))
    save_model(model, tmp_path / "model")
    name = f"model.layers.3.{name}"
    original = EMBEDDING if "embed" in name else "lm_head.weight"
    edit(tmp_path / "model", lambda tensors: tensors.update({name: tensors[name] + 1}))
    assert_refused(tmp_path / "model", SINGLE, name, original, "differs")
    edit(tmp_path / "model", lambda tensors: tensors.update({name: tensors[name][1:]}))
    assert_refused(tmp_path / "model", SINGLE, name, original, "differs")
    edit(tmp_path / "model", lambda tensors: tensors.pop(name))  # `transformers` writes none
    assert_same_model(load_model(tmp_path / "model"), model)


def test_absent_mtp_weights_cause_a_warning(tmp_path: Path) -> None:
    model = lively_model(tiny(num_nextn_predict_layers=1))
    save_model(model, tmp_path / "model")

    def drop_module(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.3.")]:
            del tensors[name]

    edit(tmp_path / "model", drop_module)
    with pytest.warns(UserWarning, match="num_nextn_predict_layers 1"):
        found = load_model(tmp_path / "model")
    assert found.config.num_nextn_predict_layers == 0
    tokens_BS = torch.tensor([[1, 2, 3]])
    assert torch.equal(found(tokens_BS).logits_BSO, model(tokens_BS).logits_BSO)


def save_fp8(model: Model, directory: Path, scales_apart: bool = False) -> dict[str, Tensor]:
    """Write a model as DeepSeek ships its own; returns what each quantised tensor stands for."""
    save_model(model, directory)
    values = {}

    def quantize(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if not any(part in name for part in NOT_QUANTIZED):
                tensors[name], tensors[f"{name}_scale_inv"], values[name] = quantize_blocks(tensors[name])

    edit(directory, quantize)
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    edit_json(directory / "config.json", quantization_config={**quantization, "activation_scheme": "dynamic"})
    if scales_apart:
        tensors = load_file(directory / SINGLE)
        (directory / SINGLE).unlink()
        homes = {name: f"model-{1 + name.endswith('_scale_inv')}.safetensors" for name in tensors}
        for home in set(homes.values()):
            save_file({k: v for k, v in tensors.items() if homes[k] == home}, directory / home)
        (directory / INDEX).write_text(json.dumps({"weight_map": homes}))
    return values


@pytest.mark.parametrize("scales_apart", [False, True], ids=["one file", "scales in another shard"])
def test_fp8_weights_are_read_by_the_definition_of_the_format(tmp_path: Path, scales_apart: bool) -> None:
    """Widths above 128 that are not multiples of it: several blocks, the last ones partial."""
    model = lively_model(MODEL)
    values = save_fp8(model, tmp_path / "model", scales_apart)
    save_model(load_model(tmp_path / "model"), tmp_path / "again")
    again, original = stored(tmp_path / "again"), stored(tmp_path / "model")
    assert any(v.shape[0] % 128 and v.shape[0] > 128 and v.shape[1] % 128 for v in values.values())
    assert any(name.startswith("model.layers.2.mlp.experts.3.") for name in values), "MTP's are quantised too"
    for name, tensor in again.items():
        expected = values[name] if name in values else original[name].double()
        assert torch.equal(tensor, expected.float()), name


def test_fp8_weights_without_scales_are_refused(tmp_path: Path) -> None:
    save_fp8(lively_model(MODEL), tmp_path / "model")
    name = "model.layers.0.self_attn.o_proj.weight"
    edit(tmp_path / "model", lambda tensors: tensors.pop(f"{name}_scale_inv"))
    assert_refused(tmp_path / "model", SINGLE, name, f"{name}_scale_inv")


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (6,), ()])
def test_fp8_scales_of_the_wrong_shape_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save_fp8(lively_model(MODEL), tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    edit(tmp_path / "model", lambda tensors: tensors.update({name: torch.ones(shape)}))
    if shape == (3, 2):
        load_model(tmp_path / "model")
    else:
        assert_refused(tmp_path / "model", SINGLE, name, str(shape), "(3, 2)")


def test_fp8_vectors_are_refused(tmp_path: Path) -> None:
    """Only matrices have blocks; a quantised norm is no part of the format."""
    save_model(lively_model(tiny()), tmp_path / "model")
    name = "model.norm.weight"
    fp8 = {name: torch.ones(24).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1)}
    edit(tmp_path / "model", lambda tensors: tensors.update(fp8))
    assert_refused(tmp_path / "model", SINGLE, name)


# --------------------------------------------------------------------------------------------------- damage


def assert_refused(directory: Path, *words: str) -> None:
    """Loading raises a CheckpointError that names the file and what is wrong with which tensor."""
    with pytest.raises(CheckpointError) as error:
        load_model(directory)
    for word in words:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A good model in one file."""
    save_model(lively_model(tiny(num_nextn_predict_layers=1)), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A good model in many."""
    save_model(lively_model(tiny()), tmp_path / "model", max_shard_size=6000)
    return tmp_path / "model"


@pytest.mark.parametrize(
    "missing",
    [
        "model.norm.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.experts.5.up_proj.weight",
        "model.layers.2.mlp.experts.0.down_proj.weight",
        "model.layers.3.eh_proj.weight",
    ],
)
def test_a_missing_tensor_is_named(directory: Path, missing: str) -> None:
    edit(directory, lambda tensors: tensors.pop(missing))
    assert_refused(directory, str(directory), missing)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.1.mlp.experts.8.up_proj.weight",
        "model.layers.1.mlp.experts.07.up_proj.weight",
        "model.layers.4.eh_proj.weight",
        "model.layers.01.input_layernorm.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.1.rotary_emb.inv_freq",
        "visual.patch_embed.weight",
    ],
)
def test_an_unexpected_tensor_is_named(directory: Path, name: str) -> None:
    edit(directory, lambda tensors: tensors.update({name: torch.ones(2)}))
    assert_refused(directory, SINGLE, name, "no part of the model")


def test_the_same_tensor_under_two_names_is_refused(directory: Path) -> None:
    """`norm.weight` and `model.norm.weight` are one parameter: the second would silently overwrite the first."""
    edit(directory, lambda tensors: tensors.update({"norm.weight": torch.ones(24)}))
    assert_refused(directory, SINGLE, "norm.weight")


def test_a_duplicate_expert_does_not_hide_a_missing_one(directory: Path) -> None:
    """Stacked and single tensors together have the right number of elements, but do not fill every parameter."""

    def confuse(tensors: dict[str, Tensor]) -> None:
        prefix = "model.layers.1.mlp.experts."
        tensors[prefix + "down_proj"] = torch.stack([tensors[f"{prefix}{j}.down_proj.weight"] for j in range(8)])

    edit(directory, confuse)
    assert_refused(directory, SINGLE, "model.layers.1.mlp.experts.")


@pytest.mark.parametrize(
    "name",
    [
        EMBEDDING,
        "model.layers.1.mlp.experts.5.up_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "lm_head.weight",
    ],
)
def test_a_wrong_shape_is_named(directory: Path, name: str) -> None:
    edit(directory, lambda tensors: tensors.update({name: torch.ones(2, 3)}))
    assert_refused(directory, SINGLE, name, "(2, 3)", "config.json implies")


@pytest.mark.parametrize("left", [0, 5, 8, 100, -1])
def test_a_truncated_file_is_named(directory: Path, left: int) -> None:
    size = (directory / SINGLE).stat().st_size
    os.truncate(directory / SINGLE, left if left >= 0 else size + left)
    assert_refused(directory, SINGLE)


@pytest.mark.parametrize("left", [0, 100, -1])
def test_a_truncated_shard_is_named(sharded: Path, left: int) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[2]
    os.truncate(shard, left if left >= 0 else shard.stat().st_size + left)
    assert_refused(sharded, shard.name)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[2]
    shard.unlink()
    assert_refused(sharded, shard.name, INDEX)


def test_a_tensor_that_is_not_where_the_index_says_is_named(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    wrong = sorted(set(index["weight_map"].values()) - {index["weight_map"][EMBEDDING]})[0]
    edit_json(sharded / INDEX, weight_map={**index["weight_map"], EMBEDDING: wrong})
    assert_refused(sharded, wrong, EMBEDDING)


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", 7, None])
def test_an_index_that_leads_elsewhere_is_refused(sharded: Path, shard: object) -> None:
    index = json.loads((sharded / INDEX).read_text())
    edit_json(sharded / INDEX, weight_map={**index["weight_map"], EMBEDDING: shard})
    assert_refused(sharded, INDEX)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"3",
        b"{}",
        b'{"weight_map": 3}',
        b'{"weight_map": null}',
        b'{"weight_map": {}}',
        b"\xff\xfe",
    ],
)
def test_an_unreadable_index_is_named(sharded: Path, content: bytes) -> None:
    (sharded / INDEX).write_bytes(content)
    assert_refused(sharded, INDEX)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"{}", b"\xff\xfe", b'{"model_type": "llama"}'])
def test_an_unreadable_config_is_named(directory: Path, content: bytes) -> None:
    (directory / "config.json").write_bytes(content)
    assert_refused(directory, "config.json")
    with pytest.raises(CheckpointError):
        load_config(directory)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "24"},
        {"n_group": 3},
        {"sliding_window": 5},
        {"rope_scaling": [1]},
        {"rope_scaling": {"type": ["yarn"]}},
        {"eos_token_id": ["x"]},
        {"scoring_func": "softmax"},
    ],
)
def test_a_config_that_is_not_ours_is_refused_with_its_file(directory: Path, changes: dict[str, Any]) -> None:
    edit_json(directory / "config.json", **changes)
    assert_refused(directory, "config.json", next(iter(changes)))


def test_absent_files_are_named(directory: Path) -> None:
    (directory / SINGLE).unlink()
    assert_refused(directory, SINGLE, INDEX)
    (directory / "config.json").unlink()
    assert_refused(directory, "config.json")


def test_a_file_that_is_no_safetensors_is_named(directory: Path) -> None:
    (directory / SINGLE).write_bytes(b"\x80\x04 not a pickle to be run" * 9)
    assert_refused(directory, SINGLE)


def test_shard_sizes_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="max_shard_size is 0"):
        save_model(lively_model(tiny()), tmp_path / "model", max_shard_size=0)
    assert not list(tmp_path.iterdir())
