"""Writing a model's tensors as sharded safetensors, in the types requested, a few rows of a few tensors at a time."""

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Self

import torch

from fathom.checkpoint.hf.directory import INDEX, SINGLE
from fathom.checkpoint.hf.name_mapping import SCALE_SUFFIX, is_fp8_weight
from fathom.checkpoint.hf.safetensors_io import CheckpointError, ShardWriter
from fathom.checkpoint.hf.weights import TensorSpec, Weights
from fathom.files import atomic_write
from fathom.quantization import fp8

Storage = Literal["f32", "bf16", "fp8"]
"""How weights are stored. `fp8`: as DeepSeek-V3's release, the large matrices in FP8 blocks and the rest bfloat16."""

SHARD_BYTES = 5 * 10**9
"""The default limit of a shard's size."""
_TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
_BIAS = ".e_score_correction_bias"
_WORKERS = 2


class WriteItem(NamedTuple):
    """One tensor and the type in which it will be stored."""

    spec: TensorSpec
    dtype: torch.dtype
    """float8_e4m3fn means that a tensor of scales is stored with it."""

    def tensors(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, type and shape of what is stored: the tensor, and its scales if there are any."""
        name, shape, _ = self.spec
        if self.dtype != torch.float8_e4m3fn:
            return [(name, self.dtype, shape)]
        scales = (name + SCALE_SUFFIX, torch.float32, fp8.scale_shape(shape[0], shape[1]))
        return [(name, self.dtype, shape), scales]

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self.tensors())


@dataclass(frozen=True)
class Verification:
    """The result of reading back what was written and comparing it with its source."""

    tensors: int
    relative_error: float
    """√(Σ(found − source)² / Σ source²) over all weights: 0 where nothing was rounded."""

    @classmethod
    def from_squares(cls, tensors: int, error: float, source: float) -> Self:
        """From the two sums, Σ(found − source)² and Σ source²."""
        return cls(tensors, math.sqrt(error / source) if source else 0.0)


def plan_save(specs: Sequence[TensorSpec], storage: Storage | None) -> list[WriteItem]:
    """The stored type of every tensor; its own where `storage` is None. Correction biases are always float32."""
    return [WriteItem(spec, _stored_type(spec, storage)) for spec in specs]


def _stored_type(spec: TensorSpec, storage: Storage | None) -> torch.dtype:
    if spec.name.endswith(_BIAS):
        return torch.float32
    if storage is None:
        return spec.dtype
    if storage == "fp8" and is_fp8_weight(spec.name):
        return torch.float8_e4m3fn
    return _TYPES[storage]


def split_into_shards(items: Sequence[WriteItem], max_shard_size: int) -> list[list[WriteItem]]:
    """The tensors, in order, in shards of at most `max_shard_size` bytes; a larger tensor has a shard of its own."""
    if max_shard_size < 1:
        raise CheckpointError(f"max_shard_size is {max_shard_size}; it must be a positive number of bytes")
    shards: list[list[WriteItem]] = [[]]
    size = 0
    for item in items:
        if shards[-1] and size + item.bytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.bytes
    return shards


def write_tensors(weights: Weights, items: Sequence[WriteItem], directory: Path, max_shard_size: int) -> None:
    """Write the planned tensors of `weights`, and the index where there are several shards."""
    shards = split_into_shards(items, max_shard_size)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = [tensor for item in shard for tensor in item.tensors()]
        with ShardWriter(directory / file, tensors) as writer, ThreadPoolExecutor(_WORKERS) as pool:
            for _ in pool.map(lambda item: _write(weights, item, writer), shard):
                pass
        weight_map |= dict.fromkeys((name for name, _, _ in tensors), file)
    if len(shards) > 1:
        total = sum(item.bytes for item in items)
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write(weights: Weights, item: WriteItem, writer: ShardWriter) -> None:
    name, shape, _ = item.spec
    for first, last in fp8.row_chunks(shape):
        rows = weights.rows(name, first, last)
        if item.dtype != torch.float8_e4m3fn:
            writer.write(name, first, rows.to(item.dtype))
            continue
        try:
            qweight, scales = fp8.quantize(rows)
        except ValueError as error:
            raise CheckpointError(f"tensor {name}, rows {first} to {last}: {error}") from error
        writer.write(name, first, qweight)
        writer.write(name + SCALE_SUFFIX, first // fp8.BLOCK, scales)


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write a JSON file atomically."""
    atomic_write(path, json.dumps(content, indent=2) + "\n")
