"""The whole model in one call of compiled C++, for the few tokens of a decoding step (fathom/ops/decode/decode.cpp).

Reading the weights is what takes the time, so they are read where they lie. The structures below give their addresses
to the C++, which declares the same ones. Passes of many tokens, where matmuls dominate, go to the eager backend.

Shapes: N tokens, D hidden, O vocabulary, L MoE layers, K experts per token.
"""

import ctypes
from array import array
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from typing import cast

import torch
from torch import Tensor

from fathom.engine.backends.compiled import CompiledBackend
from fathom.engine.backends.raw_weights import layer_weights
from fathom.engine.batch import BatchMetadata, ForwardOutput, Routed, SequenceChunk
from fathom.engine.kv_cache import LatentCache
from fathom.model.block import Block
from fathom.model.layers import LATENT_NORM_EPS, RMSNorm
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


_METADATA = ("token_ids", "positions", "slot_mapping", "seq_indices", "block_tables")
"""The arrays of `BatchMetadata`."""


class _Step(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("tokens", "max_blocks_per_seq")),
        *((name, c_void_p) for name in (*_METADATA, "cache", "prev_hidden", "hidden")),
        ("logits_count", c_int64),
        *((name, c_void_p) for name in ("logits_indices", "logits", "experts", "weights")),
    )


class CpuBackend(CompiledBackend):
    """See `backends.Backend`. Float32 passes are batch-invariant: a token's result is the same bits in every batch."""

    max_tokens = 48
    """Tokens up to which reading the weights takes longer than multiplying with them."""
    max_cache_write_tokens = 512
    """The same for `write_mtp_kv_cache`, which is two matmuls."""

    def __init__(self, model: Model, cache: LatentCache, max_positions: int) -> None:
        """`max_positions`: slots that one sequence may take at most."""
        super().__init__(model, cache)
        config = model.config
        self._alive: list[Tensor] = []  # what the structures point to
        self._copies: list[tuple[Tensor, Tensor]] = []  # those among them that are copies, with what they copy
        self._hidden_size, self._vocab_size = config.hidden_size, config.vocab_size
        rope = rope_table(config, torch.arange(max_positions))
        layers = [self._layer(cast(Block, layer)) for layer in model.layers]
        modules = [self._module(cast(MTPModule, module)) for module in model.mtp]
        shared = config.moe_intermediate_size * config.n_shared_experts
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
            page_size=cache.page_size,
            slots=cache.latents_LMW.shape[1],
            widest=max(2 * config.hidden_size, config.intermediate_size, config.moe_intermediate_size, shared),
            eps=config.rms_norm_eps,
            latent_eps=LATENT_NORM_EPS,
            scale=softmax_scale(config),
            routed_scale=config.routed_scaling_factor,
            embed=self._matrix(*stored(model.embed_tokens, "weight")),
            norm=self._vector(model.norm.weight),
            head=self._matrix(*stored(model.lm_head, "weight")),
            layer_count=len(layers),
            layers=(_Layer * len(layers))(*layers),
            modules=(_Module * len(modules))(*modules),
            cosines=self._address(rope.cos),
            sines=self._address(rope.sin),
        )
        self._plan_address, self._dtype = ctypes.addressof(self._plan), cache.latents_LMW.dtype

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Copy again what had to be copied: vectors of bfloat16 models, which the C++ reads in float32."""
        for copy, original in self._copies:
            copy.copy_(original)

    def _run(
        self,
        module: int | None,
        chunks: Sequence[SequenceChunk],
        logits_indices: Sequence[int],
        prev_hidden_ND: Tensor | None,
        cache_only: bool = False,
    ) -> ForwardOutput:
        metadata = BatchMetadata.of(chunks, self.cache.page_size, self.cache.null_slot)
        n, indices = len(metadata.token_ids), array("q", logits_indices)
        h_ND = torch.empty(0 if cache_only else n, self._hidden_size)
        logits_NO = torch.empty(len(indices), self._vocab_size)
        shape = (self.model.config.num_moe_layers if module is None else 0, n, self._plan.choices)
        experts_LNK, weights_LNK = torch.empty(shape, dtype=torch.int64), torch.empty(shape)
        step = _Step(
            tokens=n,
            max_blocks_per_seq=metadata.max_blocks_per_seq,
            **{name: _array_address(getattr(metadata, name)) for name in _METADATA},
            cache=self.cache.latents_LMW.data_ptr(),
            prev_hidden=None if prev_hidden_ND is None else prev_hidden_ND.data_ptr(),
            hidden=None if cache_only else h_ND.data_ptr(),
            logits_count=len(indices),
            logits_indices=_array_address(indices),
            logits=logits_NO.data_ptr(),
            experts=experts_LNK.data_ptr(),
            weights=weights_LNK.data_ptr(),
        )
        cpu.call("decode", self._dtype, self._plan_address, ctypes.addressof(step), -1 if module is None else module)
        return ForwardOutput(h_ND, logits_NO, Routed(experts_LNK, weights_LNK))

    def _layer(self, block: Block) -> _Layer:
        weights = layer_weights(block)
        matrices = {name: self._matrix(*matrix) for name, matrix in weights.matrices.items()}
        return _Layer(**matrices, **{name: self._vector(vector) for name, vector in weights.vectors.items()})

    def _module(self, module: MTPModule) -> _Module:
        return _Module(
            embed_norm=self._vector(module.enorm.weight),
            state_norm=self._vector(module.hnorm.weight),
            join=self._matrix(*stored(module.eh_proj, "weight")),
            layer=self._layer(module),
            norm=self._vector(cast(RMSNorm, module.shared_head["norm"]).weight),
        )

    def _matrix(self, values: Tensor, scales: Tensor | None) -> _Weight:
        """A matrix, or a stack of matrices of this many rows and columns each, where it lies."""
        rows, columns = values.shape[-2:]
        if values.dtype == torch.int32:  # eight int4 values each
            columns *= 8
        scales_address = None if scales is None else self._address(scales)
        return _Weight(self._address(values), scales_address, _FORMATS[values.dtype], rows, columns)

    def _vector(self, values: Tensor) -> _Weight:
        """A vector in float32."""
        return _Weight(self._address(values, torch.float32), None, _FORMATS[torch.float32], 1, len(values))

    def _address(self, tensor: Tensor, dtype: torch.dtype | None = None) -> int:
        """Where it lies; a copy lies there only where another type is needed, or it is not contiguous."""
        original = tensor.detach()
        found = original.to(dtype or original.dtype).contiguous()
        self._alive.append(found)
        if found.data_ptr() != original.data_ptr():
            self._copies.append((found, original))
        return found.data_ptr()


def _array_address(values: "array[int]") -> int:
    return values.buffer_info()[0]


def supports(model: Model) -> bool:
    """Whether this backend can run the model: all of it on the CPU, in float32 or bfloat16, with the kernels built.

    The router in C++ is DeepSeek-V3's.
    """
    weights = list(model.parameters())
    return not model.config.is_v2 and cpu.usable(*weights) and all(weight.dtype in _FORMATS for weight in weights)
