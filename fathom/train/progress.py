"""Progress of a run on the screen: one live line in a terminal, elsewhere a plain line every few seconds."""

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

_PLAIN_EVERY = 15.0
"""Seconds between lines where the output is not a terminal."""

_SHOWN = {
    "reward": "reward {:.3f}",
    "pass_rate": "pass {:.0%}",
    "length": "length {:.0f}",
    "entropy": "entropy {:.2f}",
    "max_abs_dlogp": "Δlogp {:.0e}",
    "route_mismatch": "rerouted {:.1%}",
    "loss": "loss {:.3f}",
    "mtp_loss": "mtp {:.3f}",
    "val_bpb": "bpb {:.3f}",
    "tokens_per_second": "{:,.0f} tok/s",
    "mfu": "mfu {:.0%}",
    "max_vio": "maxvio {:.2f}",
}
"""The metrics that the line shows, where a run has them, in this order."""


class Progress:
    """Shows each step's metrics; silent on all ranks but the main one."""

    def __init__(self, console: Console, steps: int, visible: bool = True) -> None:
        self.console = console
        self._steps = steps
        self._visible = visible
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._evaluated: dict[str, float] = {}
        self._seconds_per_step: float | None = None
        self._last_step = time.perf_counter()
        self._last_print = 0.0

    def __enter__(self) -> "Progress":
        if self._visible and self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live.is_started:
            self._live.stop()

    def print(self, message: str) -> None:
        """Print a line that stays."""
        if self._visible:
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Print a line that stays, with an evaluation's metrics."""
        self._evaluated = values
        metrics = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        self.print(f"step {step}: {metrics}")
        self._last_step = time.perf_counter()

    def stepped(self, step: int, values: dict[str, Any]) -> None:
        """After `step` optimizer steps: refresh the live line."""
        now = time.perf_counter()
        spent, self._last_step = now - self._last_step, now
        before = self._seconds_per_step
        # The first steps compile; the moving average decays their weight.
        self._seconds_per_step = spent if before is None else before + 0.1 * (spent - before)
        if not self._visible:
            return
        line = self._line(step, values)
        if self._live.is_started:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"))
        elif now - self._last_print > _PLAIN_EVERY:
            self._last_print = now
            self.console.print(line, highlight=False, soft_wrap=True)

    def _line(self, step: int, values: dict[str, Any]) -> str:
        left = (self._steps - step) * (self._seconds_per_step or 0.0)
        known = {**self._evaluated, **values}
        metrics = [form.format(known[name]) for name, form in _SHOWN.items() if name in known]
        return "  ".join((f"step {step}/{self._steps}", *metrics, f"{duration(left)} left"))


def duration(seconds: float) -> str:
    """3725 → 1h02m; 125 → 2m05s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s"
