"""The whole model: embedding, layers, final norm, head, MTP modules (DeepSeek-V3 report, section 2).

`states` does the work and returns everything the forward pass found out; `hidden`, `logits` and the call compose it.
The model remembers nothing between calls: loads and balance losses are outputs, the cache is passed in.

Shapes: B batch, S query length, T cache slots, D hidden, O vocabulary, W = C+R cache width, L layers (of the main
model, then one per MTP module), E experts, K experts per token.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fathom.model.block import Block
from fathom.model.cached_batch import CachedBatch, Routed
from fathom.model.config import ModelConfig
from fathom.model.layers import Linear, RMSNorm
from fathom.model.moe import Experts, RouterFacts
from fathom.model.mtp import MTPModule
from fathom.model.rope import rope_table
from fathom.model.router import Router
from fathom.ops.rope import Rope


@dataclass(frozen=True)
class RouterSummary:
    """Every router's facts, MoE layers in order, then the MTP modules that ran."""

    tokens_per_expert_LE: Tensor
    """Tokens each expert received, (MoE layers, E) int64; no rows in a model without MoE layers."""
    balance_loss: Tensor
    """Sequence-wise balance loss before α: mean over sequences, summed over layers (scalar)."""
    topk_ids_LBSK: tuple[Tensor, ...]
    """Experts each token took, one (B, S, K) tensor per layer."""


@dataclass(frozen=True)
class HiddenStates:
    """What the layers computed, before the head."""

    h_BSD: Tensor
    """The main model's state after its final norm."""
    mtp_h_BSD: tuple[Tensor, ...]
    """Each MTP module's state after `shared_head.norm`; module k covers the positions whose token i+k is known."""
    router: RouterSummary


@dataclass(frozen=True)
class ModelOutput:
    """A whole forward pass."""

    logits_BSO: Tensor
    router: RouterSummary
    mtp_logits: tuple[Tensor, ...] | None
    """One (B, S − k, O) per module k when asked for: position i predicts token i + k + 1."""


