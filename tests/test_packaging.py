"""What a newcomer touches first: make's targets, the set-up's refusals, and the floor plan they build on."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    cleared = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "TORCH_INDEX", "TORCH_VERSION", "MAKEFLAGS")}
    return subprocess.run(
        command,
        cwd=cwd,
        env={**cleared, **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the set-up reads, so that it cannot touch this checkout's .venv."""
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/setup.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def command(path: Path, body: str) -> str:
    """A shell command at ``path`` that stands in for a real program."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def setup(checkout: Path, *arguments: str, **environment: str) -> str:
    """Runs the set-up, which must refuse, and returns what it said."""
    result = run("sh", "scripts/setup.sh", *arguments, cwd=checkout, **environment)
    assert result.returncode == 1
    assert not (checkout / ".venv").exists()
    return result.stderr


def test_make_alone_lists_every_target_a_person_needs() -> None:
    text = run("make").stdout
    for target in ("help", "setup", "demo", "test", "check", "bench", "clean"):
        assert f"  make {target} " in text
    assert "TORCH_INDEX=https://download.pytorch.org/whl/cpu" in text


def test_make_bench_runs_files_that_exist() -> None:
    script = run("make", "--dry-run", "bench").stdout
    named = re.search(r"for name in ([\w ]+);", script)
    assert named is not None and "convert" in named[1].split()
    for name in named[1].split():
        assert (ROOT / "benchmarks" / f"{name}.py").is_file()


def test_an_old_python_is_refused(checkout: Path) -> None:
    old = command(checkout / "bin" / "python3", "echo 3.9")
    path = f"{checkout / 'bin'}:/usr/bin:/bin"
    assert f"'{old}' is Python 3.9; Fathom needs 3.11 or newer" in setup(checkout, PYTHON=old)
    command(checkout / "bin" / "python3.11", "exit 127")  # a version manager's command with nothing behind it
    assert "'python3' is Python 3.9; Fathom needs 3.11 or newer" in setup(checkout, PATH=path)


def test_a_python_that_does_not_run_is_refused(checkout: Path) -> None:
    assert "'no-such-python' does not run" in setup(checkout, PYTHON="no-such-python")


def test_a_python_without_venv_is_refused(checkout: Path) -> None:
    body = 'case "$2" in *version_info*) echo 3.11 ;; *) exit 1 ;; esac'
    bare = command(checkout / "bin" / "python3", body)
    assert "apt install python3-venv" in setup(checkout, PYTHON=bare)


def test_a_full_disk_is_refused_before_anything_is_made(checkout: Path) -> None:
    python = command(checkout / "bin" / "python3", "echo 3.11")
    command(checkout / "bin" / "df", "printf 'header\\n/dev/disk 100 50 1048576 50%% /\\n'")
    path = f"{checkout / 'bin'}:/usr/bin:/bin"
    assert "1024 MB free here; torch and the rest need about 3 GB" in setup(checkout, PYTHON=python, PATH=path)


def test_bad_options_are_refused(checkout: Path) -> None:
    assert "unknown argument 'tests'" in setup(checkout, "tests")
    assert "TORCH_VERSION is 'latest!'" in setup(checkout, TORCH_VERSION="latest!")


def test_the_floor_plan_has_every_room_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (contract,) = project["tool"]["importlinter"]["contracts"]
    rooms = [room.strip(" ()") for layer in contract["layers"] for room in layer.split("|")]
    assert len(rooms) == len(set(rooms))
    # `exhaustive` is what makes a room nobody placed fail the contract; both ends are where they belong.
    assert contract["exhaustive"] and rooms[0] == "cli" and rooms[-1] == "files"


def test_the_pins_are_versions_that_the_package_allows() -> None:
    requirements = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = {
        r.name: r.specifier
        for r in map(requirements.Requirement, project["dependencies"] + project["optional-dependencies"]["test"])
    }
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert set(allowed) <= set(pins)
    for name, version in pins.items():
        assert name not in allowed or allowed[name].contains(version), f"{name}=={version} is outside {allowed[name]}"
