"""A run of distillation: that of fine-tuning, with a teacher."""

from dataclasses import dataclass, field

from fathom.config import check
from fathom.posttrain.sft_config import SftRun
from fathom.train.run import OptimizerConfig


@dataclass(frozen=True)
class DistillRun(SftRun):
    """Everything that determines a run. The model that it starts from is the student."""

    teacher: str = ""
    """The model whose predictions are learnt: a Hugging Face directory or a hub name, of the same tokenizer."""
    beta: float = 0.0
    """0: KL(teacher‖student). 1: KL(student‖teacher). Between: the generalised Jensen-Shannon divergence."""
    temperature: float = 1.0
    """Both models' logits are divided by it."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-5))
    """AdamW or Muon, and their settings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.beta <= 1, "beta", self.beta, "a number from 0 to 1")
        check(self.temperature > 0, "temperature", self.temperature, "a positive number")
