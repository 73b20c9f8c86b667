"""A run of reinforcement learning: everything that determines it."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from fathom.config import check
from fathom.engine.sampling.sampler import SamplingParams
from fathom.posttrain.config import LearningRateConfig, LoopConfig, PosttrainRun
from fathom.posttrain.objective import Variant
from fathom.train.run import OptimizerConfig


@dataclass(frozen=True)
class RlConfig:
    """What is sampled, and what it is worth."""

    task: str = "addition"
    """addition, sort_digits, reverse_letters, count_letters, calculator, or reasoning_gym:NAME."""
    problems: int = 32
    """Problems per round."""
    group_size: int = 16
    """Answers sampled to each problem."""
    temperature: float = 1.0
    """Logits are divided by it, when sampling and when training."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the fewest likeliest tokens whose probabilities sum to this."""
    max_tokens: int = 256
    """Tokens of an answer, all its turns together."""
    variant: Variant = "cispo"
    """cispo: the ratio is capped; grpo: it is clipped token by token; gspo: sample by sample."""
    cap: float = 5.0
    """Largest ratio of cispo."""
    clip_low: float = 0.2
    """Ratios below 1 − clip_low are clipped (gspo's paper: 3e-4)."""
    clip_high: float = 0.28
    """Ratios above 1 + clip_high are clipped (gspo's paper: 4e-4)."""
    updates: int = 1
    """Optimizer steps per round, each on a part of its answers."""
    kl_weight: float = 0.0
    """β, weight of the KL to the start, by the unbiased estimator of V3.2; above 0 a second model is kept."""
    overlong: Literal["mask", "penalise"] = "mask"
    """Answers that max_tokens cut off: mask takes them out, penalise takes up to 1 off the reward of those that end in
    the last overlong_cushion tokens."""
    overlong_cushion: int = 32
    """Tokens below max_tokens from which on penalise takes effect."""
    replay_routing: bool = True
    """Train with the experts that the engine chose."""
    keep_sampling_mask: bool = True
    """Score tokens among those that top_k and top_p kept."""
    speculative: bool = True
    """Let the MTP module draft; it changes no token."""
    parity_bound: float | None = None
    """Stop where the KL between engine and trainer (mean k3) is larger; None: 1e-7, in bfloat16 1e-3."""
    eval_problems: int = 64
    """Test problems answered greedily at each evaluation; 0: none."""

    def __post_init__(self) -> None:
        check(self.problems >= 1, "problems", self.problems, "1 or more")
        check(self.group_size >= 2, "group_size", self.group_size, "2 or more: a lone answer has no advantage")
        check(self.temperature > 0, "temperature", self.temperature, "above 0: greedy answers are all alike")
        self.params()  # checks the others
        check(1 <= self.updates <= self.problems, "updates", self.updates, f"from 1 to problems ({self.problems})")
        for name in ("cap", "clip_low", "clip_high", "kl_weight", "overlong_cushion", "eval_problems"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        bound = self.parity_bound
        check(bound is None or bound > 0, "parity_bound", bound, "a positive number, or None")
        cushion = self.overlong_cushion
        fits = self.overlong == "mask" or cushion <= self.max_tokens
        check(fits, "overlong_cushion", cushion, f"at most max_tokens ({self.max_tokens})")

    def params(self) -> SamplingParams:
        """Of every answer."""
        return SamplingParams(self.temperature, self.top_k, self.top_p, max_tokens=self.max_tokens)


@dataclass(frozen=True)
class RlRun(PosttrainRun):
    """Everything that determines a run."""

    rl: Annotated[RlConfig, tyro.conf.arg(name="")] = field(default_factory=RlConfig)
    """Task, sampling and objective."""
    train: LoopConfig = field(default_factory=LoopConfig)
    """Length, memory, evaluation and checkpoints."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=3e-6, betas=(0.9, 0.99), weight_decay=0.0)
    )
    """AdamW or Muon, and their settings."""
    schedule: LearningRateConfig = field(default_factory=LearningRateConfig)
    """The learning rate during the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        steps, updates = self.train.steps, self.rl.updates
        check(steps % updates == 0, "train.steps", steps, f"a multiple of updates ({updates})")
