"""Configuration survives the trip through JSON, and nothing wrong gets in quietly."""

import json
import math
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.config import (
    ConfigError,
    current_flags,
    from_json,
    load_json,
    renamed_fields,
    save_json,
    to_json,
)
from fathom.files import atomic_write


@dataclass(frozen=True)
class Train:
    batch_size: int = 8
    lr: float = 2.2e-4
    betas: tuple[float, float] = (0.9, 0.95)
    milestones: tuple[int, ...] = ()
    schedule: Literal["cosine", "constant"] = "cosine"
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")


@dataclass(frozen=True)
class Run:
    name: str
    compile: bool = False
    train: Train = field(default_factory=Train)
    long_context: Train | None = None
    stages: tuple[Train, ...] = ()


finite = st.floats(allow_nan=False, allow_infinity=False)
trains = st.builds(
    Train,
    batch_size=st.integers(min_value=1),
    lr=finite,
    betas=st.tuples(finite, finite),
    milestones=st.lists(st.integers()).map(tuple),
    schedule=st.sampled_from(["cosine", "constant"]),
    clip=st.none() | finite,
)
runs = st.builds(
    Run,
    name=st.text(),
    compile=st.booleans(),
    train=trains,
    long_context=st.none() | trains,
    stages=st.lists(trains, max_size=2).map(tuple),
)


@settings(max_examples=50, deadline=None)
@given(runs)
def test_what_is_written_is_read_back(run: Run) -> None:
    assert from_json(Run, json.loads(json.dumps(to_json(run)))) == run


def test_a_file_round_trips_and_leaves_nothing_aside(tmp_path: Path) -> None:
    run = Run("β", stages=(Train(lr=1e-3),))
    save_json(run, tmp_path / "run.json")
    assert load_json(Run, tmp_path / "run.json") == run
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_absent_keys_take_their_defaults_and_an_int_becomes_a_float() -> None:
    run = from_json(Run, {"name": "a", "train": {"lr": 1}})
    assert run == Run("a", train=Train(lr=1.0))
    assert isinstance(run.train.lr, float)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"name": "a", "train": {"batch_size": "8"}},
            "config: train.batch_size: got '8', expected an integer",
        ),
        (
            {"name": "a", "train": {"batch_size": True}},
            "config: train.batch_size: got True, expected an integer",
        ),
        (
            {"name": "a", "train": {"batch_size": 8.0}},
            "config: train.batch_size: got 8.0, expected an integer",
        ),
        ({"name": "a", "compile": 1}, "config: compile: got 1, expected true or false"),
        ({"name": "a", "train": {"lr": math.nan}}, "config: train.lr: got nan, expected a finite number"),
        ({"name": "a", "train": {"lr": math.inf}}, "config: train.lr: got inf, expected a finite number"),
        ({"name": "a", "train": {"lr": True}}, "config: train.lr: got True, expected a finite number"),
        ({"name": "a", "train": {"lr": None}}, "config: train.lr: got None, expected a finite number"),
        ({"name": "a", "train": {"clip": "no"}}, "train.clip: got 'no', expected a finite number or null"),
        (
            {"name": "a", "train": {"betas": [0.9]}},
            "train.betas: got [0.9], expected a list of 2: a finite number",
        ),
        ({"name": "a", "train": {"betas": [0.9, "x"]}}, "train.betas[1]: got 'x', expected a finite number"),
        ({"name": "a", "train": {"milestones": 3}}, "got 3, expected a list, each item an integer"),
        (
            {"name": "a", "train": {"schedule": "linear"}},
            'got \'linear\', expected one of "cosine", "constant"',
        ),
        (
            {"name": "a", "train": {"batchsize": 8}},
            "train.batchsize: unknown key, did you mean 'batch_size'?",
        ),
        ({"name": "a", "zzz": 8}, "config: zzz: unknown key, expected one of name, compile, train"),
        ({"name": "a", "train": {"batch_size": 0}}, "config: train: batch_size is 0; it must be at least 1"),
        (
            {"name": "a", "stages": [{}, {"lr": "x"}]},
            "config: stages[1].lr: got 'x', expected a finite number",
        ),
        ({"name": "a", "train": [1]}, "config: train: got [1], expected an object with the fields of Train"),
        ({}, "config: name: missing, expected a string"),
        ([], "config: got [], expected an object with the fields of Run"),
    ],
)
def test_refusals_name_the_field_the_value_and_what_would_be_right(data: object, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_json(Run, data)
    assert message in str(error.value)


@given(st.integers(min_value=10**309, max_value=10**400))
def test_an_integer_no_float_can_hold_is_refused(huge: int) -> None:
    with pytest.raises(ConfigError, match="expected a finite number"):
        from_json(Train, {"lr": huge})


@pytest.mark.parametrize("change", [{"lr": math.nan}, {"batch_size": 1.5}, {"schedule": "linear"}])
def test_what_could_not_be_read_back_is_not_written(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"Train: {next(iter(change))}: got"):
        save_json(replace(Train(), **change), tmp_path / "train.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"lr": 1,}', "train.json:1:10: not valid JSON"),
        ('{"lr": 1, "lr": 2}', "train.json: the key 'lr' appears twice in one object"),
        ('{"lr": NaN}', "train.json: lr: got nan, expected a finite number"),
        ('{"lr": 1e999}', "train.json: lr: got inf, expected a finite number"),
        (b"\xff{}", "train.json: 'utf-8' codec can't decode byte"),
        ("[" * 100_000, "train.json: maximum recursion depth exceeded"),
    ],
)
def test_errors_name_the_file(text: str | bytes, message: str, tmp_path: Path) -> None:
    atomic_write(tmp_path / "train.json", text)
    with pytest.raises(ConfigError) as error:
        load_json(Train, tmp_path / "train.json")
    assert message in str(error.value)


