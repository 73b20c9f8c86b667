"""`fathom posttrain-demo`: fine-tune the demo's model on worked solutions, reinforce it, and report what changed."""

import json
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fathom.checkpoint.hf.model import load_model
from fathom.config import ConfigError
from fathom.data.tokenize import open_tokenized
from fathom.data.tokenizer import load_tokenizer
from fathom.distributed.ranks import data_parallel
from fathom.engine.engine import Engine
from fathom.eval.acceptance import draft_acceptance
from fathom.eval.likelihood import text_bits
from fathom.eval.pass_rate import Interval
from fathom.files import atomic_write
from fathom.lab.posttrain_demo.page import PosttrainReport, Stage, write_html
from fathom.metrics import read_metrics
from fathom.posttrain.config import LearningRateConfig, LoopConfig
from fathom.posttrain.evaluate import GREEDY, TaskEval, TaskEvalConfig, differences, evaluate_task
from fathom.posttrain.rl import rl
from fathom.posttrain.rl_config import RlConfig, RlRun
from fathom.posttrain.sft import sft
from fathom.posttrain.sft_config import SftData, SftLoopConfig, SftRun
from fathom.posttrain.tasks import task
from fathom.posttrain.tasks.protocol import Task, problems, worked_conversation
from fathom.train.run import OptimizerConfig

_HELD_OUT_CHARACTERS = 200_000
"""Of the text that the model was pretrained to predict: how much of it was forgotten."""


@dataclass(frozen=True)
class PosttrainDemoCommand:
    """Teach a small model to solve problems, first from worked solutions, then from rewards, and report it."""

    model: Path = Path("runs") / "demo"
    """The run to start from, which `fathom demo` makes."""
    out: Path = Path("runs") / "posttrain"
    """Directory of the two runs and the report; an earlier one is continued."""
    task: str = "addition"
    """What to learn: a task of `fathom rl`."""
    sft_steps: int = 450
    """Steps on worked solutions."""
    rl_steps: int = 60
    """Steps on rewards."""
    problems: int = 200
    """Test problems, each answered greedily and four times at random, before and after."""
    seed: int = 0
    """Of everything that is drawn."""


def run_posttrain_demo(command: PosttrainDemoCommand) -> None:
    """Raises ConfigError where there is no demo's run to start from."""
    base = command.model / "model"
    if not base.exists():
        raise ConfigError(f"{base} does not exist; `make demo` trains a small model there, or name another --model")
    console, began, exercise = Console(), time.perf_counter(), task(command.task)
    chats = command.out / "chats.jsonl"
    fine_tuning, reinforcing = _sft_run(command, base, chats), _rl_run(command)
    command.out.mkdir(parents=True, exist_ok=True)
    if not chats.exists():
        _write_solutions(exercise, chats, command.sft_steps * fine_tuning.train.batch_samples)
    with data_parallel() as ranks:
        console.rule("fine-tuning on worked solutions", style="dim")
        first, second = command.out / "sft", command.out / "rl"
        if not sft(fine_tuning, first, ranks, _started(first), console):
            return
        console.rule("reinforcement learning on rewards", style="dim")
        if not rl(reinforcing, second, ranks, _started(second), console):
            return
    console.print("answering test problems, before and after …", style="dim")
    report = _report(command, exercise, time.perf_counter() - began)
    page = command.out / "report.html"
    write_html(report, page)
    _print(report, console)
    console.out(f"\nreport    {page}\nmodel     {command.out / 'rl' / 'model'}", highlight=False)
    console.out(f"try       .venv/bin/fathom chat {command.out / 'rl' / 'model'}", highlight=False)


def _started(directory: Path) -> bool:
    return (directory / "run.json").exists()


def _write_solutions(exercise: Task, path: Path, count: int) -> None:
    """Problems of the training split with their worked solutions, one conversation a line."""
    lines = (
        json.dumps({"messages": worked_conversation(exercise, problem)})
        for problem in islice(problems(exercise, "train"), count)
    )
    atomic_write(path, "\n".join(lines) + "\n")


