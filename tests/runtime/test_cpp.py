"""Building the kernels: what decides whether they are used, and what happens without a compiler."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fathom.ops import cpu
from fathom.runtime.cpp import load_library

_WITH_KERNELS = pytest.mark.skipif(cpu.missing() is not None, reason=f"no kernels here: {cpu.missing()}")


@_WITH_KERNELS
def test_the_kernels_are_used_here() -> None:
    """Every test of the operations against their references is a test of the kernels only if these are built."""
    assert cpu.missing() is None
    assert cpu.usable(torch.zeros(1)) and cpu.usable(torch.zeros(1, dtype=torch.bfloat16))


def test_other_tensors_are_left_to_torch() -> None:
    assert not cpu.usable(torch.zeros(1, dtype=torch.float64))
    assert not cpu.usable(torch.zeros(1, dtype=torch.float16))
    assert not cpu.usable(torch.zeros(1, device="meta"))
    assert not cpu.usable(torch.zeros(1), torch.zeros(1, device="meta"))


@_WITH_KERNELS
def test_disabled_holds_for_the_block_alone() -> None:
    with pytest.raises(ValueError, match="inside"), cpu.disabled():
        assert not cpu.usable(torch.zeros(1))
        raise ValueError("inside")
    assert cpu.usable(torch.zeros(1))


PROGRAM = """
import torch
from fathom.ops import cpu
from fathom.ops.norm import rms_norm
print(cpu.missing())
print(rms_norm(torch.full((1, 4), 2.0), torch.ones(4), 0.0).tolist())
"""


def run(**environment: str) -> tuple[str, str]:
    found = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    why, result = found.stdout.splitlines()
    return why, result


def test_without_a_compiler_plain_torch_does_the_work(tmp_path: Path) -> None:
    why, result = run(PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    assert "no C++ compiler" in why and "apt install g++" in why
    assert result == "[[1.0, 1.0, 1.0, 1.0]]"


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'unknown option -march=native' >&2\nexit 1\n")
    broken.chmod(0o755)
    why, result = run(PATH=f"{tmp_path}:/usr/bin:/bin", XDG_CACHE_HOME=str(tmp_path))
    assert "unknown option -march=native" in why
    assert result == "[[1.0, 1.0, 1.0, 1.0]]"
    assert not list(tmp_path.rglob("*.so"))


@_WITH_KERNELS
def test_a_library_is_built_once_for_each_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "answer.cpp"
    made = []
    for answer in (42, 42, 43):
        source.write_text(f'extern "C" int answer() {{ return {answer}; }}')
        library = load_library("answer", [source])
        assert isinstance(library, ctypes.CDLL) and library.answer() == answer
        made.append({path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()})
    assert made[0] == made[1] and len(made[1]) == 1
    assert made[1].items() < made[2].items() and len(made[2]) == 2
