"""DPO: loss, gradient and metrics are those of TRL's `DPOTrainer`, on random log-probabilities."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fathom.distributed.ranks import Ranks
from fathom.posttrain.loss import TargetFacts
from fathom.posttrain.pack import Targets
from fathom.posttrain.prefer import DpoObjective

trl = pytest.importorskip("trl", reason="trl is not installed: pip install --target DIR --no-deps trl datasets")
pytestmark = pytest.mark.oracle

PAIRS, LENGTH = 5, 9


def _theirs(logprobs_RS: Tensor, mask_RT: Tensor, reference_R: Tensor, beta: float) -> tuple[Tensor, dict[str, Any]]:
    """TRL's own function, on a trainer that has what the function reads; first all chosen, then all rejected."""
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
        loss_types=["sigmoid"], loss_weights=[1.0], beta=beta, label_smoothing=0.0, use_weighting=False,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    zeros_RS = torch.zeros_like(logprobs_RS)
    outputs = SimpleNamespace(
        log_probs=logprobs_RS, entropy=zeros_RS, mean_logits=zeros_RS, is_top1=torch.zeros_like(logprobs_RS).bool()
    )
    chosen_P, rejected_P = reference_R.chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(mask_RT), "attention_mask": torch.ones_like(mask_RT), "completion_mask": mask_RT,
        "ref_chosen_logps": chosen_P, "ref_rejected_logps": rejected_P,
    }  # fmt: skip
    loss = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    return loss, {name: value[0] for name, value in trainer._metrics["train"].items()}


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.7])
def test_loss_gradient_and_metrics_are_trls(beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = 2 * PAIRS
    logprobs_RS, reference_RS = (
        -3 * torch.rand(rows, LENGTH, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    lengths_R = torch.randint(1, LENGTH + 1, (rows,), generator=generator)
    mask_RS = torch.arange(LENGTH) < lengths_R[:, None]
    logprobs_RS = (logprobs_RS * mask_RS).requires_grad_()
    mask_RT = torch.cat((torch.zeros(rows, 1, dtype=torch.int64), mask_RS.long()), dim=1)
    loss, metrics = _theirs(logprobs_RS, mask_RT, (reference_RS * mask_RS).sum(1), beta)
    [gradient_RS] = torch.autograd.grad(loss, logprobs_RS)

    # Ours has the answers of a pair one after the other.
    order_R = torch.arange(rows).view(2, PAIRS).T.flatten()
    chosen_RS = mask_RS[order_R]
    sample_X = torch.arange(rows)[:, None].expand(-1, LENGTH)[chosen_RS]
    values = {"reference": reference_RS[order_R][chosen_RS]}
    objective = DpoObjective(beta, PAIRS)
    facts = TargetFacts(logprobs_RS.detach()[order_R][chosen_RS], torch.zeros(len(sample_X)), None)
    c_X = objective(Targets(torch.ones(len(sample_X)), sample_X, values, rows), facts)
    torch.testing.assert_close(-c_X, gradient_RS[order_R][chosen_RS], atol=1e-12, rtol=1e-9)
    ours = objective.metrics(Ranks(0, 1, torch.device("cpu")))
    assert ours["dpo_loss"] == pytest.approx(float(loss.detach()), rel=1e-9)
    assert ours["accuracy"] == pytest.approx(metrics["rewards/accuracies"])
    assert beta * ours["margin"] == pytest.approx(metrics["rewards/margins"])
    assert ours["chosen_reward"] == pytest.approx(metrics["rewards/chosen"])
    assert ours["rejected_reward"] == pytest.approx(metrics["rewards/rejected"])
