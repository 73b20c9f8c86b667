"""Whatever a disk, a signal or a second process does to a run, it goes on from what is whole, or names what is not."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fathom import load_model
from fathom.checkpoint import training_state
from fathom.checkpoint.hf.model import CheckpointError
from fathom.checkpoint.training_state import checkpoints
from fathom.cli import main
from fathom.config import ConfigError, load_json, save_json
from fathom.distributed.ranks import Ranks
from fathom.files import exclusive_lock
from fathom.metrics import read_metrics
from fathom.train import pretrain
from fathom.train.pretrain import train
from fathom.train.run import Run
from fathom.train.step import TrainState


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Filled once by the first test that takes `finished`."""
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture
def finished(tiny_run: Run, one_rank: Ranks, whole: Path) -> tuple[Run, Path]:
    """A run with all of its four checkpoints and a moving average, and its configuration."""
    run = replace(
        tiny_run,
        train=replace(tiny_run.train, keep_last=9, final_eval_sequences=2),
        optimizer=replace(tiny_run.optimizer, ema_decay=0.9),
    )
    if not whole.exists():
        train(run, whole, one_rank)
    return run, whole


@pytest.fixture
def interrupted(finished: tuple[Run, Path], tmp_path: Path) -> tuple[Run, Path]:
    """The same run as it was after nine of its twelve steps."""
    run, whole = finished
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000012")
    return run, tmp_path / "run"


def assert_equal_models(a: Path, b: Path) -> None:
    ours, theirs = (load_file(directory.resolve() / "model.safetensors") for directory in (a, b))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


