"""Sizes and costs computed without loading a model, against the model itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from torch import nn

from fathom import presets
from fathom.checkpoint import info as info_module
from fathom.checkpoint.hf.model import CheckpointError, save_model
from fathom.checkpoint.hf.safetensors_io import StoredTensor
from fathom.checkpoint.info import model_info, weight_bytes
from fathom.cli import main
from fathom.model.quantize import quantized
from tests.model.configs import lively_model, tiny

EVEN = tiny(
    hidden_size=64, intermediate_size=96, moe_intermediate_size=32, kv_lora_rank=32, q_lora_rank=32,
    v_head_dim=32, num_attention_heads=2, num_nextn_predict_layers=1,
)  # fmt: skip


def bytes_of(model: nn.Module) -> int:
    """The bytes of every parameter and buffer, once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"q_lora_rank": None}])
def test_memory_is_what_a_loaded_model_takes(changes: dict[str, Any]) -> None:
    config = tiny(**{**vars(EVEN), **changes})
    found = weight_bytes(config)
    assert found["fp32"] == bytes_of(lively_model(config))
    bf16 = lively_model(config, dtype=torch.bfloat16)
    assert found["bf16"] == bytes_of(bf16)
    assert found["int8"] == bytes_of(quantized(bf16, "int8"))
    assert found["int4"] == bytes_of(quantized(bf16, "int4"))


def test_int4_is_none_for_a_width_it_cannot_group() -> None:
    assert weight_bytes(tiny())["int4"] is None


def test_the_released_model_has_the_published_figures() -> None:
    config = presets.ALL["deepseek-v3-671b"]().model
    found = weight_bytes(config)
    assert config.num_nextn_predict_layers == 1
    # The released FP8 files hold 688.6e9 bytes, with copies of embedding and head for the MTP layer (3.7e9).
    assert found["fp8 blocks"] == pytest.approx(684.9e9, rel=2e-3)
    assert found["bf16"] == pytest.approx(2 * 682.64e9, rel=1e-3)


def test_a_directory_is_read_without_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(lively_model(EVEN), tmp_path / "model", max_shard_size=50_000)

    def forbidden(*_: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(StoredTensor, "rows", forbidden)
    found = model_info(tmp_path / "model")
    assert found.config == EVEN and found.parameters == EVEN.parameter_counts()
    assert found.cache_bytes == 2 * EVEN.num_hidden_layers * (EVEN.kv_lora_rank + EVEN.qk_rope_head_dim)
    files = list((tmp_path / "model").glob("*.safetensors"))
    assert found.stored is not None and found.stored.files == len(files) > 1
    copies = 2 * EVEN.vocab_size * EVEN.hidden_size  # of embedding and head, in the MTP layer
    counts = found.parameters
    assert found.stored.elements == {"F32": counts.total + counts.mtp + copies}
    assert found.stored.bytes == 4 * found.stored.elements["F32"]


def test_a_directory_without_weights_and_a_damaged_one(tmp_path: Path) -> None:
    save_model(lively_model(tiny()), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        model_info(tmp_path / "model")
    file.unlink()
    assert model_info(tmp_path / "model").stored is None


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Create the model org/model in the hub's cache, as a download leaves it; the hub itself cannot be reached."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def make(weights: bool) -> Path:
        home = cache / "models--org--model"
        snapshot = home / "snapshots" / ("0" * 40)
        save_model(lively_model(EVEN), snapshot)
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text("0" * 40)
        if not weights:
            (snapshot / "model.safetensors").unlink()
        return snapshot

    return make


def test_a_model_on_the_hub_is_read_from_the_cache(hub_cache: Callable[..., Path]) -> None:
    snapshot = hub_cache(weights=True)
    assert model_info("org/model") == model_info(snapshot)


def test_a_config_alone_in_the_cache_is_enough(hub_cache: Callable[..., Path]) -> None:
    hub_cache(weights=False)
    found = model_info("org/model")
    assert found.config == EVEN and found.stored is None


def test_headers_come_from_the_hub_when_the_weights_are_not_cached(
    hub_cache: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_cache(weights=False)
    tensor = huggingface_hub.utils.TensorInfo("BF16", [3, 5], (0, 30))
    file = huggingface_hub.utils.SafetensorsFileMetadata({}, {"a": tensor})
    answer = huggingface_hub.utils.SafetensorsRepoMetadata(None, False, {"a": "x"}, {"x": file})
    monkeypatch.setattr(huggingface_hub.HfApi, "get_safetensors_metadata", lambda self, name: answer)
    assert model_info("org/model").stored == info_module.StoredFiles(1, 30, {"BF16": 15})


def test_the_command_prints_sizes_and_refuses_other_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(lively_model(EVEN, dtype=torch.bfloat16), tmp_path / "model")
    main(["info", str(tmp_path / "model")])
    text = capsys.readouterr().out
    counts = EVEN.parameter_counts()
    for words in (
        f"({counts.total:,})",
        f"({counts.active:,})",
        "216 bytes per token",
        "weights in fp8 blocks",
        "BF16",
    ):
        assert words in text
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**raw, "model_type": "llama"}))
    with pytest.raises(SystemExit):
        main(["info", str(tmp_path / "model")])
    assert "model_type is 'llama'" in " ".join(capsys.readouterr().err.split())
