"""From one model directory to another in a different type, a few rows at a time.

Reads whatever can be loaded: bf16 or float32, FP8 blocks, experts one by one or stacked. Writes our layout, which is
the released one. Memory does not grow with the model; disk space is checked before, the new directory gets its name
after everything, the check included, went well.
"""

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fathom.checkpoint.hf.directory import model_directory
from fathom.checkpoint.hf.model import staged, write_config
from fathom.checkpoint.hf.model_card import display_name, write_card
from fathom.checkpoint.hf.safetensors_io import CheckpointError, check_disk
from fathom.checkpoint.hf.save import SHARD_BYTES, Planned, Storage, Verified, plan, write_tensors
from fathom.checkpoint.hf.weights import StoredWeights, Weights
from fathom.data.tokenizer import load_tokenizer
from fathom.quantization import fp8

if TYPE_CHECKING:
    from fathom.checkpoint.gguf.tensors import DType

_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "*.model",
    "LICENSE*",
)
"""Files that go along as they are. Programs (`*.py`) never do."""


def convert(
    source: str | Path,
    out: str | Path,
    storage: Storage,
    max_shard_size: int = SHARD_BYTES,
    verify: bool = False,
) -> Verified | None:
    """Write the model at `source` (a directory, or a name on the hub) as the directory `out`, stored as `storage`.

    The tokenizer's files go along, and a model card is written. With `verify` the result is read back and compared
    with the source, number by number, before it is called `out`.

    Raises CheckpointError for a source that cannot be loaded, ValueError where source and target are one, where the
    disk is too full, where FP8 would be made from FP8, and where the comparison fails.
    """
    directory, target = model_directory(source), Path(out)
    if directory.resolve() == target.resolve():
        raise ValueError(f"--out is {str(target)!r}, the model itself; it must be another directory")
    weights = StoredWeights(directory)
    if storage == "fp8" and weights.holds_fp8:
        raise ValueError(f"{directory} holds FP8 blocks already; copy it, or convert it to bf16 or f32")
    planned = plan(weights.entries(), storage)
    check_disk(target, sum(tensor.bytes for tensor in planned))
    with staged(target) as staging:
        write_config(weights.config, staging, storage)
        _copy_companions(directory, staging)
        write_card(weights.config, directory, staging, storage)
        write_tensors(weights, planned, staging, max_shard_size)
        return compare(weights, StoredWeights(staging), planned) if verify else None


def convert_gguf(
    source: str | Path, out: str | Path, dtype: "DType", verify: bool = False
) -> tuple[Path, Verified | None]:
    """Write the model at `source`, with its tokenizer, as a GGUF file in the directory `out`; returns the file.

    The file is named after the source; with `verify` it is read back and compared before it is called so.

    Raises CheckpointError for a source that cannot be loaded, ValueError for what llama.cpp would run differently,
    where the disk is too full and where the comparison fails, ImportError without the gguf package.
    """
    from fathom.checkpoint.gguf.writer import write_gguf

    directory, target = model_directory(source), Path(out)
    weights = StoredWeights(directory)
    tokenizer = load_tokenizer(directory) if (directory / "tokenizer.json").is_file() else None
    file = target / f"{display_name(directory)}-{dtype}.gguf"
    verified = write_gguf(weights, tokenizer, file, dtype, verify)
    write_card(weights.config, directory, target, f"GGUF, {dtype}")
    return file, verified


def compare(source: Weights, found: Weights, planned: list[Planned]) -> Verified:
    """Compare every tensor with its source; raises CheckpointError for the first that is not its rounding."""
    squares = torch.zeros(2, dtype=torch.float64)
    for tensor in planned:
        name, shape, _ = tensor.entry
        for first, last in fp8.row_chunks(shape):
            expected, got = source.rows(name, first, last), found.rows(name, first, last)
            if not _is_rounding(got, expected, tensor.dtype):
                raise CheckpointError(f"tensor {name}, rows {first} to {last}: not what was read from the source")
            expected = expected.float()
            squares += torch.stack([(got.float() - expected).square().sum(), expected.square().sum()])
    error, size = squares.tolist()
    return Verified(len(planned), math.sqrt(error / size) if size else 0.0)


def _is_rounding(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    if dtype != torch.float8_e4m3fn:
        return torch.equal(found, expected.to(dtype))
    expected = expected.float()
    # Half a step, and the rounding of the scale and of two products in float32.
    bound = fp8.rounding_bound(expected, fp8.quantize(expected)[1]) * (1 + 1e-5)
    return bool(((found - expected).abs() <= bound).all())


def _copy_companions(source: Path, target: Path) -> None:
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