def _sft_run(command: PosttrainDemoCommand, base: Path, chats: Path) -> SftRun:
    return SftRun(
        init=str(base),
        train=SftLoopConfig(
            steps=command.sft_steps,
            batch_samples=48,
            max_length=512,
            save_every=0,
            eval_every=100,
            seed=command.seed,
            compute_dtype="float32",  # in which engine and trainer agree to rounding, and a rerun to the bit
        ),
        optimizer=OptimizerConfig(name="muon", learning_rate=0.01, weight_decay=0.0),
        schedule=LearningRateConfig(lr_schedule="cosine", warmup_steps=5, final_fraction=0.05),
        data=SftData(chats=str(chats)),
    )


def _rl_run(command: PosttrainDemoCommand) -> RlRun:
    return RlRun(
        init=str(command.out / "sft" / "model"),
        train=LoopConfig(
            steps=command.rl_steps,
            max_length=512,
            save_every=20,
            eval_every=20,
            seed=command.seed,
            compute_dtype="float32",
        ),
        optimizer=OptimizerConfig(learning_rate=3e-4, betas=(0.9, 0.99), weight_decay=0.0),
        rl=RlConfig(task=command.task, problems=16, group_size=16, max_tokens=160),
    )


# --------------------------------------------------------------------------------------------------- the report


def _report(command: PosttrainDemoCommand, exercise: Task, seconds: float) -> PosttrainReport:
    runs = {
        "pretrained": command.model / "model",
        "fine-tuned": command.out / "sft" / "model",
        "reinforced": command.out / "rl" / "model",
    }
    text = open_tokenized(command.model / "data").valid_text_path.read_text(encoding="utf-8", errors="ignore")
    config = TaskEvalConfig(problems=command.problems, max_tokens=160, seed=command.seed)
    stages, answers = [], {}
    for name, path in runs.items():
        model, tokenizer = load_model(path), load_tokenizer(path)
        answers[name] = found = evaluate_task(Engine(model, tokenizer, max_batch=64), exercise, config)
        prompts = [rollout.prompt_ids for rollout in found.greedy[:50]]
        stages.append(
            Stage(
                name,
                found.metrics(command.seed),
                text_bits(model, tokenizer, text[:_HELD_OUT_CHARACTERS]).bits_per_byte,
                draft_acceptance(model, prompts, 32).acceptance if model.mtp else None,
            )
        )
    return PosttrainReport(
        task=exercise.name,
        stages=stages,
        gain=differences(answers["reinforced"], answers["fine-tuned"], command.seed),
        sft=read_metrics(command.out / "sft" / "metrics.jsonl"),
        rl=read_metrics(command.out / "rl" / "metrics.jsonl"),
        samples=_samples(answers),
        problems=command.problems,
        seconds=seconds,
        model=str(command.out / "rl" / "model"),
    )


def _samples(answers: dict[str, TaskEval]) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """Some problems, and each model's greedy answer with whether it is right: first those that the models differ in."""
    whole = list(zip(*(found.greedy for found in answers.values()), strict=True))
    chosen = sorted(whole, key=lambda row: len({rollout.passed for rollout in row}) == 1)[:4]
    return [
        (
            row[0].problem.messages[-1]["content"],
            [(name, "\n".join(r.turns), r.passed) for name, r in zip(answers, row, strict=True)],
        )
        for row in chosen
    ]


def _print(report: PosttrainReport, console: Console) -> None:
    table = Table("", *(stage.name for stage in report.stages), box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for metric, label in report.shown:
        table.add_row(label, *(_cell(stage.metrics[metric]) for stage in report.stages))
    table.add_row("held-out bits per byte", *(f"{stage.bits_per_byte:.3f}" for stage in report.stages))
    if all(stage.acceptance is not None for stage in report.stages):
        table.add_row("drafts accepted", *(f"{stage.acceptance:.0%}" for stage in report.stages))
    console.print(table)
    gain = report.gain[GREEDY]
    console.print(
        f"rewards changed pass@1 by {gain.value * 100:+.0f} points (paired 95 % interval {gain.low * 100:+.0f} to "
        f"{gain.high * 100:+.0f}) on {report.problems} problems",
        highlight=False,
        soft_wrap=True,
    )


def _cell(interval: Interval) -> str:
    return f"{interval.value:.0%} ({interval.low:.0%}–{interval.high:.0%})"
