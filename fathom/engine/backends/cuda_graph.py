"""The whole model on a GPU for the few tokens of a decoding step: the kernels of fathom/ops, replayed as one graph.

A step is some two hundred kernels, each shorter than its launch would take. So a step of a given size is captured once
as a CUDA graph, in which everything but the contents of a few buffers is fixed, and replayed as a whole. Sizes are
rounded up; padding tokens have position −1, choose no experts, and their results are ignored. Passes of more tokens go
to the eager backend.

Shapes: N tokens, D hidden, O vocabulary, H heads, X = P+R query width, C latent, V value width, W = C+R, L layers,
K experts per token.
"""

import time
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fathom.engine.backends.compiled import CompiledBackend
from fathom.engine.backends.raw_weights import LayerWeights, layer_weights
from fathom.engine.batch import BatchMetadata, ForwardOutput, Routed, SequenceChunk
from fathom.engine.kv_cache import LatentCache
from fathom.model.block import Block
from fathom.model.layers import LATENT_NORM_EPS, RMSNorm
from fathom.model.mtp import MTPModule
from fathom.model.rope import rope_table, softmax_scale
from fathom.model.transformer import Model
from fathom.ops.attention import triton as attention
from fathom.ops.linear.triton import head_linear, linear
from fathom.ops.linear.triton_tiles import Weight
from fathom.ops.moe import triton_experts as experts
from fathom.ops.moe.triton_routing import route
from fathom.ops.norm.triton import add_and_normalise
from fathom.ops.rope import Rope
from fathom.quantization.weight_only import stored

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Tokens that a captured step may have; more run eagerly."""


class _Inputs(NamedTuple):
    """A step's buffers: what differs from one replay to the next."""

    metadata: Tensor
    """Token ids, positions, slot mapping, sequence indices, length of a block table, block tables: one int64 copy."""
    prev_hidden_ND: Tensor | None
    """For an MTP module, the hidden states of the tokens before, float32."""


class _Step(NamedTuple):
    """A step of one size, ready to run."""

    inputs: _Inputs
    replay: Callable[[], None]
    outputs: list[ForwardOutput | None]
    """One entry, where each replay leaves its results; None where only the cache is written."""