# --- damaged checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("file", ["model.safetensors", "ema/model.safetensors", "training_state/state.pt"])
@pytest.mark.parametrize("damage", [flip, lambda content: content[: len(content) // 2], lambda content: b"", None])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    finished: tuple[Run, Path],
    interrupted: tuple[Run, Path],
    one_rank: Ranks,
    file: str,
    damage: Callable[[bytes], bytes] | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, out = interrupted
    damaged = out / "checkpoints" / "step-000009" / file
    if damage is None:
        damaged.unlink()
    else:
        damaged.write_bytes(damage(damaged.read_bytes()))
    with pytest.raises(SystemExit):
        main(["info", str(out / "checkpoints" / "step-000009"), "--verify"])
    assert train(run, out, one_rank, resume=True, console=Console(width=1000, force_terminal=False))
    said = capsys.readouterr()
    assert str(damaged) in said.out
    assert "set aside as step-000009.damaged" in said.out
    assert "resuming after step 6" in said.out
    assert_equal_models(out / "model", finished[1] / "model")
    assert (out / "checkpoints" / "step-000009" / file).stat().st_size > 0  # written again


def test_without_a_whole_checkpoint_training_does_not_start_over(
    interrupted: tuple[Run, Path], one_rank: Ranks
) -> None:
    run, out = interrupted
    for checkpoint in checkpoints(out):
        (checkpoint / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no whole checkpoint: .*step-000009.*; .*step-000003"):
        train(run, out, one_rank, resume=True)
    assert len(checkpoints(out)) == 3


def test_a_checkpoint_of_the_version_before_has_no_digests(
    finished: tuple[Run, Path], interrupted: tuple[Run, Path], one_rank: Ranks
) -> None:
    run, out = interrupted
    for checkpoint in checkpoints(out):
        (checkpoint / "training_state" / "digests.json").unlink()
    state = out / "checkpoints" / "step-000009" / "training_state" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    assert train(run, out, one_rank, resume=True)
    assert_equal_models(out / "model", finished[1] / "model")
    assert state.parent.parent.with_name("step-000009.damaged").is_dir()


def test_info_verifies_every_file(finished: tuple[Run, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, out = finished
    files = [path for path in (out / "model").resolve().rglob("*") if path.is_file()]
    main(["info", str(out / "model"), "--verify"])
    assert f"all {len(files) - 1} files are as they were written" in capsys.readouterr().out


# --- killed at the worst moment


class Killed(BaseException):
    """In place of SIGKILL: nothing is caught or cleaned up on its way."""


@pytest.mark.parametrize("save_every", [0, 4])
def test_resuming_makes_the_link_that_a_killed_run_could_not(
    tiny_run: Run, one_rank: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_every: int
) -> None:
    run = replace(tiny_run, train=replace(tiny_run.train, steps=8, save_every=save_every))

    def killed(link: Path, target: Path) -> None:
        if target.name == "step-000008":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training_state, "_replace_link", killed)
        with pytest.raises(Killed):
            train(run, tmp_path, one_rank)
    assert train(run, tmp_path, one_rank, resume=True)
    assert (tmp_path / "model").resolve().name == "step-000008"


def test_a_half_deleted_checkpoint_does_not_count(
    tiny_run: Run, one_rank: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(tiny_run, train=replace(tiny_run.train, steps=3, save_every=1, keep_last=1))

    real = shutil.rmtree

    def killed(path: Path, **options: Any) -> None:
        if (path / "model.safetensors").exists():
            (path / "model.safetensors").unlink()
            raise Killed
        real(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training_state.shutil, "rmtree", killed)
        with pytest.raises(Killed):
            train(run, tmp_path, one_rank)
    assert all((path / "model.safetensors").exists() for path in checkpoints(tmp_path))
    assert train(run, tmp_path, one_rank, resume=True)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def test_leftovers_of_killed_saves_are_swept(interrupted: tuple[Run, Path], one_rank: Ranks) -> None:
    run, out = interrupted
    (out / "checkpoints" / ".step-000012.abc.tmp").mkdir()
    (out / "checkpoints" / ".step-000012.tmp").mkdir()  # as an earlier version named it
    (out / ".run.json.77.tmp").touch()
    (out / ".model.tmp").symlink_to("checkpoints/step-000009")
    assert train(run, out, one_rank, resume=True)
    assert not [path for path in (*out.iterdir(), *(out / "checkpoints").iterdir()) if path.name.endswith(".tmp")]
    assert len(checkpoints(out)) == 4


def test_a_torn_last_line_is_forgiven(interrupted: tuple[Run, Path], one_rank: Ranks) -> None:
    run, out = interrupted
    for name in ("loads.jsonl", "metrics.jsonl"):
        with (out / name).open("a") as file:
            file.write('{"step": 13, "loads": [[1, 2')
    assert train(run, out, one_rank, resume=True)
    for name in ("loads.jsonl", "metrics.jsonl"):
        steps = [row["step"] for row in read_metrics(out / name)]
        assert sorted(set(steps)) == list(range(1, 13))


def with_bad_step(monkeypatch: pytest.MonkeyPatch, step: int, stop: bool = False) -> None:
    """Make the loss of `step` NaN, and let SIGTERM come right after it if `stop`."""
    real = pretrain.pretrain_step

    def bad(state: TrainState, *arguments: Any) -> Any:
        weight = state.model.norm.weight.data
        kept = weight[0].item()
        if state.step + 1 == step:
            weight[0] = float("nan")
        metrics = real(state, *arguments)
        weight[0] = kept if state.step == step else weight[0]
        if stop and state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    monkeypatch.setattr(pretrain, "pretrain_step", bad)


@pytest.mark.parametrize(("step", "stop"), [(8, False), (5, True)])
def test_a_run_that_ends_with_a_skipped_step_leaves_a_model(
    tiny_run: Run, one_rank: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, stop: bool
) -> None:
    run = replace(tiny_run, train=replace(tiny_run.train, steps=8, save_every=0))
    with_bad_step(monkeypatch, step, stop)
    assert train(run, tmp_path, one_rank) is not stop
    assert (tmp_path / "model").resolve().name == f"step-{step:06d}"
    assert load_model(tmp_path / "model").norm.weight.isfinite().all()


def test_two_processes_do_not_train_in_one_directory(interrupted: tuple[Run, Path], one_rank: Ranks) -> None:
    run, out = interrupted
    with exclusive_lock(out / ".lock"), pytest.raises(ValueError, match="is in use by") as refused:
        train(run, out, one_rank, resume=True)
    assert f"process {os.getpid()} on {socket.gethostname()}" in str(refused.value)
    assert train(run, out, one_rank, resume=True)


def test_the_root_is_no_run(tiny_run: Run, one_rank: Ranks) -> None:
    with pytest.raises(ConfigError, match="the root of the file system"):
        train(tiny_run, Path("/"), one_rank)


# --- what a run was made of


def test_a_corpus_that_changed_leaves_the_runs_own_data(
    finished: tuple[Run, Path], interrupted: tuple[Run, Path], one_rank: Ranks, corpus: Path, tmp_path: Path
) -> None:
    _, out = interrupted
    record = load_json(Run, out / "run.json")
    shutil.copytree(corpus, tmp_path / "texts")
    (tmp_path / "texts" / "new.txt").write_text("quartz zebra vexing jumbled kitsch\n" * 99)
    moved = replace(record, data=replace(record.data, corpus=str(tmp_path / "texts")))
    # The same name, another content: run.json and meta.json both have the path.
    for file in (out / "run.json", out / "data" / "meta.json"):
        file.write_text(file.read_text().replace(str(corpus), str(tmp_path / "texts")))
    assert train(moved, out, one_rank, resume=True)
    assert_equal_models(out / "model", finished[1] / "model")
    shutil.rmtree(out / "data")
    with pytest.raises(ConfigError, match="was trained with another tokenizer than that of"):
        train(moved, out, one_rank, resume=True)


def test_the_same_tokenizer_on_another_text_is_refused(
    interrupted: tuple[Run, Path], one_rank: Ranks, corpus: Path, tmp_path: Path
) -> None:
    run, out = interrupted
    tokenizer = out / "checkpoints" / "step-000009"
    data = replace(run.data, tokenizer=str(tokenizer))
    train(replace(run, data=data, train=replace(run.train, steps=3)), tmp_path / "second", one_rank)
    shutil.copytree(corpus, tmp_path / "texts")
    (tmp_path / "texts" / "00.txt").write_text("a dog sat on the mat\n" * 99)
    record = load_json(Run, tmp_path / "second" / "run.json")
    changed = replace(record, data=replace(data, corpus=str(tmp_path / "texts")))
    save_json(changed, tmp_path / "second" / "run.json")
    with pytest.raises(ConfigError, match=r"was tokenised with data\.corpus .*; run\.json has"):
        train(changed, tmp_path / "second", one_rank, resume=True)
    shutil.rmtree(tmp_path / "second" / "data")
    with pytest.raises(ConfigError, match="was trained on another text than that in"):
        train(changed, tmp_path / "second", one_rank, resume=True)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("model", "hidden_size", 64),
        ("model", "vocab_size", 330),
        ("model", "num_nextn_predict_layers", 0),
        ("model", "num_nextn_predict_layers", 2),
        ("model", "routed_scaling_factor", 2.0),
        ("data", "heldout", 0.1),
        ("train", "seed", 5),
    ],
)
def test_a_run_json_of_another_run_is_refused_by_field(
    interrupted: tuple[Run, Path], one_rank: Ranks, section: str, name: str, value: Any
) -> None:
    _, out = interrupted
    content = json.loads((out / "run.json").read_text())
    content[section][name] = value
    (out / "run.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=rf"{section}\.{name} "):
        train(load_json(Run, out / "run.json"), out, one_rank, resume=True)


# --- what may change


def test_what_only_measures_or_saves_may_change_and_a_run_may_be_made_longer(
    interrupted: tuple[Run, Path], one_rank: Ranks
) -> None:
    run, out = interrupted
    longer = replace(run, train=replace(run.train, steps=15, eval_sequences=3, final_eval_sequences=1, keep_last=1))
    assert train(longer, out, one_rank, resume=True)
    assert [path.name for path in checkpoints(out)] == ["step-000015"]
    assert load_json(Run, out / "run.json").train.steps == 15
    with pytest.raises(ConfigError, match=r"train.steps is 12; .*step-000015 has 15 steps already"):
        train(run, out, one_rank, resume=True)
    other = replace(longer, optimizer=replace(run.optimizer, learning_rate=1.0))
    with pytest.raises(ConfigError, match=r"has optimizer.learning_rate 0.003, this run 1.0"):
        train(other, out, one_rank, resume=True)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tiny_flags: list[str], tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the corpus fits, the model does not."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fathom", "train", *tiny_flags, "--out", str(out)]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"error: [Errno 27] File too large: '{out / 'checkpoints/step-000003'}'"
    ]
    assert not list((out / "checkpoints").iterdir())
    subprocess.run([*command, "--resume"], check=True, capture_output=True)
    assert len(checkpoints(out)) == 2
