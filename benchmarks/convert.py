"""Speed of conversions against copying the same files with a checksum, and their peak memory.

    python benchmarks/convert.py                    # a checkpoint of 8 GB (28 GB of disk, a quarter of an hour)
    python benchmarks/convert.py --quick            # of 0.5 GB
    python benchmarks/convert.py --json FILE        # rows {name, ours, peer, ratio, floor, goal, resident} as well

Every step runs in a process of its own, so that its peak memory can be measured; steps are interleaved, so that a
drift of the disk's speed affects all alike. Speed is the bf16 model's bytes per second, whichever side of the
conversion it is on. All flush their output to the disk. Weights are random.
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fathom import presets
from fathom.checkpoint.convert import convert, convert_gguf
from fathom.checkpoint.hf.model import write_config
from fathom.checkpoint.hf.name_mapping import released_tensors
from fathom.checkpoint.hf.safetensors_io import check_disk_space, sync
from fathom.checkpoint.hf.save import plan_save, write_tensors
from fathom.checkpoint.hf.weights import TensorSpec, meta_model
from fathom.checkpoint.info import weight_bytes
from fathom.files import atomic_directory
from fathom.model.config import ModelConfig

SHARD_BYTES = 10**9
RESIDENT_LIMIT = 2 * 10**9
FLOOR, GOAL = 0.7, 1.0
_CHUNK = 1 << 24


class RandomWeights:
    """A checkpoint of any size from a million random values."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        tensors = released_tensors(meta_model(config), config)
        self._specs = [TensorSpec(name, tuple(tensor.shape), torch.bfloat16) for name, tensor in tensors]
        self._shapes = {spec.name: spec.shape for spec in self._specs}
        generator = torch.Generator().manual_seed(0)
        self._pool = torch.randn(1 << 20, generator=generator).mul(0.02).bfloat16()

    def specs(self) -> list[TensorSpec]:
        return self._specs

    def rows(self, name: str, first: int, last: int) -> Tensor:
        shape = self._shapes[name]
        columns = shape[1] if len(shape) > 1 else 1
        elements = (last - first) * columns
        return self._pool.repeat(-(-elements // len(self._pool)))[:elements].view(-1, columns)


def synthetic(target_bytes: float) -> ModelConfig:
    """A model with an MTP module whose bf16 weights take about `target_bytes`: as many equal layers as needed."""
    shape = presets.ALL["16b-a3b"]().model
    config = replace(shape, num_hidden_layers=2, n_routed_experts=16, n_group=1, topk_group=1)
    if target_bytes < 2e9:
        config = replace(config, hidden_size=1024, moe_intermediate_size=704, vocab_size=16384)
    while True:
        bytes_ = weight_bytes(config)["bf16"]
        assert bytes_ is not None
        if bytes_ >= target_bytes:
            return config
        config = replace(config, num_hidden_layers=config.num_hidden_layers + 1)


def copy(source: Path, target: Path) -> None:
    """The baseline: every byte is read, hashed and written."""
    target.mkdir()
    for file in sorted(source.iterdir()):
        digest = hashlib.sha256()
        with open(file, "rb", buffering=0) as reading, open(target / file.name, "wb", buffering=0) as writing:
            while chunk := reading.read(_CHUNK):
                digest.update(chunk)
                writing.write(chunk)
            os.fsync(writing.fileno())
        print(digest.hexdigest(), file.name, file=sys.stderr)
    sync(target)


STEPS: dict[str, Callable[[Path, Path], object]] = {
    "copy": copy,
    "bf16 to FP8": lambda source, target: convert(source, target, "fp8", SHARD_BYTES),
    "FP8 to bf16": lambda source, target: convert(source, target, "bf16", SHARD_BYTES),
    "bf16 to GGUF": lambda source, target: convert_gguf(source, target, "bf16"),
}


def step(name: str, source: Path, target: Path) -> None:
    """One step, in this process; prints its seconds and its peak resident bytes."""
    began = time.perf_counter()
    STEPS[name](source, target)
    seconds = time.perf_counter() - began
    # macOS counts bytes, Linux kibibytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": seconds, "resident": peak}))


def measure(name: str, source: Path, target: Path) -> tuple[float, int]:
    """Seconds and peak resident bytes of a step in a new process."""
    words = [sys.executable, __file__, "--step", name, str(source), str(target)]
    answer = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True)
    found = json.loads(answer.stdout.splitlines()[-1])
    return found["seconds"], found["resident"]


def turn(folder: Path) -> dict[str, tuple[float, int]]:
    """Every step once; output is removed as soon as no later step needs it."""
    bf16 = folder / "bf16"
    found = {}
    for name, source, unneeded in (
        ("copy", bf16, True),
        ("bf16 to FP8", bf16, False),
        ("FP8 to bf16", folder / "bf16 to FP8", True),
        ("bf16 to GGUF", bf16, True),
    ):
        found[name] = measure(name, source, folder / name)
        if unneeded:
            shutil.rmtree(folder / name)
    shutil.rmtree(folder / "bf16 to FP8")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="0.5 GB")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--folder", type=Path, help="where the files are made, and removed; else the temporary folder")
    parser.add_argument("--step", nargs=3, metavar=("NAME", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step is not None:
        step(options.step[0], Path(options.step[1]), Path(options.step[2]))
        return
    config, turns = synthetic(0.5e9 if options.quick else 8e9), 3 if options.quick else 2
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        weights = RandomWeights(config)
        planned = plan_save(weights.specs(), "bf16")
        total = sum(tensor.bytes for tensor in planned)
        check_disk_space(Path(name) / "bf16", 3 * total)
        with atomic_directory(Path(name) / "bf16") as staging:
            write_config(config, staging, "bf16")
            write_tensors(weights, planned, staging, SHARD_BYTES)
        found = [turn(Path(name)) for _ in range(turns)]
    report(found, total, options.json)


def report(found: list[dict[str, tuple[float, int]]], total: int, file: Path | None) -> None:
    speeds = {name: total / median(turn[name][0] for turn in found) for name in STEPS}
    resident = {name: max(turn[name][1] for turn in found) for name in STEPS}
    peer = speeds.pop("copy")
    table = Table(
        "conversion", "MB/s", "of copying", "resident MB", title=f"{total / 1e9:.2f} GB, copy {peer / 1e6:.0f} MB/s"
    )
    rows = []
    for name, speed in speeds.items():
        ratio = speed / peer
        table.add_row(name, f"{speed / 1e6:.0f}", f"{ratio:.0%}", f"{resident[name] / 1e6:.0f}")
        row = {"name": name, "ours": speed, "peer": peer, "ratio": ratio, "floor": FLOOR, "goal": GOAL}
        rows.append({**row, "resident": resident[name]})
    Console(width=100).print(table)
    if file is not None:
        file.write_text(json.dumps(rows, indent=2) + "\n")
    largest = max(row["resident"] for row in rows)
    if largest > RESIDENT_LIMIT:
        sys.exit(f"{largest / 1e9:.2f} GB were resident; the limit is {RESIDENT_LIMIT / 1e9:.0f} GB")


if __name__ == "__main__":
    main()
