"""Small models with a tokenizer, saved as directories that a run can start from."""

from pathlib import Path
from typing import Any

import torch

from fathom.checkpoint.hf.model import save_model
from fathom.data.tokenizer import SMALLEST_VOCABULARY, Tokenizer, train_tokenizer
from fathom.model.transformer import Model
from fathom.posttrain.config import LoraConfig
from fathom.posttrain.lora import adapters, add_adapters
from tests.model.configs import lively_model, tiny


def tiny_tokenizer() -> Tokenizer:
    """Bytes, and the control tokens."""
    return train_tokenizer(["a text"], SMALLEST_VOCABULARY)


def save_tiny(directory: Path, seed: int = 0, std: float = 0.05, **changes: Any) -> Path:
    """A model of random weights with one MTP module, as `fathom train` would leave it."""
    tokenizer = tiny_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    sizes = {"vocab_size": SMALLEST_VOCABULARY, "num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    save_model(lively_model(tiny(**{**sizes, **ids, **changes}), seed, std), directory, tokenizer)
    return directory


@torch.no_grad()
def adapted(model: Model, experts: bool = False, rank: int = 3, std: float = 0.1) -> Model:
    """The model with adapters that change it."""
    add_adapters(model, LoraConfig(rank, alpha=5, experts=experts), seed=0)
    generator = torch.Generator().manual_seed(1)
    for adapter in adapters(model).values():
        adapter.B.copy_(std * torch.randn(adapter.B.shape, generator=generator))
    return model
