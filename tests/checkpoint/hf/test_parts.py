"""Loading some layers or experts, keeping matrices in FP8, and the peak memory of loading."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fathom.checkpoint.hf.model import CheckpointError, load_model, load_part, save_model
from fathom.checkpoint.hf.safetensors_io import StoredTensor
from fathom.checkpoint.info import weight_bytes
from fathom.engine.engine import Engine
from fathom.engine.sampling.sampler import SamplingParams
from fathom.model.quantize import quantized
from fathom.model.transformer import Model
from fathom.quantization.fp8_layers import FP8Experts, FP8Linear
from tests.checkpoint.directories import tensors_of
from tests.checkpoint.fp8_definition import MODEL
from tests.model.configs import lively_model, random_tokens, relative_error, tiny

CONFIG = replace(MODEL, num_hidden_layers=3)


@pytest.fixture(scope="module")
def model() -> Model:
    return lively_model(CONFIG, seed=3, std=0.1)


@pytest.fixture(scope="module")
def directory(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save_model(model, tmp_path_factory.mktemp("part") / "model", max_shard_size=300_000)
    return tmp_path_factory.getbasetemp() / "part0" / "model"


@pytest.fixture(scope="module")
def fp8_directory(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save_model(model, tmp_path_factory.mktemp("stored") / "fp8", storage="fp8")
    return tmp_path_factory.getbasetemp() / "stored0" / "fp8"


# ----------------------------------------------------------------------------------------------------- slices


@pytest.mark.parametrize("layers", [range(1, 2), range(2, 4), range(0), None])
@pytest.mark.parametrize("experts", [range(1, 3), range(3, 4), None])
def test_a_part_equals_that_part_of_the_model(
    model: Model, directory: Path, layers: range | None, experts: range | None
) -> None:
    found = load_part(directory, layers, experts)
    expected = {}
    for name, tensor in tensors_of(model).items():
        kind, number, *_ = [*name.split("."), ""]
        layer = {"layers": 0, "mtp": CONFIG.num_hidden_layers}.get(kind)
        if layers is None or (layer is not None and layer + int(number) in layers):
            whole = experts is None or ".experts." not in name
            expected[name] = tensor if whole or experts is None else tensor[experts.start : experts.stop]
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_no_other_weights_are_read(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    rows = StoredTensor.rows

    def recorded(stored: StoredTensor, first: int, last: int) -> torch.Tensor:
        read.append(stored.name)
        return rows(stored, first, last)

    monkeypatch.setattr(StoredTensor, "rows", recorded)
    load_part(directory, range(2, 3), range(1, 2))
    # Of others only what is compared is read: an MTP layer's copies and their originals.
    compared = {"model.embed_tokens.weight", "lm_head.weight"}
    others = {name for name in read if not name.startswith("model.layers.2.")}
    assert others == compared | {f"model.layers.3.{name}.weight" for name in ("embed_tokens", "shared_head.head")}
    assert {name.split(".")[5] for name in read if ".experts." in name} == {"1"}


def test_parts_have_the_requested_type(fp8_directory: Path) -> None:
    found = load_part(fp8_directory, range(1, 2), dtype=torch.bfloat16)
    expected = tensors_of(load_model(fp8_directory, torch.bfloat16))
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("ranges", [{"layers": range(3, 5)}, {"experts": range(-1, 2)}])
def test_a_range_beyond_the_model_is_named(directory: Path, ranges: dict[str, range]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(ranges))} is range\(.*\); this model has 4"):
        load_part(directory, **ranges)


# ----------------------------------------------------------------------------------------------- FP8 in memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_fp8_weights_compute_what_dequantized_ones_do(fp8_directory: Path, dtype: torch.dtype) -> None:
    kept, wide = load_model(fp8_directory, dtype, keep_fp8=True), load_model(fp8_directory, torch.float32)
    tokens_BS = random_tokens(CONFIG, 2, 15)
    with torch.no_grad():
        found, expected = kept(tokens_BS, mtp=True), wide.to(dtype)(tokens_BS, mtp=True)
    assert found.mtp_logits is not None and expected.mtp_logits is not None
    if dtype == torch.float32:
        assert relative_error(found.logits_BSO, expected.logits_BSO) <= 1e-5
        assert relative_error(found.mtp_logits[0], expected.mtp_logits[0]) <= 1e-5
    assert found.logits_BSO.dtype == dtype
    assert torch.equal(found.router.topk_ids_LBSK[0], expected.router.topk_ids_LBSK[0])


def test_which_weights_stay_in_fp8_and_the_memory_they_take(fp8_directory: Path) -> None:
    kept = load_model(fp8_directory, torch.bfloat16, keep_fp8=True)
    for name, module in kept.named_modules():
        if name.endswith("_proj") and "eh_proj" not in name:
            assert isinstance(module, FP8Linear), name
        assert not name.endswith("mlp.experts") or isinstance(module, FP8Experts), name
    assert not any(parameter.requires_grad for n, parameter in kept.named_parameters() if ".qweight" in n)
    size = sum(tensor.nbytes for tensor in {id(t): t for t in tensors_of(kept).values()}.values())
    assert size == weight_bytes(CONFIG)["fp8 blocks"]


def test_the_engine_runs_with_kept_fp8_weights(fp8_directory: Path) -> None:
    answers = []
    for keep in (False, True):
        engine = Engine(load_model(fp8_directory, keep_fp8=keep), speculative=1)
        handle = engine.submit([3, 1, 4, 1, 5], SamplingParams(max_tokens=20, ignore_eos=True))
        while engine.has_work:
            engine.step()
        answers.append(handle.token_ids)
    assert answers[0] == answers[1] and len(set(answers[0])) > 3


def test_quantized_models_are_not_saved(fp8_directory: Path, model: Model, tmp_path: Path) -> None:
    for low_bit in (load_model(fp8_directory, keep_fp8=True), quantized(model, "int8")):
        with pytest.raises(CheckpointError, match="weights are quantised"):
            save_model(low_bit, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------- peak memory

LOAD = """
import json, sys
import torch
from fathom.checkpoint.hf.model import load_config, load_model
from fathom.checkpoint.hf.weights import meta_model

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

torch.set_num_threads(1)
meta_model(load_config(sys.argv[1]))  # the first meta tensor makes torch import a lot
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # resets the peak
before = status("VmRSS")
model = load_model(sys.argv[1], torch.bfloat16, keep_fp8=sys.argv[2] == "True")
size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
layer = sum(t.nbytes for t in model.layers[1].parameters())
print(json.dumps({"peak": status("VmHWM") - before, "size": size, "layer": layer}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' /proc")
@pytest.mark.parametrize(("storage", "keep_fp8"), [("f32", False), ("fp8", False), ("fp8", True)])
def test_peak_memory_of_loading_is_at_most_model_and_one_layer(tmp_path: Path, storage: Any, keep_fp8: bool) -> None:
    config = tiny(
        hidden_size=256, intermediate_size=512, moe_intermediate_size=256, n_routed_experts=64, num_hidden_layers=5,
        kv_lora_rank=128, q_lora_rank=128, vocab_size=2000,
    )  # fmt: skip
    save_model(Model(config), tmp_path / "model", storage=storage)
    answer = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "model"), str(keep_fp8)],
        capture_output=True, check=True, text=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    found = json.loads(answer.stdout)
    assert found["size"] > 5e7
    assert found["size"] <= found["peak"] + 2**22 and found["peak"] <= found["size"] + found["layer"], found
