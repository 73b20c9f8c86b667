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

from fathom.checkpoint import fp8
from fathom.checkpoint.directory import INDEX, load_config, model_directory
from fathom.checkpoint.names import place
from fathom.checkpoint.shards import CheckpointError, sync
from fathom.checkpoint.weights import ModelWeights, StoredWeights, Weights, bands, blank_model, parameters_and_buffers
from fathom.checkpoint.writing import SHARD_BYTES, Storage, plan, write_json, write_tensors
from fathom.data.tokenizer import Tokenizer, save_tokenizer
from fathom.model.config import ModelConfig
from fathom.model.transformer import Model

__all__ = ["CheckpointError", "load_config", "load_model", "model_directory", "save_model"]


def load_model(path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Model:
    """Load any DeepSeek-V3-architecture model: a Hugging Face directory, or a name on the hub.

    Weights are converted to `dtype` as they are read (FP8 blocks are dequantised); correction biases stay float32.
    A directory whose MTP weights are absent loads without MTP modules, with a warning. Raises CheckpointError for
    missing, unexpected or misshapen tensors.
    """
    weights = StoredWeights(model_directory(path))
    model = blank_model(weights.config)
    model.to(dtype).to_empty(device=device)
    model.tie_head()
    _fill(model, weights)
    return model.eval()


@torch.no_grad()
def _fill(model: Model, weights: Weights) -> None:
    """Copy every tensor to its place."""
    targets = parameters_and_buffers(model)
    for name, shape, _ in weights.entries():
        where = place(name, model.config)
        if where is None:  # an MTP layer's copy of embedding or head
            continue
        target = where.of(targets[where.parameter])
        for first, last in bands(shape):
            target[first:last].copy_(weights.rows(name, first, last).view_as(target[first:last]))


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
        raw["quantization_config"] = fp8.QUANTIZATION
    write_json(directory / "config.json", raw)
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
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