class CudaGraphBackend(CompiledBackend):
    """See `backends.Backend`. Weights are read where they lie, not copied."""

    max_tokens = max_cache_write_tokens = SIZES[-1]

    def __init__(self, model: Model, cache: LatentCache, max_positions: int) -> None:
        """`max_positions`: slots that one sequence may take at most."""
        super().__init__(model, cache)
        config = model.config
        self._config, self._cache_LMW, self._page_size = config, cache.latents_LMW, cache.page_size
        self._device, self._dtype = self._cache_LMW.device, self._cache_LMW.dtype
        self._max_pages = -(-max_positions // self._page_size)
        # An MTP module never sees slot 0, and as in the other backends its positions count from slot 1.
        positions = torch.arange(max_positions, device=self._device)
        self._ropes = rope_table(config, positions), rope_table(config, (positions - 1).clamp_min(0))
        self._scale = softmax_scale(config)
        self._layers = [layer_weights(cast(Block, layer)) for layer in model.layers]
        self._modules = [layer_weights(cast(MTPModule, module)) for module in model.mtp]
        self._head = Weight(*stored(model.lm_head, "weight"))
        self._steps: dict[tuple[int | None, bool, int], _Step] = {}
        self._graph_pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None

    @torch.no_grad()
    def warm_up(self, tokens: int) -> None:
        """Capture steps of all sizes up to `tokens`."""
        largest = next((size for size in SIZES if size >= tokens), SIZES[-1])
        kinds: list[tuple[int | None, bool]] = [(None, False)]
        if self._modules:
            kinds += [(0, False), (0, True)]
        with self._eager.on_device():
            for size in SIZES[: SIZES.index(largest) + 1]:
                for module, cache_only in kinds:
                    self._step(module, cache_only, size)

    def _run(
        self,
        module: int | None,
        chunks: Sequence[SequenceChunk],
        logits_indices: Sequence[int],
        prev_hidden_ND: Tensor | None,
        cache_only: bool = False,
    ) -> ForwardOutput:
        metadata = BatchMetadata.of(chunks, self._page_size, self.cache.null_slot)
        count, wanted = len(metadata.token_ids), list(logits_indices)
        with self._eager.on_device():
            size = next(size for size in SIZES if size >= count)
            step = self._step(module, cache_only, size)
            self._fill(step.inputs, metadata, prev_hidden_ND, size)
            step.replay()
            [output] = step.outputs
            if output is None:
                none_ND = self._empty(0, self._config.hidden_size)
                return ForwardOutput(none_ND, none_ND, self._unrouted(0))
            h_ND, logits_NO, routed = output
            if wanted != list(range(count)):
                logits_NO = logits_NO[torch.tensor(wanted, device=self._device, dtype=torch.int64)]
            found = Routed(routed.experts_LNK[:, :count].clone(), routed.weights_LNK[:, :count].clone())
            return ForwardOutput(h_ND[:count].clone(), logits_NO[: len(wanted)], found)

    def _step(self, module: int | None, cache_only: bool, size: int) -> _Step:
        key = (module, cache_only, size)
        if key not in self._steps:
            self._steps[key] = self._capture(*key)
        return self._steps[key]

    def _capture(self, module: int | None, cache_only: bool, size: int) -> _Step:
        """Compile what is not compiled yet, and capture the step where there are graphs."""
        began = time.perf_counter()
        metadata = torch.zeros(4 * size + 1 + size * self._max_pages, dtype=torch.int64, device=self._device)
        hidden = self._config.hidden_size
        prev_hidden_ND = None if module is None else torch.zeros(size, hidden, device=self._device)
        inputs = _Inputs(metadata, prev_hidden_ND)
        self._fill(inputs, BatchMetadata(1), prev_hidden_ND, size)
        outputs: list[ForwardOutput | None] = []

        def compute() -> None:
            outputs[:] = [self._compute(module, cache_only, size, inputs)]

        compute()
        if self._device.type != "cuda":  # Triton's interpreter, in tests
            return _Step(inputs, compute, outputs)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._graph_pool):
            compute()
        self.compile_seconds += time.perf_counter() - began
        return _Step(inputs, graph.replay, outputs)

    def _fill(self, inputs: _Inputs, metadata: BatchMetadata, prev_hidden_ND: Tensor | None, size: int) -> None:
        """Copy a step's tokens into its buffers, padded to `size`. The driver stages the copy: nothing waits for it."""
        padding = size - len(metadata.token_ids)
        flat, null_slot = array("q"), self.cache.null_slot
        per_token = (metadata.token_ids, metadata.positions, metadata.slot_mapping, metadata.seq_indices)
        for values, none in zip(per_token, (0, -1, null_slot, 0), strict=True):
            flat.extend(values)
            flat.extend([none] * padding)
        flat.append(metadata.max_blocks_per_seq)
        flat.extend(metadata.block_tables)
        inputs.metadata[: len(flat)].copy_(torch.frombuffer(flat, dtype=torch.int64), non_blocking=True)
        if prev_hidden_ND is not None and inputs.prev_hidden_ND is not None:
            inputs.prev_hidden_ND[: len(prev_hidden_ND)].copy_(prev_hidden_ND)

    # ---------------------------------------------------------------------------------------------- one step

    def _compute(self, module: int | None, cache_only: bool, size: int, inputs: _Inputs) -> ForwardOutput | None:
        ids_N, positions_N, slot_mapping_N, seq_indices_N = inputs.metadata[: 4 * size].view(4, size)
        block_tables = inputs.metadata[4 * size :]
        first = 0 if module is None else 1  # an MTP module never writes slot 0
        rope, per_token = self._ropes[first], (positions_N, slot_mapping_N, seq_indices_N)
        places = attention.Places(*per_token, block_tables, self._page_size, first)
        x_ND = self.model.embed_tokens(ids_N).float()
        if module is None:
            norm, layers, caches = self.model.norm, self._layers, self._cache_LMW
            routed = self._unrouted(self._config.num_moe_layers, size)
            choices = iter(zip(*routed, strict=True))
        else:
            part = cast(MTPModule, self.model.mtp[module])
            norm, layers = cast(RMSNorm, part.shared_head["norm"]), [self._modules[module]]
            caches = self._cache_LMW[len(self._layers) + module :]
            routed = self._unrouted(0, size)
            choices = iter(zip(*self._unrouted(1, size), strict=True))
            x_ND = self._join(part, x_ND, inputs.prev_hidden_ND)
        normed_ND = self._empty(size, self._config.hidden_size, dtype=self._dtype)
        add_and_normalise(x_ND, None, *self._norm(layers[0], "input_norm"), normed_ND)
        if cache_only:
            self._project_and_write(normed_ND, layers[0], rope, places, caches[0])
            return None
        for layer, cache_MW, following in zip(layers, caches, [*layers[1:], None], strict=False):
            attended_ND = self._attend(normed_ND, layer, rope, places, cache_MW)
            add_and_normalise(x_ND, attended_ND[:, None], *self._norm(layer, "post_norm"), normed_ND)
            choice = next(choices) if "router" in layer.matrices else None
            y_NKD = self._feed_forward(normed_ND, layer, places, choice)
            if following is not None:
                add_and_normalise(x_ND, y_NKD, *self._norm(following, "input_norm"), normed_ND)
        h_ND = torch.empty_like(x_ND)
        add_and_normalise(x_ND, y_NKD, norm.weight, norm.eps, h_ND)
        logits_NO = self._empty(size, self._config.vocab_size)
        linear(h_ND.to(self._dtype), [self._head], [logits_NO])
        return ForwardOutput(h_ND, logits_NO, routed)

    def _join(self, part: MTPModule, embedded_ND: Tensor, prev_hidden_ND: Tensor | None) -> Tensor:
        """h', the input of an MTP module's layer (N, D)."""
        assert prev_hidden_ND is not None
        halves = [self._empty(*embedded_ND.shape, dtype=self._dtype) for _ in range(2)]
        for x_ND, norm, out_ND in zip((embedded_ND, prev_hidden_ND), (part.enorm, part.hnorm), halves, strict=True):
            add_and_normalise(x_ND, None, norm.weight, norm.eps, out_ND)
        joined_ND = torch.empty_like(embedded_ND)
        linear(torch.cat(halves, dim=-1), [Weight(*stored(part.eh_proj, "weight"))], [joined_ND])
        return joined_ND

    def _attend(
        self, normed_ND: Tensor, layer: LayerWeights, rope: Rope, places: attention.Places, cache_MW: Tensor
    ) -> Tensor:
        """What attention adds to the residual stream (N, D)."""
        config, tokens = self._config, len(normed_ND)
        heads, nope, latent = config.num_attention_heads, config.qk_nope_head_dim, config.kv_lora_rank
        q_NHX = self._empty(tokens, heads, config.qk_head_dim, dtype=self._dtype)
        q_NQ = self._project_and_write(normed_ND, layer, rope, places, cache_MW, q_NHX)
        if q_NQ is not None:
            linear(q_NQ, [_matrix(layer, "q_b")], [q_NHX.flatten(1)])
        up_HYC = layer.matrices["kv_b"][0].unflatten(0, (heads, -1))
        up_k_HPC, up_v_HVC = up_HYC.split((nope, config.v_head_dim), dim=1)
        q_NHC, out_NHC = (self._empty(tokens, heads, latent, dtype=self._dtype) for _ in range(2))
        head_linear(q_NHX[..., :nope], up_k_HPC.transpose(1, 2), q_NHC)
        scratch = attention.Scratch.of(tokens, heads, latent, self._device)
        q = (q_NHC, q_NHX[..., nope:], rope)
        attention.paged_latent_attention(*q, places, cache_MW, self._scale, scratch, out_NHC)
        heads_NHV = self._empty(tokens, heads, config.v_head_dim, dtype=self._dtype)
        head_linear(out_NHC, up_v_HVC, heads_NHV)
        attended_ND = self._empty(tokens, config.hidden_size)
        linear(heads_NHV.flatten(1), [_matrix(layer, "o")], [attended_ND])
        return attended_ND

    def _project_and_write(
        self,
        normed_ND: Tensor,
        layer: LayerWeights,
        rope: Rope,
        places: attention.Places,
        cache_MW: Tensor,
        q_NHX: Tensor | None = None,
    ) -> Tensor | None:
        """Write the latents; project the queries into `q_NHX` if given, or return their latents (N, Q)."""
        kv_NW = self._empty(len(normed_ND), self._config.cache_width)
        matrices, outs, query = [_matrix(layer, "kv_a")], [kv_NW], None
        if q_NHX is not None and "q_a" in layer.matrices:
            matrices.insert(0, _matrix(layer, "q_a"))
            raw_NQ = self._empty(len(normed_ND), len(layer.matrices["q_a"][0]))
            outs.insert(0, raw_NQ)
            normed_NQ = torch.empty_like(raw_NQ, dtype=self._dtype)
            query = attention.QueryLatent(raw_NQ, layer.vectors["q_a_norm"], normed_NQ)
        elif q_NHX is not None:
            matrices.insert(0, _matrix(layer, "q_b"))
            outs.insert(0, q_NHX.flatten(1))
        linear(normed_ND, matrices, outs)
        norm = (layer.vectors["kv_a_norm"], LATENT_NORM_EPS)
        attention.write_kv_cache(kv_NW, *norm, rope, places.positions_N, places.slot_mapping_N, cache_MW, query)
        return None if query is None else query.normed_NQ

    def _feed_forward(
        self,
        normed_ND: Tensor,
        layer: LayerWeights,
        places: attention.Places,
        choice: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """The experts' outputs (N, K+1, D); their ids and weights (N, K) are written to `choice`."""
        config, (tokens, hidden) = self._config, normed_ND.shape
        routed, choices, width = None, 0, 0
        if choice is not None:
            logits_NE = self._empty(tokens, config.n_routed_experts)
            linear(normed_ND, [_matrix(layer, "router")], [logits_NE])
            groups = (config.n_group, config.topk_group)
            factor, normalise = config.routed_scaling_factor, config.norm_topk_prob
            route(logits_NE, layer.vectors["bias"], places.positions_N, *choice, groups, normalise, factor)
            routed = experts.Routed(_matrix(layer, "gate_up"), _matrix(layer, "down"), *choice)
            choices, width = config.num_experts_per_tok, config.moe_intermediate_size
        shared = experts.Shared(_matrix(layer, "gate"), _matrix(layer, "up"), _matrix(layer, "out"))
        scratch = experts.Scratch(
            hidden_NKF=self._empty(tokens, choices, width, dtype=self._dtype),
            hidden_NU=self._empty(tokens, len(shared.gate_UD.data), dtype=self._dtype),
            y_NKD=self._empty(tokens, choices + 1, hidden),
        )
        experts.feed_forward(normed_ND, routed, shared, scratch)
        return scratch.y_NKD

    def _norm(self, layer: LayerWeights, name: str) -> tuple[Tensor, float]:
        return layer.vectors[name], self._config.rms_norm_eps

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def _unrouted(self, layers: int, tokens: int = 0) -> Routed:
        """Room for the routing of so many layers."""
        shape = (layers, tokens, self._config.num_experts_per_tok)
        return Routed(self._empty(*shape, dtype=torch.int64), self._empty(*shape))


def _matrix(layer: LayerWeights, name: str) -> Weight:
    return Weight(*layer.matrices[name])


def supports(model: Model) -> bool:
    """Whether this backend can run the model: all of it on one GPU, in float32 or bfloat16, with DeepSeek-V3's router.

    Matmuls have the activations' type, which the routers' weights must then have, too.
    """
    weights, own = list(model.parameters()), model.embed_tokens.weight.dtype
    dtypes = {torch.float32, torch.bfloat16, torch.int8, torch.int32}
    on_one_gpu = len({weight.device for weight in weights}) == 1 and weights[0].is_cuda
    supported = all(weight.dtype in dtypes for weight in weights)
    return on_one_gpu and supported and not model.config.is_v2 and all(r.weight.dtype == own for r in model.routers())
