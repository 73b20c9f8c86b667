"""Two hundred steps on the fast operations against two hundred on their references: one loss curve."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fathom.distributed.ranks import Ranks
from fathom.metrics import read_metrics
from fathom.model.moe import Experts
from fathom.ops import cpu
from fathom.ops.attention import expanded_attention_reference
from fathom.ops.loss import linear_cross_entropy_reference
from fathom.ops.moe import routed_experts_reference
from fathom.train.pretrain import train
from fathom.train.run import Run

_WINDOW = 20


def losses(run: Run, directory: Path, ranks: Ranks) -> Tensor:
    """Main and MTP loss of every step, (steps, 2)."""
    assert train(run, directory, ranks)
    rows = [row for row in read_metrics(directory / "metrics.jsonl") if "loss" in row]
    return torch.tensor([(row["loss"], row["mtp_loss"]) for row in rows])


def use_references(patch: pytest.MonkeyPatch) -> None:
    def experts(self: Experts, x_ND: Tensor, topk_ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        gate_up_EGD, down_EDF = self.gate_up_proj.to(x_ND.dtype), self.down_proj.to(x_ND.dtype)
        return routed_experts_reference(x_ND, topk_ids_NK, weights_NK, gate_up_EGD, down_EDF)

    patch.setattr(Experts, "forward", experts)
    patch.setattr("fathom.model.mla.expanded_attention", expanded_attention_reference)
    patch.setattr("fathom.train.loss.linear_cross_entropy", linear_cross_entropy_reference)


@pytest.mark.slow
@pytest.mark.skipif(cpu.missing() is not None, reason=f"no kernels here: {cpu.missing()}")
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_the_loss_curve_is_the_references(
    compute: str, tiny_run: Run, one_rank: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding differs, and Muon magnifies it, so single steps drift apart in time; the curve may not."""
    steps = 200 if compute == "bfloat16" else 100
    settings = replace(tiny_run.train, steps=steps, save_every=0, compute_dtype=compute)
    run = replace(tiny_run, train=settings)
    fast = losses(run, tmp_path / "fast", one_rank)
    use_references(monkeypatch)
    with cpu.disabled():
        plain = losses(run, tmp_path / "plain", one_rank)
    assert fast.shape == (steps, 2) and fast[-_WINDOW:].mean() < 0.6 * fast[:_WINDOW].mean()  # it does learn
    early = 4 if compute == "float32" else 3
    assert (fast[:early] - plain[:early]).abs().max() < (1e-4 if compute == "float32" else 2e-2)
    windows = (fast - plain).unflatten(0, (-1, _WINDOW)).mean(1)
    assert windows.abs().max() < 0.05
