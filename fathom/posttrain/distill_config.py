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
    on_policy: bool = False
    """Train on answers that the student samples to the data's prompts, by KL(student‖teacher), token by token."""
    max_tokens: int = 256
    """On policy: tokens of an answer."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-5))
    """AdamW or Muon, and their settings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.beta <= 1, "beta", self.beta, "a number from 0 to 1")
        check(self.temperature > 0, "temperature", self.temperature, "a positive number")
        check(self.max_tokens >= 1, "max_tokens", self.max_tokens, "1 or more")
        if self.on_policy:
            check(self.beta == 0, "beta", self.beta, "left out with on_policy, whose divergence is KL(student‖teacher)")
            share = self.data.pretrain_share
            check(share == 0, "data.pretrain_share", share, "0 with on_policy: text has no prompts")
