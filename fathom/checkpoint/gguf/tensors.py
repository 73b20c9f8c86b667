"""A model's tensors as llama.cpp expects them in a GGUF file: other names, stacked experts, W_kvb in two halves.

Shapes: E routed experts, H heads, P nope width, V value width, C latent rank, Y = P+V; in stacked matrices the last two
letters are rows and columns.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GGMLType
from numpy.typing import NDArray
from torch import Tensor

from fathom.checkpoint.hf.safetensors_io import CheckpointError
from fathom.checkpoint.hf.save import Verification
from fathom.checkpoint.hf.weights import Weights, read_tensor
from fathom.model.config import ModelConfig
from fathom.model.layers import LATENT_NORM_EPS
from fathom.quantization import fp8

DType = Literal["f32", "bf16", "q8_0"]

GGML_TYPES = {"f32": GGMLType.F32, "bf16": GGMLType.BF16, "q8_0": GGMLType.Q8_0}
_Q8_BLOCK = 32

# Released names within a layer that the gguf package's table lacks.
_OWN_NAMES = {
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "enorm.weight": "nextn.enorm.weight",
    "hnorm.weight": "nextn.hnorm.weight",
    "eh_proj.weight": "nextn.eh_proj.weight",
    "shared_head.norm.weight": "nextn.shared_head_norm.weight",
}


class GGUFTensor(NamedTuple):
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    sources: list[str]
    """The released tensors that it consists of, concatenated."""
    transform: Literal["key half", "value half", "rescaled"] | None = None
    """What is applied to them."""
    exact: bool = False
    """Stays float32 whatever the file's type."""

    def ggml_type(self, dtype: DType) -> GGMLType:
        """Its type in a file of type `dtype`."""
        if self.exact or len(self.shape) == 1:
            return GGMLType.F32
        if dtype == "q8_0" and self.shape[-1] % _Q8_BLOCK:
            return GGMLType.BF16
        return GGML_TYPES[dtype]

    def bytes(self, dtype: DType) -> int:
        """Its size in a file of type `dtype`."""
        block, bytes_ = gguf.GGML_QUANT_SIZES[self.ggml_type(dtype)]
        return math.prod(self.shape) // block * int(bytes_)


def gguf_tensors(weights: Weights, modules: int) -> list[GGUFTensor]:
    """Every tensor of the file, in order; those of the first `modules` MTP modules included."""
    config = weights.config
    shapes = {spec.name: spec.shape for spec in weights.specs()}
    layers = config.num_hidden_layers + modules
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, layers)
    outside = ["model.embed_tokens.weight", "model.norm.weight"]
    if not config.tie_word_embeddings:  # where the head is missing, llama.cpp uses the embedding
        outside.append("lm_head.weight")
    tensors = [GGUFTensor(str(names.get_name(name, (".weight",))), shapes[name], [name]) for name in outside]
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        within = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        for tensor in _layer_tensors(prefix, within, config):
            own = _OWN_NAMES.get(tensor.name)
            name = f"blk.{layer}.{own}" if own else names.get_name(prefix + tensor.name, (".weight",))
            tensors.append(tensor._replace(name=str(name)))
    return tensors


def _layer_tensors(prefix: str, shapes: dict[str, tuple[int, ...]], config: ModelConfig) -> Iterator[GGUFTensor]:
    """The layer's tensors, under the released names within it; experts are stacked, and W_kvb has one per half."""
    heads, latent = config.num_attention_heads, config.kv_lora_rank
    for name, shape in shapes.items():
        part, sources = name.removesuffix(".weight"), [prefix + name]
        if part == "self_attn.kv_b_proj":
            key_shape = (heads, latent, config.qk_nope_head_dim)
            yield GGUFTensor("self_attn.k_b_proj.weight", key_shape, sources, "key half")
            yield GGUFTensor("self_attn.v_b_proj.weight", (heads, config.v_head_dim, latent), sources, "value half")
        elif part in ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa") and config.rms_norm_eps != LATENT_NORM_EPS:
            yield GGUFTensor(name, shape, sources, "rescaled", exact=True)
        elif not part.startswith("mlp.experts.") and part not in ("embed_tokens", "shared_head.head"):
            yield GGUFTensor(name, shape, sources, exact=part == "mlp.gate")
    for kind in ("gate_proj", "up_proj", "down_proj"):
        if (shape_of_one := shapes.get(f"mlp.experts.0.{kind}.weight")) is not None:
            count = config.n_routed_experts
            sources = [f"{prefix}mlp.experts.{expert}.{kind}.weight" for expert in range(count)]
            yield GGUFTensor(f"mlp.experts.{kind}.weight", (count, *shape_of_one), sources)


