"""A digest per file of a checkpoint, written with it and compared before training goes on from it.

XXH3 is no cryptographic hash: it finds what a disk, a cable or a copy damages, at the speed of memory.
"""

import hashlib
import json
from pathlib import Path

import xxhash

from fathom.checkpoint.hf.directory import read_json_object
from fathom.checkpoint.hf.safetensors_io import CheckpointError
from fathom.files import atomic_write

DIGESTS = Path("training_state") / "digests.json"


def write_digests(checkpoint: Path) -> None:
    """Write the digests of all files in `checkpoint`, by their paths relative to it."""
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file())
    digests = {file.relative_to(checkpoint).as_posix(): _digest(file) for file in files}
    atomic_write(checkpoint / DIGESTS, json.dumps(digests, indent=2) + "\n")


def verify_digests(checkpoint: Path) -> int:
    """Compare every file with its digest; returns how many files there are.

    Raises CheckpointError, which names the file, where one is damaged or missing, or where there are no digests.
    """
    if not (checkpoint / DIGESTS).is_file():
        raise CheckpointError(f"{checkpoint} has no {DIGESTS}: only checkpoints of `fathom train` have digests")
    digests = read_json_object(checkpoint / DIGESTS)
    for name, digest in digests.items():
        try:
            found = _digest(checkpoint / name)
        except OSError as error:
            raise CheckpointError(f"{checkpoint / name} cannot be read: {error.strerror}") from error
        if found != digest:
            raise CheckpointError(f"{checkpoint / name} is damaged: it is not what was written (another digest)")
    return len(digests)


def digest_of(*files: Path) -> str:
    """One digest of the contents of several files, in this order."""
    return xxhash.xxh3_128_hexdigest(" ".join(map(_digest, files)).encode())


def _digest(file: Path) -> str:
    with open(file, "rb", buffering=0) as content:
        return hashlib.file_digest(content, xxhash.xxh3_128).hexdigest()
