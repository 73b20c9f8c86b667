"""The hot operations against their alternatives, forward and backward: `python benchmarks/ops.py`.

Medians of several alternating rounds, so that a drifting machine affects all versions alike. Prints a table.
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

from fathom.ops import cpu
from fathom.ops.attention import expanded_attention, expanded_attention_reference
from fathom.ops.linear import linear, linear_reference
from fathom.ops.loss import linear_cross_entropy, linear_cross_entropy_reference
from fathom.ops.moe import dispatch, routed_experts, routed_experts_reference
from fathom.ops.rope import Rope, apply_rope
from fathom.runtime.hardware import install_allocator, matmul_flops

_ROUNDS = 9
_DTYPE = torch.bfloat16


def main() -> None:
    install_allocator()
    torch.manual_seed(0)
    peak = matmul_flops(_DTYPE, torch.device("cpu"))
    title = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, bf16, "
    table = Table("operation", "version", "ms", title=title + f"{peak / 1e9:.0f} GFLOP/s peak")
    for operation, versions in (
        ("attention 8 x 512, 6 heads, 64+32/64", attention()),
        ("experts 4096 tokens, top-4 of 32, 384 → 2x256 → 384", routed()),
        ("linear 4096 tokens, 384 → 768, float32 weights", linear_layer()),
        ("loss 4096 tokens, 384 → 8192 vocabulary", cross_entropy()),
    ):
        for version, milliseconds in timed(versions).items():
            table.add_row(operation, version, f"{milliseconds:.1f}")
    Console(width=130).print(table)


def timed(versions: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median milliseconds of each version."""
    times: dict[str, list[float]] = {name: [] for name in versions}
    for round_ in range(_ROUNDS + 1):
        for name, call in versions.items():
            began = time.perf_counter()
            call()
            if round_:  # the first prepares kernels
                times[name].append((time.perf_counter() - began) * 1e3)
    return {name: median(found) for name, found in times.items()}


def plain(call: Callable[[], None]) -> Callable[[], None]:
    """The same without the kernels of fathom/ops."""

    def run() -> None:
        with cpu.disabled():
            call()

    return run


def attention() -> dict[str, Callable[[], None]]:
    q, kv = (torch.randn(8, 512, 6, width, dtype=_DTYPE, requires_grad=True) for width in (96, 128))
    key = torch.randn(8, 512, 32, dtype=_DTYPE, requires_grad=True)
    grad = torch.randn(8, 512, 6, 64, dtype=_DTYPE)
    rope = Rope(*(torch.randn(512, 16) for _ in range(2)))

    def fused(q: Tensor, kv: Tensor, key: Tensor, rope: Rope, scale: float) -> Tensor:
        """torch's kernel takes its fast path only where values are as wide as keys."""
        k_nope, v = kv.split((64, 64), dim=-1)
        k = torch.cat((k_nope, key.unsqueeze(2).expand(-1, -1, 6, -1)), dim=-1)
        q = torch.cat((q[..., :64], apply_rope(q[..., 64:], rope)), dim=-1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, F.pad(v, (0, 32))))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[..., :64].transpose(1, 2)

    def through(function: Callable[..., Tensor]) -> Callable[[], None]:
        return lambda: function(q, kv, key, rope, 0.1).backward(grad)

    return {
        "a head per thread (ours)": through(expanded_attention),
        "plain torch, in query blocks": plain(through(expanded_attention)),
        "torch's fused kernel": through(fused),
        "reference": plain(through(expanded_attention_reference)),
    }


def routed() -> dict[str, Callable[[], None]]:
    x = torch.randn(4096, 384, dtype=_DTYPE, requires_grad=True)
    gate_up = torch.randn(32, 512, 384, requires_grad=True)
    down = torch.randn(32, 384, 256, requires_grad=True)
    grad = torch.randn(4096, 384, dtype=_DTYPE)

    def choose() -> tuple[Tensor, Tensor]:
        """Another routing at every call, as in training."""
        tilt = torch.rand(32) * 0.5
        ids = (torch.rand(4096, 32) + tilt).topk(4, dim=1).indices
        return ids, torch.rand(4096, 4)

    def ours() -> None:
        ids, weights = choose()
        routed_experts(x, dispatch(ids, 32, _DTYPE), weights, gate_up, down).backward(grad)

    def reference() -> None:
        ids, weights = choose()
        weights_bf16 = gate_up.to(_DTYPE), down.to(_DTYPE)
        routed_experts_reference(x, ids, weights, *weights_bf16).backward(grad)

    return {
        "an expert per thread (ours)": ours,
        "plain torch, grouped matmuls": plain(ours),
        "reference (loop over experts)": reference,
    }


def linear_layer() -> dict[str, Callable[[], None]]:
    x = torch.randn(4096, 384, dtype=_DTYPE, requires_grad=True)
    weight = torch.randn(768, 384, requires_grad=True)
    grad = torch.randn(4096, 768, dtype=_DTYPE)
    return {
        "weights rounded as they are read (ours)": lambda: linear(x, weight).backward(grad),
        "reference (rounded before)": lambda: linear_reference(x, weight).backward(grad),
    }


def cross_entropy() -> dict[str, Callable[[], None]]:
    h = torch.randn(4096, 384, dtype=_DTYPE, requires_grad=True)
    head = torch.randn(8192, 384, requires_grad=True)
    targets = torch.randint(8192, (4096,))

    def through(function: Callable[..., Tensor]) -> Callable[[], None]:
        return lambda: function(h, head, targets).backward()

    return {
        "chunked (ours)": through(linear_cross_entropy),
        "plain torch, chunked": plain(through(linear_cross_entropy)),
        "reference (whole logits)": through(linear_cross_entropy_reference),
    }


if __name__ == "__main__":
    main()
