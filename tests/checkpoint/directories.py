"""Model directories in tests: what is in one, changing it, and how a model in bfloat16 or FP8 is shipped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fathom.checkpoint.hf.model import CheckpointError, load_model, save_model
from fathom.model.config import ModelConfig
from fathom.model.transformer import Model
from tests.checkpoint.fp8_definition import NOT_QUANTIZED, quantize_blocks
from tests.model.configs import lively_model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"


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


def assert_refused(directory: Path, *words: str) -> None:
    """Loading raises a CheckpointError that names the file and what is wrong with which tensor."""
    with pytest.raises(CheckpointError) as error:
        load_model(directory)
    for word in words:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"
