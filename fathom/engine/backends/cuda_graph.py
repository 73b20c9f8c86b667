"""The whole model on a GPU for the few tokens of a decoding step: the kernels of fathom/ops, replayed as one graph.

A step is some two hundred launches, each shorter than asking for it would take. So a step of a given size is recorded
once as a CUDA graph, in which everything but the numbers in a few buffers is fixed, and asked for as a whole. Sizes are
rounded up; the tokens that fill them up stand nowhere, choose no experts and are not looked at.

Shapes: N tokens, D hidden, O vocabulary, H heads, X = P+R query width, C latent, V value width, W = C+R, L layers,
K experts per token.
"""

import time
from array import array
from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fathom.engine.backends.raw_weights import LayerWeights, layer_weights
from fathom.engine.batch import BatchMetadata
from fathom.model.block import Block
from fathom.model.cached_batch import Routed
from fathom.model.layers import LATENT_NORM_EPS, RMSNorm
from fathom.model.moe import MoE
from fathom.model.mtp import MTPModule
from fathom.model.rope import rope_table, softmax_scale
from fathom.model.transformer import Model
from fathom.ops.attention import triton as attention
from fathom.ops.linear.triton import head_linear, linear
from fathom.ops.linear.triton_tiles import Weight
from fathom.ops.moe import triton_experts as experts
from fathom.ops.moe.triton_routing import route
from fathom.ops.norm.triton import add_and_normalise
from fathom.quantization.weight_only import stored

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Tokens that a step may have."""


class _Inputs(NamedTuple):
    """A step's buffers: what differs from one replay to the next."""

    numbers: Tensor
    """Ids, positions, slots, owners, the length of a row of pages, the pages: one copy fills it."""
    prev_hidden_ND: Tensor | None
    """For a module, the states before the tokens, float32."""


class _Outputs(NamedTuple):
    states_ND: Tensor
    logits_NO: Tensor
    routed: Routed


class _Step(NamedTuple):
    """A step of one size, ready to run."""

    inputs: _Inputs
    replay: Callable[[], None]
    outputs: _Outputs | None


