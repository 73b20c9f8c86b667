"""Killed and continued, a run ends with the very weights of one that was never interrupted."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fathom import load_model
from fathom.checkpoint.training_state import checkpoints, load_state
from fathom.config import ConfigError
from fathom.distributed.ranks import Ranks
from fathom.metrics import read_metrics
from fathom.train.pretrain import train
from fathom.train.run import Run


def _command(flags: list[str], out: Path) -> list[str]:
    return [sys.executable, "-m", "fathom", "train", *flags, "--out", str(out)]


def _final(out: Path) -> tuple[dict[str, torch.Tensor], dict]:
    newest = checkpoints(out)[-1]
    return load_file(newest / "model.safetensors"), load_state(newest)


def _assert_equal_runs(a: Path, b: Path) -> None:
    (weights_a, state_a), (weights_b, state_b) = _final(a), _final(b)
    assert weights_a.keys() == weights_b.keys()
    for name in weights_a:
        assert torch.equal(weights_a[name], weights_b[name]), name
    for one, other in zip(state_a["optimizers"], state_b["optimizers"], strict=True):
        for key, moments in one["state"].items():
            for name, value in moments.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(other["state"][key][name]))
    losses = [
        [(row["step"], row["loss"]) for row in read_metrics(out / "metrics.jsonl") if "loss" in row] for out in (a, b)
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_sigkill_at_random_moments(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = [*tiny_flags, "--train.steps", "60", "--train.save-every", "5", "--optimizer.ema-decay", "0.9"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(_command(flags, tmp_path / "whole"), check=True, env=environment, capture_output=True)
    killed, kills = tmp_path / "killed", 0
    draw = random.Random()
    command = _command(flags, killed)
    while True:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if kills < 4 and not _finished_after(process, killed, draw.uniform(0.0, 0.4)):
            process.kill()
            process.communicate()
            kills += 1
        else:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors.decode()
            break
        started = (killed / "run.json").exists()
        command = _command(["--resume"] if started else flags, killed)
    assert kills >= 1
    _assert_equal_runs(tmp_path / "whole", killed)
    averages = [load_file(checkpoints(tmp_path / n)[-1] / "ema" / "model.safetensors") for n in ("whole", "killed")]
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])


def _finished_after(process: subprocess.Popen, out: Path, seconds: float) -> bool:
    """Wait until training has begun, then that long; whether the process was done by then."""
    seen = len(read_metrics(out / "metrics.jsonl")) if (out / "metrics.jsonl").exists() else 0
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        path = out / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) != seen:
            break
        time.sleep(0.02)
    time.sleep(seconds)
    return process.poll() is not None


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_zero(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = [*tiny_flags, "--train.steps", "100000", "--train.save-every", "0"]
    process = subprocess.Popen(_command(flags, tmp_path / "run"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert not _finished_after(process, tmp_path / "run", 0.3)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors.decode()
    assert b"--resume" in output
    (saved,) = checkpoints(tmp_path / "run")
    assert load_model(saved).config.num_nextn_predict_layers == 1


@pytest.mark.slow
def test_resuming_in_process_is_bit_exact(tiny_run: Run, one_rank: Ranks, tmp_path: Path) -> None:
    train(tiny_run, tmp_path / "whole", one_rank)
    short = replace(tiny_run, train=replace(tiny_run.train, keep_last=9))
    train(short, tmp_path / "cut", one_rank)
    for late in checkpoints(tmp_path / "cut")[2:]:
        shutil.rmtree(late)
    assert train(short, tmp_path / "cut", one_rank, resume=True)
    _assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


OLD_NAMES = {
    "optimizer": {"name": "kind", "max_grad_norm": "clip"},
    "train": {
        "compute_dtype": "compute",
        "activation_checkpointing": "recompute",
        "seq_balance_loss_weight": "balance_alpha",
    },
    "schedule": {
        "lr_schedule": "shape",
        "decay_fraction": "decay_share",
        "mtp_loss_weight": "mtp_weight",
        "mtp_loss_weight_late": "mtp_weight_late",
        "bias_update_speed": "bias_speed",
        "bias_freeze_fraction": "bias_still_share",
    },
}


@pytest.mark.slow
def test_a_run_with_the_names_of_the_version_before_resumes_bit_exactly(
    tiny_run: Run, one_rank: Ranks, tmp_path: Path
) -> None:
    run = replace(tiny_run, optimizer=replace(tiny_run.optimizer, ema_decay=0.9, max_grad_norm=0.5))
    train(run, tmp_path / "whole", one_rank)
    train(replace(run, train=replace(run.train, keep_last=9)), tmp_path / "cut", one_rank)
    for late in checkpoints(tmp_path / "cut")[2:]:
        shutil.rmtree(late)
    record = tmp_path / "cut" / "run.json"
    current = json.loads(record.read_text())
    del current["train"]["final_eval_sequences"]  # a field it did not have
    old = {
        section: {OLD_NAMES.get(section, {}).get(key, key): value for key, value in values.items()}
        if isinstance(values, dict)
        else values
        for section, values in current.items()
    }
    assert sum(map(len, OLD_NAMES.values())) == sum(len(old[s].keys() - current[s].keys()) for s in OLD_NAMES)
    record.write_text(json.dumps(old))
    with pytest.warns(DeprecationWarning, match="is now called") as caught:
        assert train(run, tmp_path / "cut", one_rank, resume=True)
    assert len(caught) == 11
    assert any("run.json: optimizer.clip is now called max_grad_norm" in str(each.message) for each in caught)
    _assert_equal_runs(tmp_path / "whole", tmp_path / "cut")
    assert "clip" not in record.read_text()


@pytest.mark.slow
def test_only_the_newest_checkpoints_stay_and_half_written_ones_do_not_count(
    tiny_run: Run, one_rank: Ranks, tmp_path: Path
) -> None:
    train(tiny_run, tmp_path, one_rank)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000009", "step-000012"]
    (tmp_path / "checkpoints" / ".step-000015.tmp").mkdir()
    assert checkpoints(tmp_path)[-1].name == "step-000012"
    assert (tmp_path / "model").resolve() == checkpoints(tmp_path)[-1].resolve()
    assert load_model(tmp_path / "model").config.bos_token_id == 0


@pytest.mark.slow
def test_run_json_records_what_was_resolved(tiny_run: Run, one_rank: Ranks, tmp_path: Path) -> None:
    auto = replace(tiny_run, train=replace(tiny_run.train, steps=2, compute_dtype="auto", compile="auto"))
    train(auto, tmp_path, one_rank)
    recorded = json.loads((tmp_path / "run.json").read_text())
    assert recorded["train"]["compute_dtype"] in ("float32", "bfloat16")
    assert recorded["train"]["compile"] == "off"
    assert recorded["model"]["eos_token_id"] == 1


def test_a_directory_is_not_trained_into_twice(tiny_run: Run, one_rank: Ranks, tmp_path: Path) -> None:
    run = replace(tiny_run, train=replace(tiny_run.train, steps=1))
    train(run, tmp_path, one_rank)
    with pytest.raises(ConfigError, match="already holds a run: continue it with --resume"):
        train(run, tmp_path, one_rank)
    with pytest.raises(ConfigError, match="holds no run to resume"):
        train(run, tmp_path / "elsewhere", one_rank, resume=True)
