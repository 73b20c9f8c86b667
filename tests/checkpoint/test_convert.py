"""Converting model directories: every value, the files that are copied, refusals and failures."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from fathom.checkpoint.convert import convert
from fathom.checkpoint.hf import safetensors_io as shards
from fathom.checkpoint.hf import save as writing
from fathom.checkpoint.hf.model import CheckpointError, load_model, save_model
from fathom.checkpoint.hf.safetensors_io import StoredTensor
from fathom.checkpoint.hf.save import Storage
from fathom.data.tokenizer import load_tokenizer, train_tokenizer
from fathom.model.config import ModelConfig
from fathom.model.transformer import Model
from fathom.quantization import fp8
from tests.checkpoint.directories import stored
from tests.checkpoint.fp8_definition import MODEL, NOT_QUANTIZED, quantize_blocks
from tests.model.configs import lively_model, model_configs, tiny


def narrow_model(config: ModelConfig, seed: int = 0) -> Model:
    model = lively_model(config, seed, dtype=torch.bfloat16)
    for router in model.routers():
        router.e_score_correction_bias = 5 + 0.001 * torch.arange(config.n_routed_experts, dtype=torch.float32)
    return model


@pytest.mark.parametrize("shard", [10**9, 300_000])
def test_fp8_is_stored_as_deepseek_stores_it(tmp_path: Path, shard: int) -> None:
    model = narrow_model(MODEL)
    save_model(model, tmp_path / "wide")
    convert(tmp_path / "wide", tmp_path / "fp8", "fp8", max_shard_size=shard)
    bf16, fp8_tensors = stored(tmp_path / "wide"), stored(tmp_path / "fp8")
    for name, tensor in bf16.items():
        found = fp8_tensors.pop(name)
        if any(part in name for part in NOT_QUANTIZED):
            assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
            continue
        qweight, scales, _ = quantize_blocks(tensor)
        assert found.dtype == torch.float8_e4m3fn and torch.equal(found.float(), qweight.float()), name
        found_scales = fp8_tensors.pop(f"{name}_scale_inv")
        assert found_scales.dtype == torch.float32 and torch.equal(found_scales, scales), name
    assert not fp8_tensors
    raw = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert raw["quantization_config"] == {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    }  # fmt: skip
    assert raw["torch_dtype"] == "bfloat16"


@settings(max_examples=8, deadline=None)
@given(model_configs(), st.sampled_from([20_000, 10**9]), st.integers(0, 2**32 - 1))
def test_conversions_round_trip(
    tmp_path_factory: pytest.TempPathFactory, config: ModelConfig, max_shard_size: int, seed: int
) -> None:
    """float32 → bf16 → fp8 → bf16: what is loaded is what was written, with no error beyond the rounding to FP8."""
    there = tmp_path_factory.mktemp("round_trip")
    model = lively_model(config, seed)
    save_model(model, there / "f32", max_shard_size=max_shard_size)
    convert(there / "f32", there / "bf16", "bf16", verify=True)
    found = convert(there / "bf16", there / "fp8", "fp8", max_shard_size, verify=True)
    assert found is not None and found.relative_error < 2**-4
    back = convert(there / "fp8", there / "back", "bf16", verify=True)
    assert back is not None and back.relative_error < 2**-8
    dequantised = load_model(there / "fp8", torch.bfloat16)
    again = load_model(there / "back", torch.bfloat16)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, dequantised.state_dict()[name]), name
    assert again.config == config
    assert not list(there.glob(".*")), "something temporary was left behind"


def test_save_model_writes_fp8_as_conversion_does(tmp_path: Path) -> None:
    model = narrow_model(MODEL)
    save_model(model, tmp_path / "wide")
    convert(tmp_path / "wide", tmp_path / "converted", "fp8")
    save_model(model, tmp_path / "saved", storage="fp8")
    converted, saved = stored(tmp_path / "converted"), stored(tmp_path / "saved")
    assert converted.keys() == saved.keys()
    assert all(torch.equal(tensor.float(), saved[name].float()) for name, tensor in converted.items())
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in ("converted", "saved")]
    assert configs[0] == configs[1]


def test_every_layout_is_converted_to_the_released_one(tmp_path: Path) -> None:
    """Stacked experts, no copies for the MTP layer, names without their prefix, one type for everything."""
    model = lively_model(tiny(num_nextn_predict_layers=1))
    save_model(model, tmp_path / "ours")
    tensors = stored(tmp_path / "ours")
    theirs = {name.replace("model.norm", "norm"): t for name, t in tensors.items() if ".experts." not in name}
    for name in ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"):
        del theirs[name]
    for i, layer in enumerate([*model.layers, *model.mtp]):
        if hasattr(layer.mlp, "experts"):
            prefix = f"model.layers.{i}.mlp.experts."
            theirs[prefix + "gate_up_proj"] = layer.mlp.experts.gate_up_proj.detach().clone()
            theirs[prefix + "down_proj"] = layer.mlp.experts.down_proj.detach().clone()
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    save_file(theirs, tmp_path / "theirs" / "model.safetensors")
    convert(tmp_path / "theirs", tmp_path / "out", "f32", verify=True)
    found = stored(tmp_path / "out")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.items())


def test_tokenizer_files_are_copied_and_programs_are_not(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["the quick brown fox", "the lazy dog"], 280)
    save_model(lively_model(tiny(vocab_size=280)), tmp_path / "model", tokenizer)
    (tmp_path / "model" / "modeling_deepseek.py").write_text("raise SystemExit")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    convert(tmp_path / "model", tmp_path / "out", "bf16")
    assert load_tokenizer(tmp_path / "out").encode("the dog") == tokenizer.encode("the dog")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "README.md",
    }  # fmt: skip


@pytest.mark.parametrize("to", ["fp8", "bf16"])
def test_conversion_reads_a_chunk_of_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Storage
) -> None:
    """An embedding of 1.4 million elements is read in two chunks, as is everything larger."""
    save_model(lively_model(tiny(vocab_size=60_000)), tmp_path / "model")
    sizes = []
    rows = StoredTensor.rows

    def recorded(stored: StoredTensor, first: int, last: int) -> torch.Tensor:
        found = rows(stored, first, last)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(StoredTensor, "rows", recorded)
    convert(tmp_path / "model", tmp_path / "out", to, verify=True)
    assert 10**6 < max(sizes) <= 1 << 20


# --------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_model(lively_model(tiny()), tmp_path / "model")
    return tmp_path / "model"


def test_a_model_is_not_converted_onto_itself(directory: Path) -> None:
    with pytest.raises(ValueError, match="the source itself"):
        convert(directory, directory / ".." / "model", "bf16")


def test_fp8_is_not_made_from_fp8(directory: Path, tmp_path: Path) -> None:
    convert(directory, tmp_path / "fp8", "fp8")
    with pytest.raises(ValueError, match="in FP8 already"):
        convert(tmp_path / "fp8", tmp_path / "again", "fp8")


def test_a_tensor_with_values_that_are_not_finite_is_named(directory: Path, tmp_path: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name][3, 3] = float("inf")
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=name):
        convert(directory, tmp_path / "fp8", "fp8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_insufficient_disk_space_is_reported_before_anything_is_written(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ValueError, match=r"needs 0\.07 GB of disk, and .* has 0\.00 GB free"):
        convert(directory, tmp_path / "new" / "out", "bf16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_conversion_leaves_no_partial_output(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool, error: type[BaseException]
) -> None:
    out = tmp_path / "out"
    if existing:
        save_model(lively_model(tiny(), seed=5), out)
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    calls: list[Any] = []
    original = writing._write

    def interrupted(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 7:
            raise error("enough")
        original(*arguments)

    monkeypatch.setattr(writing, "_write", interrupted)
    with pytest.raises(error):
        convert(directory, out, "bf16")
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before


def test_output_that_fails_verification_does_not_get_its_name(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = fp8.quantize

    def wrong(weight_RI: Tensor) -> tuple[Tensor, Tensor]:
        qweight, scales = original(weight_RI)
        return qweight, scales * 1.2

    monkeypatch.setattr(writing.fp8, "quantize", wrong)
    with pytest.raises(CheckpointError, match="what was written differs from the source"):
        convert(directory, tmp_path / "out", "fp8", verify=True)
    assert not (tmp_path / "out").exists()


def test_absent_mtp_weights_are_absent_from_the_new_config(tmp_path: Path) -> None:
    save_model(lively_model(tiny()), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_nextn_predict_layers": 1}))
    with pytest.warns(UserWarning, match="num_nextn_predict_layers 1"):
        convert(tmp_path / "model", tmp_path / "out", "bf16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_model(tmp_path / "out").config.num_nextn_predict_layers == 0
