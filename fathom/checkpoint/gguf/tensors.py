"""A model's tensors as llama.cpp wants them in a GGUF file: other names, stacked experts, W_kvb in two halves.

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
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from torch import Tensor

from fathom.checkpoint.hf.safetensors_io import CheckpointError
from fathom.checkpoint.hf.weights import Weights, whole
from fathom.model.config import ModelConfig
from fathom.model.layers import LATENT_NORM_EPS
from fathom.quantization import fp8

DType = Literal["f32", "bf16", "q8_0"]

KINDS = {"f32": Kind.F32, "bf16": Kind.BF16, "q8_0": Kind.Q8_0}
_Q8_BLOCK = 32

# The released names within a layer, without «.weight», and llama.cpp's. W_kvb and the experts are cut or stacked.
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "enorm": "nextn.enorm",
    "hnorm": "nextn.hnorm",
    "eh_proj": "nextn.eh_proj",
    "shared_head.norm": "nextn.shared_head_norm",
}
_EXPERTS = {"gate": "ffn_gate_exps", "up": "ffn_up_exps", "down": "ffn_down_exps"}


class GGUFTensor(NamedTuple):
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    parts: list[str]
    """The released tensors it is made of, one behind the other."""
    change: Literal["key half", "value half", "rescaled"] | None = None
    """What is done to them on the way."""
    exact: bool = False
    """Stays float32 whatever the file's type."""

    def kind(self, dtype: DType) -> Kind:
        """The type it has in a file of type `dtype`."""
        if self.exact or len(self.shape) == 1:
            return Kind.F32
        if dtype == "q8_0" and self.shape[-1] % _Q8_BLOCK:
            return Kind.BF16
        return KINDS[dtype]

    def bytes(self, dtype: DType) -> int:
        """Its size in a file of type `dtype`."""
        block, bytes_ = gguf.GGML_QUANT_SIZES[self.kind(dtype)]
        return math.prod(self.shape) // block * int(bytes_)


def gguf_tensors(weights: Weights, modules: int) -> list[GGUFTensor]:
    """Every tensor of the file, in order; `modules` of the MTP modules are among them."""
    config = weights.config
    shapes = {entry.name: entry.shape for entry in weights.entries()}
    embedding, norm, head = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
    tensors = [
        GGUFTensor("token_embd.weight", shapes[embedding], [embedding]),
        GGUFTensor("output_norm.weight", shapes[norm], [norm]),
    ]
    if not config.tie_word_embeddings:  # where it is missing, llama.cpp takes the embedding
        tensors.append(GGUFTensor("output.weight", shapes[head], [head]))
    for layer in range(config.num_hidden_layers + modules):
        prefix = f"model.layers.{layer}."
        within = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        for tensor in _layer_tensors(prefix, within, config):
            tensors.append(tensor._replace(name=f"blk.{layer}.{tensor.name}"))
    return tensors


def _layer_tensors(prefix: str, shapes: dict[str, tuple[int, ...]], config: ModelConfig) -> Iterator[GGUFTensor]:
    heads, latent = config.num_attention_heads, config.kv_lora_rank
    for name, shape in shapes.items():
        part, parts = name.removesuffix(".weight"), [prefix + name]
        if part == "self_attn.kv_b_proj":
            key_shape = (heads, latent, config.qk_nope_head_dim)
            yield GGUFTensor("attn_k_b.weight", key_shape, parts, "key half")
            yield GGUFTensor("attn_v_b.weight", (heads, config.v_head_dim, latent), parts, "value half")
        elif part == "mlp.gate.e_score_correction_bias":
            yield GGUFTensor("exp_probs_b.bias", shape, parts)
        elif part in ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa") and config.rms_norm_eps != LATENT_NORM_EPS:
            yield GGUFTensor(f"{_NAMES[part]}.weight", shape, parts, "rescaled", exact=True)
        elif part in _NAMES:
            yield GGUFTensor(f"{_NAMES[part]}.weight", shape, parts, exact=part == "mlp.gate")
    for kind, ours in _EXPERTS.items():
        if (first := shapes.get(f"mlp.experts.0.{kind}_proj.weight")) is not None:
            count = config.n_routed_experts
            parts = [f"{prefix}mlp.experts.{expert}.{kind}_proj.weight" for expert in range(count)]
            yield GGUFTensor(f"{ours}.weight", (count, *first), parts)


def encoded(weights: Weights, tensor: GGUFTensor, dtype: DType) -> Iterator[NDArray[Any]]:
    """The tensor's numbers as they lie in the file, a piece at a time."""
    for piece in _pieces(weights, tensor):
        yield encode(piece, tensor.kind(dtype))


def compare_file(weights: Weights, tensors: list[GGUFTensor], file: Path, dtype: DType) -> float:
    """Read a finished file back and compare every tensor with its source; returns √(Σ(found − source)² / Σ source²).

    Raises CheckpointError for the first number that is not its source's rounding.
    """
    places = {tensor.name: tensor.data_offset for tensor in gguf.GGUFReader(file).tensors}
    squares = np.zeros(2)
    with open(file, "rb", buffering=0) as stored:
        for tensor in tensors:
            stored.seek(places[tensor.name])
            for piece in _pieces(weights, tensor):
                expected = encode(piece, tensor.kind(dtype)).view(np.uint8)
                found = np.frombuffer(stored.read(expected.nbytes), np.uint8)
                if found.tobytes() != expected.tobytes():
                    raise CheckpointError(f"{file}: tensor {tensor.name} is not what was read from the source")
                source = piece.float().numpy()
                values = gguf.quants.dequantize(found.reshape(expected.shape), tensor.kind(dtype))
                squares += np.square(values - source).sum(), np.square(source).sum()
    return math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0


def _pieces(weights: Weights, tensor: GGUFTensor) -> Iterator[Tensor]:
    config = weights.config
    for name in tensor.parts:
        if tensor.change is None:
            shape = tensor.shape[-2:]
            for first, last in fp8.row_chunks(shape):
                yield weights.rows(name, first, last)
        elif tensor.change == "rescaled":
            yield _rescaled(whole(weights, name, tensor.shape), name, config)
        else:
            width = config.qk_nope_head_dim + config.v_head_dim
            up_YC = whole(weights, name, (config.num_attention_heads * width, config.kv_lora_rank))
            up_HYC = up_YC.unflatten(0, (config.num_attention_heads, width))
            key_HPC, value_HVC = up_HYC.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
            yield key_HPC.transpose(1, 2) if tensor.change == "key half" else value_HVC


def _rescaled(weight: Tensor, name: str, config: ModelConfig) -> Tensor:
    """The map in front of a latent norm, so scaled that rms_norm_eps acts in the norm as the latents' own epsilon.

    llama.cpp has one epsilon for all norms, and x·s / sqrt(mean((x·s)²) + ε) = x / sqrt(mean(x²) + ε/s²). The rows of
    the shared rotary key pass no norm.
    """
    scaled = weight.float().clone()
    rows = config.kv_lora_rank if name.endswith("kv_a_proj_with_mqa.weight") else len(scaled)
    scaled[:rows] *= math.sqrt(config.rms_norm_eps / LATENT_NORM_EPS)
    return scaled


def encode(tensor: Tensor, kind: Kind) -> NDArray[Any]:
    """Numbers in the file's own form."""
    if kind is Kind.Q8_0:
        blocks: NDArray[np.uint8] = gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)
        return blocks
    if kind is Kind.BF16:
        return tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy()  # NumPy has no bfloat16
    return tensor.float().contiguous().numpy()
