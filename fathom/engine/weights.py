"""New weights for an engine: checked as a whole, then copied into the model's own parameters."""

from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fathom.model.transformer import Model

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class _Parameter:
    """One of the model's tensors, as its state dict names it."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self._name = module, name

    @property
    def is_quantized(self) -> bool:
        return parametrize.is_parametrized(self._module, self._name)

    @property
    def value(self) -> Tensor:
        """What it computes with; a quantised matrix is dequantised for it."""
        return cast(Tensor, getattr(self._module, self._name))

    @property
    def key(self) -> int | str:
        """The same for two names of one parameter."""
        return self._name + str(id(self._module)) if self.is_quantized else self.value.data_ptr()

    def copy_(self, tensor: Tensor) -> None:
        """Take the tensor's values, quantised again where the parameter is."""
        if not self.is_quantized:
            self.value.copy_(tensor)
            return
        quantized = cast(nn.ModuleDict, self._module.parametrizations)[self._name]
        value = self.value
        stored = quantized[0].right_inverse(tensor.to(value.device, value.dtype))  # type: ignore[index]
        for index, part in enumerate(stored):
            getattr(quantized, f"original{index}").copy_(part)


@torch.no_grad()
def update_parameters(model: Model, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
    """Copy tensors, by their names in `Model.state_dict()`, into the model's parameters, quantised ones included.

    Any floating type is converted to the parameter's own. Parameters that are not named stay as they are. Raises
    ValueError, and changes nothing, if a name is unknown or a tensor has another shape or no floating type.
    """
    given = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
    known = dict(_parameters(model))
    filled: dict[int | str, tuple[str, Tensor]] = {}
    for name, tensor in given:
        _check(name, tensor, known)
        # A shared parameter, such as a tied head, has several names.
        other, earlier = filled.setdefault(known[name].key, (name, tensor))
        if earlier is not tensor and not torch.equal(earlier, tensor):
            raise ValueError(f"{name} and {other} are one parameter of this model, but their new values differ")
    for name, tensor in given:
        known[name].copy_(tensor)


def _parameters(model: Model) -> Iterator[tuple[str, _Parameter]]:
    for path, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        names = [*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))]
        if parametrize.is_parametrized(module):
            names += cast(nn.ModuleDict, module.parametrizations)
        yield from ((f"{path}.{name}" if path else name, _Parameter(module, name)) for name in names)


def _check(name: str, tensor: Tensor, known: Mapping[str, _Parameter]) -> None:
    if name not in known:
        raise ValueError(
            f"{name} is no parameter of this model; names are those of Model.state_dict(), such as {next(iter(known))}"
        )
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is given as {type(tensor).__name__}; it must be a tensor")
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device, so it has no values")
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name} has type {tensor.dtype}; it must be float32, bfloat16, float16 or float64")
    value = known[name].value
    if value.dtype not in _DTYPES:
        raise ValueError(f"{name} is stored as {value.dtype}, which cannot be updated; load the model anew")
    if tensor.shape != value.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; the model's has {tuple(value.shape)}")
