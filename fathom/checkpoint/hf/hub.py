"""Uploading a model directory to the Hugging Face hub."""

import re
from pathlib import Path

from fathom.checkpoint.hf.safetensors_io import CheckpointError
from fathom.checkpoint.hf.weights import StoredWeights

_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_PUBLIC = [
    "*.safetensors",
    "*.gguf",
    "*.json",
    "*.jinja",
    "*.model",
    "merges.txt",
    "README.md",
    "LICENSE*",
]
_PRIVATE = ["*/*"]
"""Folders within, such as a checkpoint's training state, stay at home."""


def push(directory: Path, repo: str, private: bool, message: str) -> str:
    """Upload the model in `directory` to the hub's repository `repo`, made where needed; returns its address.

    The directory must hold a model that loads, whole, or a GGUF file: a broken upload is found before it begins.
    Raises CheckpointError where it does not, ValueError for a `repo` that is no owner/name.
    """
    if not _REPO.fullmatch(repo):
        raise ValueError(f"REPO is {repo!r}; it must be owner/name")
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    if not any(directory.glob("*.gguf")):
        StoredWeights(directory)
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(repo, private=private, exist_ok=True)
    api.upload_folder(
        repo_id=repo,
        folder_path=directory,
        commit_message=message,
        allow_patterns=_PUBLIC,
        ignore_patterns=_PRIVATE,
    )
    return str(url)
