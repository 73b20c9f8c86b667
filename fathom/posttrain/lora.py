"""LoRA: a frozen model and small trained adapters, W + (alpha / rank)·B·A (arXiv 2106.09685).

An adapter is a parametrisation of a weight: whatever reads the weight, be it a kernel, the absorbed form of attention
or a recomputed layer, gets the sum. So the model's code does not change, and training multiplies by exactly the
matrices that are served after the merge; with x·W + x·A·B they would be rounded differently, and the sampler of
reinforcement learning would not be the policy that is trained.

The sum is made anew in every forward pass and kept for the backward pass, one layer at a time where activations are
checkpointed. One micro-batch of 4 x 512 tokens of the bench-small preset, rank 16, on one core of a Xeon (Sapphire
Rapids), bfloat16 activations; bytes are those saved for the backward pass:

    trained                    seconds   MiB    with checkpointing
    all weights (90.2M)           1.76   383    1.81 s    65 MiB
    adapters (0.8M)               1.26   353    1.69 s    57 MiB
    with the experts' (7.1M)      1.60   641    2.11 s    93 MiB

So adapters save gradients and moments (12 bytes a weight) and the frozen experts' weight gradients.
`lora_memory` has the sum for a GPU.

With weights in bfloat16 the sum is rounded to bfloat16: as long as an adapter has moved a weight by less than half of
its last place, forward passes do not change. The adapters are float32, so nothing is lost, and steps add up; it is also
what a merged file in bfloat16 holds.

Shapes: E experts, O outputs, I inputs, R rank; … nothing, or E.
"""

import zlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fathom.config import ConfigError
from fathom.model.config import ModelConfig
from fathom.model.layers import Linear, SwiGLU
from fathom.model.mla import MultiHeadLatentAttention
from fathom.model.moe import Experts
from fathom.model.transformer import Model
from fathom.posttrain.config import LoraConfig


