"""Optimizers: every parameter once, Muon on stacks equal to torch's on each matrix, and the moving average."""

from dataclasses import replace

import pytest
import torch

from fathom.model.transformer import Model
from fathom.train.optim import EMA, BatchedMuon, build_optimizers
from fathom.train.run import Run


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_has_exactly_one_optimizer(tiny_run: Run, kind: str) -> None:
    model = Model(tiny_run.model)
    optimizers = build_optimizers(model, replace(tiny_run.optimizer, name=kind))
    owned = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())


def test_norms_and_gate_biases_do_not_decay(tiny_run: Run) -> None:
    model = Model(tiny_run.model)
    decay = {
        id(p): group["weight_decay"]
        for optimizer in build_optimizers(model, tiny_run.optimizer)
        for group in optimizer.param_groups
        for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if parameter.dim() == 1 else 0.1), name


@pytest.fixture
def as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch orthogonalises in bfloat16 also where that is slow."""
    monkeypatch.setattr("fathom.train.optim.bfloat16_is_emulated", lambda device: False)


@pytest.mark.usefixtures("as_torch_does")
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("shape", [(3, 16, 8), (3, 8, 16), (2, 12, 12)])
def test_batched_muon_is_torchs_muon_on_every_matrix(shape: tuple[int, int, int], parts: int) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape)
    gradients = [torch.randn(shape) for _ in range(4)]
    stack = torch.nn.Parameter(start.clone())
    ours = BatchedMuon([{"params": [stack], "parts": parts}], lr=0.02, weight_decay=0.1)
    singles = [torch.nn.Parameter(matrix.clone()) for matrix in start.unflatten(1, (parts, -1)).flatten(0, 1)]
    theirs = torch.optim.Muon(singles, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        stack.grad = gradient.clone()
        for single, part in zip(singles, gradient.unflatten(1, (parts, -1)).flatten(0, 1), strict=True):
            single.grad = part.clone()
        ours.step()
        theirs.step()
    moved = (stack - start).norm()
    # Both orthogonalise in bfloat16; batching changes only the order of its sums.
    assert (stack - torch.stack(list(singles)).view_as(stack)).norm() < 0.01 * moved


@pytest.mark.parametrize("emulated", [True, False])
def test_bfloat16_is_orthogonal_enough(emulated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both types give updates whose singular values lie where Newton-Schulz leaves them."""
    monkeypatch.setattr("fathom.train.optim.bfloat16_is_emulated", lambda device: emulated)
    torch.manual_seed(2)
    weight = torch.nn.Parameter(torch.zeros(24, 16))
    weight.grad = torch.randn(24, 16)
    BatchedMuon([{"params": [weight]}], lr=1.0, weight_decay=0.0).step()
    values = torch.linalg.svdvals(weight.detach()) / (0.2 * 24**0.5)
    assert values.min() > 0.5 and values.max() < 1.3


@pytest.mark.usefixtures("as_torch_does")
def test_matrices_of_one_shape_share_a_batch_and_nothing_else() -> None:
    """Tall, wide and stacked matrices of one shape, up to transposition, against torch's optimizer on each."""
    torch.manual_seed(1)
    shapes = [(8, 16), (16, 8), (3, 8, 16), (12, 4)]
    mine = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(m.clone()) for p in mine for m in p.detach().reshape(-1, *p.shape[-2:])]
    starts = [p.detach().clone() for p in mine]
    ours = BatchedMuon([{"params": mine}], lr=0.02, weight_decay=0.1)
    torchs = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p in mine:
            p.grad = torch.randn_like(p)
        for single, grad in zip(theirs, (g for p in mine for g in p.grad.reshape(-1, *p.shape[-2:])), strict=True):
            single.grad = grad.clone()
        ours.step()
        torchs.step()
    rest = iter(theirs)
    for p, start in zip(mine, starts, strict=True):
        expected = torch.stack([next(rest) for _ in range(p.numel() // (p.shape[-1] * p.shape[-2]))]).view_as(p)
        assert (p - expected).norm() < 0.01 * (p - start).norm()


def test_average_follows_its_formula(tiny_run: Run) -> None:
    model = Model(tiny_run.model)
    average = EMA(model, decay=0.75)
    before = model.norm.weight.detach().clone()
    with torch.no_grad():
        model.norm.weight += 4.0
    average.update(model)
    torch.testing.assert_close(average.weights["norm.weight"], before + 1.0)
