"""MTP modules to compare with: ones that share neither embedding nor head with the main model.

Their matrices lie in each module under the names that released checkpoints give them there (as copies of the main
model's): `embed_tokens` and `shared_head.head`.
"""

from typing import cast

from torch import nn

from fathom.model.config import ModelConfig
from fathom.model.mtp import MTPModule
from fathom.model.transformer import Model


class ApartModel(Model):
    """A model whose MTP modules each have an embedding and a head of their own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        for module in self.mtp:
            module.register_module("embed_tokens", nn.Embedding(config.vocab_size, config.hidden_size))
            # No `Linear` of the layers: like the main model's head it is no matrix for Muon.
            head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            cast(MTPModule, module).shared_head["head"] = head

    def head_of(self, module: int) -> nn.Linear:
        return cast(nn.Linear, self._part(module).shared_head["head"]) if module else super().head_of(0)

    def embedding_of(self, module: int) -> nn.Embedding:
        return cast(nn.Embedding, self._part(module).embed_tokens) if module else super().embedding_of(0)

    def _part(self, module: int) -> MTPModule:
        return cast(MTPModule, self.mtp[module - 1])
