"""A small model with a tokenizer, and conversations that it can learn, for the tests of post-training."""

import json
import random
from pathlib import Path
from typing import Any

import torch

from fathom.checkpoint.hf.model import save_model
from fathom.data.tokenizer import Tokenizer, train_tokenizer
from tests.model.configs import lively_model, tiny

ANIMALS = ("cat", "dog", "cow", "hen", "bee", "fox", "ape", "elk")


def small_tokenizer() -> Tokenizer:
    return train_tokenizer(["What does the cat say? The cat says meow.\n" * 3, " ".join(ANIMALS) * 3], 300)


def save_small_model(directory: Path, **changes: Any) -> Path:
    """A model with random weights and one MTP module."""
    torch.manual_seed(0)
    settings = {"vocab_size": 300, "num_nextn_predict_layers": 1, "max_position_embeddings": 256, **changes}
    save_model(lively_model(tiny(**settings)), directory, small_tokenizer())
    return directory


def exchange(animal: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"What does the {animal} say?"},
        {"role": "assistant", "content": f"The {animal} says {animal[::-1]}."},
    ]


def write_chats(path: Path, count: int = 40) -> Path:
    """Conversations of one to three turns, and pairs of a prompt and what follows it."""
    draw = random.Random(0)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        turns = [exchange(draw.choice(ANIMALS)) for _ in range(draw.choice((1, 1, 2, 3)))]
        messages = [message for turn in turns for message in turn]
        row: dict[str, Any] = {"messages": messages}
        if number % 5 == 4:
            row = {"prompt": "The " + draw.choice(ANIMALS), "completion": f" says {number}."}
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