def test_a_field_type_we_do_not_read_is_a_programming_error() -> None:
    @dataclass(frozen=True)
    class Odd:
        value: dict[str, int] = field(default_factory=dict)
        either: int | str = 0

    with pytest.raises(TypeError, match="cannot have the type dict"):
        from_json(Odd, {"value": {}})
    with pytest.raises(TypeError, match="no other union"):
        from_json(Odd, {"either": 1})


# --- renamed fields


@renamed_fields(clip="max_grad_norm", recompute="activation_checkpointing")
@dataclass(frozen=True)
class Renamed:
    max_grad_norm: float = 1.0
    activation_checkpointing: bool = False


@dataclass(frozen=True)
class Outer:
    inner: Renamed = field(default_factory=Renamed)


def test_an_old_keyword_and_an_old_attribute_work_and_warn_where_they_are_used() -> None:
    with pytest.warns(DeprecationWarning, match="clip is now called max_grad_norm") as caught:
        renamed = Renamed(clip=2.0)  # type: ignore[call-arg]
    assert renamed == Renamed(max_grad_norm=2.0)
    with pytest.warns(DeprecationWarning, match="clip is now called max_grad_norm") as read:
        assert renamed.clip == 2.0  # type: ignore[attr-defined]
    assert {warning.filename for warning in (*caught, *read)} == {__file__}


def test_an_old_key_is_read_and_the_current_one_written(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"inner": {"clip": 2, "recompute": true}}')
    with pytest.warns(DeprecationWarning) as caught:
        read = load_json(Outer, path)
    assert read == Outer(Renamed(max_grad_norm=2.0, activation_checkpointing=True))
    assert f"{path}: inner.clip is now called max_grad_norm" in str(caught[0].message)
    assert {warning.filename for warning in caught} == {__file__}
    save_json(read, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_json(Outer, path) == read


def test_current_names_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert replace(Renamed(max_grad_norm=2.0), max_grad_norm=3.0).max_grad_norm == 3.0
        assert current_flags(Outer, ["--inner.max-grad-norm", "2"]) == ["--inner.max-grad-norm", "2"]


def test_both_names_are_refused() -> None:
    message = "clip is the old name of max_grad_norm, which is given too; leave it out"
    with pytest.raises(TypeError, match=message):
        Renamed(clip=2.0, max_grad_norm=1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=message):
        replace(Renamed(), clip=2.0)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"config: inner\.clip: is the old name of max_grad_norm"):
        from_json(Outer, {"inner": {"clip": 2, "max_grad_norm": 2}})
    with pytest.raises(
        ConfigError, match=r"--inner\.clip is the old name of --inner\.max-grad-norm, which is given too"
    ):
        current_flags(Outer, ["--inner.clip", "2", "--inner.max_grad_norm=3"])


@pytest.mark.parametrize(
    ("words", "current"),
    [
        (["--inner.clip", "2"], ["--inner.max-grad-norm", "2"]),
        (["--inner.clip=2"], ["--inner.max-grad-norm=2"]),
        (["--inner.recompute", "--out", "clip"], ["--inner.activation-checkpointing", "--out", "clip"]),
        (["--inner.no-recompute"], ["--inner.no-activation-checkpointing"]),
    ],
)
def test_old_flags_become_current_ones(words: list[str], current: list[str]) -> None:
    with pytest.warns(DeprecationWarning, match="is now called --inner") as caught:
        assert current_flags(Outer, words) == current
    assert {warning.filename for warning in caught} == {__file__}


def test_an_underscore_in_a_flag_is_a_hyphen() -> None:
    with pytest.warns(DeprecationWarning, match="--train.bias-speed is now called --train.bias-update-speed"):
        assert current_flags(_Speed, ["--train.bias_speed=1"], "train.") == ["--train.bias-update-speed=1"]


@renamed_fields(bias_speed="bias_update_speed")
@dataclass(frozen=True)
class _Speed:
    bias_update_speed: float = 0.0
