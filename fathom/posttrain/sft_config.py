"""A run of supervised fine-tuning; defaults follow the DeepSeek-V3 report, section 5.1: two epochs, 5e-6 to 1e-6."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from fathom.config import check
from fathom.posttrain.config import LearningRateConfig, LoopConfig, PosttrainRun
from fathom.train.run import OptimizerConfig


@dataclass(frozen=True)
class SftData:
    """What to train on."""

    chats: Annotated[str, tyro.conf.arg(aliases=["--data"])] = ""
    """JSON Lines, plain or compressed, with `messages`, or `prompt` and `completion`, a line."""
    epochs: float = 2
    """How often every sample is trained, unless train.steps says how long the run is."""
    heldout: float = 0.02
    """Fraction of the samples that is never trained and measured instead; 0: none."""
    strict: bool = False
    """Refuse samples of more than train.max_length tokens; otherwise they are left out, and counted."""
    pretrain_share: float = 0.0
    """Fraction of each step's trained tokens that is text of `corpus`, as in pretraining, so that less is forgotten."""
    corpus: str | None = None
    """That text: as in `fathom train`, a file, a directory, a glob (quote it), `hf:NAME` or `python-stdlib`."""

    def __post_init__(self) -> None:
        check(self.epochs > 0, "data.epochs", self.epochs, "a positive number")
        check(0 <= self.heldout < 1, "data.heldout", self.heldout, "a fraction from 0 to below 1")
        check(0 <= self.pretrain_share < 1, "data.pretrain_share", self.pretrain_share, "a fraction from 0 to below 1")
        missing = "set where data.pretrain_share is not 0, and only there"
        check((self.corpus is not None) == (self.pretrain_share > 0), "data.corpus", self.corpus, missing)


@dataclass(frozen=True)
class SftLoopConfig(LoopConfig):
    """How long the run is, what fits on the machine, and what is written."""

    steps: int = 0
    """Optimizer steps; 0: as many as data.epochs take."""
    batch_samples: int = 32
    """Samples per step, over all ranks and micro-batches."""

    def __post_init__(self) -> None:
        check(self.steps >= 0, "train.steps", self.steps, "0 or more")
        check(self.batch_samples >= 1, "train.batch_samples", self.batch_samples, "1 or more")
        inherited = {name: value for name, value in vars(self).items() if name != "batch_samples"}
        LoopConfig(**inherited | {"steps": max(1, self.steps)})  # which checks the rest


@dataclass(frozen=True)
class SftRun(PosttrainRun):
    """Everything that determines a run."""

    train: SftLoopConfig = field(default_factory=SftLoopConfig)
    """Length, memory, evaluation and checkpoints."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=5e-6))
    """AdamW or Muon, and their settings."""
    schedule: LearningRateConfig = field(default_factory=lambda: LearningRateConfig(lr_schedule="cosine"))
    """The learning rate during the run."""
    data: SftData = field(default_factory=SftData)
    """Conversations, and text mixed in."""
