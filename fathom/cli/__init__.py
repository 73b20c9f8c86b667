"""The command line: `fathom COMMAND …`, one file per command. Flags derive from dataclasses.

tyro builds them: nested dataclasses become dotted flags (`--model.hidden-size`), and the docstrings under the fields
become `--help`. typer and click would need every one of the hundred fields written down a second time.
"""

import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console

import fathom
from fathom import presets
from fathom.config import ConfigError
from fathom.train.errors import TrainingError

_COMMANDS = {
    "train": ("PRESET --out DIR", f"train a model, or --resume a run; presets: {', '.join(presets.ALL)}"),
    "sft": ("MODEL --data FILE --out DIR", "supervised fine-tuning on conversations"),
    "prefer": ("MODEL --data FILE --out DIR", "train a model on pairs of a better and a worse answer (DPO)"),
    "sample": ("MODEL --task NAME --out FILE", "answer problems several times, keep right answers as data for sft"),
    "distill": ("STUDENT --teacher MODEL --data FILE --out DIR", "train a model towards another one's predictions"),
    "rl": ("MODEL --task NAME --out DIR", "reinforcement learning with verifiable rewards"),
    "generate": ("PATH --prompt …", "continue a text with any DeepSeek-V3 model directory"),
    "eval": (
        "PATH --task … | --tasks … | --text …",
        "how often a model solves a task; lm-eval's tasks; a text in bits per byte",
    ),
    "info": ("PATH", "parameters, cache and memory of a model, without loading it"),
    "export": ("PATH --to hf|fp8|gguf --out DIR", "write a model for other programs"),
    "import": ("PATH --out DIR", "write any model that loads in our layout"),
    "push": ("DIR REPO", "upload a model directory to the Hugging Face hub"),
    "serve": ("PATH", "serve a model over the OpenAI protocol, with a web page"),
    "chat": ("PATH", "talk to a model in the terminal"),
    "demo": ("", "train a small model in six minutes and report what it learned"),
    "posttrain-demo": ("", "teach the demo's model to solve problems and report what changed"),
    "inspect": ("PATH", "write a page on what experts, heads, latents and drafts do with a text"),
    "plan": (
        "PRESET|PATH",
        "memory, time and cost of training, on a cluster or on this machine; --search finds a layout",
    ),
    "ablations": ("[NAME …]", "test the architecture's claims on small models, against baselines of the same modules"),
}
"""The file of that name has `run(words)`. Imported when called, so that a command needs only its own libraries."""

_RENAMED = {"study": "ablations"}
"""Old names of commands, which work for one release."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `fathom` command; exits with 2 and one line where the user's input is wrong."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return
    if words[0] == "--version":
        print(fathom.__version__)
        return
    try:
        with _deprecations_in_one_line():
            _run(words)
    except BrokenPipeError:
        # The reader of our output has gone (`… | head`): nothing is left to say, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError, TrainingError) as error:
        # Every room raises these with a message made for the user.
        message = _printable(f"error: {error}")
        Console(stderr=True).print(message, style="bold red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def _printable(message: str) -> str:
    """One line that a terminal takes for text: names in damaged files may hold line breaks and escape sequences."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in message)


def _run(words: list[str]) -> None:
    command = _RENAMED.get(words[0], words[0])
    if command != words[0]:
        warnings.warn(
            f"fathom {words[0]} is now called fathom {command}; the old name goes with the next release",
            DeprecationWarning,
            stacklevel=1,
        )
    if command not in _COMMANDS:
        raise ConfigError(f"there is no command {command!r}; there are {', '.join(_COMMANDS)}")
    importlib.import_module(f"fathom.cli.{command.replace('-', '_')}").run(words[1:])


@contextmanager
def _deprecations_in_one_line() -> Iterator[None]:
    """Print our own deprecations as a plain line each: old flags, and old keys in a run's files."""
    with warnings.catch_warnings():
        warnings.filterwarnings("default", category=DeprecationWarning, module="fathom")
        show = warnings.showwarning

        def show_plainly(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, DeprecationWarning):
                Console(stderr=True).print(f"note: {message}", style="yellow", markup=False, soft_wrap=True)
            else:
                show(message, category, filename, lineno, file, line)

        warnings.showwarning = show_plainly
        yield


def _usage() -> str:
    calls = {name: f"fathom {name} {takes}".rstrip() for name, (takes, _) in _COMMANDS.items()}
    width = max(map(len, calls.values()))
    lines = [f"  {calls[name]:{width}}   {does}" for name, (_, does) in _COMMANDS.items()]
    return "\n".join(
        [
            f"fathom {fathom.__version__}: the DeepSeek-V3 recipe, from a laptop to a cluster",
            "",
            *lines,
            "",
            "Each command explains its flags with --help.",
            "Several processes: torchrun --nproc-per-node N -m fathom train …",
        ]
    )
