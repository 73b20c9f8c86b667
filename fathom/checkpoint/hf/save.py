"""Writing a model's tensors as sharded safetensors, in the types asked for, a few rows of a few tensors at a time."""

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from fathom.checkpoint.hf.directory import INDEX, SINGLE
from fathom.checkpoint.hf.name_mapping import SCALE_SUFFIX, is_fp8_weight
from fathom.checkpoint.hf.safetensors_io import CheckpointError, ShardWriter
from fathom.checkpoint.hf.weights import Entry, Weights
from fathom.config import atomic_write
from fathom.quantization import fp8

Storage = Literal["f32", "bf16", "fp8"]
"""How weights are stored. `fp8`: as DeepSeek-V3's release, the large matrices in FP8 blocks and the rest bfloat16."""

SHARD_BYTES = 5 * 10**9
"""Files are cut at this size where nothing else is asked for."""
_TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
_BIAS = ".e_score_correction_bias"
_WORKERS = 2


class Planned(NamedTuple):
    """One tensor and how it will be stored."""

    entry: Entry
    dtype: torch.dtype
    """float8_e4m3fn means that a tensor of scales goes with it."""

    def tensors(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """What goes into the file: name, type and shape, a scale behind its weight."""
        name, shape, _ = self.entry
        if self.dtype != torch.float8_e4m3fn:
            return [(name, self.dtype, shape)]
        scales = (name + SCALE_SUFFIX, torch.float32, fp8.scale_shape(shape[0], shape[1]))
        return [(name, self.dtype, shape), scales]

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self.tensors())


@dataclass(frozen=True)
class Verified:
    """What reading the result back and comparing it with its source showed."""

    tensors: int
    relative_error: float
    """√(Σ(found − source)² / Σ source²) over all weights: 0 where nothing was rounded."""


def plan(entries: Sequence[Entry], storage: Storage | None) -> list[Planned]:
    """The type of every tensor; without a `storage` it is its own. Correction biases are float32 in any."""
    return [Planned(entry, _stored_type(entry, storage)) for entry in entries]


def _stored_type(entry: Entry, storage: Storage | None) -> torch.dtype:
    if entry.name.endswith(_BIAS):
        return torch.float32
    if storage is None:
        return entry.dtype
    if storage == "fp8" and is_fp8_weight(entry.name):
        return torch.float8_e4m3fn
    return _TYPES[storage]


def cut(planned: Sequence[Planned], max_shard_size: int) -> list[list[Planned]]:
    """The tensors, in order, in shards of at most `max_shard_size` bytes (a larger tensor stands alone)."""
    if max_shard_size < 1:
        raise CheckpointError(f"max_shard_size is {max_shard_size}; it must be a positive number of bytes")
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in planned:
        if shards[-1] and size + tensor.bytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    return shards


def write_tensors(weights: Weights, planned: Sequence[Planned], directory: Path, max_shard_size: int) -> None:
    """Write all planned tensors of `weights`, and the index where there are several files."""
    shards = cut(planned, max_shard_size)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = [tensor for part in shard for tensor in part.tensors()]
        with ShardWriter(directory / file, tensors) as writer, ThreadPoolExecutor(_WORKERS) as pool:
            for _ in pool.map(lambda part: _write(weights, part, writer), shard):
                pass
        weight_map |= dict.fromkeys((name for name, _, _ in tensors), file)
    if len(shards) > 1:
        total = sum(tensor.bytes for tensor in planned)
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write(weights: Weights, planned: Planned, writer: ShardWriter) -> None:
    name, shape, _ = planned.entry
    for first, last in fp8.row_chunks(shape):
        rows = weights.rows(name, first, last)
        if planned.dtype != torch.float8_e4m3fn:
            writer.write(name, first, rows.to(planned.dtype))
            continue
        try:
            qweight, scales = fp8.quantize(rows)
        except ValueError as error:
            raise CheckpointError(f"tensor {name}, rows {first} to {last}: {error}") from error
        writer.write(name, first, qweight)
        writer.write(name + SCALE_SUFFIX, first // fp8.BLOCK, scales)


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write a JSON file in one step."""
    atomic_write(path, json.dumps(content, indent=2) + "\n")