class Model(nn.Module):
    """A DeepSeek-V3 model with freshly initialised weights; `fathom.load_model` reads a checkpoint instead."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
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
        states = self.forward_hidden(tokens_BS, mtp=mtp)
        mtp_logits = tuple(self.logits(h, k) for k, h in enumerate(states.mtp_h_BSD, 1)) if mtp else None
        return ModelOutput(self.logits(states.h_BSD), states.router, mtp_logits)

    def hidden(self, tokens_BS: Tensor) -> Tensor:
        """The state after the final norm (B, S, D): what the head and the first MTP module read."""
        return self.forward_hidden(tokens_BS).h_BSD

    def logits(self, h_BSD: Tensor, module: int = 0) -> Tensor:
        """The output head, of the main model or of an MTP module counted from 1: (…, D) → (…, O)."""
        logits_BSO: Tensor = self.head_of(module)(h_BSD)
        return logits_BSO

    def head_of(self, module: int) -> nn.Linear:
        """The head that reads the main model's states (0) or an MTP module's (from 1): the same one for all."""
        return self.lm_head

    def embedding_of(self, module: int) -> nn.Embedding:
        """The embedding of what the main model (0) or an MTP module (from 1) reads: the same one for all."""
        return self.embed_tokens

    def forward_hidden(
        self,
        tokens_BS: Tensor,
        mtp: bool = False,
        lookahead_BM: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
        activation_checkpointing: bool = False,
    ) -> HiddenStates:
        """Run the layers over whole sequences.

        With `mtp` the modules run too. `lookahead_BM` holds the M = num_nextn_predict_layers tokens that follow each
        row, where they are known (training cuts its rows with them): every module then covers all S positions.
        `compute_dtype` is the activations' type; None means that of the weights. With `activation_checkpointing` each
        layer of the main model keeps its input alone and runs again in the backward pass.
        """
        self._check_tokens(tokens_BS)
        rope = rope_table(self.config, torch.arange(tokens_BS.shape[1], device=tokens_BS.device))
        x_BSD = self._embed(tokens_BS, compute_dtype)
        facts: list[RouterFacts] = []
        for layer in self.layers:
            if activation_checkpointing:
                x_BSD, layer_facts = checkpoint(layer, x_BSD, rope, use_reentrant=False)
            else:
                x_BSD, layer_facts = layer(x_BSD, rope)
            if layer_facts is not None:
                facts.append(layer_facts)
        h_BSD = self.norm(x_BSD)
        mtp_h_BSD: list[Tensor] = []
        if mtp:
            ahead_BT = tokens_BS if lookahead_BM is None else torch.cat((tokens_BS, lookahead_BM), dim=1)
            mtp_h_BSD, mtp_facts = self._run_mtp(ahead_BT, h_BSD, rope, compute_dtype)
            facts += mtp_facts
        return HiddenStates(h_BSD, tuple(mtp_h_BSD), self._summary(facts))

    def _run_mtp(
        self, ahead_BT: Tensor, h_BSD: Tensor, rope: Rope, compute_dtype: torch.dtype | None
    ) -> tuple[list[Tensor], list[RouterFacts]]:
        """Chain the modules: module k reads the state of the one before and the token k places ahead."""
        states, facts = [], []
        for k, module in enumerate(self.mtp, start=1):
            length = min(h_BSD.shape[1], ahead_BT.shape[1] - k)
            if length < 1:
                raise ValueError(f"sequences of {ahead_BT.shape[1]} tokens are too short for MTP module {k}")
            embedded_BSD = self._embed(ahead_BT[:, k : k + length], compute_dtype, k)
            # Rotary positions are relative: counting a module's own from 0 changes nothing.
            here = Rope(rope.cos[:length], rope.sin[:length])
            h_BSD, module_facts = cast(MTPModule, module).predict(embedded_BSD, h_BSD[:, :length], here)
            states.append(h_BSD)
            facts.append(module_facts)
        return states, facts

    # ------------------------------------------------------------------------------------- with a latent cache

    def forward_with_cache(
        self, tokens_N: Tensor, batch: CachedBatch, compute_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Routed]:
        """Continue sequences: write the tokens' latents into the cache. Gives final states (N, D) and the routing.

        Tokens come in the order of `batch.slot_mapping_N`. `compute_dtype` is the activations' type; None means the
        cache's.
        """
        rope = rope_table(self.config, batch.positions)
        x_1ND = self._embed(tokens_N[None], compute_dtype or batch.cache_LMW.dtype)
        facts: list[RouterFacts] = []
        for index, layer in enumerate(self.layers):
            x_1ND, layer_facts = layer(x_1ND, rope, batch.layer(index))
            if layer_facts is not None:
                facts.append(layer_facts)
        h_1ND: Tensor = self.norm(x_1ND)
        return h_1ND[0], self._routed(facts, len(tokens_N))

    def forward_mtp_with_cache(self, module: int, tokens_N: Tensor, h_ND: Tensor, batch: CachedBatch) -> Tensor:
        """Continue MTP module number `module` (from 0): token t_{i+1} with state h_i, at the slot of token i+1.

        The activations have the states' type.

        Positions count as the caller likes (rotary positions are relative), but slots the module never wrote must not
        be among those it sees.
        """
        rope = rope_table(self.config, batch.positions)
        embedded_1ND = self._embed(tokens_N[None], h_ND.dtype, module + 1)
        cache = batch.layer(len(self.layers) + module)
        out_1ND, _ = cast(MTPModule, self.mtp[module]).predict(embedded_1ND, h_ND[None], rope, cache)
        return out_1ND[0]

    def write_mtp_kv_cache(self, module: int, tokens_N: Tensor, h_ND: Tensor, batch: CachedBatch) -> None:
        """Write the latents that `forward_mtp_with_cache` would, and compute nothing else: nobody asks for the
        states."""
        block = cast(MTPModule, self.mtp[module])
        x_1ND = block.joined(self._embed(tokens_N[None], h_ND.dtype), h_ND[None])
        rope = rope_table(self.config, batch.positions)
        block.self_attn.write_kv_cache(block.input_layernorm(x_1ND), rope, batch.layer(len(self.layers) + module))

    # ---------------------------------------------------------------------------------------------------------

    def tie_head(self) -> None:
        """Make head and embedding one parameter where the configuration says so (again, after `to_empty`)."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def routers(self) -> list[Router]:
        """Every router, in the order of `RouterSummary.tokens_per_expert_LE`."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def _embed(self, tokens_BS: Tensor, compute_dtype: torch.dtype | None, module: int = 0) -> Tensor:
        embedded_BSD: Tensor = self.embedding_of(module)(tokens_BS)
        return embedded_BSD if compute_dtype is None else embedded_BSD.to(compute_dtype)

    def _check_tokens(self, tokens_BS: Tensor) -> None:
        if tokens_BS.dim() != 2 or tokens_BS.is_floating_point() or tokens_BS.numel() == 0:
            shape = tuple(tokens_BS.shape)
            raise ValueError(f"tokens must be integers of shape (batch, length), got {tokens_BS.dtype} {shape}")

    def _routed(self, facts: list[RouterFacts], tokens: int) -> Routed:
        if not facts:
            none_LNK = self.embed_tokens.weight.new_zeros(0, tokens, self.config.num_experts_per_tok)
            return Routed(none_LNK.long(), none_LNK.float())
        experts_LNK = torch.stack([layer.topk_ids_BSK[0] for layer in facts])
        return Routed(experts_LNK, torch.stack([layer.weights_BSK[0] for layer in facts]))

    def _summary(self, facts: list[RouterFacts]) -> RouterSummary:
        device = self.embed_tokens.weight.device
        if not facts:
            empty_LE = torch.zeros(0, self.config.n_routed_experts, dtype=torch.int64, device=device)
            return RouterSummary(empty_LE, torch.zeros((), device=device), ())
        tokens_per_expert_LE = torch.stack([f.tokens_per_expert_E for f in facts])
        balance = torch.stack([f.balance_loss for f in facts if f.balance_loss is not None]).sum()
        return RouterSummary(tokens_per_expert_LE, balance, tuple(f.topk_ids_BSK for f in facts))


@torch.no_grad()
def initialize(module: nn.Module, std: float) -> None:
    """Normal(0, std) for every matrix and the embedding; norms stay 1 and correction biases 0 (report, 4.2)."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding, Router)):
            nn.init.normal_(part.weight, std=std)
        elif isinstance(part, Experts):
            nn.init.normal_(part.gate_up_proj, std=std)
            nn.init.normal_(part.down_proj, std=std)
