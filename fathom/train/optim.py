"""AdamW as in the report, and Muon for the layers' matrices.

`torch.optim.Muon` takes single matrices, one after another; most of this model's are experts', in stacks and many of
one shape. `BatchedMuon` applies the same rule (Newton-Schulz, arXiv 2502.16982's scaling to AdamW's update size) to
all matrices of a shape in one batch of matmuls.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fathom.model.layers import Linear
from fathom.model.moe import Experts
from fathom.model.transformer import Model
from fathom.runtime.precision import bfloat16_is_emulated
from fathom.train.run import OptimizerConfig

_MUON_MOMENTUM = 0.95
_NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
NEWTON_SCHULZ_STEPS = 5
BATCH_ELEMENTS = 1 << 24
"""Matrices are orthogonalised in batches of about this many elements, which bounds the size of the intermediates."""


def build_optimizers(model: Model, config: OptimizerConfig) -> list[Optimizer]:
    """One optimizer per kind of parameter; each that is not frozen belongs to exactly one."""
    matrices = muon_groups(model) if config.name == "muon" else []
    taken = {id(p) for group in matrices for p in group["params"]}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    decayed = [p for p in rest if p.dim() >= 2]
    plain = [p for p in rest if p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], betas=config.betas, fused=True, **settings)
    for param in rest:
        # torch would allocate them in the first step, between its temporaries, where they fragment memory for good.
        zero = torch.zeros((), dtype=torch.float32, device=param.device)
        adamw.state[param] = {"step": zero, "exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
    return [adamw, BatchedMuon(matrices, **settings)] if matrices else [adamw]


def muon_groups(model: Model) -> list[dict[str, Any]]:
    """The layers' matrices and the experts' stacks; embedding, head and gates stay with AdamW."""
    single: list[nn.Parameter] = []
    double: list[nn.Parameter] = []
    for part in (*model.layers, *model.mtp):
        for module in part.modules():
            if isinstance(module, Linear):
                single.append(cast(nn.Parameter, module.weight))
            elif isinstance(module, Experts):
                double.append(module.gate_up_proj)
                single.append(module.down_proj)
    groups: list[dict[str, Any]] = [{"params": single}, {"params": double, "parts": 2}]
    return [group for group in groups if group["params"]]


class BatchedMuon(Optimizer):
    """Muon for parameters (I, O) and (E, I, O), each of whose E matrices is orthogonalised on its own.

    A group with `parts` 2 holds two matrices stacked over each other (an expert's gate and up projection), which are
    two linear layers and so orthogonalised separately.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, weight_decay: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "parts": 1})
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter with a gradient."""
        batches: dict[tuple[int, ...], list[tuple[Tensor, dict[str, Any], Tensor]]] = defaultdict(list)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                matrices_EIO = self._directions(param, group["parts"])
                batch = batches[tuple(sorted(matrices_EIO.shape[1:]))]
                batch.append((param, group, matrices_EIO))
                del matrices_EIO
                if sum(m.numel() for _, _, m in batch) >= BATCH_ELEMENTS:
                    _apply(batch)
        for batch in batches.values():
            _apply(batch)

    def _directions(self, param: Tensor, parts: int) -> Tensor:
        """Gradient and momentum mixed (Nesterov), as matrices (E, I, O) in the type they are orthogonalised in."""
        momentum: Tensor = self.state[param]["momentum_buffer"]
        assert param.grad is not None
        momentum.lerp_(param.grad, 1 - _MUON_MOMENTUM)
        # Newton-Schulz needs no more precision than bfloat16 has.
        dtype = param.dtype if bfloat16_is_emulated(param.device) else torch.bfloat16
        mixed = param.grad.lerp(momentum, _MUON_MOMENTUM).to(dtype)
        return mixed.unflatten(-2, (parts, -1)).flatten(0, -3)


def _apply(batch: list[tuple[Tensor, dict[str, Any], Tensor]]) -> None:
    """Update parameters whose matrices have one shape, up to transposition; the batch is empty afterwards."""
    if not batch:
        return
    moved = [(param, group, len(m), m.shape[-2] > m.shape[-1]) for param, group, m in batch]
    joined = [m.mT if tall else m for (_, _, m), (*_, tall) in zip(batch, moved, strict=True)]
    batch.clear()
    joined_EIO = torch.cat(joined)
    joined.clear()  # frees the matrices before the workspaces are allocated
    results = orthogonalize(joined_EIO).split([count for _, _, count, _ in moved])
    for (param, group, _, tall), result in zip(moved, results, strict=True):
        update = result.mT if tall else result
        rate = group["lr"] * 0.2 * math.sqrt(max(update.shape[-2:]))
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_(update.reshape(param.shape), alpha=-rate)


def orthogonalize(x_EIO: Tensor) -> Tensor:
    """Roughly U·Vᵀ of each wide matrix's singular value decomposition, in their type. Overwrites its argument."""
    a, b, c = _NEWTON_SCHULZ
    x_EIO.div_(x_EIO.norm(dim=(-2, -1), keepdim=True).clamp_(min=1e-7))
    next_EIO = torch.empty_like(x_EIO)
    gram_EII = x_EIO.new_empty(*x_EIO.shape[:-1], x_EIO.shape[-2])
    polynomial_EII = torch.empty_like(gram_EII)
    for _ in range(NEWTON_SCHULZ_STEPS):
        torch.bmm(x_EIO, x_EIO.mT, out=gram_EII)
        torch.baddbmm(gram_EII, gram_EII, gram_EII, beta=b, alpha=c, out=polynomial_EII)
        torch.baddbmm(x_EIO, polynomial_EII, x_EIO, beta=a, out=next_EIO)
        x_EIO, next_EIO = next_EIO, x_EIO
    return x_EIO


class EMA:
    """Exponential moving average of the weights (report, section 4.2)."""

    def __init__(self, model: Model, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: Model) -> None:
        """ema ← decay·ema + (1 − decay)·weights."""
        current = [p.detach() for _, p in model.named_parameters()]
        torch._foreach_lerp_(list(self.weights.values()), current, 1 - self.decay)
