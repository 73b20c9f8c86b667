"""The hot operations against their alternatives, forward and backward: `python benchmarks/ops.py`.

Medians of several turns taken in rotation, so that a drifting machine meets all alike. Prints a table.
"""

import platform
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fathom.ops import experts
from fathom.ops.attention import causal_attention, causal_attention_reference
from fathom.ops.loss import linear_cross_entropy, linear_cross_entropy_reference
from fathom.train.hardware import keep_freed_memory, matmul_flops

_TURNS = 9
_DTYPE = torch.bfloat16


def main() -> None:
    keep_freed_memory()
    torch.manual_seed(0)
    peak = matmul_flops(_DTYPE, torch.device("cpu"))
    title = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, bf16, "
    table = Table("operation", "version", "ms", title=title + f"{peak / 1e9:.0f} GFLOP/s peak")
    for operation, versions in (
        ("attention 8 x 512, 6 heads, 96/64", attention()),
        ("experts 4096 tokens, top-4 of 16, 192 → 2x96 → 192", routed()),
        ("loss 4096 tokens, 192 → 4096 words", cross_entropy()),
    ):
        for version, milliseconds in timed(versions).items():
            table.add_row(operation, version, f"{milliseconds:.1f}")
    Console(width=110).print(table)


def timed(versions: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median milliseconds of each version."""
    times: dict[str, list[float]] = {name: [] for name in versions}
    for turn in range(_TURNS + 1):
        for name, call in versions.items():
            began = time.perf_counter()
            call()
            if turn:  # the first prepares kernels
                times[name].append((time.perf_counter() - began) * 1e3)
    return {name: median(found) for name, found in times.items()}


def attention() -> dict[str, Callable[[], None]]:
    q, k = (torch.randn(8, 512, 6, 96, dtype=_DTYPE, requires_grad=True) for _ in range(2))
    v = torch.randn(8, 512, 6, 64, dtype=_DTYPE, requires_grad=True)
    grad = torch.randn(8, 512, 6, 64, dtype=_DTYPE)

    def fused(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """torch's kernel takes its fast path only where values are as wide as keys."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, F.pad(v, (0, 32))))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[..., :64].transpose(1, 2)

    names = {"in query blocks (ours)": causal_attention, "torch's fused kernel": fused}
    names["reference"] = causal_attention_reference
    return {name: (lambda f=f: f(q, k, v, 0.1).backward(grad)) for name, f in names.items()}


def routed() -> dict[str, Callable[[], None]]:
    x = torch.randn(4096, 192, dtype=_DTYPE, requires_grad=True)
    gate_up = torch.randn(16, 192, 192, dtype=_DTYPE, requires_grad=True)
    down = torch.randn(16, 192, 96, dtype=_DTYPE, requires_grad=True)
    grad = torch.randn(4096, 192, dtype=_DTYPE)

    def choose() -> tuple[Tensor, Tensor]:
        """Another routing at every call, as in training."""
        tilt = torch.rand(16) * 0.5
        ids = (torch.rand(4096, 16) + tilt).topk(4, dim=1).indices
        return ids, torch.rand(4096, 4)

    def grouped(multiple: int) -> None:
        own = experts._row_multiple
        experts._row_multiple = lambda *_: multiple
        ids, weights = choose()
        experts.routed_experts(x, experts.dispatch(ids, 16), weights, gate_up, down).backward(grad)
        experts._row_multiple = own

    def reference() -> None:
        ids, weights = choose()
        experts.routed_experts_reference(x, ids, weights, gate_up, down).backward(grad)

    return {
        "grouped, rows padded to 64 (ours)": lambda: grouped(64),
        "grouped, rows as they fall": lambda: grouped(1),
        "reference (loop over experts)": reference,
    }


def cross_entropy() -> dict[str, Callable[[], None]]:
    h = torch.randn(4096, 192, dtype=_DTYPE, requires_grad=True)
    head = torch.randn(4096, 192, requires_grad=True)
    targets = torch.randint(4096, (4096,))
    names = {"chunked (ours)": linear_cross_entropy, "reference (whole logits)": linear_cross_entropy_reference}
    return {name: (lambda f=f: f(h, head, targets).backward()) for name, f in names.items()}


if __name__ == "__main__":
    main()
