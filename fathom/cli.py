"""The command line: `fathom train`, `fathom generate`, `fathom demo`. Flags derive from the configuration dataclasses.

tyro builds them: nested dataclasses become dotted flags (`--model.hidden-size`), and the docstrings under the fields
become `--help`. typer and click would want every one of the hundred fields written down a second time.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

import fathom
from fathom import presets
from fathom.checkpoint.huggingface import load_model, model_directory
from fathom.config import ConfigError, load_json, to_json
from fathom.data.tokenizer import load_tokenizer
from fathom.infer.engine import Engine, Request, TextStream
from fathom.infer.sampler import SamplingParams
from fathom.parallel.data import data_parallel
from fathom.study.demo import DemoCommand, run_demo
from fathom.train.loop import TrainingError, train
from fathom.train.run import Run

_USAGE = f"""\
fathom {fathom.__version__}: the DeepSeek-V3 recipe, from a laptop to a cluster

  fathom train PRESET --out DIR     train a model; presets: {", ".join(presets.ALL)}
  fathom train --resume --out DIR   continue a run from its newest checkpoint
  fathom generate PATH --prompt …   continue a text with any DeepSeek-V3 model directory
  fathom demo                       train a small model in six minutes and show what it learned

Each command explains its flags with --help. Several processes: torchrun --nproc-per-node N -m fathom train …
"""


@dataclass(frozen=True)
class TrainCommand:
    """Train a model. The run's resolved configuration, metrics and checkpoints go to --out."""

    run: Annotated[Run, tyro.conf.arg(name="")]
    out: Path
    """Directory of the run."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoint (from the start where there is none)."""


@dataclass(frozen=True)
class ResumeCommand:
    """Continue a run as its run.json describes it."""

    out: Path
    """Directory of the run."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Continue from the newest checkpoint."""


@dataclass(frozen=True)
class GenerateCommand:
    """Continue a text with any DeepSeek-V3-architecture model directory."""

    path: tyro.conf.Positional[str]
    """A Hugging Face model directory, or a name on the hub."""
    prompt: str
    """Text to continue; «-» reads it from standard input."""
    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = field(default_factory=SamplingParams)
    speculative: bool = True
    """Let the MTP module draft where it pays (the text is the same, or of the same distribution)."""
    eager: bool = False
    """Plain torch alone, without compiled kernels."""
    dtype: str = "float32"
    """float32 or bfloat16."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `fathom` command; exits with 2 and one line where the user's input is wrong."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], None]] = {"train": _train, "generate": _generate, "demo": _demo}
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE)
        return
    if words[0] == "--version":
        print(fathom.__version__)
        return
    try:
        if words[0] not in commands:
            raise ConfigError(f"there is no command {words[0]!r}; there are {', '.join(commands)}")
        commands[words[0]](words[1:])
    except BrokenPipeError:
        # The reader of our output has gone (`… | head`): nothing is left to say, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError, TrainingError) as error:
        # Every room raises these with a message made for the user.
        Console(stderr=True).print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        sys.exit(2)


def _train(words: list[str]) -> None:
    if not words or words[0].startswith("-"):
        _resume(words)
        return
    name = words[0]
    if name not in presets.ALL:
        raise ConfigError(f"there is no preset {name!r}; there are {', '.join(presets.ALL)}")
    default = TrainCommand(presets.ALL[name](), out=Path("runs") / name)
    command = tyro.cli(TrainCommand, args=words[1:], default=default, prog=f"fathom train {name}")
    if command.resume:
        _refuse_another_run(command)
    with data_parallel() as ranks:
        resume = command.resume and (command.out / "run.json").exists()
        train(command.run, command.out, ranks, resume)


def _resume(words: list[str]) -> None:
    """`fathom train` without a preset: only to continue, or to ask for help."""
    if not words or "-h" in words or "--help" in words:
        print(_USAGE + "\nfathom train PRESET --help lists every setting of a run.")
        return
    command = tyro.cli(ResumeCommand, args=words, prog="fathom train")
    if not command.resume:
        raise ConfigError(f"name a preset ({', '.join(presets.ALL)}), or continue a run with --resume --out DIR")
    with data_parallel() as ranks:
        train(Run(), command.out, ranks, resume=True)


def _refuse_another_run(command: TrainCommand) -> None:
    """Flags that differ from the run being resumed would be ignored: say so instead."""
    record = command.out / "run.json"
    if not record.exists():
        return
    ours, theirs = to_json(command.run), to_json(load_json(Run, record))
    # What the run itself fills in: token ids, compute type, compilation.
    filled = {"bos_token_id", "eos_token_id", "pad_token_id", "compute", "compile"}
    for section, values in ours.items():
        if not isinstance(values, dict):
            continue
        for key, value in values.items():
            if key not in filled and theirs[section][key] != value and command.run.init is None:
                flag = f"--{section}.{key.replace('_', '-')}"
                raise ConfigError(
                    f"{record} has {section}.{key} {theirs[section][key]!r}, the command line {value!r}: leave the "
                    f"preset and {flag} out to continue the run as it is, or train into another --out"
                )


def _generate(words: list[str]) -> None:
    command = tyro.cli(GenerateCommand, args=words, prog="fathom generate")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if command.dtype not in dtypes:
        raise ConfigError(f"--dtype is {command.dtype!r}; it must be {' or '.join(dtypes)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    directory = model_directory(command.path)
    model = load_model(directory, dtypes[command.dtype], device)
    tokenizer = load_tokenizer(directory)
    prompt = sys.stdin.read() if command.prompt == "-" else command.prompt
    engine = Engine(model, tokenizer, command.speculative, max_batch=1, eager=command.eager)
    handle = engine.submit(Request(prompt, command.sampling))
    text = TextStream(tokenizer)
    began = time.perf_counter()
    print(prompt, end="", flush=True)
    while engine.has_work:
        for update in engine.step():
            print(text.add(update.tokens), end="", flush=True)
    print(text.rest())
    seconds = time.perf_counter() - began
    tokens, accepted = len(handle.token_ids), ""
    if handle.drafted:
        accepted = f", {handle.accepted / handle.drafted:.0%} of drafts accepted"
    Console(stderr=True).print(
        f"{tokens} tokens in {seconds:.1f} s, {handle.tokens_per_forward:.2f} per forward pass{accepted}",
        style="dim",
        highlight=False,
    )


def _demo(words: list[str]) -> None:
    run_demo(tyro.cli(DemoCommand, args=words, prog="fathom demo"))
