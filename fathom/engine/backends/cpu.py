"""The whole model in one call on the CPU, for the few tokens of a decoding step (fathom/ops/decode/decode.cpp).

Says where every weight of a model lies, in the structures that the C++ reads. They are the same in both languages.

Shapes: N tokens, D hidden, O vocabulary, E experts, J pairs of rotary numbers.
"""

import ctypes
from array import array
from collections.abc import Iterable
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from typing import cast

import torch
from torch import Tensor

from fathom.engine.backends.raw_weights import layer_weights
from fathom.engine.batch import BatchMetadata
from fathom.model.block import Block
from fathom.model.cached_batch import Routed
from fathom.model.layers import LATENT_NORM_EPS, RMSNorm
from fathom.model.moe import MoE
from fathom.model.mtp import MTPModule
from fathom.model.rope import rope_table, softmax_scale
from fathom.model.transformer import Model
from fathom.ops import cpu
from fathom.quantization.weight_only import stored

_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.int32: 3}


class _Weight(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("scales", c_void_p),
        ("format", c_int64),
        ("rows", c_int64),
        ("columns", c_int64),
    )


class _Layer(Structure):
    _fields_ = tuple(
        (name, _Weight)
        for name in (
            *("input_norm", "q_a", "q_a_norm", "q_b", "kv_a", "kv_a_norm", "kv_b", "o"),
            *("post_norm", "router", "bias", "gate_up", "down"),
            *("gate", "up", "out"),
        )
    )


class _Module(Structure):
    _fields_ = (
        *((name, _Weight) for name in ("embed_norm", "state_norm", "join")),
        ("layer", _Layer),
        ("norm", _Weight),
    )


class _Plan(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("hidden", "heads", "nope", "rope", "value", "latent")),
        *((name, c_int64) for name in ("experts", "choices", "groups", "topk_group", "normalise")),
        *((name, c_int64) for name in ("page_size", "slots", "widest")),
        *((name, c_double) for name in ("eps", "latent_eps", "scale", "routed_scale")),
        *((name, _Weight) for name in ("embed", "norm", "head")),
        ("layer_count", c_int64),
        ("layers", POINTER(_Layer)),
        ("modules", POINTER(_Module)),
        ("cosines", c_void_p),
        ("sines", c_void_p),
    )


class _Step(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("tokens", "max_blocks_per_seq")),
        *(
            (name, c_void_p)
            for name in (
                "token_ids",
                "positions",
                "slot_mapping",
                "seq_indices",
                "block_tables",
                "cache",
                "prev_hidden",
                "hidden",
            )
        ),
        ("logits_count", c_int64),
        *((name, c_void_p) for name in ("logits_indices", "logits", "experts", "weights")),
    )


