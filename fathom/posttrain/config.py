"""What every run of post-training has in common; written beside its checkpoints as run.json. Each loop adds its own."""

import math
from dataclasses import dataclass, field
from typing import Literal

from fathom.config import check
from fathom.train.run import OptimizerConfig
from fathom.train.schedule import StepHyperparameters


@dataclass(frozen=True)
class LoopConfig:
    """How long a run is, what fits on the machine, and what is written."""

    steps: int = 100
    """Optimizer steps."""
    micro_batch_tokens: int = 8192
    """Tokens per forward pass on one rank; gradients are accumulated over the batch."""
    max_length: int = 1024
    """Tokens that a sample, its prompt included, may have."""
    seed: int = 0
    """Seed of everything that is drawn."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of activations and matmuls; auto: bfloat16 where a short timing finds it faster. Weights stay float32."""
    activation_checkpointing: bool = False
    """Save only each layer's input for the backward pass and recompute the layer there."""
    mtp_loss_weight: float = 0.1
    """λ, the weight of the mean of the MTP losses."""
    seq_balance_loss_weight: float = 0.0
    """α, weight of the sequence-wise balance loss."""
    bias_update_speed: float = 0.0
    """γ, by how much each expert's correction bias moves per step."""
    eval_every: int = 50
    """Steps between evaluations (0: only at the end)."""
    save_every: int = 50
    """Steps between checkpoints (0: only at the end)."""
    keep_last: int = 2
    """Checkpoints to keep, the newest."""
    max_bad_steps: int = 10
    """Stop after this many steps in a row with a loss or gradient that is not finite."""
    tensorboard: bool = False
    """Also write TensorBoard event files."""

    def __post_init__(self) -> None:
        for name in ("steps", "micro_batch_tokens", "max_length", "keep_last", "max_bad_steps"):
            check(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "1 or more")
        for name in (
            *("mtp_loss_weight", "seq_balance_loss_weight", "bias_update_speed"),
            *("eval_every", "save_every", "seed"),
        ):
            check(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        tokens = self.micro_batch_tokens
        expected = f"at least max_length ({self.max_length})"
        check(tokens >= self.max_length, "train.micro_batch_tokens", tokens, expected)


@dataclass(frozen=True)
class LearningRateConfig:
    """How the learning rate changes over the run."""

    lr_schedule: Literal["cosine", "constant"] = "constant"
    """cosine: from the peak to final_fraction of it at the end."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    final_fraction: float = 0.2
    """Of the peak, at the end of the cosine (the report's fine-tuning: 5e-6 to 1e-6)."""

    def __post_init__(self) -> None:
        check(self.warmup_steps >= 0, "schedule.warmup_steps", self.warmup_steps, "0 or more")
        right = 0 <= self.final_fraction <= 1
        check(right, "schedule.final_fraction", self.final_fraction, "a fraction from 0 to 1")

    def factor(self, step: int, steps: int) -> float:
        """On the peak learning rate, at `step` (from 0) of `steps`."""
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.lr_schedule == "constant":
            return warmup
        progress = step / max(1, steps - 1)
        return warmup * (self.final_fraction + (1 - self.final_fraction) * (1 + math.cos(math.pi * progress)) / 2)


@dataclass(frozen=True)
class LoraConfig:
    """Adapters, which are trained instead of the model's weights."""

    rank: int = 0
    """Rank of the adapters of attention, dense layers and shared experts; 0: train all weights, without adapters."""
    alpha: float = 32.0
    """Adapters are multiplied by alpha / rank. Their learning rate is about ten times that of all weights."""
    experts: bool = False
    """Adapt the routed experts, too, each by its own."""

    def __post_init__(self) -> None:
        check(self.rank >= 0, "lora.rank", self.rank, "0 (no adapters) or more")
        check(self.alpha > 0, "lora.alpha", self.alpha, "a positive number")
        check(self.rank > 0 or not self.experts, "lora.experts", self.experts, "False where lora.rank is 0")


@dataclass(frozen=True)
class PosttrainRun:
    """The part that all runs share."""

    init: str
    """The model to start from: a Hugging Face directory or a hub name."""
    train: LoopConfig = field(default_factory=LoopConfig)
    """Length, memory, evaluation and checkpoints."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW or Muon, and their settings."""
    schedule: LearningRateConfig = field(default_factory=LearningRateConfig)
    """The learning rate during the run."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters."""

    def __post_init__(self) -> None:
        adamw = self.optimizer.name == "adamw" or not self.lora.rank
        check(adamw, "optimizer.name", self.optimizer.name, "'adamw' with lora.rank: adapters are not whole matrices")
        decay = self.optimizer.ema_decay
        check(decay == 0, "optimizer.ema_decay", decay, "0: post-training keeps no moving average of the weights")

    def hyperparameters(self, step: int) -> StepHyperparameters:
        """Those of `step` (from 0)."""
        return StepHyperparameters(
            learning_rate=self.optimizer.learning_rate * self.schedule.factor(step, self.train.steps),
            max_grad_norm=self.optimizer.max_grad_norm,
            bias_update_speed=self.train.bias_update_speed,
            mtp_loss_weight=self.train.mtp_loss_weight,
        )


CHANGEABLE = frozenset(
    [
        *("steps", "eval_every", "save_every", "keep_last", "max_bad_steps", "tensorboard", "activation_checkpointing"),
    ]
)
"""Fields of `train` that a resumed run may change: its length, and what leaves its steps as they are."""
