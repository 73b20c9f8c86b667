"""Writing a model directory so that it appears, or replaces an older one, only when it is complete."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fathom.checkpoint.hf.directory import INDEX
from fathom.checkpoint.hf.safetensors_io import CheckpointError, sync


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """An empty directory beside `target`, which becomes the model at `target` when the block ends without an error.

    After an error, or a Ctrl-C, it is removed and `target` is unchanged. Files of an older model at `target` that are
    not weights are kept.
    """
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; a model is a directory")
    target = target.resolve()
    if Path.cwd().is_relative_to(target):
        raise CheckpointError(f"{target} is the working directory or a parent of it, and cannot be replaced")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = _temporary_sibling(target)
    try:
        os.chmod(staging, 0o755)
        yield staging
        _replace(target, staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _temporary_sibling(target: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))


def _replace(target: Path, staging: Path) -> None:
    """Make the staged directory the model at `target`.

    Both models are complete at any moment: directories are renamed, and the old one is deleted only after the new one
    has its name and those files of the old one that are no part of a model.
    """
    if not target.exists():
        os.rename(staging, target)
    else:
        replaced = _temporary_sibling(target)
        os.rename(target, replaced)
        try:
            os.rename(staging, target)
        except BaseException:
            os.rename(replaced, target)
            raise
        for file in replaced.iterdir():
            is_weights = file.name == INDEX or file.match("model*.safetensors")
            if not is_weights and not (target / file.name).exists():
                os.rename(file, target / file.name)
        shutil.rmtree(replaced)
    sync(target.parent)
