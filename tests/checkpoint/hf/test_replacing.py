"""Replacing a model: complete at every moment, and nothing of the old one lost."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fathom.checkpoint.hf import save as writing
from fathom.checkpoint.hf.model import CheckpointError, load_model, save_model
from tests.checkpoint.directories import (
    INDEX,
    SINGLE,
    assert_same_model,
)
from tests.model.configs import lively_model, tiny

pytestmark = pytest.mark.filterwarnings("error")


def test_saving_over_a_model_replaces_it_and_keeps_other_files(tmp_path: Path) -> None:
    target = tmp_path / "model"
    save_model(lively_model(tiny(), seed=1), target, max_shard_size=6000)
    (target / "README.md").write_text("mine")
    (target / "training_state").mkdir()
    (target / "training_state" / "state.json").write_text("{}")

    for newer, size in (
        (lively_model(tiny(), seed=2), 10**9),
        (lively_model(tiny(vocab_size=70), seed=3), 9000),
    ):
        save_model(newer, target, max_shard_size=size)
        assert_same_model(load_model(target), newer)
        shards = {file.name for file in target.glob("*.safetensors")}
        if size == 10**9:
            assert shards == {SINGLE} and not (target / INDEX).exists()
        else:
            index = json.loads((target / INDEX).read_text())
            assert shards == set(index["weight_map"].values())
    assert (target / "README.md").read_text() == "mine"
    assert (target / "training_state" / "state.json").read_text() == "{}"


@pytest.mark.parametrize("moment", range(1, 5))
def test_a_replacement_killed_at_any_moment_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Killed before the n-th rename: both models are complete, under the target's name or beside it."""
    target = tmp_path / "model"
    old, new = lively_model(tiny(), seed=1), lively_model(tiny(), seed=2)
    save_model(old, target)
    (target / "notes.txt").write_text("mine")
    rename, calls = os.rename, []

    class Killed(BaseException):
        pass

    def killed(*names: Any) -> None:
        calls.append(names)
        if len(calls) >= moment:
            raise Killed
        rename(*names)

    monkeypatch.setattr(os, "rename", killed)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    if moment == 4:
        save_model(new, target)
    else:
        with pytest.raises(Killed):
            save_model(new, target)
    monkeypatch.undo()
    found = {path: load_model(path) for path in tmp_path.iterdir() if any(path.glob("*.safetensors"))}
    if target in found:
        assert_same_model(found[target], old if moment == 1 else new)
    for expected in (old, new):
        assert any(torch.equal(expected.lm_head.weight, model.lm_head.weight) for model in found.values())
    assert [path.read_text() for path in tmp_path.rglob("notes.txt")] == ["mine"]


def test_a_failed_rename_puts_the_old_model_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = lively_model(tiny(), seed=1)
    save_model(old, tmp_path / "model")
    rename, calls = os.rename, []

    def failing(*names: Any) -> None:
        calls.append(names)
        if len(calls) == 2:
            raise OSError("not now")
        rename(*names)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="not now"):
        save_model(lively_model(tiny(), seed=2), tmp_path / "model")
    assert_same_model(load_model(tmp_path / "model"), old)


def test_the_working_directory_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="working directory"):
        save_model(lively_model(tiny()), ".")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("broken", ["ShardWriter", "_write", "write_json"])
def test_a_failed_save_leaves_the_old_model_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool, broken: str
) -> None:
    target = tmp_path / "model"
    old = lively_model(tiny(), seed=1)
    if existing:
        save_model(old, target)
    before = sorted(tmp_path.rglob("*"))
    calls = []

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == (1 if broken == "write_json" else 2):
            raise OSError("the disk is full")
        return original(*args, **kwargs)

    original = getattr(writing, broken)
    monkeypatch.setattr(writing, broken, fail)
    with pytest.raises(OSError, match="the disk is full"):
        save_model(lively_model(tiny(), seed=2), target, max_shard_size=6000)
    assert sorted(tmp_path.rglob("*")) == before
    if existing:
        assert_same_model(load_model(target), old)


def test_saving_onto_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("precious")
    with pytest.raises(ValueError, match="is a file"):
        save_model(lively_model(tiny()), tmp_path / "model")
    assert (tmp_path / "model").read_text() == "precious"


def test_shard_sizes_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="max_shard_size is 0"):
        save_model(lively_model(tiny()), tmp_path / "model", max_shard_size=0)
    assert not list(tmp_path.iterdir())
