"""How many steps a demo takes: as many as fit into its minutes, and enough to show something."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from fathom import presets
from fathom.config import ConfigError
from fathom.distributed.ranks import Ranks
from fathom.lab.demo import command
from fathom.train.run import Run


@pytest.mark.parametrize(("seconds", "steps"), [(0.5, 590), (60.0, 40)])
def test_a_slow_machine_takes_the_fewest_steps_and_says_so(
    seconds: float, steps: int, tiny_run: Run, one_rank: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presets, "nano", lambda: tiny_run)
    monkeypatch.setattr(command, "seconds_per_step", lambda *_: seconds)
    out = io.StringIO()
    wanted = command.DemoCommand(tmp_path, minutes=5.75)
    run, _ = command._frozen_run(wanted, one_rank, Console(file=out, width=200))
    assert run.train.steps == pytest.approx(steps, rel=0.02)
    assert ("slow or busy: 40 steps" in out.getvalue()) == (steps == 40)


def test_no_time_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"minutes is 0; it must be above 0"):
        command.run_demo(command.DemoCommand(tmp_path, minutes=0))
