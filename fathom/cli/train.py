"""`fathom train`: a preset with its flags, or a run to continue."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fathom import presets
from fathom.config import ConfigError, current_flags, load_json, to_json
from fathom.distributed.ranks import data_parallel
from fathom.train.pretrain import train
from fathom.train.run import Run

_USAGE = f"""\
fathom train PRESET --out DIR     train a model; presets: {", ".join(presets.ALL)}
fathom train --resume --out DIR   continue a run from its newest checkpoint

fathom train PRESET --help lists every setting of a run.
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


def run(arguments: list[str]) -> None:
    if not arguments or arguments[0].startswith("-"):
        _resume(arguments)
        return
    name = arguments[0]
    if name not in presets.ALL:
        raise ConfigError(f"there is no preset {name!r}; there are {', '.join(presets.ALL)}")
    default = TrainCommand(presets.ALL[name](), out=Path("runs") / name)
    command = tyro.cli(
        TrainCommand, args=current_flags(Run, arguments[1:]), default=default, prog=f"fathom train {name}"
    )
    if command.resume:
        _refuse_another_run(command)
    with data_parallel() as ranks:
        resume = command.resume and (command.out / "run.json").exists()
        train(command.run, command.out, ranks, resume)


def _resume(arguments: list[str]) -> None:
    """`fathom train` without a preset: continue a run, or print help."""
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(_USAGE)
        return
    command = tyro.cli(ResumeCommand, args=arguments, prog="fathom train")
    if not command.resume:
        raise ConfigError(f"name a preset ({', '.join(presets.ALL)}), or continue a run with --resume --out DIR")
    with data_parallel() as ranks:
        train(Run(), command.out, ranks, resume=True)


def _refuse_another_run(command: TrainCommand) -> None:
    """Refuse flags that differ from the run being resumed, which would be ignored."""
    record = command.out / "run.json"
    if not record.exists():
        return
    ours, theirs = to_json(command.run), to_json(load_json(Run, record))
    # Resolved when the run starts: token ids, compute type, compilation.
    filled = {"bos_token_id", "eos_token_id", "pad_token_id", "compute_dtype", "compile"}
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
