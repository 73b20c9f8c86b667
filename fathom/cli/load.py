"""Loading a model with its tokenizer, for the commands that run one."""

from pathlib import Path
from typing import Literal

import torch

from fathom.checkpoint.hf.directory import model_directory
from fathom.checkpoint.hf.model import load_model
from fathom.data.tokenizer import Tokenizer, load_tokenizer
from fathom.model.quantize import quantized
from fathom.model.transformer import Model
from fathom.quantization.integer import Precision
from fathom.runtime.hardware import install_allocator, usable_device

Dtype = Literal["float32", "bfloat16"]


def load(
    path: str, dtype: Dtype, quantize: Precision | None = None, device: str | None = None
) -> tuple[Model, Tokenizer]:
    """A model directory, or a name on the hub; without `device` on a GPU if there is one.

    Raises ConfigError for a device that cannot be used, and whatever a model that cannot be loaded raises.
    """
    place = _place(device)
    directory = model_directory(path)
    tokenizer = load_tokenizer(directory)  # before the weights, which may take minutes
    return _load_model(directory, dtype, quantize, place), tokenizer


def load_for_ids(
    path: str, dtype: Dtype, quantize: Precision | None = None, device: str | None = None
) -> tuple[Model, Tokenizer | None, str]:
    """As `load`; but of a directory without tokenizer.json the tokenizer may be None: then the text says why."""
    directory = model_directory(path)
    if not (directory / "tokenizer.json").is_file():
        try:
            load_tokenizer(directory)
        except (FileNotFoundError, ValueError) as error:
            return _load_model(directory, dtype, quantize, _place(device)), None, str(error)
    return *load(path, dtype, quantize, device), ""


def _place(device: str | None) -> torch.device:
    place = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cpu":
        install_allocator()
    return place


def _load_model(directory: Path, dtype: Dtype, quantize: Precision | None, place: torch.device) -> Model:
    model = load_model(directory, getattr(torch, dtype), place)
    return model if quantize is None else quantized(model, quantize)
