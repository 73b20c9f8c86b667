"""How benchmarks/train.py measures: sides take their steps in turn, so that drift of the machine affects all equally.

Each side is a separate process (benchmarks/side.py). benchmarks/train_gpu.py starts its sides in the same way.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any

from side import Spec

from fathom.config import to_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

WARM_UP = 2
"""First turns, not counted: kernels are prepared, moments and memory allocated."""
_LAST_LINES = 15
_PATIENCE_SECONDS = 30


class SideError(RuntimeError):
    """A side exited early; the message names it and has the last lines of its standard error."""


@dataclass(frozen=True)
class Group:
    """Sides that take turns, by name; all of them are in memory at once."""

    sides: dict[str, Spec]
    bandwidth: bool = False
    """Whether memory bandwidth is measured between the steps, too."""


@dataclass(frozen=True)
class Result:
    """One side's counted steps."""

    spec: Spec
    sizes: dict[str, int]
    """`parameters`, and of them those in `linear` layers."""
    steps: list[dict[str, float]]

    @property
    def seconds(self) -> float:
        """Median of a full step."""
        return median(step["fb"] + step["optimizer"] for step in self.steps)

    def seconds_of(self, part: str) -> float:
        """Median seconds of a part of the step: `fb` (forward and backward) or `optimizer`."""
        return median(step[part] for step in self.steps)

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.spec.batch * self.spec.length

    def mfu(self, peak: float) -> float:
        """Model FLOP/s of a step as a fraction of `peak`."""
        flops = self.tokens * self.spec.shape.flops_per_token(self.spec.length, mtp=True)
        return flops / self.seconds / peak

    @property
    def memory(self) -> float:
        """Bytes at the peak of a step, above weights, gradients and moments."""
        return max(step["memory"] for step in self.steps)


@dataclass(frozen=True)
class Outcome:
    """The measurements of one group."""

    sides: dict[str, Result]
    peaks: list[float]
    """FLOP/s of a large matmul at each counted turn."""
    bandwidths: list[float]
    """Bytes per second at each counted turn; empty unless the group measures bandwidth."""

    @property
    def peak(self) -> float:
        """Median FLOP/s of a large matmul."""
        return median(self.peaks)


def measure(
    group: Group,
    turns: int,
    report: Callable[[str], None],
    environments: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> Outcome:
    """Start the group's sides, run `turns` counted steps of each in rotation, end them.

    `report` is called with a side's name before each of its steps; `environments`: what a side's process has in its
    environment beside this one's, by name.
    """
    with ExitStack() as stack:
        # All start at once and are awaited one after another: nothing is timed yet.
        sides = {
            name: stack.enter_context(running(name, spec, environment=environments.get(name, {})))
            for name, spec in group.sides.items()
        }
        sizes = {name: side.answer() for name, side in sides.items()}
        first = next(iter(sides.values()))
        steps: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        peaks, bandwidths = [], []
        for turn in range(WARM_UP + turns):
            for name, side in sides.items():
                report(name)
                steps[name].append(side.request(f"step {turn}"))
            peaks.append(first.request("peak"))
            if group.bandwidth:
                bandwidths.append(first.request("bandwidth"))
    results = {name: Result(group.sides[name], sizes[name], steps[name][WARM_UP:]) for name in steps}
    return Outcome(results, peaks[WARM_UP:], bandwidths[WARM_UP:])


class Side:
    """A running side, which takes one request at a time."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], errors: IO[str]) -> None:
        self._name = name
        self._process = process
        self._errors = errors

    def request(self, line: str, seconds: float = threading.TIMEOUT_MAX) -> Any:
        """The side's answer to a request; a side that takes more than `seconds` is killed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n".encode())
        except BrokenPipeError:
            raise self._ended() from None
        patience = threading.Timer(seconds, self._process.kill)
        patience.start()
        try:
            return self.answer()
        except SideError as error:
            if patience.is_alive():
                raise
            raise SideError(f"the side «{self._name}» took longer than {seconds:.0f} s; {error}") from None
        finally:
            patience.cancel()

    def answer(self) -> Any:
        """The next line that the side writes."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._ended()
        return json.loads(line)

    def _ended(self) -> SideError:
        status = self._process.wait()
        how = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
        if status == -signal.SIGKILL:
            how += " (out of memory?)"
        self._errors.seek(0)
        lines = self._errors.read().splitlines()[-_LAST_LINES:]
        return SideError("\n".join([f"the side «{self._name}» {how}; its last lines:", *lines]))


@contextmanager
def running(
    name: str,
    spec: "DataclassInstance",
    program: str = "side.py",
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Side]:
    """A context with the side's process: a program of this folder with `spec` as its argument."""
    command = [sys.executable, str(Path(__file__).with_name(program)), json.dumps(to_json(spec))]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        # Unbuffered: what could not be written to a side that has exited is not written again when the pipe is closed.
        subprocess.Popen(
            command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **environment},
        ) as process,
    ):
        try:
            yield Side(name, process, errors)
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=_PATIENCE_SECONDS)  # it exits at the end of its input
        finally:
            process.kill()
