"""The layout of a Hugging Face model directory: its configuration and where its tensors are. No weights are read."""

import json
from pathlib import Path
from typing import Any

from fathom.checkpoint.hf.safetensors_io import CheckpointError, StoredTensor, read_header
from fathom.config import ConfigError
from fathom.model.config import ModelConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WEIGHT_FILES = (INDEX, "model*.safetensors")
"""Patterns of the files that a new model replaces; other files of an older one stay."""
BESIDE_WEIGHTS = ["*.json", "*.jinja", "*.model", "merges.txt", "LICENSE*"]
"""Patterns of what a model consists of besides its weights: configuration, tokenizer, chat template."""


def model_directory(path: str | Path, weights: bool = True) -> Path:
    """The directory itself, or the local copy of the model of that name on the hub, downloaded if necessary.

    Without `weights` nothing large is downloaded; weights from an earlier download may be there nevertheless.
    Raises CheckpointError where `path` is neither a directory nor a model on the hub.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def download(patterns: list[str]) -> Path:
        return Path(snapshot_download(str(path), allow_patterns=patterns, ignore_patterns=["*/*"]))

    try:
        directory = download(["*.json"])
        if weights:
            load_config(directory)  # a model that cannot be loaded is refused before its weights are fetched
            index = directory / INDEX
            directory = download(
                [*BESIDE_WEIGHTS, *(set(_weight_map(index).values()) if index.is_file() else [SINGLE])]
            )
        return directory
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        message = f"{path} is neither a directory nor a model that can be downloaded from the hub: {error}"
        raise CheckpointError(message) from error


def load_config(path: str | Path) -> ModelConfig:
    """Read `config.json` of a model directory, or of a model on the hub."""
    directory = model_directory(path, weights=False)
    raw = read_config(directory)
    quantized = directory / "hf_quant_config.json"  # where NVIDIA's releases say what their config.json may not
    if not raw.get("quantization_config") and quantized.is_file():
        raw["quantization_config"] = read_json_object(quantized).get("quantization")
    try:
        return ModelConfig.from_dict(raw)
    except ConfigError as error:
        raise CheckpointError(f"{directory / 'config.json'}: {error}") from error


def read_config(directory: Path) -> dict[str, Any]:
    """The content of `config.json`, unchecked."""
    file = directory / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist: {directory} is not a Hugging Face model directory")
    return read_json_object(file)


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; raises CheckpointError for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds {type(found).__name__}, not an object")
    return found


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the directory by name, from the index and the files' headers alone."""
    if not (directory / INDEX).is_file():
        single = directory / SINGLE
        if not single.is_file():
            raise CheckpointError(f"{directory} has neither {SINGLE} nor {INDEX}")
        return read_header(single)
    tensors: dict[str, StoredTensor] = {}
    for shard, names in _shards(directory / INDEX).items():
        header = read_header(shard)
        for name in names:
            if name not in header:
                raise CheckpointError(f"{shard} has no tensor {name}, which {INDEX} assigns to it")
            tensors[name] = header[name]
    return tensors


def _shards(index: Path) -> dict[Path, list[str]]:
    """The shards that the index lists, each with the names of its tensors."""
    shards: dict[Path, list[str]] = {}
    for name, shard in _weight_map(index).items():
        shards.setdefault(index.parent / shard, []).append(name)
    for path in shards:
        if not _is_file(path):
            raise CheckpointError(f"{path} is listed in {index.name} but does not exist")
    return shards


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, by the index."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no valid weight_map: it must map each tensor's name to a file")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise CheckpointError(f"{index} maps {name} to {shard!r:.200}, which is not a file of this directory")
    return weight_map


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is longer than the file system allows
        return False
