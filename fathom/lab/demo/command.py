"""`fathom demo`: train the nano preset on Python's standard library, then report what the four mechanisms did.

A few steps are timed first, on weights that are then discarded, and the number of steps that fits into the time becomes
part of the run's configuration, so that training is still a function of the configuration alone.
"""

import json
import os
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console

from fathom import presets
from fathom.checkpoint.hf.model import load_model
from fathom.config import ConfigError, check
from fathom.data.tokenize import TokenizedCorpus, open_tokenized
from fathom.data.tokenizer import Tokenizer
from fathom.distributed.ranks import Ranks, data_parallel
from fathom.engine.engine import Engine
from fathom.engine.outputs import Generation
from fathom.engine.sampling.sampler import SamplingParams
from fathom.eval.compression import compressed_bits_per_byte
from fathom.lab.demo.page import write_html
from fathom.lab.demo.report import Continuation, DemoReport, GeneratedToken, print_report
from fathom.metrics import read_metrics
from fathom.model.transformer import Model
from fathom.runtime.hardware import install_allocator
from fathom.train.pretrain import train
from fathom.train.progress import duration
from fathom.train.run import Run
from fathom.train.setup import resolve, tokenize_once
from fathom.train.timing import seconds_per_step

_SLOWER = 1.06
"""How much longer steps of the run take than timed ones: evaluations between them, and a CPU that heats up."""
_TIMED_STEPS, _TIMED_SECONDS = 40, 30.0
_FEWEST_STEPS = 40
_EVALUATIONS = 4
_FINAL_SECONDS = 32.0
"""Reserved for the evaluations, the last of which covers all held-out text."""
_MARKER = ".fathom-demo"
_PROMPT_TOKENS, _NEW_TOKENS = 96, 160


@dataclass(frozen=True)
class DemoCommand:
    """Train a small model on the source of Python's standard library, then report what the four mechanisms did."""

    out: Path = Path("runs/demo")
    """Output directory; an earlier demo there is replaced."""
    minutes: float = 5.75
    """Training time, compilation and evaluations included."""


def run_demo(command: DemoCommand) -> None:
    """Train, measure, report. Raises ConfigError for a directory with other content, or no time."""
    check(command.minutes > 0, "minutes", command.minutes, "above 0")
    console = Console()
    _clear(command.out)
    with data_parallel() as ranks:
        run, spent = _frozen_run(command, ranks, console)
        began = time.perf_counter()
        finished = train(run, command.out, ranks, console=console)
    if not finished:
        return
    seconds = spent + time.perf_counter() - began
    console.print("measuring and writing the report …", style="dim")
    report = _report(command.out, seconds)
    page = command.out / "report.html"
    write_html(report, page)
    print_report(report, console)
    console.out(f"\nreport    {page}\nmodel     {command.out / 'model'}  (a Hugging Face directory)", highlight=False)
    console.out(f"try       fathom generate {command.out / 'model'} --prompt 'def read('", highlight=False)


def _clear(directory: Path) -> None:
    """Make an empty directory; only an earlier demo is deleted."""
    if directory.exists() and any(directory.iterdir()):
        if not (directory / _MARKER).exists():
            raise ConfigError(f"{directory} is not empty and not an earlier demo; choose another --out")
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _MARKER).touch()


