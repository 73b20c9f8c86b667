"""AdamW as in the report, and Muon for the layers' matrices.

`torch.optim.Muon` takes single matrices; the experts' weights are stacks of them, which `StackedMuon` orthogonalises
in one batch of products with the same rule (Newton-Schulz, arXiv 2502.16982's scaling to AdamW's update size).
"""

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fathom.model.layers import Linear
from fathom.model.moe import Experts
from fathom.model.transformer import Model
from fathom.train.run import OptimizerConfig

_MUON_MOMENTUM = 0.95
_NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
_NEWTON_SCHULZ_STEPS = 5


def build_optimizers(model: Model, config: OptimizerConfig) -> list[Optimizer]:
    """One optimizer per kind of parameter; each parameter belongs to exactly one."""
    matrices, stacks = _muon_parameters(model) if config.kind == "muon" else ([], [])
    taken = {id(p) for p in (*matrices, *(p for group in stacks for p in group["params"]))}
    rest = [p for p in model.parameters() if id(p) not in taken]
    decayed = [p for p in rest if p.dim() >= 2]
    plain = [p for p in rest if p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], betas=config.betas, fused=True, **settings)
    optimizers: list[Optimizer] = [adamw]
    if matrices:
        muon = torch.optim.Muon(matrices, momentum=_MUON_MOMENTUM, adjust_lr_fn="match_rms_adamw", **settings)
        optimizers.append(muon)
    if stacks:
        optimizers.append(StackedMuon(stacks, **settings))
    return optimizers


def _muon_parameters(model: Model) -> tuple[list[nn.Parameter], list[dict[str, Any]]]:
    """The layers' matrices and, as parameter groups, the experts' stacks; embedding, head and gates stay with AdamW."""
    matrices: list[nn.Parameter] = []
    gate_up: list[nn.Parameter] = []
    down: list[nn.Parameter] = []
    for part in (*model.layers, *model.mtp):
        for module in part.modules():
            if isinstance(module, Linear):
                matrices.append(cast(nn.Parameter, module.weight))
            elif isinstance(module, Experts):
                gate_up.append(module.gate_up_proj)
                down.append(module.down_proj)
    stacks: list[dict[str, Any]] = [{"params": gate_up, "parts": 2}, {"params": down}]
    return matrices, stacks if down else []


class StackedMuon(Optimizer):
    """Muon for parameters (E, I, O): every one of the E matrices is orthogonalised on its own, all in one batch.

    A group with `parts` 2 holds two matrices stacked over each other (an expert's gate and up projection), which are
    two linear maps and so orthogonalised apart.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, weight_decay: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "parts": 1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter with a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(param)
                momentum: Tensor = state["momentum_buffer"]
                momentum.lerp_(param.grad, 1 - _MUON_MOMENTUM)
                update = param.grad.lerp(momentum, _MUON_MOMENTUM).unflatten(1, (group["parts"], -1)).flatten(0, 1)
                rate = group["lr"] * 0.2 * math.sqrt(max(update.shape[-2:]))
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(orthogonalize(update).view_as(param).to(param.dtype), alpha=-rate)


def orthogonalize(matrices_EIO: Tensor) -> Tensor:
    """Roughly U·Vᵀ of each matrix's singular value decomposition, in bfloat16 as torch.optim.Muon computes it."""
    a, b, c = _NEWTON_SCHULZ
    x = matrices_EIO.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


class WeightAverage:
    """Exponential moving average of the weights, kept aside (report, section 4.2)."""

    def __init__(self, model: Model, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: Model) -> None:
        """average ← decay·average + (1 − decay)·weights."""
        current = [p.detach() for _, p in model.named_parameters()]
        torch._foreach_lerp_(list(self.weights.values()), current, 1 - self.decay)
