"""What a forward pass returns beside the cache it was passed.

Shapes: B batch, S length, D hidden, O vocabulary, L routers (MoE layers in order, then the MTP modules that ran),
E experts, K experts per token.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fathom.model.router import RouterOutput


@dataclass(frozen=True)
class RouterOutputs:
    """The outputs of all routers."""

    layers: tuple[RouterOutput, ...]
    """One for each router."""
    tokens_per_expert_LE: Tensor
    """Tokens each expert received, int64; no rows in a model without MoE layers."""
    balance_loss: Tensor
    """Sequence-wise balance loss before α: mean over sequences, summed over routers (scalar)."""

    @staticmethod
    def of(layers: Sequence[RouterOutput], experts: int, device: torch.device) -> "RouterOutputs":
        """Stack them; `experts` and `device` are those of a model that may have no MoE layers."""
        if not layers:
            empty_LE = torch.zeros(0, experts, dtype=torch.int64, device=device)
            return RouterOutputs((), empty_LE, torch.zeros((), device=device))
        balance = torch.stack([layer.balance_loss for layer in layers if layer.balance_loss is not None]).sum()
        return RouterOutputs(tuple(layers), torch.stack([layer.tokens_per_expert_E for layer in layers]), balance)

    @property
    def topk_ids_LBSK(self) -> tuple[Tensor, ...]:  # noqa: N802 (a tensor's shape)
        """Experts each token took, one (B, S, K) tensor per router."""
        return tuple(layer.topk_ids_BSK for layer in self.layers)

    @property
    def rerouted_BS(self) -> Tensor | None:  # noqa: N802 (a tensor's shape)
        """Whether live scores would have sent the token to other experts in any layer whose routing was replayed, bool;
        None where none was."""
        replayed = [layer.rerouted_BS for layer in self.layers if layer.rerouted_BS is not None]
        return torch.stack(replayed).any(0) if replayed else None

    @property
    def loads_LE(self) -> Tensor:  # noqa: N802 (a tensor's shape)
        """The old name of `tokens_per_expert_LE`."""
        warn_renamed("loads_LE", "tokens_per_expert_LE")
        return self.tokens_per_expert_LE


@dataclass(frozen=True)
class HiddenStates:
    """What the layers computed, before the head."""

    h_BSD: Tensor
    """The main model's hidden states after its final norm."""
    mtp_h_BSD: tuple[Tensor, ...]
    """Each MTP module's after `shared_head.norm`; module k covers the positions whose token i+k is given."""
    router: RouterOutputs


@dataclass(frozen=True)
class ModelOutput:
    """A whole forward pass."""

    logits_BSO: Tensor
    router: RouterOutputs
    mtp_logits: tuple[Tensor, ...] | None
    """With `mtp`, one (B, S − k, O) per module k: position i predicts token i + k + 1."""


def warn_renamed(old: str, new: str) -> None:
    """A DeprecationWarning at the caller of the old name."""
    warnings.warn(f"{old} is now called {new}; the old name goes with the next release", DeprecationWarning, 3)
