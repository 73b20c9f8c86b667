"""Uploading a model directory to the Hugging Face hub."""

import re
from pathlib import Path

from fathom.checkpoint.hf.directory import BESIDE_WEIGHTS
from fathom.checkpoint.hf.safetensors_io import CheckpointError
from fathom.checkpoint.hf.weights import CheckpointWeights

_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_UPLOADED = [*BESIDE_WEIGHTS, "*.safetensors", "*.gguf", "README.md"]
_IGNORED = ["*/*"]
"""Subdirectories, such as a checkpoint's training state, are not uploaded."""


def push(directory: Path, repo: str, private: bool, message: str) -> str:
    """Upload the model in `directory` to the hub's repository `repo`, created if necessary; returns its URL.

    Raises CheckpointError, before anything is uploaded, where the directory holds neither a complete model that loads
    nor a GGUF file; ValueError where `repo` is not owner/name.
    """
    if not _REPO.fullmatch(repo):
        raise ValueError(f"REPO is {repo!r}; it must be owner/name")
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    if not any(directory.glob("*.gguf")):
        CheckpointWeights(directory)
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(repo, private=private, exist_ok=True)
    api.upload_folder(
        repo_id=repo,
        folder_path=directory,
        commit_message=message,
        allow_patterns=_UPLOADED,
        ignore_patterns=_IGNORED,
    )
    return str(url)