class NativeModel:
    """A model on the CPU; it is read where it lies, not copied."""

    max_tokens_per_call = 48
    """Tokens up to which reading the weights takes longer than multiplying with them."""
    max_cache_write_tokens = 512
    """The same where a drafting module only writes latents: two products a token."""
    compile_seconds = 0.0
    """The kernels are compiled once for all models."""

    def __init__(self, model: Model, cache_LMW: Tensor, page_size: int, positions: int) -> None:
        config = model.config
        self._kept: list[Tensor] = []  # what the structures point to and nobody else holds
        self._hidden, self._words, self._cache_LMW = config.hidden_size, config.vocab_size, cache_LMW
        self._sparse_layers = sum(isinstance(cast(Block, layer).mlp, MoE) for layer in model.layers)
        rope = rope_table(config, torch.arange(positions))
        layers = [self._layer(cast(Block, layer)) for layer in model.layers]
        modules = [self._module(cast(MTPModule, module)) for module in model.mtp]
        common = config.moe_intermediate_size * config.n_shared_experts
        self._plan = _Plan(
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            nope=config.qk_nope_head_dim,
            rope=config.qk_rope_head_dim,
            value=config.v_head_dim,
            latent=config.kv_lora_rank,
            experts=config.n_routed_experts,
            choices=config.num_experts_per_tok,
            groups=config.n_group,
            topk_group=config.topk_group,
            normalise=config.norm_topk_prob,
            page_size=page_size,
            slots=cache_LMW.shape[1],
            widest=max(2 * config.hidden_size, config.intermediate_size, config.moe_intermediate_size, common),
            eps=config.rms_norm_eps,
            latent_eps=LATENT_NORM_EPS,
            scale=softmax_scale(config),
            routed_scale=config.routed_scaling_factor,
            embed=self._weight(*stored(model.embed_tokens, "weight")),
            norm=self._floats(model.norm.weight),
            head=self._weight(*stored(model.lm_head, "weight")),
            layer_count=len(layers),
            layers=(_Layer * len(layers))(*layers),
            modules=(_Module * len(modules))(*modules),
            cosines=self._keep(rope.cos),
            sines=self._keep(rope.sin),
        )
        self._plan_at, self._dtype = ctypes.addressof(self._plan), cache_LMW.dtype

    def prepare(self, tokens: int) -> None:
        """Nothing: it is ready."""

    def run(
        self,
        module: int | None,
        metadata: BatchMetadata,
        logits_indices: Iterable[int],
        prev_hidden_ND: Tensor | None = None,
        cache_only: bool = False,
    ) -> tuple[Tensor, Tensor, Routed]:
        """States (N, D) of the main model or of MTP module number `module`, and the logits of the tokens
        `logits_indices`.

        States and logits are float32. The routing is that of the main model, of no layer for a module. With
        `cache_only` a module writes its latents and no more: there are no states.
        """
        n, indices = len(metadata.token_ids), array("q", logits_indices)
        states_ND = torch.empty(0 if cache_only else n, self._hidden)
        logits = torch.empty(len(indices), self._words)
        routed = (self._sparse_layers if module is None else 0, n, self._plan.choices)
        experts_LNK, weights_LNK = torch.empty(routed, dtype=torch.int64), torch.empty(routed)
        step = _Step(
            tokens=n,
            max_blocks_per_seq=metadata.max_blocks_per_seq,
            token_ids=_address(metadata.token_ids),
            positions=_address(metadata.positions),
            slot_mapping=_address(metadata.slot_mapping),
            seq_indices=_address(metadata.seq_indices),
            block_tables=_address(metadata.block_tables),
            cache=self._cache_LMW.data_ptr(),
            prev_hidden=None if prev_hidden_ND is None else prev_hidden_ND.data_ptr(),
            hidden=None if cache_only else states_ND.data_ptr(),
            logits_count=len(indices),
            logits_indices=_address(indices),
            logits=logits.data_ptr(),
            experts=experts_LNK.data_ptr(),
            weights=weights_LNK.data_ptr(),
        )
        cpu.call("decode", self._dtype, self._plan_at, ctypes.addressof(step), -1 if module is None else module)
        return states_ND, logits, Routed(experts_LNK, weights_LNK)

    def _layer(self, block: Block) -> _Layer:
        weights = layer_weights(block)
        matrices = {name: self._weight(*matrix) for name, matrix in weights.matrices.items()}
        return _Layer(**matrices, **{name: self._floats(vector) for name, vector in weights.vectors.items()})

    def _module(self, module: MTPModule) -> _Module:
        return _Module(
            embed_norm=self._floats(module.enorm.weight),
            state_norm=self._floats(module.hnorm.weight),
            join=self._weight(*stored(module.eh_proj, "weight")),
            layer=self._layer(module),
            norm=self._floats(cast(RMSNorm, module.shared_head["norm"]).weight),
        )

    def _weight(self, numbers: Tensor, scales: Tensor | None) -> _Weight:
        """A matrix, or a stack of matrices of this many rows and columns each, where it lies."""
        rows, columns = numbers.shape[-2:]
        if numbers.dtype == torch.int32:
            columns *= 8
        scales_at = None if scales is None else self._keep(scales)
        return _Weight(self._keep(numbers), scales_at, _FORMATS[numbers.dtype], rows, columns)

    def _floats(self, numbers: Tensor) -> _Weight:
        """A vector in float32."""
        return _Weight(self._keep(numbers.float()), None, _FORMATS[torch.float32], 1, len(numbers))

    def _keep(self, tensor: Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


def _address(numbers: "array[int]") -> int:
    return numbers.buffer_info()[0]


def usable(model: Model) -> bool:
    """Whether this model can run here: all of it on the CPU, in float32 or bfloat16, with the kernels built.

    The router in C++ is DeepSeek-V3's.
    """
    weights = list(model.parameters())
    return not model.config.is_v2 and cpu.usable(*weights) and all(weight.dtype in _FORMATS for weight in weights)
