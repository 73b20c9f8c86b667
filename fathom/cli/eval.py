"""`fathom eval`: a model's results on tasks with verifiable answers, on lm-eval's tasks, or on a text."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fathom.cli.load import Dtype, load
from fathom.config import ConfigError
from fathom.data.tokenizer import Tokenizer
from fathom.engine.engine import Engine
from fathom.eval.likelihood import text_bits
from fathom.eval.pass_rate import Interval
from fathom.files import atomic_write
from fathom.model.transformer import Model
from fathom.posttrain.evaluate import TaskEval, TaskEvalConfig, as_json, differences, evaluate_task
from fathom.posttrain.tasks import task
from fathom.posttrain.tasks.protocol import Task

Metrics = dict[str, dict[str, Any]]
"""Of each task or text, its metrics by name."""


@dataclass(frozen=True)
class EvalCommand:
    """Measure how often a model solves a task; run lm-eval's tasks on it; or measure a text in bits per byte."""

    path: tyro.conf.Positional[str]
    """A Hugging Face model directory, or a name on the hub."""
    task: tuple[str, ...] = ()
    """Tasks with verifiable answers: addition, sort_digits, reverse_letters, count_letters, calculator, or
    reasoning_gym:NAME (the extra `posttrain`). Their test problems are put to the model by its chat template."""
    sampling: Annotated[TaskEvalConfig, tyro.conf.arg(name="")] = field(default_factory=TaskEvalConfig)
    against: str | None = None
    """Another model on the same problems and texts; differences are this model's minus the other's, paired."""
    tasks: tuple[str, ...] = ()
    """Names of lm-eval tasks, or YAML files of your own. A task file can name Python functions, which are then run."""
    chat: bool = False
    """Put lm-eval's questions to the model by its chat template."""
    text: tuple[Path, ...] = ()
    """Text files in UTF-8, each measured as one document; needs no lm-eval."""
    few_shot: int | None = None
    """Examples before each question of an lm-eval task; None: as the task defines."""
    limit: int | None = None
    """Run only this many questions of each lm-eval task, the first ones."""
    dtype: Dtype = "float32"
    """Data type of the weights."""
    json: Path | None = None
    """Also write the metrics to this JSON file."""


def run(words: list[str]) -> None:
    command = tyro.cli(EvalCommand, args=words, prog="fathom eval")
    _check(command)
    chosen, texts = [task(name) for name in command.task], {str(file): _read(file) for file in command.text}
    model, tokenizer = load(command.path, command.dtype)
    evals = _evaluate(model, tokenizer, chosen, command.sampling)
    results: Metrics = {name: asdict(text_bits(model, tokenizer, text)) for name, text in texts.items()}
    if command.tasks:
        from fathom.eval.harness import run_tasks  # lm-eval comes with the extra "eval"

        results |= run_tasks(model, tokenizer, command.tasks, command.few_shot, command.limit, command.chat)
    others: dict[str, TaskEval] = {}
    if command.against is not None:
        del model  # two may not fit
        model, tokenizer = load(command.against, command.dtype)
        others = _evaluate(model, tokenizer, chosen, command.sampling)
        for name, text in texts.items():
            bits = text_bits(model, tokenizer, text).bits_per_byte
            results[name] |= {"against": bits, "difference": results[name]["bits_per_byte"] - bits}
    for name, found in evals.items():
        results[name] = _show_task(name, found, others.get(name), command)
    _show({name: metrics for name, metrics in results.items() if name not in evals})
    if command.json is not None:
        atomic_write(command.json, json.dumps(results, indent=2, default=str) + "\n")


def _check(command: EvalCommand) -> None:
    if not command.task and not command.tasks and not command.text:
        raise ConfigError(
            "nothing to measure: give --task (names), --tasks (lm-eval's: names or YAML files) or --text (files)"
        )
    if command.against is not None and not command.task and not command.text:
        raise ConfigError("--against compares on --task and --text; lm-eval's tasks are run once for each model")
    if command.chat and not command.tasks:
        raise ConfigError("--chat is for lm-eval's tasks, --tasks; those of --task use the chat template anyway")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text: {file} is not UTF-8: {error}") from error


def _evaluate(model: Model, tokenizer: Tokenizer, tasks: list[Task], config: TaskEvalConfig) -> dict[str, TaskEval]:
    engine = Engine(model, tokenizer) if tasks else None
    found = {}
    for each in tasks:
        assert engine is not None
        with _progress(each.name, config.problems * (1 + config.samples)) as progress:
            found[each.name] = evaluate_task(engine, each, config, progress)
    return found


@contextmanager
def _progress(name: str, answers: int) -> Iterator[Any]:
    """A bar in a terminal, on standard error; yields what advances it."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(f"{name}, answers", total=answers)
        yield lambda: progress.advance(bar)


def _show_task(name: str, own: TaskEval, other: TaskEval | None, command: EvalCommand) -> dict[str, Any]:
    """Print a task's table; returns its metrics for JSON."""
    config = command.sampling
    columns = {"model": own.metrics(config.seed)}
    if other is not None:
        columns |= {"against": other.metrics(config.seed), "difference": differences(own, other, config.seed)}
    drawn = f", {config.samples} samples each at temperature {config.temperature:g}" if config.samples else ""
    table = Table("", *columns, box=None, padding=(0, 2, 0, 0), pad_edge=False)  # three columns fit into 80
    for metric in columns["model"]:
        table.add_row(
            metric.replace("_", " "), *(_cell(metric, column[metric], head) for head, column in columns.items())
        )
    console = Console()
    console.print(f"{name}: {config.problems:,} test problems{drawn}; 95 % intervals", highlight=False, soft_wrap=True)
    console.print(table)
    model, *others = ((head, as_json(column)) for head, column in columns.items())
    return {"problems": config.problems, "samples": config.samples, **model[1], **dict(others)}


def _cell(metric: str, interval: Interval, heading: str) -> str:
    """Rates in percent, lengths in tokens; a difference with its sign."""
    scale, sign = (1 if metric == "length" else 100), ("+" if heading == "difference" else "")
    value, low, high = (scale * each for each in (interval.value, interval.low, interval.high))
    return f"{value:{sign}.1f} ({low:.1f}..{high:.1f})"


def _show(results: Metrics) -> None:
    if not results:
        return
    table = Table("task or text", "metric", "value")
    for name, metrics in results.items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                table.add_row(name, metric, f"{value:.4f}")
            elif isinstance(value, int) and not isinstance(value, bool):
                table.add_row(name, metric, f"{value:,}")
    Console().print(table)