def _frozen_run(command: DemoCommand, ranks: Ranks, console: Console) -> tuple[Run, float]:
    """The nano run with the number of steps that fits, and the seconds spent timing."""
    install_allocator()
    run = presets.nano()
    console.print("tokenising the Python standard library …", style="dim")
    prepared = tokenize_once(run, command.out / "data", ranks)
    began = time.perf_counter()
    run = resolve(run, prepared, ranks)
    how = "compiling, then timing" if run.train.compile == "on" else "timing"
    console.print(f"{how} steps …", style="dim")
    step = seconds_per_step(run, command.out, ranks, _TIMED_STEPS, _TIMED_SECONDS)
    spent = time.perf_counter() - began
    left = command.minutes * 60 - spent - _FINAL_SECONDS
    steps = int(left / (step * _SLOWER))
    if steps < _FEWEST_STEPS:
        steps, needed = _FEWEST_STEPS, spent + _FINAL_SECONDS + _FEWEST_STEPS * step * _SLOWER
        console.out(
            f"a step takes {step:.1f} s on this machine, which is slow or busy: {steps} steps, the fewest that show "
            f"anything, take {duration(needed)} instead of {duration(command.minutes * 60)}",
            highlight=False,
        )
    every = -(-steps // _EVALUATIONS)
    train_config = replace(run.train, steps=steps, eval_every=every, eval_sequences=8, save_every=0)
    return replace(run, train=train_config), spent


# ------------------------------------------------------------------------------------------------ the report


def _report(directory: Path, seconds: float) -> DemoReport:
    """Everything the report shows, from the files of the run and measured on its saved model."""
    prepared = open_tokenized(directory / "data")
    evaluation = json.loads((directory / "evaluation.json").read_text())
    recorded = json.loads((directory / "run.json").read_text())["train"]
    sizes = compressed_bits_per_byte(prepared.valid_text_path.read_bytes())
    model = load_model(directory / "model")
    prompts = _held_out_prompts(prepared, 3)
    plain, speculative = _decoding_speeds(model, prompts[0][1])
    drafting = Engine(model, max_batch=1)
    return DemoReport(
        config=model.config,
        corpus=_corpus(prepared),
        metrics=read_metrics(directory / "metrics.jsonl"),
        loads=_loads(directory),
        bits_per_byte=evaluation["bits_per_byte"],
        gzip=sizes.gzip,
        xz=sizes.xz,
        max_vio_global=evaluation["max_vio_global"],
        acceptance=evaluation["mtp_acceptance"],
        agreement=evaluation["mtp_agreement"][0],
        tokens_per_forward=evaluation["tokens_per_forward"],
        plain_tokens_per_second=plain,
        speculative_tokens_per_second=speculative,
        seconds=seconds,
        tokens=recorded["steps"] * recorded["batch_size"] * recorded["sequence_length"],
        machine=_machine(recorded["compute_dtype"]),
        model_directory=str(directory / "model"),
        continuations=tuple(
            _continuation(name, prompt, _continue(drafting, prompt), prepared.tokenizer) for name, prompt in prompts
        ),
    )


def _corpus(prepared: TokenizedCorpus) -> str:
    size = (prepared.train_bytes + prepared.valid_bytes) / 1e6
    return f"{prepared.config.corpus}, {size:.1f} MB, sha256 {prepared.corpus_hash[:12]}…"


def _machine(compute: str) -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} CPU cores ({platform.machine()}), torch {torch.__version__}, {compute}"


def _loads(directory: Path) -> list[tuple[int, list[list[int]]]]:
    lines = (directory / "loads.jsonl").read_text().splitlines()
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [(record["step"], record["loads"]) for record in records]


def _held_out_prompts(prepared: TokenizedCorpus, count: int) -> list[tuple[str, list[int]]]:
    """(file name, tokens) from the middle of the first held-out documents that are long enough."""
    ids = np.fromfile(prepared.valid_path, dtype=prepared.token_dtype)
    ends = np.flatnonzero(ids == prepared.tokenizer.eos_id)
    begins = np.concatenate(([0], ends[:-1] + 1))
    long = [i for i in range(len(ends)) if ends[i] - begins[i] > 4 * _PROMPT_TOKENS][:count]
    middles = [int(begins[i] + ends[i]) // 2 for i in long]
    names = [prepared.heldout_documents[i] for i in long]
    return [(name, ids[middle : middle + _PROMPT_TOKENS].tolist()) for name, middle in zip(names, middles, strict=True)]


def _continue(engine: Engine, prompt: Sequence[int]) -> Generation:
    params = SamplingParams(max_tokens=_NEW_TOKENS, ignore_eos=True)
    return engine.generate([prompt], params)[0].generation


def _decoding_speeds(model: Model, prompt: Sequence[int]) -> tuple[float, float]:
    """Median tokens per second of greedy decoding, without and with drafts, after the adaptive draft length settled."""
    rates: dict[bool, list[float]] = {False: [], True: []}
    engines = {speculative: Engine(model, speculative=speculative, max_batch=1) for speculative in rates}
    for turn in range(12):
        for speculative, found in rates.items():
            began = time.perf_counter()
            generation = _continue(engines[speculative], prompt)
            if turn >= 4:
                found.append(len(generation.token_ids) / (time.perf_counter() - began))
    return median(rates[False]), median(rates[True])


def _continuation(name: str, prompt: list[int], generation: Generation, tokenizer: Tokenizer) -> Continuation:
    """Split the decoded text by token; a character of several tokens belongs to the last one."""
    tokens, shown = [], 0
    for count, accepted in enumerate(generation.accepted_mask, start=1):
        whole = tokenizer.decode(generation.token_ids[:count]).removesuffix("\ufffd")
        tokens.append(GeneratedToken(whole[shown:], accepted))
        shown = max(shown, len(whole))
    return Continuation(name, tokenizer.decode(prompt), tuple(tokens), generation.tokens_per_forward)
