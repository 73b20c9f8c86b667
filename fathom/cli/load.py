"""Loading a model with its tokenizer, for the commands that run one."""

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
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    place = usable_device(name)
    if place.type == "cpu":
        install_allocator()
    directory = model_directory(path)
    tokenizer = load_tokenizer(directory)  # before the weights, which may take minutes
    model = load_model(directory, getattr(torch, dtype), place)
    return model if quantize is None else quantized(model, quantize), tokenizer
