"""What the commands of post-training share: a model with the flags of a run, or a run to continue."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Generic, TypeVar

import tyro
from rich.console import Console

from fathom.config import ConfigError, load_json
from fathom.distributed.ranks import Ranks, data_parallel
from fathom.posttrain.config import PosttrainRun

R = TypeVar("R", bound=PosttrainRun)

Loop = Callable[[R, Path, Ranks, bool, Console | None], bool]
"""A loop, such as `sft`: (run, directory, ranks, resume, console), whether it finished."""


@dataclass(frozen=True)
class PosttrainCommand(Generic[R]):
    """Train a model further. The run's configuration, metrics and checkpoints go to --out."""

    run: Annotated[R, tyro.conf.arg(name="")]
    out: Path
    """Directory of the run."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoint (from the start where there is none)."""


def run_posttrain(name: str, run_type: type[R], loop: Loop[R], words: list[str]) -> None:
    """`fathom NAME MODEL --out DIR …`, or `fathom NAME --resume --out DIR …`."""
    model = words[0] if words and not words[0].startswith("-") else None
    flags = words if model is None else words[1:]
    if model is None and "--resume" not in flags:
        if not flags or {"-h", "--help"} & set(flags):
            print(_usage(name))
            return
        raise ConfigError(
            f"name a model (a directory or a hub name), or continue a run: fathom {name} --resume --out DIR"
        )
    out = _out(flags) or Path("runs") / name
    record, resume = out / "run.json", "--resume" in flags
    if resume and (model is None or record.exists()):
        if not record.exists():
            raise ConfigError(f"{out} holds no run to resume: {record} does not exist")
        # Flags that are not given leave the run as it is.
        default = load_json(run_type, record)
        if model is not None and model != default.init:
            raise ConfigError(
                f"{record} starts from {default.init!r}, this command from {model!r}; leave the model out"
            )
    else:
        resume, default = False, run_type(init=str(model))
    command = tyro.cli(
        PosttrainCommand[run_type],  # type: ignore[valid-type]
        args=flags,
        default=PosttrainCommand(default, out),
        prog=f"fathom {name} {model or ''}".rstrip(),
    )
    with data_parallel() as ranks:
        loop(command.run, command.out, ranks, resume, None)


def _out(flags: list[str]) -> Path | None:
    """The directory that --out names."""
    for index, word in enumerate(flags):
        flag, equals, value = word.partition("=")
        if flag == "--out":
            return Path(value) if equals else Path(flags[index + 1]) if index + 1 < len(flags) else None
    return None


def _usage(name: str) -> str:
    return f"""\
fathom {name} MODEL --out DIR      train a model directory, or a model of the hub, further
fathom {name} --resume --out DIR   continue a run from its newest checkpoint; --train.steps N makes it longer

fathom {name} MODEL --help lists every setting of a run.
"""
