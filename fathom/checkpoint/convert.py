"""Converting a model directory to another storage type, a few rows at a time.

Reads whatever can be loaded: bf16 or float32, FP8 blocks, experts one by one or stacked. Writes the released layout.
Memory does not grow with the model. Disk space is checked first, and the result gets its name only when it is complete
and, with `verify`, was read back and compared.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fathom.checkpoint.hf.directory import WEIGHT_FILES, model_directory
from fathom.checkpoint.hf.model import write_config
from fathom.checkpoint.hf.model_card import display_name, write_model_card
from fathom.checkpoint.hf.safetensors_io import CheckpointError, check_disk_space
from fathom.checkpoint.hf.save import SHARD_BYTES, Storage, Verification, WriteItem, plan_save, write_tensors
from fathom.checkpoint.hf.weights import CheckpointWeights, Weights
from fathom.data.tokenizer import load_tokenizer
from fathom.files import atomic_directory
from fathom.quantization import fp8

if TYPE_CHECKING:
    from fathom.checkpoint.gguf.tensors import DType

_COPIED = (
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
"""Files that are copied unchanged. Programs (`*.py`) never are."""


def convert(
    source: str | Path,
    out: str | Path,
    storage: Storage,
    max_shard_size: int = SHARD_BYTES,
    verify: bool = False,
) -> Verification | None:
    """Write the model at `source` (a directory, or a name on the hub) as the directory `out`, stored as `storage`.

    The tokenizer's files are copied, and a model card is written. With `verify` the result is read back and every value
    compared with its source before the result gets the name `out`.

    Raises CheckpointError for a source that cannot be loaded, ValueError where source and target are the same
    directory, where the disk is too full, where FP8 would be made from FP8, and where the comparison fails.
    """
    directory, target = model_directory(source), Path(out)
    if directory.resolve() == target.resolve():
        raise ValueError(f"--out is {str(target)!r}, the source itself; it must be another directory")
    weights = CheckpointWeights(directory)
    if storage == "fp8" and weights.has_fp8:
        raise ValueError(f"{directory} is in FP8 already; copy it, or convert it to bf16 or f32")
    items = plan_save(weights.specs(), storage)
    check_disk_space(target, sum(item.bytes for item in items))
    with atomic_directory(target, replaced=WEIGHT_FILES) as staging:
        write_config(weights.config, staging, storage)
        _copy_files(directory, staging)
        write_model_card(weights.config, directory, staging, storage)
        write_tensors(weights, items, staging, max_shard_size)
        return compare(weights, CheckpointWeights(staging), items) if verify else None


def convert_gguf(
    source: str | Path, out: str | Path, dtype: "DType", verify: bool = False
) -> tuple[Path, Verification | None]:
    """Write the model at `source`, with its tokenizer, as a GGUF file in the directory `out`; returns the file.

    The file is named after the source. With `verify` it is read back and compared before it gets its name.

    Raises CheckpointError for a source that cannot be loaded, ValueError for what llama.cpp would run differently,
    where the disk is too full and where the comparison fails, ImportError without the gguf package.
    """
    from fathom.checkpoint.gguf.writer import write_gguf

    directory, target = model_directory(source), Path(out)
    weights = CheckpointWeights(directory)
    tokenizer = load_tokenizer(directory) if (directory / "tokenizer.json").is_file() else None
    file = target / f"{display_name(directory)}-{dtype}.gguf"
    verification = write_gguf(weights, tokenizer, file, dtype, verify)
    write_model_card(weights.config, directory, target, f"GGUF, {dtype}")
    return file, verification


def compare(source: Weights, found: Weights, items: list[WriteItem]) -> Verification:
    """Compare every tensor with its source; raises CheckpointError for the first that is not correctly rounded."""
    squares = torch.zeros(2, dtype=torch.float64)
    for item in items:
        name, shape, _ = item.spec
        for first, last in fp8.row_chunks(shape):
            expected, got = source.rows(name, first, last), found.rows(name, first, last)
            if not _is_rounding(got, expected, item.dtype):
                raise CheckpointError(
                    f"tensor {name}, rows {first} to {last}: what was written differs from the source"
                )
            expected = expected.float()
            squares += torch.stack([(got.float() - expected).square().sum(), expected.square().sum()])
    return Verification.from_squares(len(items), *squares.tolist())


def _is_rounding(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether `found` is `expected` rounded to the type."""
    if dtype != torch.float8_e4m3fn:
        return torch.equal(found, expected.to(dtype))
    expected = expected.float()
    # Half a step, plus the rounding of the scale, the division and the product in float32.
    bound = fp8.rounding_bound(expected, fp8.quantize(expected)[1]) * (1 + 1e-5)
    return bool(((found - expected).abs() <= bound).all())


def _copy_files(source: Path, target: Path) -> None:
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
