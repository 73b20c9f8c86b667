"""What a Hugging Face model directory holds: its configuration and its tensors' places. No weight is read here."""

import json
from pathlib import Path
from typing import Any

from fathom.checkpoint.hf.safetensors_io import CheckpointError, StoredTensor, read_header
from fathom.config import ConfigError
from fathom.model.config import ModelConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model"]


def model_directory(path: str | Path, weights: bool = True) -> Path:
    """The directory itself, or the local copy of the hub's model of that name (downloaded when it is not there yet).

    Without `weights` nothing large is downloaded; what an earlier download left is there all the same.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = _WANTED if weights else ["*.json"]
    try:
        return Path(snapshot_download(str(path), allow_patterns=wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        message = f"{path} is neither a directory nor a model that the hub gave: {error}"
        raise CheckpointError(message) from error


def load_config(path: str | Path) -> ModelConfig:
    """Read `config.json` of a model directory, or of a model on the hub."""
    directory = model_directory(path, weights=False)
    raw = read_config(directory)
    try:
        return ModelConfig.from_dict(raw)
    except ConfigError as error:
        raise CheckpointError(f"{directory / 'config.json'}: {error}") from error


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json` as it lies."""
    file = directory / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist: {directory} is not a Hugging Face model directory")
    raw = _read_json(file)
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} holds {type(raw).__name__}, not an object")
    return raw


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
                raise CheckpointError(f"{shard}: tensor {name} is not in it, but {INDEX} says so")
            tensors[name] = header[name]
    return tensors


def _shards(index: Path) -> dict[Path, list[str]]:
    """The files that the index lists, each with the names of the tensors to take from it."""
    content = _read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no readable weight_map: it must name each tensor's file")
    shards: dict[Path, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise CheckpointError(f"{index}: {name} points to {shard!r:.200}, which is not a file of this directory")
        shards.setdefault(index.parent / shard, []).append(name)
    for path in shards:
        if not _is_file(path):
            raise CheckpointError(f"{path} is listed in {index.name} but does not exist")
    return shards


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for any file
        return False


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
