"""Metrics of a run as JSON lines, always, and as TensorBoard scalars on request.

``metrics.jsonl`` holds one object per line, ``{"step": 10, "loss": 3.2}``, in the order written. It is only
appended to, so a run that is killed loses at most the line it was writing: readers accept a torn last line,
and no other. A resumed run first cuts the file back to its checkpoint's step, so that no step appears twice.
"""

import json
import math
import time
from pathlib import Path
from typing import Any, SupportsFloat

from fathom.config import atomic_write


class MetricsLog:
    """Appends to ``directory/metrics.jsonl`` and, with `tensorboard`, to event files in ``directory/tensorboard``."""

    def __init__(self, directory: Path, tensorboard: bool = False) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "metrics.jsonl"
        self._events_directory = directory / "tensorboard"
        self._events = _open_events(self._events_directory) if tensorboard else None
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            # A torn last line: without this the next line would be glued to it.
            self._rewrite(read_metrics(self.path))

    def write(self, step: int, **values: SupportsFloat) -> None:
        """Record ``values`` (numbers, or tensors of one element) for ``step``."""
        scalars = {name: value if isinstance(value, int) else float(value) for name, value in values.items()}
        with open(self.path, "a", encoding="utf-8") as file:  # closing it flushes the line
            file.write(_line({"step": step, **scalars}))
        if self._events is not None:
            for name, scalar in scalars.items():
                self._events.add_scalar(name, scalar, step)

    def truncate_after(self, step: int) -> None:
        """Drop what was recorded after ``step``: a run resumed from there is about to write it again."""
        if self.path.exists():
            self._rewrite([record for record in read_metrics(self.path) if record["step"] <= step])
        if self._events is not None:
            self._events.close()
            self._events = _open_events(self._events_directory, purge_step=step + 1)

    def close(self) -> None:
        """Flush TensorBoard's writer; JSON lines are flushed as they are written."""
        if self._events is not None:
            self._events.close()

    def _rewrite(self, records: list[dict[str, Any]]) -> None:
        atomic_write(self.path, "".join(_line(record) for record in records))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file. A torn last line is dropped; any other broken line is an error."""
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: not a line of JSON: {line!r:.80}") from error
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f'{path}:{number}: expected an object with an integer "step", got {line!r:.80}')
        records.append(record)
    return records


class Stopwatch:
    """Sums the seconds spent inside its ``with`` blocks, for rates such as tokens per second.

    It reads the wall clock of the host: synchronise an accelerator before the block ends.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    def __enter__(self) -> "Stopwatch":
        self._started = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        self.seconds += time.perf_counter() - self._started


def _line(record: dict[str, Any]) -> str:
    """One line of valid JSON, which has no NaN or infinity: null keeps the line, and a plot shows the gap."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _open_events(directory: Path, purge_step: int | None = None) -> Any:
    """TensorBoard's writer; with ``purge_step``, its readers hide what was recorded at that step or later."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("TensorBoard is not installed: pip install 'fathom-lm[tensorboard]'") from error
    return SummaryWriter(str(directory), purge_step=purge_step)  # type: ignore[no-untyped-call]
