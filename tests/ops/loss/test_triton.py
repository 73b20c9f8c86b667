"""The Triton kernel against plain torch, in Triton's interpreter where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fathom.ops.loss import IGNORE, _chunk
from fathom.ops.loss import triton as cross_entropy
from fathom.ops.loss.triton import cross_entropy_
from tests.gpu import DEVICE
from tests.ops.errors import scale_free_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "words"), [(1, 1), (3, 64), (5, 67), (4, 1000)])
def test_equals_plain_torch(tokens: int, words: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_BLOCK", 64)
    draw = torch.Generator().manual_seed(words)
    logits_MO = (3 * torch.randn(tokens, words, generator=draw)).to(dtype)
    targets_M = torch.randint(words, (tokens,), generator=draw)
    targets_M[2:3] = IGNORE
    expected, gradient_MO = _chunk(logits_MO.double(), targets_M, torch.float64)
    found_MO = logits_MO.to(DEVICE)
    losses_M = cross_entropy_(found_MO, targets_M.to(DEVICE), IGNORE)
    assert losses_M.dtype == torch.float32 and (losses_M[2:3] == 0).all() and (found_MO[2:3] == 0).all()
    torch.testing.assert_close(losses_M.double().sum().cpu(), expected, rtol=1e-5, atol=1e-5)
    assert scale_free_error(found_MO.cpu().double(), gradient_MO) < (1e-10 if dtype == torch.float32 else 1e-4)


def test_what_is_not_finite_or_outside_is_not_hidden() -> None:
    for poison in (float("nan"), float("inf")):
        logits_MO = torch.zeros(2, 70, device=DEVICE)
        logits_MO[1, 66] = poison
        losses_M = cross_entropy_(logits_MO, torch.tensor([0, 1], device=DEVICE), IGNORE)
        assert losses_M.isfinite().tolist() == [True, False]
    for target in (-1, 70, 10**6):
        losses_M = cross_entropy_(torch.zeros(1, 70, device=DEVICE), torch.tensor([target], device=DEVICE), IGNORE)
        assert not losses_M.isfinite().any()


def test_a_masked_beginning_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_BLOCK", 64)
    logits_MO = torch.full((1, 130), float("-inf"), device=DEVICE)
    logits_MO[0, 100:] = 0
    losses_M = cross_entropy_(logits_MO, torch.tensor([101], device=DEVICE), IGNORE)
    torch.testing.assert_close(losses_M.cpu(), torch.tensor([30.0]).log())
