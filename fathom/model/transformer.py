"""The whole model: embedding, layers, final norm, head, MTP modules (DeepSeek-V3 report, section 2).

`embed`, `run_layers` and `finish` compose `forward_hidden`, which returns everything the forward pass computed;
`hidden`, `logits` and the call build on it. The model keeps nothing between calls: expert loads and balance losses are
outputs, the cache is passed in.

Shapes: B batch, S query length, N = B·S tokens, D hidden, O vocabulary, M MTP modules, T = S + M, X tokens with a
successor, L layers (of the main model, then one per MTP module), E experts, K experts per token.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fathom.model.block import Block
from fathom.model.cached_batch import CachedBatch
from fathom.model.config import ModelConfig
from fathom.model.layers import Linear, RMSNorm
from fathom.model.memory import check_model_fits
from fathom.model.moe import Experts
from fathom.model.mtp import MTPModule
from fathom.model.outputs import HiddenStates, ModelOutput, RouterOutputs, warn_renamed
from fathom.model.rope import rope_table
from fathom.model.router import Router, RouterOutput
from fathom.model.segments import segment_positions, with_successor
from fathom.ops.attention import check_cu_seqlens
from fathom.ops.rope import Rope


class Model(nn.Module):
    """A DeepSeek-V3 model with freshly initialised weights; `fathom.load_model` reads a checkpoint instead."""

    def __init__(self, config: ModelConfig) -> None:
        """Raises ConfigError for a model that is larger than the memory of the device it is built on."""
        super().__init__()
        check_model_fits(config)
        self.config = config
        dense = config.first_k_dense_replace
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, moe=i >= dense) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.tie_head()
        self.mtp = nn.ModuleList(MTPModule(config) for _ in range(config.num_nextn_predict_layers))
        initialize(self, config.initializer_range)

    def forward(self, tokens_BS: Tensor, mtp: bool = False) -> ModelOutput:
        """Logits of every position; with `mtp` also those of the MTP modules."""
        hidden = self.forward_hidden(tokens_BS, mtp=mtp)
        mtp_logits = tuple(self.logits(h_BSD, k) for k, h_BSD in enumerate(hidden.mtp_h_BSD, 1)) if mtp else None
        return ModelOutput(self.logits(hidden.h_BSD), hidden.router, mtp_logits)

    def hidden(self, tokens_BS: Tensor) -> Tensor:
        """The hidden states after the final norm (B, S, D), which the head and the first MTP module take."""
        return self.forward_hidden(tokens_BS).h_BSD

    def logits(self, h_BSD: Tensor, module: int = 0) -> Tensor:
        """The output head: (…, D) → (…, O). Main model (0) and MTP modules (from 1) share one."""
        logits_BSO: Tensor = self.lm_head(h_BSD)
        return logits_BSO

    def forward_hidden(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        mtp: bool = False,
        detach_mtp: bool = False,
        lookahead_BM: Tensor | None = None,
        topk_ids_LBSK: Tensor | Sequence[Tensor] | None = None,
        compute_dtype: torch.dtype | None = None,
        activation_checkpointing: bool = False,
    ) -> HiddenStates:
        """Run the layers over whole sequences.

        `cu_seqlens` (int32, on the CPU or beside the tokens; `segments.py`) cuts the rows into segments that are
        isolated from each other; without it a row is one sequence, attended causally across all its documents.
        `positions_BS` are the tokens' positions; None counts from 0 in each row, or in each segment.

        With `mtp` the modules run too. `lookahead_BM` holds the M = num_nextn_predict_layers tokens that follow each
        row, where they are known (pretraining cuts its rows with them): every module then covers all S positions. With
        segments it is not allowed, as nothing follows a segment: module k runs over the tokens whose k-th successor
        lies in their segment, one after another in one row (so is its routing), and its hidden states are zero at the
        others, which are no one's inputs and must take no targets. With `detach_mtp` their losses train the modules
        alone: no gradient reaches the layers and the embedding through them.

        `topk_ids_LBSK` (int, one entry per MoE layer of the main model) replays a routing. MTP modules route live:
        engines return the routing of the main model alone.

        `compute_dtype` is the activations' type; None means that of the weights. With `activation_checkpointing` each
        layer of the main model keeps its input alone and runs again in the backward pass. Raises ValueError for inputs
        of wrong type, shape or values.
        """
        x_BSD = self.embed(tokens_BS, compute_dtype)
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, *tokens_BS.shape)
            cu_seqlens = cu_seqlens.to(tokens_BS.device)
            if mtp and lookahead_BM is not None:
                raise ValueError("lookahead_BM is given with cu_seqlens; it must be None: no token follows a segment")
        if topk_ids_LBSK is not None:
            self._check_topk_ids(topk_ids_LBSK, tokens_BS)
        rope = rope_table(self.config, _positions(tokens_BS, positions_BS, cu_seqlens))
        every = range(len(self.layers))
        x_BSD, routing = self.run_layers(every, x_BSD, rope, cu_seqlens, topk_ids_LBSK, activation_checkpointing)
        h_BSD = self.finish(x_BSD)
        mtp_h_BSD: list[Tensor] = []
        if mtp:
            ahead_BT = tokens_BS if lookahead_BM is None else torch.cat((tokens_BS, lookahead_BM), dim=1)
            mtp_h_BSD, mtp_routing = self._run_mtp(ahead_BT, h_BSD, rope, cu_seqlens, detach_mtp)
            routing += mtp_routing
        outputs = RouterOutputs.of(routing, self.config.n_routed_experts, h_BSD.device)
        return HiddenStates(h_BSD, tuple(mtp_h_BSD), outputs)

    def states(self, tokens_BS: Tensor, mtp: bool = False, **options: Any) -> HiddenStates:
        """The old name of `forward_hidden`."""
        warn_renamed("Model.states", "forward_hidden")
        return self.forward_hidden(tokens_BS, mtp=mtp, **options)

    # --- the stages of `forward_hidden`, so that a pipeline's rank can run some of them

    def embed(self, tokens_BS: Tensor, compute_dtype: torch.dtype | None = None) -> Tensor:
        """Embeddings (B, S, D) in `compute_dtype`, None: that of the weights. Raises ValueError for wrong tokens."""
        if tokens_BS.dim() != 2 or tokens_BS.is_floating_point() or tokens_BS.numel() == 0:
            shape = tuple(tokens_BS.shape)
            raise ValueError(f"tokens must be integers of shape (batch, length), got {tokens_BS.dtype} {shape}")
        x_BSD: Tensor = self.embed_tokens(tokens_BS)
        return x_BSD if compute_dtype is None else x_BSD.to(compute_dtype)

    def run_layers(
        self,
        layers: range,
        x_BSD: Tensor,
        rope: Rope,
        cu_seqlens: Tensor | None = None,
        topk_ids_LBSK: Tensor | Sequence[Tensor] | None = None,
        activation_checkpointing: bool = False,
    ) -> tuple[Tensor, list[RouterOutput]]:
        """Run those of the main model's layers: the residual stream (B, S, D), and each MoE layer's router output.

        `topk_ids_LBSK` has an entry for every MoE layer of the main model. Modules of other layers are not touched: a
        rank that runs some need not have the others.
        """
        routing = []
        for index in layers:
            moe = index - self.config.first_k_dense_replace
            replayed_BSK = topk_ids_LBSK[moe] if topk_ids_LBSK is not None and moe >= 0 else None
            arguments = x_BSD, rope, None, cu_seqlens, replayed_BSK
            if activation_checkpointing:
                x_BSD, routed = checkpoint(self.layers[index], *arguments, use_reentrant=False)
            else:
                x_BSD, routed = self.layers[index](*arguments)
            if routed is not None:
                routing.append(routed)
        return x_BSD, routing

    def finish(self, x_BSD: Tensor) -> Tensor:
        """The final norm: hidden states (B, S, D) for the head and the first MTP module."""
        h_BSD: Tensor = self.norm(x_BSD)
        return h_BSD

    def _run_mtp(
        self, ahead_BT: Tensor, h_BSD: Tensor, rope: Rope, cu_seqlens: Tensor | None, detach: bool
    ) -> tuple[list[Tensor], list[RouterOutput]]:
        """Chain the modules: module k takes the hidden states of the one before and the token k places ahead."""
        hidden, routing = [], []
        h_BSD = h_BSD.detach() if detach else h_BSD
        for k, module in enumerate(cast(Iterable[MTPModule], self.mtp), start=1):
            if cu_seqlens is None:
                h_BSD, routed = self._run_mtp_module(k, module, ahead_BT, h_BSD, rope, detach)
            else:
                h_BSD, routed = self._run_mtp_module_in_segments(k, module, ahead_BT, h_BSD, rope, cu_seqlens, detach)
            hidden.append(h_BSD)
            routing.append(routed)
        return hidden, routing

    def _run_mtp_module(
        self, k: int, module: MTPModule, ahead_BT: Tensor, h_BSD: Tensor, rope: Rope, detach: bool
    ) -> tuple[Tensor, RouterOutput]:
        length = min(h_BSD.shape[1], ahead_BT.shape[1] - k)
        if length < 1:
            raise ValueError(f"sequences of {ahead_BT.shape[1]} tokens are too short for MTP module {k}")
        embedded_BSD = self.embed(ahead_BT[:, k : k + length], h_BSD.dtype)
        embedded_BSD = embedded_BSD.detach() if detach else embedded_BSD
        # Rotary positions are relative: counting a module's own from 0 changes nothing.
        own_rope = Rope(rope.cos[..., :length, :], rope.sin[..., :length, :])
        return cast(tuple[Tensor, RouterOutput], module(embedded_BSD, h_BSD[:, :length], own_rope))

    def _run_mtp_module_in_segments(
        self,
        k: int,
        module: MTPModule,
        tokens_BS: Tensor,
        h_BSD: Tensor,
        rope: Rope,
        cu_seqlens: Tensor,
        detach: bool,
    ) -> tuple[Tensor, RouterOutput]:
        """One row of the X tokens whose k-th successor lies in their segment; zero states at all others."""
        tokens_N, h_ND = tokens_BS.flatten(), h_BSD.flatten(0, 1)
        index_X, own_cu_seqlens = with_successor(cu_seqlens, len(tokens_N), k)
        if len(index_X) == 0:
            raise ValueError(f"segments of at most {k} tokens are too short for MTP module {k}")
        own_rope = Rope(*(table.flatten(0, -2)[index_X][None] for table in rope))
        embedded_1XD = self.embed(tokens_N[index_X + k][None], h_BSD.dtype)
        embedded_1XD = embedded_1XD.detach() if detach else embedded_1XD
        out_1XD, routed = module(embedded_1XD, h_ND[index_X][None], own_rope, None, own_cu_seqlens)
        return torch.zeros_like(h_ND).index_copy(0, index_X, out_1XD[0]).view_as(h_BSD), routed

    def _check_topk_ids(self, topk_ids_LBSK: Tensor | Sequence[Tensor], tokens_BS: Tensor) -> None:
        layers, experts = self.config.num_moe_layers, self.config.n_routed_experts
        shape = (*tokens_BS.shape, self.config.num_experts_per_tok)
        found = [tuple(ids_BSK.shape) for ids_BSK in topk_ids_LBSK]
        if found != [shape] * layers:
            raise ValueError(f"topk_ids_LBSK has entries of shapes {found}; it must have {layers} of shape {shape}")
        for layer, ids_BSK in enumerate(topk_ids_LBSK):
            if ids_BSK.is_floating_point() or ids_BSK.dtype == torch.bool:
                raise ValueError(f"topk_ids_LBSK[{layer}] is {ids_BSK.dtype}; it must be integers")
            low, high = (0, 0) if ids_BSK.is_cuda else map(int, ids_BSK.aminmax())  # the host waits for no GPU
            if low < 0 or high >= experts:
                raise ValueError(f"topk_ids_LBSK[{layer}] holds {low} to {high}; it must be from 0 to {experts - 1}")

    # --- with a latent cache

    def forward_with_cache(
        self, tokens_N: Tensor, batch: CachedBatch, compute_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, list[RouterOutput]]:
        """Continue sequences: write the tokens' latents into the cache. Gives hidden states (N, D), and what each MoE
        layer's router computed (B = 1, S = N).

        Tokens come in the order of `batch.slot_mapping_N`. `compute_dtype` is the activations' type; None means the
        cache's.
        """
        rope = rope_table(self.config, batch.positions)
        x_1ND = self.embed(tokens_N[None], compute_dtype or batch.cache_LMW.dtype)
        routing = []
        for index, layer in enumerate(self.layers):
            x_1ND, routed = layer(x_1ND, rope, batch.layer(index))
            if routed is not None:
                routing.append(routed)
        return self.finish(x_1ND)[0], routing

    def forward_mtp_with_cache(self, module: int, tokens_N: Tensor, h_ND: Tensor, batch: CachedBatch) -> Tensor:
        """Continue MTP module number `module` (from 0): token t_{i+1} with hidden state h_i, at the slot of token i+1.

        Gives its hidden states (N, D), in the type of `h_ND`. Positions may count from anywhere (rotary positions are
        relative), but slots the module never wrote must not be among those it attends.
        """
        rope = rope_table(self.config, batch.positions)
        embedded_1ND = self.embed(tokens_N[None], h_ND.dtype)
        out_1ND, _ = self.mtp[module](embedded_1ND, h_ND[None], rope, batch.layer(len(self.layers) + module))
        return cast(Tensor, out_1ND)[0]

    def write_mtp_kv_cache(self, module: int, tokens_N: Tensor, h_ND: Tensor, batch: CachedBatch) -> None:
        """Write the latents that `forward_mtp_with_cache` would, and compute nothing else."""
        block = cast(MTPModule, self.mtp[module])
        x_1ND = block.project(self.embed(tokens_N[None], h_ND.dtype), h_ND[None])
        rope = rope_table(self.config, batch.positions)
        block.self_attn.write_kv_cache(block.input_layernorm(x_1ND), rope, batch.layer(len(self.layers) + module))

    # --- parameters

    def tie_head(self) -> None:
        """Make head and embedding one parameter where the configuration says so (again, after `to_empty`)."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def routers(self) -> list[Router]:
        """Every router, in the order of `RouterOutputs.layers`."""
        return [module for module in self.modules() if isinstance(module, Router)]


def _positions(tokens_BS: Tensor, positions_BS: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Every token's position (B, S); (S) where all rows count from 0."""
    if positions_BS is not None:
        if positions_BS.shape != tokens_BS.shape or positions_BS.is_floating_point():
            found = f"{positions_BS.dtype} of shape {tuple(positions_BS.shape)}"
            raise ValueError(f"positions_BS is {found}; it must be integers of shape {tuple(tokens_BS.shape)}")
        return positions_BS
    if cu_seqlens is not None:
        return segment_positions(cu_seqlens, tokens_BS.numel()).view_as(tokens_BS)
    return torch.arange(tokens_BS.shape[1], device=tokens_BS.device)


@torch.no_grad()
def initialize(module: nn.Module, std: float) -> None:
    """Normal(0, std) for every matrix and the embedding; norms stay 1 and correction biases 0 (report, 4.2)."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding, Router)):
            nn.init.normal_(part.weight, std=std)
        elif isinstance(part, Experts):
            nn.init.normal_(part.gate_up_proj, std=std)
            nn.init.normal_(part.down_proj, std=std)
