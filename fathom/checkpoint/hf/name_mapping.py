"""The released checkpoints' tensor names, and which of our model's parameters each belongs to.

Almost the identity: the prefix `model.` is dropped, experts are stacked into (E, …) tensors, and MTP module k is layer
num_hidden_layers + k − 1, which has copies of the shared embedding and head.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from fathom.model.config import ModelConfig

_LAYER = re.compile(r"model\.layers\.(0|[1-9]\d*)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(0|[1-9]\d*)\.(gate|up|down)_proj\.weight")
_SHARED_COPIES = ("embed_tokens.weight", "shared_head.head.weight")
# Embedding, head, norms, router and eh_proj are bfloat16 or wider in the released FP8 checkpoints.
_FP8_WEIGHT = re.compile(
    r"model\.layers\.\d+\.(self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)"
    r"|mlp\.((experts\.\d+|shared_experts)\.)?(gate|up|down)_proj)\.weight"
)
_DERIVED = re.compile(r"(.+\.)?rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)")
SCALE_SUFFIX = "_scale_inv"
"""An FP8 matrix `NAME.weight` has its scales in the tensor `NAME.weight_scale_inv`."""


class ParameterSlice(NamedTuple):
    """What a checkpoint tensor fills: a whole parameter, or rows of one expert's matrix in a stacked one."""

    parameter: str
    expert: int | None = None
    first: int = 0
    last: int | None = None

    def of(self, parameter: Tensor) -> Tensor:
        """The view of the parameter that the checkpoint tensor fills."""
        return parameter if self.expert is None else parameter[self.expert][self.first : self.last]


def locate(name: str, config: ModelConfig) -> ParameterSlice | None:
    """The part of a parameter that tensor `name` fills; None for the MTP layers' copies of embedding and head.

    For a name that is not of this architecture, the parameter is one that no model has.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return ParameterSlice(name.removeprefix("model."))
    layer, rest = int(match[1]), match[2]
    module = layer - config.num_hidden_layers
    if module >= 0 and rest in _SHARED_COPIES:
        return None
    prefix = f"layers.{layer}." if module < 0 else f"mtp.{module}."
    expert = _EXPERT.fullmatch(rest)
    if expert is None:
        return ParameterSlice(prefix + rest)
    number, kind, width = int(expert[1]), expert[2], config.moe_intermediate_size
    if number >= config.n_routed_experts:
        return ParameterSlice(name)
    if kind == "down":
        return ParameterSlice(prefix + "mlp.experts.down_proj", number)
    first = 0 if kind == "gate" else width
    return ParameterSlice(prefix + "mlp.experts.gate_up_proj", number, first, first + width)


def is_fp8_weight(name: str) -> bool:
    """Whether the released FP8 checkpoints hold the tensor of this name in FP8."""
    return _FP8_WEIGHT.fullmatch(name) is not None


def is_derived(name: str) -> bool:
    """Whether a tensor of this name follows from the configuration: the rotary tables that some programs store."""
    return _DERIVED.fullmatch(name) is not None


def layer_of(name: str) -> int | None:
    """The layer that a released tensor is part of; None for embedding, final norm and head."""
    match = _LAYER.fullmatch(name)
    return None if match is None else int(match[1])


def parameters_and_buffers(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of a model under its own names; tied ones under both of theirs."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def released_tensors(model: nn.Module, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors under the released names, experts one by one, as every other program reads them.

    The head is included even when tied, and every MTP layer has its copies of embedding and head: vLLM reads both.
    """
    tensors = parameters_and_buffers(model)
    for name, tensor in tensors.items():
        released = _released_name(name, config)
        if name.endswith("mlp.experts.gate_up_proj"):
            yield from _expert_tensors(released, tensor.chunk(2, dim=1), ("gate_proj", "up_proj"))
        elif name.endswith("mlp.experts.down_proj"):
            yield from _expert_tensors(released, (tensor,), ("down_proj",))
        else:
            yield released, tensor
    for module in range(config.num_nextn_predict_layers):
        prefix = f"model.layers.{config.num_hidden_layers + module}."
        yield prefix + "embed_tokens.weight", tensors["embed_tokens.weight"]
        yield prefix + "shared_head.head.weight", tensors["lm_head.weight"]


def _released_name(name: str, config: ModelConfig) -> str:
    if name.startswith("mtp."):
        _, module, rest = name.split(".", 2)
        return f"model.layers.{config.num_hidden_layers + int(module)}.{rest}"
    return name if name.startswith("lm_head.") else f"model.{name}"


def _expert_tensors(
    stacked_name: str, stacked: tuple[Tensor, ...], kinds: tuple[str, ...]
) -> Iterator[tuple[str, Tensor]]:
    prefix = stacked_name.rsplit(".", 1)[0]
    for expert in range(stacked[0].shape[0]):
        for kind, tensor in zip(kinds, stacked, strict=True):
            yield f"{prefix}.{expert}.{kind}.weight", tensor[expert]
