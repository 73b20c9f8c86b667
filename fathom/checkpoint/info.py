"""The size and cost of a model, from config.json and the headers of its files: no weights are read."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fathom.checkpoint.hf.directory import INDEX, SINGLE, load_config, model_directory, stored_tensors
from fathom.checkpoint.hf.name_mapping import locate, released_tensors
from fathom.checkpoint.hf.safetensors_io import CheckpointError
from fathom.checkpoint.hf.save import Storage, plan_save
from fathom.checkpoint.hf.weights import TensorSpec, check_size, meta_model
from fathom.model.config import ModelConfig
from fathom.model.counts import ParameterCounts
from fathom.model.quantize import quantizable_weights
from fathom.model.transformer import Model
from fathom.quantization.integer import Precision, quantized_bytes

_CACHE_ITEM_BYTES = 2
"""Of a cached value: the cache is bfloat16."""


@dataclass(frozen=True)
class StoredFiles:
    """The tensors in a model's files, by their headers."""

    files: int
    bytes: int
    """Of all tensors, the copies for other programs included."""
    elements: dict[str, int]
    """How many elements have each type, by the header's name for it, the most frequent first."""


@dataclass(frozen=True)
class Info:
    """A model's configuration, and the memory that it takes."""

    config: ModelConfig
    parameters: ParameterCounts
    cache_bytes: int
    """Per token of context, in bfloat16, for the main model's layers."""
    cache_bytes_mtp: int
    """The same, including the MTP modules."""
    memory: dict[str, int | None]
    """Bytes of the weights, MTP modules included, by precision; None for a precision that this model cannot have."""
    stored: StoredFiles | None
    """None without weights, and for a model on the hub while the hub cannot be reached."""


def model_info(path: str | Path) -> Info:
    """Read config.json and the headers of a directory, or of a model on the hub (offline: of an earlier download).

    Raises CheckpointError for a path that is neither, and for damaged files.
    """
    directory = model_directory(path, weights=False)
    config = load_config(directory)
    stored = _stored(path, directory, config)  # first: it bounds what is built next
    return Info(
        config=config,
        parameters=config.parameter_counts(),
        cache_bytes=cache_bytes(config),
        cache_bytes_mtp=cache_bytes(config, mtp=True),
        memory=weight_bytes(config),
        stored=stored,
    )


def cache_bytes(config: ModelConfig, mtp: bool = False) -> int:
    """Bytes of KV cache per token of context, in bfloat16; with `mtp` including the MTP modules."""
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
    return layers * config.cache_width * _CACHE_ITEM_BYTES


def weight_bytes(config: ModelConfig) -> dict[str, int | None]:
    """Bytes of all weights by precision, every parameter once.

    fp32, bf16 and fp8 as `save_model` stores them: correction biases in float32; for fp8 the large matrices in blocks
    and the rest in bfloat16. int8 and int4 as `fathom.quantized` stores them, what it does not quantise in bfloat16.
    """
    model = meta_model(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    specs = [
        TensorSpec(name, tuple(tensor.shape), tensor.dtype)
        for name, tensor in released_tensors(model, config)
        if locate(name, config) is not None and name not in tied
    ]
    bf16 = _stored_bytes(specs, "bf16")
    return {
        "fp32": _stored_bytes(specs, "f32"),
        "bf16": bf16,
        "fp8 blocks": _stored_bytes(specs, "fp8"),
        "int8": _quantized_bytes(model, bf16, "int8"),
        "int4": _quantized_bytes(model, bf16, "int4"),
    }


def _stored_bytes(specs: list[TensorSpec], storage: Storage) -> int:
    return sum(item.bytes for item in plan_save(specs, storage))


def _quantized_bytes(model: Model, bf16: int, precision: Precision) -> int | None:
    """Bytes of a model that takes `bf16` bytes in bfloat16, once its large matrices are quantised."""
    shapes = [getattr(module, parameter).shape for _, module, parameter in quantizable_weights(model)]
    try:
        return bf16 + sum(quantized_bytes(shape, precision) - 2 * math.prod(shape) for shape in shapes)
    except ValueError:  # a matrix whose columns int4 cannot group
        return None


def _stored(path: str | Path, directory: Path, config: ModelConfig) -> StoredFiles | None:
    local = Path(path).is_dir()
    if local and not any((directory / name).exists() for name in (INDEX, SINGLE)):
        return None
    try:
        return _stored_locally(directory, config)
    except CheckpointError:
        if local:
            raise
        return _stored_on_hub(str(path))


def _stored_locally(directory: Path, config: ModelConfig) -> StoredFiles:
    by_name = stored_tensors(directory)
    check_size(config, by_name, directory)
    tensors = by_name.values()
    elements = Counter[str]()
    for tensor in tensors:
        elements[tensor.dtype] += math.prod(tensor.shape)
    files = {tensor.file for tensor in tensors}
    return StoredFiles(len(files), sum(tensor.bytes for tensor in tensors), dict(elements.most_common()))


def _stored_on_hub(name: str) -> StoredFiles | None:
    """From the headers alone, which the hub serves without the weights."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        found = HfApi().get_safetensors_metadata(name)
    except (OSError, NotASafetensorsRepoError):  # offline, or another format
        return None
    files = found.files_metadata.values()
    bytes_ = sum(t.data_offsets[1] - t.data_offsets[0] for file in files for t in file.tensors.values())
    elements = Counter({str(dtype): count for dtype, count in found.parameter_count.items()})
    return StoredFiles(len(found.files_metadata), bytes_, dict(elements.most_common()))
