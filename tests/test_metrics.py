"""The metrics file stays readable through NaNs, kills and resumptions."""

import json
import math
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.metrics import MetricsLog, read_metrics


def test_each_write_is_one_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run")
    log.write(1, loss=3.5, tokens=1024)
    log.write(2, loss=torch.tensor(3.25), **{"balance/max_vio": 0.5})
    assert log.path.read_text().splitlines() == [
        '{"step": 1, "loss": 3.5, "tokens": 1024}',
        '{"step": 2, "loss": 3.25, "balance/max_vio": 0.5}',
    ]


@settings(deadline=None)  # the disk may be slow
@given(st.floats())
def test_every_float_leaves_valid_json(value: float) -> None:
    with tempfile.TemporaryDirectory() as directory:
        log = MetricsLog(Path(directory))
        log.write(0, loss=value)
        (record,) = read_metrics(log.path)
        assert "NaN" not in log.path.read_text() and "Infinity" not in log.path.read_text()
    assert record["loss"] == (value if math.isfinite(value) else None)


@settings(deadline=None)
@given(st.integers(min_value=0))
def test_a_kill_at_any_byte_loses_at_most_the_last_line(cut: int) -> None:
    records = [{"step": 1, "loss": 3.5}, {"step": 2, "loss": None}, {"step": 3, "loss": 3.0}]
    whole = "".join(json.dumps(record) + "\n" for record in records)
    torn = whole[: cut % (len(whole) + 1)]
    # A line that lacks only its newline is whole.
    survivors = [record for record in records if json.dumps(record) in torn]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "metrics.jsonl"
        path.write_text(torn)
        assert read_metrics(path) == survivors
        MetricsLog(path.parent).write(9, loss=1.0)
        assert read_metrics(path) == [*survivors, {"step": 9, "loss": 1.0}]


def test_truncate_after_forgets_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in (10, 20, 30):
        log.write(step, loss=1.0)
    with open(log.path, "a") as file:
        file.write('{"step": 40, "lo')
    log.truncate_after(20)
    assert [record["step"] for record in read_metrics(log.path)] == [10, 20]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    log.write(30, loss=2.0)
    assert read_metrics(log.path)[-1] == {"step": 30, "loss": 2.0}


def test_truncate_after_in_an_empty_directory_is_quiet(tmp_path: Path) -> None:
    MetricsLog(tmp_path).truncate_after(0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", ["{oops", '{"loss": 1.0}', "17"])
def test_a_broken_middle_line_is_named(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{broken}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: "):
        read_metrics(path)


def test_tensorboard_gets_the_same_numbers_and_forgets_the_same_steps(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = MetricsLog(tmp_path, tensorboard=True)
    for step in (1, 2, 3):
        log.write(step, loss=float(step))
    log.truncate_after(1)
    log.write(2, loss=20.0)
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 20.0)]


def test_tensorboard_missing_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'fathom-lm\[tensorboard\]'"):
        MetricsLog(tmp_path, tensorboard=True)


def test_endless_brackets_are_a_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + '{"a": ' * 100_000 + '\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a line of JSON"):
        read_metrics(path)
    path.write_text('{"step": 1}\n' + "[" * 100_000)
    assert [record["step"] for record in read_metrics(path)] == [1]
