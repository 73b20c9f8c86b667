"""`fathom train`: a preset with its flags, or a run to continue."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fathom import presets
from fathom.checkpoint.hf.model import load_config
from fathom.config import ConfigError, current_flags, load_json
from fathom.distributed.ranks import data_parallel
from fathom.train.pretrain import train
from fathom.train.resume import resumed_run
from fathom.train.run import Run

_USAGE = f"""\
fathom train PRESET --out DIR     train a model; presets: {", ".join(presets.ALL)}
fathom train --resume --out DIR   continue a run from its newest checkpoint; --train.steps N makes it longer

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
    command = _parse(name, arguments[1:], TrainCommand(presets.ALL[name](), out=Path("runs") / name))
    record = command.out / "run.json"
    resume = command.resume and record.exists()
    if resume:
        recorded = load_json(Run, record)
        if recorded.init is None:
            resumed_run(recorded, command.run, record)  # refuses another preset than the run started from
        # Flags that are not given leave the run as it is, whatever the preset says.
        command = _parse(name, arguments[1:], TrainCommand(recorded, command.out))
    elif command.run.init is not None:
        _refuse_another_model(command.run, command.run.init, arguments)
    with data_parallel() as ranks:
        train(command.run, command.out, ranks, resume)


def _resume(arguments: list[str]) -> None:
    """`fathom train` without a preset: continue a run, or print help."""
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(_USAGE)
        return
    command, flags = tyro.cli(ResumeCommand, args=arguments, prog="fathom train", return_unknown_args=True)
    if not command.resume:
        raise ConfigError(f"name a preset ({', '.join(presets.ALL)}), or continue a run with --resume --out DIR")
    record = command.out / "run.json"
    if not record.exists():
        raise ConfigError(f"{command.out} holds no run to resume: {record} does not exist")
    changed = _parse("--resume", flags, TrainCommand(load_json(Run, record), command.out))
    with data_parallel() as ranks:
        train(changed.run, command.out, ranks, resume=True)


def _parse(name: str, flags: list[str], default: TrainCommand) -> TrainCommand:
    return tyro.cli(TrainCommand, args=current_flags(Run, flags), default=default, prog=f"fathom train {name}")


def _refuse_another_model(run: Run, init: str, arguments: list[str]) -> None:
    """Refuse --model flags that differ from the model that the run starts from, which would be ignored."""
    config, flags = load_config(init), {word.partition("=")[0].replace("-", "_") for word in arguments}
    for name, given in vars(run.model).items():
        more_modules = name == "num_nextn_predict_layers" and given > config.num_nextn_predict_layers
        if f"__model.{name}" in flags and given != getattr(config, name) and not more_modules:
            raise ConfigError(
                f"--model.{name.replace('_', '-')} is {given!r}; --init {init} has {getattr(config, name)!r}, and a "
                "run that starts from a model has its architecture: leave the flag out"
            )
