"""What a model is and what it needs, from config.json and the headers of its files: no weight is read."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fathom.checkpoint.hf.directory import INDEX, SINGLE, load_config, model_directory, stored_tensors
from fathom.checkpoint.hf.name_mapping import locate, released_tensors
from fathom.checkpoint.hf.safetensors_io import CheckpointError
from fathom.checkpoint.hf.save import plan
from fathom.checkpoint.hf.weights import Entry, blank_model
from fathom.model.config import ModelConfig
from fathom.model.counts import ParameterCounts
from fathom.quantization import fp8

_CACHE_BYTES = 2
"""Of a cached number: the cache is bfloat16."""
_INT4_GROUP = 32


@dataclass(frozen=True)
class Stored:
    """What lies in the files, by their headers."""

    files: int
    bytes: int
    """Of all tensors, the copies for other programs included."""
    numbers: dict[str, int]
    """How many numbers of each type, under the header's names for them, the most frequent first."""


@dataclass(frozen=True)
class Info:
    """A model's shape and its costs."""

    config: ModelConfig
    parameters: ParameterCounts
    cache_bytes: int
    """Per token of context, in bfloat16, the main model's layers."""
    cache_bytes_mtp: int
    """The same, with that of the MTP modules."""
    memory: dict[str, int | None]
    """Bytes of the weights, MTP modules included, by precision; None where a precision cannot hold this model."""
    stored: Stored | None
    """None where the files are on the hub alone and it cannot be reached."""


def model_info(path: str | Path) -> Info:
    """Read a directory's, or a hub model's, config.json and headers; of the hub, what was downloaded once is enough.

    Raises CheckpointError for a path that is neither, and for files that are damaged.
    """
    directory = model_directory(path, weights=False)
    config = load_config(directory)
    return Info(
        config=config,
        parameters=config.parameter_counts(),
        cache_bytes=cache_bytes(config),
        cache_bytes_mtp=cache_bytes(config, mtp=True),
        memory=weight_bytes(config),
        stored=_stored(path, directory),
    )


def cache_bytes(config: ModelConfig, mtp: bool = False) -> int:
    """Bytes cached per token of context, in bfloat16; with `mtp` the modules' own entries too."""
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
    return layers * config.cache_width * _CACHE_BYTES


def weight_bytes(config: ModelConfig) -> dict[str, int | None]:
    """Bytes of all weights by precision, every parameter once.

    fp32, bf16 and fp8 as they are stored (correction biases float32; fp8 the large matrices in blocks, the rest
    bfloat16). int8 and int4 as `fathom.quantized` keeps them: numbers and scales, what it leaves alone in bfloat16.
    """
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    entries = [
        Entry(name, tuple(tensor.shape), tensor.dtype)
        for name, tensor in released_tensors(blank_model(config), config)
        if locate(name, config) is not None and name not in tied
    ]
    bytes_: dict[str, int | None] = {}
    bytes_["fp32"] = sum(tensor.bytes for tensor in plan(entries, "f32"))
    bytes_["bf16"] = sum(tensor.bytes for tensor in plan(entries, "bf16"))
    bytes_["fp8 blocks"] = sum(tensor.bytes for tensor in plan(entries, "fp8"))
    bytes_["int8"] = sum(_int8_bytes(entry) for entry in entries)
    widths = {entry.shape[1] for entry in entries if _is_packed(entry.name)}
    fits = all(width % _INT4_GROUP == 0 for width in widths)
    bytes_["int4"] = sum(_int4_bytes(entry) for entry in entries) if fits else None
    return bytes_


def _is_packed(name: str) -> bool:
    """Whether `fathom.quantized` packs the matrix: attention absorbs kv_b_proj in two directions and keeps it."""
    if name.endswith("kv_b_proj.weight"):
        return False
    return fp8.is_quantized(name) or name.endswith(("lm_head.weight", "eh_proj.weight"))


def _int8_bytes(entry: Entry) -> int:
    if not _is_packed(entry.name):
        return plan([entry], "bf16")[0].bytes
    rows, columns = entry.shape
    return rows * columns + 4 * rows


def _int4_bytes(entry: Entry) -> int:
    if not _is_packed(entry.name):
        return plan([entry], "bf16")[0].bytes
    numbers = math.prod(entry.shape)
    return numbers // 2 + 2 * (numbers // _INT4_GROUP)


def _stored(path: str | Path, directory: Path) -> Stored | None:
    local = Path(path).is_dir()
    if local and not any((directory / name).exists() for name in (INDEX, SINGLE)):
        return None
    try:
        return _stored_here(directory)
    except CheckpointError:
        if local:
            raise
        return _stored_on_hub(str(path))


def _stored_here(directory: Path) -> Stored:
    tensors = stored_tensors(directory).values()
    numbers = Counter[str]()
    for tensor in tensors:
        numbers[tensor.dtype] += math.prod(tensor.shape)
    files = {tensor.file for tensor in tensors}
    return Stored(len(files), sum(tensor.bytes for tensor in tensors), dict(numbers.most_common()))


def _stored_on_hub(name: str) -> Stored | None:
    """From the headers alone, which the hub gives without the weights behind them."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        found = HfApi().get_safetensors_metadata(name)
    except (OSError, NotASafetensorsRepoError):  # offline, or another format
        return None
    files = found.files_metadata.values()
    bytes_ = sum(t.data_offsets[1] - t.data_offsets[0] for file in files for t in file.tensors.values())
    numbers = Counter({str(dtype): count for dtype, count in found.parameter_count.items()})
    return Stored(len(found.files_metadata), bytes_, dict(numbers.most_common()))
