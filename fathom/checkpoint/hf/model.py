"""Hugging Face model directories: config.json, sharded safetensors, tokenizer.

What is written loads as it lies in `transformers`, vLLM, SGLang and llama.cpp's converter; what they and DeepSeek
publish is read, a few rows at a time. Only safetensors are ever opened and nothing from a checkpoint is executed.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fathom.checkpoint.hf.directory import INDEX, load_config, model_directory
from fathom.checkpoint.hf.keep_fp8 import insert_fp8_layers, load_fp8_weight
from fathom.checkpoint.hf.name_mapping import layer_of, locate
from fathom.checkpoint.hf.safetensors_io import CheckpointError, sync
from fathom.checkpoint.hf.save import SHARD_BYTES, Storage, plan, write_json, write_tensors
from fathom.checkpoint.hf.weights import (
    ModelWeights,
    StoredWeights,
    Weights,
    blank_model,
    parameters_and_buffers,
)
from fathom.data.tokenizer import Tokenizer, save_tokenizer
from fathom.model.config import ModelConfig
from fathom.model.transformer import Model
from fathom.quantization import fp8

_FP8_QUANTIZATION_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [fp8.BLOCK, fp8.BLOCK],
}
"""config.json's quantization_config, by which other programs recognise the format."""

__all__ = ["CheckpointError", "load_config", "load_model", "load_part", "model_directory", "save_model"]


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    keep_fp8: bool = False,
) -> Model:
    """Load any DeepSeek-V3-architecture model: a Hugging Face directory, or a name on the hub.

    Weights are converted to `dtype` as they are read; correction biases stay float32. FP8 blocks are dequantised, or
    with `keep_fp8` stay as they are in memory, for inference alone. A directory whose MTP weights are absent loads
    without MTP modules, with a warning. Raises CheckpointError for missing, unexpected or misshapen tensors.
    """
    weights = StoredWeights(model_directory(path))
    model = blank_model(weights.config)
    with torch.device("meta"):
        kept = insert_fp8_layers(model, weights) if keep_fp8 else frozenset()
    model.to(dtype).to_empty(device=device)
    model.tie_head()
    _fill(model, weights, kept)
    return model.eval()


@torch.no_grad()
def _fill(model: Model, weights: StoredWeights, kept: frozenset[str]) -> None:
    """Copy every tensor to its place; those of the names in `kept` as FP8 blocks."""
    targets = parameters_and_buffers(model)
    for name, shape, _ in weights.entries():
        where = locate(name, model.config)
        if where is None:  # an MTP layer's copy of embedding or head
            continue
        if name in kept:
            load_fp8_weight(model, name, *weights.blocks(name))
        else:
            _copy(weights, name, shape, where.of(targets[where.parameter]))


def _copy(weights: Weights, name: str, shape: tuple[int, ...], target: Tensor) -> None:
    for first, last in fp8.row_chunks(shape):
        target[first:last].copy_(weights.rows(name, first, last).view_as(target[first:last]))


@torch.no_grad()
def load_part(
    path: str | Path,
    layers: range | None = None,
    experts: range | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """Some of a model's tensors, by the names of `Model`'s parameters and buffers; nothing else is read.

    `layers` are numbered as in the files, MTP module k being layer num_hidden_layers + k; embedding, final norm and
    head come along only where it is None, which stands for everything. Of the routed experts only `experts` are
    loaded, stacked in that order. Raises CheckpointError as `load_model` does, ValueError for a range that reaches
    beyond the model.
    """
    weights = StoredWeights(model_directory(path))
    config, blank = weights.config, parameters_and_buffers(blank_model(weights.config))
    _check_range("layers", layers, config.num_hidden_layers + config.num_nextn_predict_layers)
    _check_range("experts", experts, config.n_routed_experts)
    part: dict[str, Tensor] = {}
    for name, shape, _ in weights.entries():
        where = locate(name, config)
        if where is None or (layers is not None and layer_of(name) not in layers):
            continue
        if where.expert is not None and experts is not None:
            if where.expert not in experts:
                continue
            where = where._replace(expert=experts.index(where.expert))
        if where.parameter not in part:
            whole = blank[where.parameter]
            stacked = whole.shape if where.expert is None or experts is None else (len(experts), *whole.shape[1:])
            wide = whole.dtype if where.parameter.endswith("e_score_correction_bias") else dtype
            part[where.parameter] = torch.empty(stacked, dtype=wide, device=device)
        _copy(weights, name, shape, where.of(part[where.parameter]))
    return part


def _check_range(name: str, wanted: range | None, count: int) -> None:
    if wanted is not None and any(number not in range(count) for number in wanted):
        raise ValueError(f"{name} is {wanted}; this model has {count}, counted from 0")


def save_model(
    model: Model,
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    max_shard_size: int = SHARD_BYTES,
    storage: Storage | None = None,
) -> None:
    """Write the model as a Hugging Face directory, shards of at most `max_shard_size` bytes.

    Weights keep their own type, or take that of `storage`: `f32`, `bf16`, or `fp8`, the blocks of DeepSeek-V3's
    release. Everything is written aside first; an existing model at `path` is replaced only by a complete one, and
    files that are no part of a model are left alone.
    """
    weights = ModelWeights(model)
    planned = plan(weights.entries(), storage)
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    with staged(Path(path)) as staging:
        write_config(model.config, staging, storage, dtype)
        if tokenizer is not None:
            save_tokenizer(tokenizer, staging)
        write_tensors(weights, planned, staging, max_shard_size)


def write_config(config: ModelConfig, directory: Path, storage: Storage | None, dtype: str = "float32") -> None:
    """Write config.json, and the control tokens' ids in generation_config.json; `dtype` counts without a `storage`."""
    raw = config.to_dict(dtype if storage is None else "float32" if storage == "f32" else "bfloat16")
    if storage == "fp8":
        raw["quantization_config"] = _FP8_QUANTIZATION_CONFIG
    write_json(directory / "config.json", raw)
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": raw["eos_token_id"]}
    ids["pad_token_id"] = config.pad_token_id
    write_json(directory / "generation_config.json", {k: v for k, v in ids.items() if v is not None})


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """An empty directory beside `target`, which becomes the model at `target` when the block ends without an error.

    After an error, or a Ctrl-C, it is removed, and what was at `target` is as it was.
    """
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; a model is a directory")
    target = target.resolve()
    if Path.cwd().is_relative_to(target):
        raise CheckpointError(f"{target} is where this runs; a directory that is replaced must be another one")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = _beside(target)
    try:
        os.chmod(staging, 0o755)
        yield staging
        _put_in_place(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _beside(target: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))


def _put_in_place(staging: Path, target: Path) -> None:
    """Make the staged directory the model at `target`.

    Both models are whole at any moment: directories change names, and nothing of the old one is deleted before the new
    one has its name and the files that belong to no model.
    """
    if not target.exists():
        os.rename(staging, target)
    else:
        replaced = _beside(target)
        os.rename(target, replaced)
        try:
            os.rename(staging, target)
        except BaseException:
            os.rename(replaced, target)
            raise
        for kept in replaced.iterdir():
            part_of_the_model = kept.name == INDEX or kept.match("model*.safetensors")
            if not part_of_the_model and not (target / kept.name).exists():
                os.rename(kept, target / kept.name)
        shutil.rmtree(replaced)
    sync(target.parent)
