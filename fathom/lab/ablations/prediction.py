"""MTP modules to compare with: ones that share neither embedding nor head with the main model.

Their matrices lie in each module under the names that released checkpoints give them there (as copies of the main
model's): `embed_tokens` and `shared_head.head`. Such a model is trained and evaluated on whole sequences; it does not
draft.

Shapes: B batch, S length, M MTP modules, D hidden, O vocabulary.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fathom.model.cached_batch import CachedBatch
from fathom.model.config import ModelConfig
from fathom.model.mtp import MTPModule
from fathom.model.outputs import HiddenStates, RouterOutputs
from fathom.model.rope import rope_table
from fathom.model.transformer import Model
from fathom.train.loss import PretrainLoss


class ApartModel(Model):
    """A model whose MTP modules each have an embedding and a head of their own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        for module in self.mtp:
            module.register_module("embed_tokens", nn.Embedding(config.vocab_size, config.hidden_size))
            # No `Linear` of the layers: like the main model's head it is no matrix for Muon.
            head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            cast(MTPModule, module).shared_head["head"] = head

    def heads(self) -> list[nn.Linear]:
        """The main model's head, then each module's."""
        return [self.lm_head, *(cast(nn.Linear, cast(MTPModule, module).shared_head["head"]) for module in self.mtp)]

    def logits(self, h_BSD: Tensor, module: int = 0) -> Tensor:
        logits_BSO: Tensor = self.heads()[module](h_BSD)
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
        main = super().forward_hidden(
            tokens_BS,
            positions_BS,
            cu_seqlens,
            topk_ids_LBSK=topk_ids_LBSK,
            compute_dtype=compute_dtype,
            activation_checkpointing=activation_checkpointing,
        )
        if not mtp:
            return main
        if cu_seqlens is not None or detach_mtp:
            raise NotImplementedError("MTP modules with their own embeddings and heads are for pretraining alone")
        ahead_BT = tokens_BS if lookahead_BM is None else torch.cat((tokens_BS, lookahead_BM), dim=1)
        h_BSD, mtp_h_BSD, routing = main.h_BSD, [], list(main.router.layers)
        for k, module in enumerate(self.mtp, start=1):
            length = min(h_BSD.shape[1], ahead_BT.shape[1] - k)
            embedded_BSD = cast(nn.Embedding, module.embed_tokens)(ahead_BT[:, k : k + length]).to(h_BSD.dtype)
            rope = rope_table(self.config, torch.arange(length, device=tokens_BS.device))
            h_BSD, routed = module(embedded_BSD, h_BSD[:, :length], rope)
            mtp_h_BSD.append(h_BSD)
            routing.append(routed)
        outputs = RouterOutputs.of(routing, self.config.n_routed_experts, h_BSD.device)
        return HiddenStates(main.h_BSD, tuple(mtp_h_BSD), outputs)

    def forward_mtp_with_cache(self, module: int, tokens_N: Tensor, h_ND: Tensor, batch: CachedBatch) -> Tensor:
        raise NotImplementedError("a model whose MTP modules have their own embeddings and heads does not draft")


class ApartLoss(PretrainLoss):
    """The pretraining loss of such a model."""

    def __init__(self, loss: PretrainLoss) -> None:
        """With the model and the settings of `loss`."""
        settings = loss.seq_balance_loss_weight, loss.compute_dtype, loss.activation_checkpointing
        super().__init__(loss.model, *settings)

    def head_weights(self) -> list[Tensor]:
        return [head.weight for head in cast(ApartModel, self.model).heads()]
