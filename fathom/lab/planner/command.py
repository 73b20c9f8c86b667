"""`fathom plan`: parse the flags, make the plan, print it."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from fathom import presets
from fathom.checkpoint.hf.directory import load_config, model_directory
from fathom.config import ConfigError
from fathom.lab.planner.assumptions import Assumptions
from fathom.lab.planner.hardware import GPUS, Cluster, Gpu, check
from fathom.lab.planner.layout import Layout
from fathom.lab.planner.local import local_json, plan_local, show_local
from fathom.lab.planner.memory import serving_memory
from fathom.lab.planner.plan import make_plan
from fathom.lab.planner.search import search
from fathom.lab.planner.show import plan_json, show_plan, show_sensitivity
from fathom.model.config import ModelConfig
from fathom.runtime.hardware import usable_device
from fathom.train.run import Run, TrainConfig

_LOCAL = ("cpu", "cuda")


@dataclass(frozen=True)
class PlanCommand:
    """What training and serving a model take: memory, communication, time and cost, on a cluster or on this machine."""

    model: tyro.conf.Positional[str]
    """A preset, a config.json, a model directory or a name on the hub."""
    layout: Annotated[Layout, tyro.conf.arg(name="")] = field(default_factory=Layout)
    gpu: str = "h800"
    """h800, h100, h200, b200, a100 or l40s; cpu or cuda: this machine, by timing a few real training steps."""
    gpus: int = 8
    gpus_per_node: int = 8
    link: float | None = None
    """GB/s to other GPUs of the node, one direction, instead of the data sheet's."""
    network: float | None = None
    """GB/s of each GPU to other nodes, one direction, instead of the common value."""
    tokens: float = 1e12
    """Budget of tokens whose cost is computed."""
    price: float = 2.0
    """Of a GPU-hour (2 dollars in the report)."""
    context: int = 4096
    """Serving: tokens of a request."""
    requests: int = 64
    """Serving: concurrent requests."""
    assume: Assumptions = field(default_factory=Assumptions)
    search: tyro.conf.FlagCreatePairsOff[bool] = False
    """Find the fastest layout that fits; batch, length, precision, moments and ZeRO stage stay as given."""
    sensitivity: tyro.conf.FlagCreatePairsOff[bool] = False
    """Also show how much each assumption matters."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print JSON instead of tables."""

    def __post_init__(self) -> None:
        for name in ("tokens", "context", "requests"):
            check(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        check(self.price >= 0, "price", self.price, "0 or more")
        for name in ("link", "network"):
            value = getattr(self, name)
            check(value is None or value > 0, name, value, "a positive number of GB/s")

    @property
    def cluster(self) -> Cluster:
        """The GPUs that the flags describe."""
        check(self.gpu in GPUS, "gpu", self.gpu, f"one of {', '.join((*GPUS, *_LOCAL))}")
        gpu: Gpu = GPUS[self.gpu]
        link = gpu.link if self.link is None else self.link * 1e9
        network = gpu.network if self.network is None else self.network * 1e9
        return Cluster(replace(gpu, link=link, network=network), self.gpus, self.gpus_per_node)


def plan_command(words: list[str]) -> None:
    """Parse, plan, print. A preset's own batch and length are the defaults."""
    run = _run(words[0]) if words and not words[0].startswith("-") else None
    default = tyro.MISSING_NONPROP if run is None else PlanCommand(words[0], layout=_layout(run))
    command = tyro.cli(PlanCommand, args=words[1:] if run else words, default=default, prog="fathom plan")
    assert run is not None  # without a model tyro has ended the program
    if command.gpu in _LOCAL:
        _local(command, run)
    else:
        _cluster(command, run.model)


def _cluster(command: PlanCommand, config: ModelConfig) -> None:
    cluster, layout, assumed = command.cluster, command.layout, command.assume
    make = search if command.search else make_plan
    plan = make(config, layout, cluster, assumed)
    serving = serving_memory(config, cluster, layout.precision, command.context, command.requests)
    if command.json:
        print(json.dumps(plan_json(plan, command.tokens, command.price, serving), indent=1))
        return
    console = Console()
    show_plan(console, plan, command.tokens, command.price, serving)
    if command.sensitivity:
        show_sensitivity(console, plan)


def _local(command: PlanCommand, run: Run) -> None:
    layout = command.layout
    for name in ("pipeline", "tensor", "expert", "schedule", "precision", "moments"):
        value, only = getattr(layout, name), getattr(Layout, name)
        check(value == only, name, value, f"{only} on this machine")
    train = replace(
        run.train,
        batch_size=layout.global_batch,
        micro_batch_size=layout.micro_batch,
        sequence_length=layout.length,
        activation_checkpointing=layout.recompute == "full",
    )
    with Console(stderr=True).status("timing a few real training steps"):
        plan = plan_local(replace(run, train=train), usable_device(command.gpu))
    if command.json:
        print(json.dumps(local_json(plan), indent=1))
    else:
        show_local(Console(), plan)


def _layout(run: Run) -> Layout:
    """The batch of the run."""
    train = run.train
    return Layout(
        micro_batch=train.micro_batch_size,
        global_batch=train.batch_size,
        length=train.sequence_length,
        recompute="full" if train.activation_checkpointing else "selective",
    )


def _run(model: str) -> Run:
    """A preset, or a default run with the architecture found at `model`."""
    if model in presets.ALL:
        return presets.ALL[model]()
    path = Path(model)
    if path.suffix == ".json":
        config = _read(path)
    else:
        if not path.exists() and "/" not in model:
            raise ConfigError(f"there is no preset or directory {model!r}; presets: {', '.join(presets.ALL)}")
        config = load_config(model_directory(model, weights=False))
    length = min(4096, config.max_position_embeddings)
    return Run(model=config, train=TrainConfig(batch_size=1024, micro_batch_size=1, sequence_length=length))


def _read(path: Path) -> ModelConfig:
    try:
        return ModelConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, AttributeError) as error:
        raise ConfigError(f"{path} is not a config.json: {error}") from error
