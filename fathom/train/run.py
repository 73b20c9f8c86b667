"""A run's whole configuration: the model, the data, and how it is trained. Written beside its checkpoints as run.json.

Defaults follow the DeepSeek-V3 report (section 4.2) where a value carries over from 14.8T tokens to a laptop; fractions
are of the whole run, so that one recipe serves every length.
"""

from dataclasses import dataclass, field
from typing import Literal

from fathom.config import check, renamed_fields
from fathom.data.corpus import DataConfig
from fathom.model.config import ModelConfig


@renamed_fields(
    shape="lr_schedule",
    decay_share="decay_fraction",
    mtp_weight="mtp_loss_weight",
    mtp_weight_late="mtp_loss_weight_late",
    bias_speed="bias_update_speed",
    bias_still_share="bias_freeze_fraction",
)
@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate, the weight of the MTP losses and the bias update speed change over the run."""

    lr_schedule: Literal["wsd", "report"] = "wsd"
    """wsd: warm-up, stable, linear decay to zero. report: warm-up, constant for 68 % of the run, cosine to a tenth
    over 29 %, then a tenth, and a thirtieth for the last 1 %."""
    warmup_steps: int = 20
    """Steps of linear warm-up (the report: 2000)."""
    decay_fraction: float = 0.4
    """Last fraction of the run, over which wsd decays the learning rate."""
    mtp_loss_weight: float = 0.3
    """λ, the weight of the mean of the MTP losses."""
    mtp_loss_weight_late: float = 0.1
    """λ after the first two thirds of the run (10T of 14.8T tokens in the report)."""
    bias_update_speed: float = 0.001
    """γ, by how much each expert's correction bias moves per step; short runs need more than the report's 0.001."""
    bias_freeze_fraction: float = 0.034
    """Last fraction of the run, in which the biases are frozen (500B of 14.8T tokens in the report)."""

    def __post_init__(self) -> None:
        check(self.warmup_steps >= 0, "schedule.warmup_steps", self.warmup_steps, "0 or more")
        for name in ("decay_fraction", "bias_freeze_fraction"):
            check(0 <= getattr(self, name) <= 1, f"schedule.{name}", getattr(self, name), "a fraction from 0 to 1")
        for name in ("mtp_loss_weight", "mtp_loss_weight_late", "bias_update_speed"):
            check(getattr(self, name) >= 0, f"schedule.{name}", getattr(self, name), "0 or more")


@renamed_fields(kind="name", clip="max_grad_norm")
@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw for all parameters; or muon for the layers' matrices and adamw for the rest."""
    learning_rate: float = 2.2e-4
    """Peak learning rate; Muon's updates are scaled to AdamW's size, so one rate serves both."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of the first and second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices; norms and biases have none."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm, taken over all parameters."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights, saved with each checkpoint; 0: no average."""

    def __post_init__(self) -> None:
        check(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "a positive number")
        check(all(0 <= b < 1 for b in self.betas), "optimizer.betas", self.betas, "two numbers from 0 to below 1")
        check(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        check(self.max_grad_norm > 0, "optimizer.max_grad_norm", self.max_grad_norm, "a positive number")
        check(0 <= self.ema_decay < 1, "optimizer.ema_decay", self.ema_decay, "from 0 to below 1")


@renamed_fields(compute="compute_dtype", recompute="activation_checkpointing", balance_alpha="seq_balance_loss_weight")
@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 16
    """Sequences per step, over all ranks and micro-batches."""
    micro_batch_size: int = 16
    """Sequences per forward pass on one rank; gradients are accumulated over the batch."""
    batch_ramp_start: int | None = None
    """Sequences per step at the start of the run, growing linearly to batch_size; None: no ramp."""
    batch_ramp_steps: int = 0
    """Steps the ramp takes."""
    sequence_length: int = 256
    """Tokens per sequence."""
    seed: int = 0
    """Seed of initial weights and data order."""
    seq_balance_loss_weight: float = 1e-4
    """α, weight of the sequence-wise balance loss."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of activations and matmuls; auto: bfloat16 where a short timing finds it faster. Weights stay float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile for the layers; auto: on a GPU (a CPU runs the kernels of fathom/ops)."""
    activation_checkpointing: bool = False
    """Save only each layer's input for the backward pass and recompute the layer there."""
    eval_every: int = 200
    """Steps between evaluations on the held-out split (0: only at the end)."""
    eval_sequences: int | None = 1024
    """Held-out sequences of an evaluation during the run, evenly spaced; None: all of them."""
    final_eval_sequences: int | None = 4096
    """Held-out sequences of the last evaluation, evenly spaced; None: all of them."""
    save_every: int = 200
    """Steps between checkpoints (0: only at the end)."""
    keep_last: int = 2
    """Checkpoints to keep, the newest."""
    max_bad_steps: int = 10
    """Stop after this many steps in a row with a loss or gradient that is not finite."""
    tensorboard: bool = False
    """Also write TensorBoard event files."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch_size", "sequence_length", "keep_last", "max_bad_steps"):
            check(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "1 or more")
        for name in ("eval_every", "save_every", "batch_ramp_steps", "seq_balance_loss_weight"):
            check(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        check(
            self.batch_size % self.micro_batch_size == 0,
            "train.batch_size",
            self.batch_size,
            f"a multiple of micro_batch_size ({self.micro_batch_size})",
        )
        start = self.batch_ramp_start
        right = start is None or (0 < start <= self.batch_size and start % self.micro_batch_size == 0)
        expected = f"a multiple of micro_batch_size ({self.micro_batch_size}), at most batch_size ({self.batch_size})"
        check(right, "train.batch_ramp_start", start, expected)
        for name in ("eval_sequences", "final_eval_sequences"):
            count = getattr(self, name)
            check(count is None or count >= 1, f"train.{name}", count, "1 or more, or None")


@dataclass(frozen=True)
class Run:
    """Everything that determines a run. Presets are functions that return one."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The architecture (config.json's keys)."""
    data: DataConfig = field(default_factory=DataConfig)
    """The corpus and its tokenizer."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, batch, evaluation and checkpoints."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW or Muon, and their settings."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """What changes during the run."""
    init: str | None = None
    """Start from this model directory or hub name (weights, tokenizer); MTP modules it lacks start fresh."""

    def __post_init__(self) -> None:
        method = self.model.topk_method
        check(
            method == "noaux_tc", "model.topk_method", method, "'noaux_tc': balancing moves the biases of that method"
        )
        longest = self.model.max_position_embeddings
        length = self.train.sequence_length
        check(length <= longest, "train.sequence_length", length, f"at most model.max_position_embeddings ({longest})")
