"""Metrics of a run as JSON lines, always, and as TensorBoard scalars on request.

``metrics.jsonl`` holds one object per line, ``{"step": 10, "loss": 3.2}``, in the order written. It is only
appended to, so a run that is killed loses at most the line it was writing: readers accept a torn last line,
and no other. A resumed run first cuts the file back to its checkpoint's step, so that no step appears twice.
"""

import json
import math
from pathlib import Path
from typing import Any, SupportsFloat

from fathom.files import atomic_write, full_disk_named


class JsonLines:
    """A file of JSON objects with an integer ``step``, one a line; a torn last line is cut off when it is opened."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            self._rewrite(read_metrics(path))  # else the next line would be glued to the torn one

    def append(self, record: dict[str, Any]) -> None:
        """Write one line."""
        # Closing the file flushes the line.
        with full_disk_named(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(_line(record))

    def truncate_after(self, step: int) -> None:
        """Drop what was recorded after ``step``."""
        if self.path.exists():
            self._rewrite([record for record in read_metrics(self.path) if record["step"] <= step])

    def _rewrite(self, records: list[dict[str, Any]]) -> None:
        atomic_write(self.path, "".join(map(_line, records)))


class MetricsLog:
    """Appends to ``directory/metrics.jsonl`` and, with `tensorboard`, to event files in ``directory/tensorboard``."""

    def __init__(self, directory: Path, tensorboard: bool = False) -> None:
        self._lines = JsonLines(directory / "metrics.jsonl")
        self.path = self._lines.path
        self._events_directory = directory / "tensorboard"
        self._events = _open_events(self._events_directory) if tensorboard else None

    def write(self, step: int, **values: SupportsFloat) -> None:
        """Record ``values`` (numbers, or tensors of one element) for ``step``."""
        scalars = {name: value if isinstance(value, int) else float(value) for name, value in values.items()}
        self._lines.append({"step": step, **scalars})
        if self._events is not None:
            for name, scalar in scalars.items():
                self._events.add_scalar(name, scalar, step)

    def truncate_after(self, step: int) -> None:
        """Drop what was recorded after ``step``: a run resumed from there is about to write it again."""
        self._lines.truncate_after(step)
        if self._events is not None:
            self._events.close()
            self._events = _open_events(self._events_directory, purge_step=step + 1)

    def close(self) -> None:
        """Flush TensorBoard's writer; JSON lines are flushed as they are written."""
        if self._events is not None:
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file. A torn last line is dropped; any other broken line is an error."""
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: not a line of JSON: {line!r:.80}") from error
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f'{path}:{number}: expected an object with an integer "step", got {line!r:.80}')
        records.append(record)
    return records


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
