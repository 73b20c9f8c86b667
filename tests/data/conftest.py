"""A small corpus, and a tokenizer trained on it, for the whole room."""

import json
from pathlib import Path

import pytest

from fathom.data.tokenizer import ASSISTANT, BOS, EOS, USER, Tokenizer, train_tokenizer

TEXTS = [
    f"def area_{n}(width, height):\n    # Größe in m²: {n * 12345}\n    return width * height + {n}\n\n\n" * (n % 5 + 1)
    for n in range(60)
]


@pytest.fixture(scope="session")
def training_texts() -> list[str]:
    return TEXTS


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=400)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A directory of sixty small text files."""
    directory = tmp_path / "corpus"
    for number, text in enumerate(TEXTS):
        path = directory / f"part{number % 3}" / f"{number:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return directory


@pytest.fixture
def released_style(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A directory as DeepSeek writes it: tokens spelled out, roles not special; no FIM or padding."""
    directory = tmp_path / "released"
    directory.mkdir()
    content = json.loads(tokenizer.tokenizer_json)
    kept = [token for token in content["added_tokens"] if "fim" not in token["content"]]
    for token in kept:
        token["special"] = token["content"] not in (USER, ASSISTANT)
    content["added_tokens"] = kept
    content["model"]["vocab"] = {k: v for k, v in content["model"]["vocab"].items() if "fim" not in k}
    added = {token: {"__type": "AddedToken", "content": token, "lstrip": False} for token in (BOS, EOS)}
    config = {"bos_token": added[BOS], "eos_token": added[EOS], "pad_token": None, "add_bos_token": True}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
