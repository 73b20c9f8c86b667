"""`fathom sft`: a model and conversations to fine-tune it on, or a run to continue."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fathom.config import ConfigError, load_json
from fathom.distributed.ranks import data_parallel
from fathom.posttrain.sft import fine_tune
from fathom.posttrain.sft_config import SftRun

_USAGE = """\
fathom sft MODEL --data FILE.jsonl --out DIR   fine-tune a model on conversations
fathom sft --resume --out DIR                  continue a run from its newest checkpoint

fathom sft MODEL --help lists every setting of a run.
"""


@dataclass(frozen=True)
class SftCommand:
    """Fine-tune a model on conversations. The run's configuration, metrics and checkpoints go to --out."""

    run: Annotated[SftRun, tyro.conf.arg(name="")]
    out: Path
    """Directory of the run."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Continue the run in --out from its newest checkpoint (from the start where there is none)."""


@dataclass(frozen=True)
class _Continued:
    """Where a run is that is continued."""

    out: Path | None = None
    resume: tyro.conf.FlagCreatePairsOff[bool] = False


def run(arguments: list[str]) -> None:
    model = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if model is None and (not arguments or "-h" in arguments or "--help" in arguments):
        print(_USAGE)
        return
    flags = arguments if model is None else arguments[1:]
    asks_for_help = "-h" in flags or "--help" in flags
    continued = _Continued() if asks_for_help else tyro.cli(_Continued, args=flags, return_unknown_args=True)[0]
    record = None if continued.out is None else continued.out / "run.json"
    # Flags that are not given leave a recorded run as it is.
    if continued.resume and record is not None and record.exists():
        recorded = load_json(SftRun, record)
        if model not in (None, recorded.init):
            raise ConfigError(f"{record} started from {recorded.init}, not from {model}; choose another --out")
    elif model is None:
        raise ConfigError("name a model to fine-tune, or continue a run with --resume --out DIR")
    else:
        recorded = SftRun(init=model)
    default = SftCommand(recorded, out=tyro.MISSING)
    command = tyro.cli(SftCommand, args=flags, default=default, prog=f"fathom sft {model or '--resume'}")
    with data_parallel() as ranks:
        fine_tune(command.run, command.out, ranks, command.resume and record is not None and record.exists())
