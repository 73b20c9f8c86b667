"""A random model that ends its turns now and then."""

from pathlib import Path

import torch

from fathom.checkpoint.hf.model import load_model, save_model
from fathom.data.tokenizer import load_tokenizer
from tests.serve.random_model import save_random_model


@torch.no_grad()
def save_talking_model(path: Path) -> Path:
    """Write it: flat enough for samples to differ, with an end of turn whose probability varies."""
    save_random_model(path)
    model, tokenizer = load_model(path), load_tokenizer(path)
    model.lm_head.weight *= 0.4
    model.lm_head.weight[tokenizer.eos_id] *= 3
    save_model(model, path, tokenizer)
    return path
