"""The engine that samples what is trained: on the trained tensors themselves, or on a copy of another type."""

import copy
from typing import Any

import torch

from fathom.engine.engine import Engine
from fathom.posttrain.lora import merged_model, merged_state
from fathom.posttrain.session import Session

_BATCH = {"cpu": 48, "cuda": 256}
"""Conversations that are sampled at one time: on a CPU as many as the compiled step takes."""


class Sampler:
    """An engine whose weights follow the trained model's."""

    def __init__(self, session: Session[Any], conversations: int, speculative: bool) -> None:
        """For so many conversations at a time; `speculative`: with drafts."""
        self._trained = session.state.model
        model = merged_model(self._trained)
        shared = model is self._trained and session.loss.compute_dtype == torch.float32
        if session.loss.compute_dtype != torch.float32:
            # What is computed in bfloat16 is trained on float32 weights: the engine reads them in the type it computes
            # in.
            model = copy.deepcopy(model).bfloat16()
        batch = min(conversations, _BATCH[session.ranks.device.type])
        length = min(model.config.max_position_embeddings, session.run.train.max_length)
        self.engine = Engine(
            model,
            session.tokenizer,
            speculative=speculative,
            max_batch=batch,
            cache_tokens=max(batch * length, model.config.max_position_embeddings),
        )
        self._shared = shared

    def refresh(self) -> None:
        """After an update of the weights."""
        self.engine.update_weights({} if self._shared else merged_state(self._trained))