def encoded_chunks(weights: Weights, tensor: GGUFTensor, dtype: DType) -> Iterator[NDArray[Any]]:
    """The tensor's data as it is stored in the file, a chunk at a time."""
    for chunk in _chunks(weights, tensor):
        yield encode(chunk, tensor.ggml_type(dtype))


def verify_file(weights: Weights, tensors: list[GGUFTensor], file: Path, dtype: DType) -> Verification:
    """Read a finished file back and compare every tensor with its source.

    Raises CheckpointError for the first value that is not its source, rounded.
    """
    offsets = {tensor.name: tensor.data_offset for tensor in gguf.GGUFReader(file).tensors}
    squares = np.zeros(2)
    with open(file, "rb", buffering=0) as stored:
        for tensor in tensors:
            stored.seek(offsets[tensor.name])
            for chunk in _chunks(weights, tensor):
                expected = encode(chunk, tensor.ggml_type(dtype)).view(np.uint8)
                found = np.frombuffer(stored.read(expected.nbytes), np.uint8)
                if found.tobytes() != expected.tobytes():
                    raise CheckpointError(f"{file}: tensor {tensor.name}: what was written differs from the source")
                source = chunk.float().numpy()
                values = gguf.quants.dequantize(found.reshape(expected.shape), tensor.ggml_type(dtype))
                squares += np.square(values - source).sum(), np.square(source).sum()
    return Verification.from_squares(len(tensors), *squares.tolist())


def _chunks(weights: Weights, tensor: GGUFTensor) -> Iterator[Tensor]:
    config = weights.config
    for name in tensor.sources:
        if tensor.transform is None:
            for first, last in fp8.row_chunks(tensor.shape[-2:]):
                yield weights.rows(name, first, last)
        elif tensor.transform == "rescaled":
            yield _rescaled(read_tensor(weights, name, tensor.shape), name, config)
        else:
            width = config.qk_nope_head_dim + config.v_head_dim
            up_YC = read_tensor(weights, name, (config.num_attention_heads * width, config.kv_lora_rank))
            up_HYC = up_YC.unflatten(0, (config.num_attention_heads, width))
            key_HPC, value_HVC = up_HYC.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
            yield key_HPC.transpose(1, 2) if tensor.transform == "key half" else value_HVC


def _rescaled(weight: Tensor, name: str, config: ModelConfig) -> Tensor:
    """The matrix before a latent norm, scaled so that rms_norm_eps has the effect of the latent norms' own epsilon.

    llama.cpp has one epsilon for all norms, and x·s / sqrt(mean((x·s)²) + ε) = x / sqrt(mean(x²) + ε/s²). The rows of
    the shared rotary key are not normalised.
    """
    scaled = weight.float().clone()
    rows = config.kv_lora_rank if name.endswith("kv_a_proj_with_mqa.weight") else len(scaled)
    scaled[:rows] *= math.sqrt(config.rms_norm_eps / LATENT_NORM_EPS)
    return scaled


def encode(tensor: Tensor, ggml_type: GGMLType) -> NDArray[Any]:
    """Values in the file's own format."""
    if ggml_type is GGMLType.Q8_0:
        blocks: NDArray[np.uint8] = gguf.quants.quantize(tensor.float().contiguous().numpy(), ggml_type)
        return blocks
    if ggml_type is GGMLType.BF16:
        return tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy()  # NumPy has no bfloat16
    return tensor.float().contiguous().numpy()