class GraphedModel:
    """A model on a GPU, ready for steps of up to `max_tokens_per_call`; its weights are read where they lie, not
    copied."""

    max_tokens_per_call = max_cache_write_tokens = SIZES[-1]

    def __init__(self, model: Model, cache_LMW: Tensor, page_size: int, positions: int) -> None:
        """`positions`: slots that one sequence may take at most."""
        config = model.config
        self.compile_seconds = 0.0
        """Spent so far on compiling and recording."""
        self._model, self._config, self._cache_LMW, self._page_size = model, config, cache_LMW, page_size
        self._device, self._dtype = cache_LMW.device, cache_LMW.dtype
        self._most_pages = -(-positions // page_size)
        self._nowhere = cache_LMW.shape[1] - page_size
        self._rope = rope_table(config, torch.arange(positions, device=self._device))
        self._scale = softmax_scale(config)
        self._layers = [layer_weights(cast(Block, layer)) for layer in model.layers]
        self._modules = [layer_weights(cast(MTPModule, module)) for module in model.mtp]
        self._head = Weight(*stored(model.lm_head, "weight"))
        self._moe_layers = sum(isinstance(cast(Block, layer).mlp, MoE) for layer in model.layers)
        self._steps: dict[tuple[int | None, bool, int], _Step] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None

    @torch.no_grad()
    def prepare(self, tokens: int) -> None:
        """Make ready now, not when it is asked for, whatever steps of up to so many tokens may need."""
        most = next((size for size in SIZES if size >= tokens), SIZES[-1])
        kinds: list[tuple[int | None, bool]] = [(None, False)]
        if self._modules:
            kinds += [(0, False), (0, True)]
        for size in SIZES[: SIZES.index(most) + 1]:
            for module, cache_only in kinds:
                self._step(module, cache_only, size)

    @torch.no_grad()
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
        `cache_only` a module writes its latents and no more: there are no states. The logits hold until the next call.
        """
        count, which = len(metadata.token_ids), list(logits_indices)
        size = next(size for size in SIZES if size >= count)
        step = self._step(module, cache_only, size)
        self._fill(step.inputs, metadata, size, prev_hidden_ND)
        step.replay()
        if step.outputs is None:
            nothing_ND = torch.empty(0, self._config.hidden_size, device=self._device)
            return nothing_ND, nothing_ND, self._unrouted(0)
        states_ND, logits_NO, routed = step.outputs
        if which != list(range(count)):
            logits_NO = logits_NO[torch.tensor(which, device=self._device, dtype=torch.int64)]
        found = Routed(routed.experts_LNK[:, :count].clone(), routed.weights_LNK[:, :count].clone())
        return states_ND[:count].clone(), logits_NO[: len(which)], found

    def _step(self, module: int | None, cache_only: bool, size: int) -> _Step:
        key = (module, cache_only, size)
        if key not in self._steps:
            self._steps[key] = self._made(*key)
        return self._steps[key]

    def _made(self, module: int | None, cache_only: bool, size: int) -> _Step:
        """Compile what is not compiled yet, and record the step where there are graphs."""
        began = time.perf_counter()
        numbers = torch.zeros(4 * size + 1 + size * self._most_pages, dtype=torch.int64, device=self._device)
        hidden = self._config.hidden_size
        prev_hidden_ND = None if module is None else torch.zeros(size, hidden, device=self._device)
        inputs = _Inputs(numbers, prev_hidden_ND)
        self._fill(inputs, BatchMetadata(1), size, prev_hidden_ND)
        outputs: list[_Outputs | None] = []

        def compute() -> None:
            outputs[:] = [self._compute(module, cache_only, size, inputs)]

        compute()
        if self._device.type != "cuda":  # Triton's interpreter, in tests
            return self._interpreted(inputs, compute, outputs)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            compute()
        self.compile_seconds += time.perf_counter() - began
        return _Step(inputs, graph.replay, outputs[0])

    def _interpreted(self, inputs: _Inputs, compute: Callable[[], None], outputs: list[_Outputs | None]) -> _Step:
        """The same without a graph: outputs stay where they were first."""
        kept = outputs[0]

        def replay() -> None:
            compute()
            new = outputs[0]
            if kept is not None and new is not None:
                for old, fresh in zip((*kept[:2], *kept.routed), (*new[:2], *new.routed), strict=True):
                    old.copy_(fresh)

        return _Step(inputs, replay, kept)

    def _fill(self, inputs: _Inputs, metadata: BatchMetadata, size: int, prev_hidden_ND: Tensor | None) -> None:
        """Put a step's tokens into its buffers. The copy is staged by the driver, so that nobody waits for it."""
        spare = size - len(metadata.token_ids)
        numbers = array("q", metadata.token_ids)
        numbers.extend([0] * spare)
        numbers.extend(metadata.positions)
        numbers.extend([-1] * spare)
        numbers.extend(metadata.slot_mapping)
        numbers.extend([self._nowhere] * spare)
        numbers.extend(metadata.seq_indices)
        numbers.extend([0] * spare)
        numbers.append(metadata.max_blocks_per_seq)
        numbers.extend(metadata.block_tables)
        inputs.numbers[: len(numbers)].copy_(torch.frombuffer(numbers, dtype=torch.int64), non_blocking=True)
        if prev_hidden_ND is not None and inputs.prev_hidden_ND is not None:
            inputs.prev_hidden_ND[: len(prev_hidden_ND)].copy_(prev_hidden_ND)

    # ---------------------------------------------------------------------------------------------- one step

    def _compute(self, module: int | None, cache_only: bool, size: int, inputs: _Inputs) -> _Outputs | None:
        ids_N, positions_N, slot_mapping_N, owners_N = inputs.numbers[: 4 * size].view(4, size)
        pages = inputs.numbers[4 * size :]
        first = 0 if module is None else 1  # slot 0 of a module is never written
        places = attention.Places(positions_N, slot_mapping_N, owners_N, pages, self._page_size, first)
        x_ND = self._model.embed_tokens(ids_N).float()
        if module is None:
            norm, layers, caches = self._model.norm, self._layers, self._cache_LMW
            routed = self._unrouted(self._moe_layers, size)
            choices = iter(zip(*routed, strict=True))
        else:
            part = cast(MTPModule, self._model.mtp[module])
            norm, layers = cast(RMSNorm, part.shared_head["norm"]), [self._modules[module]]
            caches = self._cache_LMW[len(self._layers) + module :]
            routed = self._unrouted(0, size)
            choices = iter(zip(*self._unrouted(1, size), strict=True))
            x_ND = self._joined(part, x_ND, inputs.prev_hidden_ND)
        normed_ND = self._empty(size, self._config.hidden_size, dtype=self._dtype)
        add_and_normalise(x_ND, None, *self._norm(layers[0], "input_norm"), normed_ND)
        if cache_only:
            self._remember(normed_ND, layers[0], places, caches[0])
            return None
        for layer, cache_MW, following in zip(layers, caches, [*layers[1:], None], strict=False):
            attended_ND = self._attend(normed_ND, layer, places, cache_MW)
            add_and_normalise(x_ND, attended_ND[:, None], *self._norm(layer, "post_norm"), normed_ND)
            choice = next(choices) if "router" in layer.matrices else None
            y_NKD = self._feed_forward(normed_ND, layer, places, choice)
            if following is not None:
                add_and_normalise(x_ND, y_NKD, *self._norm(following, "input_norm"), normed_ND)
        h_ND = torch.empty_like(x_ND)
        add_and_normalise(x_ND, y_NKD, norm.weight, norm.eps, h_ND)
        logits_NO = self._empty(size, self._config.vocab_size)
        linear(h_ND.to(self._dtype), [self._head], [logits_NO])
        return _Outputs(h_ND, logits_NO, routed)

    def _joined(self, part: MTPModule, embedded_ND: Tensor, prev_hidden_ND: Tensor | None) -> Tensor:
        """What a module's layer is fed."""
        assert prev_hidden_ND is not None
        halves = [self._empty(*embedded_ND.shape, dtype=self._dtype) for _ in range(2)]
        for x_ND, norm, out_ND in zip((embedded_ND, prev_hidden_ND), (part.enorm, part.hnorm), halves, strict=True):
            add_and_normalise(x_ND, None, norm.weight, norm.eps, out_ND)
        joined_ND = torch.empty_like(embedded_ND)
        linear(torch.cat(halves, dim=-1), [Weight(*stored(part.eh_proj, "weight"))], [joined_ND])
        return joined_ND

    def _attend(self, normed_ND: Tensor, layer: LayerWeights, places: attention.Places, cache_MW: Tensor) -> Tensor:
        """What attention adds to the residual stream (N, D)."""
        config, tokens = self._config, len(normed_ND)
        heads, nope, latent = config.num_attention_heads, config.qk_nope_head_dim, config.kv_lora_rank
        q_NHX = self._empty(tokens, heads, config.qk_head_dim, dtype=self._dtype)
        q_NQ = self._remember(normed_ND, layer, places, cache_MW, q_NHX)
        if q_NQ is not None:
            linear(q_NQ, [_matrix(layer, "q_b")], [q_NHX.flatten(1)])
        up_HYC = layer.matrices["kv_b"][0].unflatten(0, (heads, -1))
        up_k_HPC, up_v_HVC = up_HYC.split((nope, config.v_head_dim), dim=1)
        q_NHC, out_NHC = (self._empty(tokens, heads, latent, dtype=self._dtype) for _ in range(2))
        head_linear(q_NHX[..., :nope], up_k_HPC.transpose(1, 2), q_NHC)
        scratch = attention.Scratch.of(tokens, heads, latent, self._device)
        q = (q_NHC, q_NHX[..., nope:], self._rope)
        attention.paged_latent_attention(*q, places, cache_MW, self._scale, scratch, out_NHC)
        heads_NHV = self._empty(tokens, heads, config.v_head_dim, dtype=self._dtype)
        head_linear(out_NHC, up_v_HVC, heads_NHV)
        attended_ND = self._empty(tokens, config.hidden_size)
        linear(heads_NHV.flatten(1), [_matrix(layer, "o")], [attended_ND])
        return attended_ND

    def _remember(
        self,
        normed_ND: Tensor,
        layer: LayerWeights,
        places: attention.Places,
        cache_MW: Tensor,
        q_NHX: Tensor | None = None,
    ) -> Tensor | None:
        """Write the latents. Where there is room for queries, they are computed beside it, or their latents given."""
        kv_NW = self._empty(len(normed_ND), self._config.cache_width)
        maps, outs, query = [_matrix(layer, "kv_a")], [kv_NW], None
        if q_NHX is not None and "q_a" in layer.matrices:
            maps.insert(0, _matrix(layer, "q_a"))
            raw_NQ = self._empty(len(normed_ND), len(layer.matrices["q_a"][0]))
            outs.insert(0, raw_NQ)
            normed_NQ = torch.empty_like(raw_NQ, dtype=self._dtype)
            query = attention.QueryLatent(raw_NQ, layer.vectors["q_a_norm"], normed_NQ)
        elif q_NHX is not None:
            maps.insert(0, _matrix(layer, "q_b"))
            outs.insert(0, q_NHX.flatten(1))
        linear(normed_ND, maps, outs)
        norm = (layer.vectors["kv_a_norm"], LATENT_NORM_EPS)
        attention.write_kv_cache(kv_NW, *norm, self._rope, places.positions_N, places.slot_mapping_N, cache_MW, query)
        return None if query is None else query.normed_NQ

    def _feed_forward(
        self,
        normed_ND: Tensor,
        layer: LayerWeights,
        places: attention.Places,
        choice: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """What the experts add (N, K+1, D); which ones and with what weights goes to `choice`."""
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
            hidden_NU=self._empty(tokens, len(shared.gate_UD.numbers), dtype=self._dtype),
            y_NKD=self._empty(tokens, choices + 1, hidden),
        )
        experts.feed_forward(normed_ND, routed, shared, scratch)
        return scratch.y_NKD

    def _norm(self, layer: LayerWeights, name: str) -> tuple[Tensor, float]:
        return layer.vectors[name], self._config.rms_norm_eps

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def _unrouted(self, layers: int, tokens: int = 0) -> Routed:
        """Room for what so many layers choose."""
        shape = (layers, tokens, self._config.num_experts_per_tok)
        return Routed(self._empty(*shape, dtype=torch.int64), self._empty(*shape))


def _matrix(layer: LayerWeights, name: str) -> Weight:
    return Weight(*layer.matrices[name])


def usable(model: Model) -> bool:
    """Whether this model can run here: all of it on one GPU, in float32 or bfloat16, with DeepSeek-V3's router.

    Products have the activations' type, which gates must then have, too.
    """
    weights, own = list(model.parameters()), model.embed_tokens.weight.dtype
    kinds = {torch.float32, torch.bfloat16, torch.int8, torch.int32}
    on_one = len({weight.device for weight in weights}) == 1 and weights[0].is_cuda
    known = all(weight.dtype in kinds for weight in weights)
    return on_one and known and not model.config.is_v2 and all(r.weight.dtype == own for r in model.routers())
