"""MoE baselines: one without shared experts, and a trained one with the top experts of every token masked.

A dense feed-forward and fewer, wider experts are plain configurations.

Shapes: N tokens, E experts, K experts per token, J masked experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from fathom.model.config import ModelConfig
from fathom.model.moe import MoE
from fathom.model.router import Router
from fathom.model.transformer import Model
from fathom.ops.moe import select_experts


class NoSharedExperts(nn.Module):
    """Takes the place of the shared experts and adds nothing."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.new_zeros(())


class DenyingRouter(Router):
    """Every token is routed to its best experts after the top J, which are masked (DeepSeekMoE, section 4.5)."""

    def __init__(self, config: ModelConfig, denied: int) -> None:
        super().__init__(config)
        if not 0 <= denied <= config.n_routed_experts - config.num_experts_per_tok:
            left = config.n_routed_experts - config.num_experts_per_tok
            raise ValueError(f"denied is {denied}; it must be from 0 to {left}, so that enough experts remain")
        self.denied = denied

    def _fuses(self, logits_NE: Tensor) -> bool:
        return False  # always by `select`

    def select(self, scores_NE: Tensor) -> Tensor:
        biased_NE = scores_NE + self.e_score_correction_bias
        if self.denied:
            biased_NE = biased_NE.scatter(1, select_experts(biased_NE, self.denied), float("-inf"))
        return select_experts(biased_NE, self.config.num_experts_per_tok)


@contextmanager
def without_best_experts(model: Model, denied: int) -> Iterator[None]:
    """Within the context the top `denied` experts of every token are masked."""
    mixtures = [module for module in model.modules() if isinstance(module, MoE)]
    before = [mixture.gate for mixture in mixtures]
    try:
        for mixture in mixtures:
            router = DenyingRouter(model.config, denied).to(mixture.gate.weight.device)
            router.load_state_dict(mixture.gate.state_dict())
            mixture.register_module("gate", router)
        yield
    finally:
        for mixture, gate in zip(mixtures, before, strict=True):
            mixture.gate = gate
