"""Every backend by name, for the tests that all of them pass; those that cannot run here are skipped with the reason.

Without a GPU the CUDA graphs' kernels run in Triton's interpreter, step by step and without graphs, and in float32
alone: the interpreter multiplies bfloat16 wrongly.
"""

import copy
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch

from fathom.engine import backends
from fathom.engine.backends import Backend
from fathom.engine.backends.cpu import CpuBackend
from fathom.engine.backends.eager import EagerBackend
from fathom.engine.kv_cache import LatentCache
from fathom.model.transformer import Model
from fathom.ops import cpu
from tests.gpu import DEVICE, ON_GPU

native = pytest.mark.skipif(not cpu.available(), reason=f"the kernels are not built: {cpu.missing()}")
triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

every_backend = pytest.mark.parametrize(
    "name",
    [
        pytest.param("eager"),
        pytest.param("cpu", marks=native),
        pytest.param("cuda_graph", marks=[triton, pytest.mark.slow]),
    ],
)


def make(name: str, model: Model, pages: int, page_size: int, max_positions: int) -> Backend:
    """A backend with a copy of the model and an empty cache."""
    device = DEVICE if name == "cuda_graph" else torch.device("cpu")
    return _on(name, copy.deepcopy(model).to(device), pages, page_size, max_positions)


def _on(name: str, model: Model, pages: int, page_size: int, max_positions: int) -> Backend:
    weight = model.embed_tokens.weight
    cache = LatentCache(model.config, pages, page_size, weight.dtype, weight.device)
    if name == "eager":
        return EagerBackend(model, cache)
    if name == "cpu":
        return CpuBackend(model, cache, max_positions)
    from fathom.engine.backends.cuda_graph import CudaGraphBackend

    return CudaGraphBackend(model, cache, max_positions)


def use(monkeypatch: pytest.MonkeyPatch, name: str) -> Callable[[Model], Model]:
    """Let engines run on this backend; what is returned moves a model to its device."""

    def choose(model: Model, pages: int, page_size: int, max_positions: int, eager: bool = False) -> Backend:
        return _on(name, model, pages, page_size, max_positions)

    monkeypatch.setattr(backends, "choose", choose)
    few_programs(monkeypatch, name)
    return lambda model: model.to(DEVICE if name == "cuda_graph" else torch.device("cpu"))


def few_programs(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Pasts in fewer parts, as with many tokens: the interpreter takes its time for every program."""
    if name == "cuda_graph" and not ON_GPU:
        from fathom.ops.attention import triton as attention

        monkeypatch.setattr(attention, "_PROGRAMS", 24)


def skip_unless_supported(name: str, dtype: torch.dtype) -> None:
    """The interpreter has no bfloat16."""
    if name == "cuda_graph" and not ON_GPU and dtype != torch.float32:
        pytest.skip("no GPU: Triton's interpreter multiplies bfloat16 wrongly")
