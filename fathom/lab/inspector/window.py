"""One forward pass over a window of a text, layer by layer through the model's own modules, recording what each did.

What the modules do not return (latents, attention weights) is computed by them again, so the model needs no hooks for
the inspector.

Shapes: S tokens of the window, Q of them whose attention is kept, D hidden, C latent rank, K experts per token,
N positions, O vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fathom.lab.inspector.attention import KeptAttention, attention_weights, strongest
from fathom.model.block import Block
from fathom.model.layers import at_least_float32
from fathom.model.mtp import MTPModule
from fathom.model.rope import rope_table
from fathom.model.router import RouterOutput
from fathom.model.transformer import Model
from fathom.ops.rope import Rope

_CHUNK = 128
"""Positions whose logits exist at once."""


class Prediction(NamedTuple):
    """A head's predictions at N positions."""

    top_N: Tensor
    """The most likely token."""
    top_p_N: Tensor
    """Its probability."""
    target_nats_N: Tensor
    """−ln p of the target."""


class Choice(NamedTuple):
    """Experts of S tokens in one layer, −1 where a token did not pass through it, and their weights."""

    experts_SK: Tensor
    weights_SK: Tensor


@dataclass(frozen=True)
class Window:
    """The record of one forward pass; tensors are on the CPU, but for the latents."""

    main: Prediction
    """The main head at the first S − 1 positions; the target is the next token."""
    drafts: tuple[Prediction, ...]
    """Module k, from 1, at the first S − k − 1 positions: of token i+k+1; the target is the main head's choice."""
    choices: tuple[Choice, ...]
    """MoE layers in order, then the MTP modules that ran, whose input at position i is token i+k."""
    latents: tuple[Tensor, ...]
    """Each layer's normalised latents (S, C), as they would be cached."""
    attention: tuple[KeptAttention, ...]
    """Each layer's attention of the chosen queries; empty without queries."""


@torch.no_grad()
def trace_window(model: Model, tokens_S: Tensor, queries: Sequence[int] = (), keys: int = 0) -> Window:
    """Process at least two tokens; for those at `queries` keep the `keys` strongest attention weights per head."""
    rope = rope_table(model.config, torch.arange(len(tokens_S), device=tokens_S.device))
    # No query attends beyond the last one: a long window must not make large matrices.
    seen = max(queries, default=0) + 1
    x_BSD = model.embed_tokens(tokens_S[None])
    choices, latents, attention = [], [], []
    for layer in cast(Sequence[Block], model.layers):
        normed_BSD = layer.input_layernorm(x_BSD)
        latents.append(layer.self_attn.latents(normed_BSD, rope)[0][0])
        if queries:
            attention.append(strongest(attention_weights(layer.self_attn, normed_BSD[0, :seen], rope, queries), keys))
        x_BSD, routing = layer(x_BSD, rope)
        if routing is not None:
            choices.append(_choice(routing, 0))
    h_BSD = model.norm(x_BSD)
    main = _prediction(model, h_BSD[0, :-1], tokens_S[1:])
    drafts, more = _drafts(model, tokens_S, h_BSD, rope, main.top_N)
    return Window(main, drafts, (*choices, *more), tuple(latents), tuple(attention))


def _drafts(
    model: Model, tokens_S: Tensor, h_BSD: Tensor, rope: Rope, top_N: Tensor
) -> tuple[tuple[Prediction, ...], list[Choice]]:
    """The chain of modules on the true tokens: inputs of module k are the previous hidden state and token i+k."""
    drafts, choices = [], []
    for k, module in enumerate(cast(Sequence[MTPModule], model.mtp), start=1):
        length = len(tokens_S) - k
        if length < 2:
            break
        embedded_BSD = model.embed_tokens(tokens_S[None, k:])
        here = Rope(rope.cos[:length], rope.sin[:length])
        h_BSD, routing = module(embedded_BSD, h_BSD[:, :length], here)
        # At position i the module predicts token i+k+1, which the main head predicts at position i+k.
        drafts.append(_prediction(model, h_BSD[0, :-1], top_N[k:].to(h_BSD.device)))
        choices.append(_choice(routing, k))
    return tuple(drafts), choices


def _choice(routing: RouterOutput, ahead: int) -> Choice:
    """By token: position i belongs to token i + `ahead`."""
    experts_SK, weights_SK = routing.topk_ids_BSK[0].cpu(), routing.weights_BSK[0].float().cpu()
    none_AK = experts_SK.new_full((ahead, experts_SK.shape[1]), -1)
    return Choice(torch.cat((none_AK, experts_SK)), torch.cat((torch.zeros(none_AK.shape), weights_SK)))


def _prediction(model: Model, h_ND: Tensor, targets_N: Tensor) -> Prediction:
    parts = []
    for h_MD, targets_M in zip(h_ND.split(_CHUNK), targets_N.split(_CHUNK), strict=True):
        logp_MO = at_least_float32(model.logits(h_MD)).log_softmax(-1)
        best = logp_MO.max(-1)
        nats_M = -logp_MO.gather(1, targets_M[:, None])[:, 0]
        parts.append((best.indices.cpu(), best.values.exp().cpu(), nats_M.cpu()))
    return Prediction(*(torch.cat(column) for column in zip(*parts, strict=True)))
