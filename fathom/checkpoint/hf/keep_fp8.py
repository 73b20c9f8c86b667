"""Loading an FP8 checkpoint without dequantising it: which modules of a model become FP8 layers, and filling them."""

from typing import cast

from torch import Tensor, nn

from fathom.checkpoint.hf.name_mapping import is_fp8_weight, locate
from fathom.checkpoint.hf.weights import CheckpointWeights
from fathom.model.layers import Linear
from fathom.model.moe import Experts
from fathom.model.transformer import Model
from fathom.quantization.fp8_layers import FP8Experts, FP8Linear


def insert_fp8_layers(model: Model, weights: CheckpointWeights) -> frozenset[str]:
    """Replace the modules whose matrices `weights` holds in FP8; returns the released names of those matrices."""
    released: dict[str, set[str]] = {}
    for entry in weights.specs():
        if weights.is_fp8(entry.name) and is_fp8_weight(entry.name):
            released.setdefault(_module_name(entry.name, model), set()).add(entry.name)
    for name, matrices in list(released.items()):
        module = model.get_submodule(name)
        if isinstance(module, Experts):
            experts, hidden, width = module.down_proj.shape
            if len(matrices) < 3 * experts:  # a stack has one type
                del released[name]
                continue
            replacement: nn.Module = FP8Experts(experts, hidden, width)
        else:
            replacement = FP8Linear(*cast(Linear, module).weight.shape)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, replacement)
    return frozenset[str]().union(*released.values())


def load_fp8_weight(model: Model, name: str, qweight_RI: Tensor, scales_ri: Tensor) -> None:
    """Copy one released matrix into the FP8 layer that stands for it."""
    module, target = model.get_submodule(_module_name(name, model)), locate(name, model.config)
    assert target is not None
    if isinstance(module, FP8Experts):
        module = module.get_submodule(name.split(".")[-2].removesuffix("_proj"))
    cast(FP8Linear, module).load(qweight_RI, scales_ri, target.expert)


def _module_name(name: str, model: Model) -> str:
    """The module that a released matrix is part of."""
    target = locate(name, model.config)
    assert target is not None
    return target.parameter.rpartition(".")[0]
