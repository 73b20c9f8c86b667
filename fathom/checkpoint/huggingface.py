"""Reading and writing Hugging Face model directories: config.json, sharded safetensors, tokenizer.

What is written loads as it lies in `transformers`, vLLM, SGLang and llama.cpp's converter; what they and DeepSeek
publish is read, one tensor at a time. Only safetensors are ever opened and nothing from a checkpoint is executed.
"""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fathom.checkpoint.names import place, released_tensors
from fathom.config import ConfigError, atomic_write
from fathom.data.tokenizer import Tokenizer, save_tokenizer
from fathom.model.config import ModelConfig
from fathom.model.transformer import Model

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FP8_BLOCK = 128
_TIED = {"lm_head.weight": "embed_tokens.weight", "embed_tokens.weight": "lm_head.weight"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file and the tensor."""


def load_config(path: str | Path) -> ModelConfig:
    """Read `config.json` of a model directory, or of a model on the hub."""
    file = model_directory(path) / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist: {path} is not a Hugging Face model directory")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} holds {type(raw).__name__}, not an object")
    try:
        return ModelConfig.from_dict(raw)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error


def load_model(path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Model:
    """Load any DeepSeek-V3-architecture model: a Hugging Face directory, or a name on the hub.

    Weights are converted to `dtype` tensor by tensor (FP8 blocks are dequantised); correction biases stay float32.
    A directory whose MTP weights are absent loads without MTP modules, with a warning. Raises CheckpointError for
    missing, unexpected or misshapen tensors.
    """
    directory = model_directory(path)
    config = load_config(directory)
    shards = _shards(directory)
    config = _without_absent_mtp(config, {name for names in shards.values() for name in names}, directory)
    with torch.device("meta"):
        model = Model(config)
    model.to(dtype).to_empty(device=device)
    model.tie_head()
    _fill(model, shards, directory)
    return model.eval()


def save_model(
    model: Model, path: str | Path, tokenizer: Tokenizer | None = None, max_shard_size: int = 5 * 10**9
) -> None:
    """Write the model as a Hugging Face directory in the weights' own type, shards of at most `max_shard_size` bytes.

    Everything is written aside first; an existing model at `path` is replaced only by a complete one, and files
    that are no part of a model are left alone.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; a model is a directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        os.chmod(staging, 0o755)
        _write_directory(model, staging, tokenizer, max_shard_size)
        _put_in_place(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


# ------------------------------------------------------------------------------------------------- reading


def model_directory(path: str | Path) -> Path:
    """The directory itself, or the local copy of the hub's model of that name (downloaded when it is not there yet)."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        message = f"{path} is neither a directory nor a model that the hub gave: {error}"
        raise CheckpointError(message) from error


def _shards(directory: Path) -> dict[Path, list[str]]:
    """Each safetensors file and the tensors to take from it."""
    index = directory / _INDEX
    if not index.is_file():
        single = directory / _SINGLE
        if not single.is_file():
            raise CheckpointError(f"{directory} has neither {_SINGLE} nor {_INDEX}")
        with _open(single) as file:
            return {single: list(file.keys())}
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        items = list(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} has no readable weight_map: {error}") from error
    if not items:
        raise CheckpointError(f"{index} has an empty weight_map")
    shards: dict[Path, list[str]] = {}
    for name, shard in items:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index}: {name} points to {shard!r}, which is not a file of this directory")
        shards.setdefault(directory / shard, []).append(name)
    for file_path in shards:
        if not file_path.is_file():
            raise CheckpointError(f"{file_path} is listed in {index.name} but does not exist")
    return shards


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from error


def _without_absent_mtp(config: ModelConfig, names: set[str], directory: Path) -> ModelConfig:
    """`transformers` drops MTP weights when it saves but keeps their number in config.json."""
    if not config.num_nextn_predict_layers:
        return config
    prefix = f"model.layers.{config.num_hidden_layers}."
    if any(name.startswith(prefix) for name in names):
        return config
    warnings.warn(
        f"{directory}: config.json promises {config.num_nextn_predict_layers} MTP module(s) but no tensor begins "
        f"with {prefix}; loading without them",
        stacklevel=3,
    )
    return replace(config, num_nextn_predict_layers=0)


@torch.no_grad()
def _fill(model: Model, shards: dict[Path, list[str]], directory: Path) -> None:
    """Copy every checkpoint tensor to its place; all places must be filled, each exactly once."""
    config = model.config
    targets = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    unfilled = {name: tensor.numel() for name, tensor in targets.items()}
    for name, tensor, file in _tensors(shards):
        where = place(name, config)
        if where is None:
            continue
        if where.parameter not in targets:
            raise CheckpointError(f"{file}: tensor {name} is no part of the model that config.json describes")
        target = where.of(targets[where.parameter])
        if target.shape != tensor.shape:
            expected, found = tuple(target.shape), tuple(tensor.shape)
            raise CheckpointError(f"{file}: tensor {name} has shape {found}, config.json asks for {expected}")
        if unfilled[where.parameter] < tensor.numel():
            raise CheckpointError(f"{file}: tensor {name} is there twice, under another name or stacked as well")
        twin = _TIED.get(where.parameter) if config.tie_word_embeddings else None
        if twin is not None and unfilled[twin] == 0 and not torch.equal(target, tensor.to(target)):
            # `transformers` would then untie them, others take one of the two.
            raise CheckpointError(f"{file}: tensor {name} differs from {twin}, but config.json ties them")
        target.copy_(tensor)
        unfilled[where.parameter] -= tensor.numel()
    if config.tie_word_embeddings:
        unfilled.pop("lm_head.weight")
    missing = sorted(name for name, numbers in unfilled.items() if numbers > 0)
    if missing:
        listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise CheckpointError(f"{directory}: no (or not all) weights for {listed}")


def _tensors(shards: dict[Path, list[str]]) -> Iterator[tuple[str, Tensor, Path]]:
    """Every tensor with its name and file, FP8 weights already multiplied by their scales."""
    home = {name: path for path, names in shards.items() for name in names}
    for path, names in shards.items():
        with _open(path) as file:
            for name in names:
                if name.endswith("_scale_inv"):
                    continue
                tensor = _read(file, name, path)
                if tensor.dtype == torch.float8_e4m3fn:
                    tensor = _dequantize(tensor, _read_scale(home, name, path), name, path)
                yield name, tensor, path


def _read(file: Any, name: str, path: Path) -> Tensor:
    try:
        tensor: Tensor = file.get_tensor(name)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: tensor {name} cannot be read: {error}") from error
    return tensor


def _read_scale(home: dict[str, Path], name: str, path: Path) -> Tensor:
    scale = f"{name}_scale_inv"
    if scale not in home:
        raise CheckpointError(f"{path}: FP8 tensor {name} has no {scale} beside it")
    with _open(home[scale]) as file:
        return _read(file, scale, home[scale])


def _dequantize(weight: Tensor, scale_inv: Tensor, name: str, path: Path) -> Tensor:
    """value = fp8 · scale_inv, one scale per 128x128 block; the last blocks may be ragged."""
    if weight.dim() != 2:
        shape = tuple(weight.shape)
        raise CheckpointError(f"{path}: FP8 tensor {name} has shape {shape}; only matrices have blocks of 128x128")
    rows, columns = weight.shape
    blocks = (-(-rows // _FP8_BLOCK), -(-columns // _FP8_BLOCK))
    if tuple(scale_inv.shape) != blocks:
        raise CheckpointError(
            f"{path}: {name}_scale_inv has shape {tuple(scale_inv.shape)}, a weight of {rows}x{columns} needs {blocks}"
        )
    spread = scale_inv.float().repeat_interleave(_FP8_BLOCK, 0).repeat_interleave(_FP8_BLOCK, 1)
    return weight.float() * spread[:rows, :columns]


# ------------------------------------------------------------------------------------------------- writing


def _write_directory(model: Model, directory: Path, tokenizer: Tokenizer | None, max_shard_size: int) -> None:
    config = model.config
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    _write_json(directory / "config.json", config.to_dict(dtype))
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    ids["pad_token_id"] = config.pad_token_id
    _write_json(directory / "generation_config.json", {k: v for k, v in ids.items() if v is not None})
    if tokenizer is not None:
        save_tokenizer(tokenizer, directory)
    plan = _plan_shards(model, max_shard_size)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(plan, start=1):
        file = _SINGLE if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        # Slices of stacked experts and shared tensors become tensors of their own here, a shard at a time.
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in shard}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        sync(directory / file)
        weight_map |= dict.fromkeys(tensors, file)
    if len(plan) > 1:
        total = sum(tensor.numel() * tensor.element_size() for shard in plan for _, tensor in shard)
        _write_json(directory / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _plan_shards(model: Model, max_shard_size: int) -> list[list[tuple[str, Tensor]]]:
    """Cut the tensors, in order, into shards of at most `max_shard_size` bytes (a larger tensor stands alone)."""
    if max_shard_size < 1:
        raise CheckpointError(f"max_shard_size is {max_shard_size}; it must be a positive number of bytes")
    shards: list[list[tuple[str, Tensor]]] = [[]]
    size = 0
    for name, tensor in released_tensors(model, model.config):
        bytes_ = tensor.numel() * tensor.element_size()
        if shards[-1] and size + bytes_ > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append((name, tensor))
        size += bytes_
    return shards


def _put_in_place(staging: Path, target: Path) -> None:
    """Make the staged directory the model at `target`."""
    if not target.exists():
        os.rename(staging, target)
    else:
        stale = {p.name for p in target.glob("model*.safetensors")} | {_INDEX}
        # Without its index a half-replaced directory cannot be mistaken for the old model, or for the new one.
        (target / _INDEX).unlink(missing_ok=True)
        files = sorted(staging.iterdir(), key=lambda p: p.name == _INDEX)
        for file in files:
            os.replace(file, target / file.name)
        for name in stale - {file.name for file in files}:
            (target / name).unlink(missing_ok=True)
    sync(target.parent)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    atomic_write(path, json.dumps(content, indent=2) + "\n")


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
