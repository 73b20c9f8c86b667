"""What a model is and what it needs, from config.json and the headers of its files: no weight is read."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fathom.checkpoint.hf.directory import INDEX, SINGLE, load_config, model_directory, stored_tensors
from fathom.checkpoint.hf.name_mapping import locate, released_tensors
from fathom.checkpoint.hf.safetensors_io import CheckpointError
from fathom.checkpoint.hf.save import Storage, plan
from fathom.checkpoint.hf.weights import Entry, blank_model
from fathom.model.config import ModelConfig
from fathom.model.counts import ParameterCounts
from fathom.model.quantize import quantizable_weights
from fathom.model.transformer import Model
from fathom.quantization.integer import Precision, quantized_bytes

_CACHE_BYTES = 2
"""Of a cached number: the cache is bfloat16."""


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
    bfloat16). int8 and int4 as `fathom.quantized` stores them, scales included, what it does not quantise in bfloat16.
    """
    model = blank_model(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    entries = [
        Entry(name, tuple(tensor.shape), tensor.dtype)
        for name, tensor in released_tensors(model, config)
        if locate(name, config) is not None and name not in tied
    ]
    bf16 = _planned_bytes(entries, "bf16")
    return {
        "fp32": _planned_bytes(entries, "f32"),
        "bf16": bf16,
        "fp8 blocks": _planned_bytes(entries, "fp8"),
        "int8": _quantized_bytes(model, bf16, "int8"),
        "int4": _quantized_bytes(model, bf16, "int4"),
    }


def _planned_bytes(entries: list[Entry], storage: Storage) -> int:
    return sum(tensor.bytes for tensor in plan(entries, storage))


def _quantized_bytes(model: Model, bf16: int, precision: Precision) -> int | None:
    """Bytes of a model that takes `bf16` in bfloat16, once its large matrices are quantised."""
    shapes = [getattr(module, parameter).shape for _, module, parameter in quantizable_weights(model)]
    try:
        return bf16 + sum(quantized_bytes(shape, precision) - 2 * math.prod(shape) for shape in shapes)
    except ValueError:  # int4 divides columns into groups
        return None


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
