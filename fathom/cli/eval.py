"""`fathom eval`: a model's results on lm-eval's tasks, or on a text."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from fathom.cli.load import Dtype, load
from fathom.config import ConfigError
from fathom.eval.likelihood import text_bits
from fathom.files import atomic_write

Metrics = dict[str, dict[str, Any]]
"""Of each task or text, its metrics by name."""


@dataclass(frozen=True)
class EvalCommand:
    """Run lm-eval's tasks on a model, or measure a text in bits per byte."""

    path: tyro.conf.Positional[str]
    """A Hugging Face model directory, or a name on the hub."""
    tasks: tuple[str, ...] = ()
    """Names of lm-eval tasks, or YAML files of your own. A task file can name Python functions, which are then run."""
    text: tuple[Path, ...] = ()
    """Text files in UTF-8, each measured as one document; needs no lm-eval."""
    few_shot: int | None = None
    """Examples before each question of a task; None: as the task defines."""
    limit: int | None = None
    """Run only this many questions of each task, the first ones."""
    dtype: Dtype = "float32"
    """Data type of the weights."""
    json: Path | None = None
    """Also write the metrics to this JSON file."""


def run(words: list[str]) -> None:
    command = tyro.cli(EvalCommand, args=words, prog="fathom eval")
    if not command.tasks and not command.text:
        raise ConfigError("nothing to measure: give --tasks (names or YAML files) or --text (files)")
    texts = {str(file): _read(file) for file in command.text}
    model, tokenizer = load(command.path, command.dtype)
    results: Metrics = {name: asdict(text_bits(model, tokenizer, text)) for name, text in texts.items()}
    if command.tasks:
        from fathom.eval.harness import run_tasks  # lm-eval comes with the extra "eval"

        results |= run_tasks(model, tokenizer, command.tasks, command.few_shot, command.limit)
    _show(results)
    if command.json is not None:
        atomic_write(command.json, json.dumps(results, indent=2, default=str) + "\n")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text: {file} is not UTF-8: {error}") from error


def _show(results: Metrics) -> None:
    table = Table("task or text", "metric", "value")
    for name, metrics in results.items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                table.add_row(name, metric, f"{value:.4f}")
            elif isinstance(value, int) and not isinstance(value, bool):
                table.add_row(name, metric, f"{value:,}")
    Console().print(table)