class LoraWeight(nn.Module):
    """The parametrisation of one weight (…, O, I): its adapters A (…, R, I) and B (…, O, R), both float32."""

    def __init__(self, weight: Tensor, config: LoraConfig, generator: torch.Generator) -> None:
        super().__init__()
        *stack, outputs, inputs = weight.shape
        self.scale = config.alpha / config.rank
        bound = inputs**-0.5
        a = torch.empty(*stack, config.rank, inputs, dtype=torch.float32, device="cpu")
        self.A = nn.Parameter(a.uniform_(-bound, bound, generator=generator).to(weight.device))
        self.B = nn.Parameter(torch.zeros(*stack, outputs, config.rank, dtype=torch.float32, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """W + (alpha / rank)·B·A in the weight's type: one matmul (of the whole stack), no other temporary."""
        add_matmul = torch.baddbmm if weight.dim() == 3 else torch.addmm
        return add_matmul(weight, self.B.to(weight.dtype), self.A.to(weight.dtype), alpha=self.scale)


def adaptable_weights(model: Model, experts: bool) -> Iterator[tuple[str, nn.Module, str]]:
    """The weights that take an adapter: name in the state dict, module, and name in the module.

    All matrices of attention, dense layers and shared experts, MTP modules included; with `experts` the routed experts'
    stacks. Embedding, head, routers and norms never.
    """
    for path, module in model.named_modules():
        if isinstance(module, MultiHeadLatentAttention | SwiGLU):
            for name, layer in module.named_children():
                if isinstance(layer, Linear):
                    yield f"{path}.{name}.weight", layer, "weight"
        elif isinstance(module, Experts) and experts:
            for name in ("gate_up_proj", "down_proj"):
                yield f"{path}.{name}", module, name


def adaptable_shapes(config: ModelConfig, experts: bool) -> dict[str, torch.Size]:
    """Name and shape of the weights that take an adapter, from the configuration alone."""
    with torch.device("meta"):
        weights = adaptable_weights(Model(config), experts)
        return {name: getattr(module, parameter).shape for name, module, parameter in weights}


def check_ranks(config: ModelConfig, lora: LoraConfig) -> None:
    """Raise ConfigError for a rank beyond that of a matrix that it is to adapt."""
    for name, shape in adaptable_shapes(config, lora.experts).items():
        if not 0 < lora.rank <= min(shape[-2:]):
            raise ConfigError(
                f"lora.rank is {lora.rank}; it must be from 1 to {min(shape[-2:])}, as {name} is "
                f"{shape[-2]} x {shape[-1]}"
            )


def add_adapters(model: Model, config: LoraConfig, seed: int) -> None:
    """Freeze the model, in place, and give it adapters that change nothing yet: B is 0, A random by (seed, name).

    Move the model to its device and type before. Raises ConfigError for a rank beyond that of a matrix.
    """
    if any(isinstance(module, LoraWeight) for module in model.modules()):
        raise ValueError("the model has adapters already; merge them first (merged_model)")
    check_ranks(model.config, config)
    model.requires_grad_(False)
    for name, module, parameter in list(adaptable_weights(model, config.experts)):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        adapter = LoraWeight(getattr(module, parameter), config, generator)
        parametrize.register_parametrization(module, parameter, adapter, unsafe=True)  # it keeps shape and type


def float32_head(model: Model) -> None:
    """Keep the head in float32, so that log-probabilities are as exact as with float32 weights."""
    model.lm_head.float()
    if model.config.tie_word_embeddings:
        model.embed_tokens.float()
        model.tie_head()


def adapters(model: Model) -> dict[str, LoraWeight]:
    """The model's adapters, by the name of the weight in the state dict of a model without them."""
    marked = ((name, module) for name, module in model.named_modules() if isinstance(module, LoraWeight))
    return {_plain_name(name): module for name, module in marked}


def adapter_state(model: Model) -> dict[str, Tensor]:
    """All that training changes: A and B by the weight's name with `.A` or `.B` after it, and the correction biases."""
    found = adapters(model).items()
    return {f"{name}.{part}": getattr(each, part).detach() for name, each in found for part in "AB"} | dict(
        model.named_buffers()
    )


@torch.no_grad()
def load_adapters(model: Model, state: Mapping[str, Tensor]) -> None:
    """Copy what `adapter_state` returned into a model with adapters; ValueError where it is of other ones."""
    own = adapter_state(model)
    for name in own.keys() ^ state.keys():
        raise ValueError(f"{name} is in {'the model' if name in own else 'the state'} alone; their adapters differ")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; the model's has {tuple(own[name].shape)}")
        own[name].copy_(tensor)


@torch.no_grad()
def merged_state(model: Model) -> dict[str, Tensor]:
    """The state dict of the model without adapters that computes the same; `Engine.update_weights` takes it.

    Adapted weights are new tensors, all others the model's own. A model without adapters gives its state dict.
    """
    found = {}
    for name, tensor in model.state_dict().items():
        if ".parametrizations." not in name:
            found[name] = tensor
        elif name.endswith(".original"):
            plain = _plain_name(name)
            path, _, parameter = plain.rpartition(".")
            found[plain] = getattr(model.get_submodule(path), parameter).detach()
    return found


def merged_model(model: Model) -> Model:
    """A model without adapters that computes the same, to save, to convert or for an engine.

    What is not adapted it shares with `model`; a model without adapters is returned as it is. The adapted weights do
    not follow later training: update an engine that uses them with `merged_state`.
    """
    if not adapters(model):
        return model
    with torch.device("meta"):
        merged = Model(model.config)
    merged.load_state_dict(merged_state(model), assign=True)
    merged.tie_head()
    return merged.requires_grad_(False).eval()


def _plain_name(name: str) -> str:
    """layers.0.mlp.up_proj.parametrizations.weight.0 → layers.0.mlp.up_proj.weight"""
    path, _, rest = name.partition(".parametrizations.")
    return f"{path}.{rest.rpartition('.')[0]}"
