"""The schema of the inspector's JSON, from which the page is drawn, and its computation from a trace.

Probabilities and weights are rounded to four digits. Lists of experts, layers and classes are in their order; positions
in the text count from 0.
"""

import math
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from fathom.data.tokenizer import Tokenizer
from fathom.lab.inspector.attention import LEAST_WEIGHT
from fathom.lab.inspector.excerpts import ExcerptFacts, attention_kept, excerpt_facts
from fathom.lab.inspector.prediction import DraftFacts, draft_facts
from fathom.lab.inspector.spectrum import ranks
from fathom.lab.inspector.statistics import Characteristic, characteristic_tokens, class_lift, co_firing, taken
from fathom.lab.inspector.text import Source, Tokens, readable
from fathom.lab.inspector.trace import KEYS_KEPT, Trace
from fathom.lab.routers import router_names
from fathom.model.balance import max_violation
from fathom.model.config import ModelConfig
from fathom.model.router import Router
from fathom.model.transformer import Model

_CHARACTERISTIC = 8
"""Characteristic tokens listed per expert."""


class ModelFacts(TypedDict):
    """The model's shape."""

    name: str
    layers: int
    dense_layers: int
    heads: int
    experts: int
    experts_per_token: int
    shared_experts: int
    groups: int
    latent_rank: int
    rope_width: int
    mtp_modules: int


class TextFacts(TypedDict):
    """The text, and how well it was predicted."""

    name: str
    rule: str
    """How tokens were classified: "python" or "plain"."""
    bytes: int
    tokens: int
    cut: bool
    """Whether the text was truncated."""
    window: int
    """Tokens of the longest window; each is a separate forward pass that starts with BOS."""
    windows: int
    bits_per_byte: float
    bits_per_token: float


class ClassFacts(TypedDict):
    """The tokens of one class."""

    name: str
    tokens: int
    bits_per_token: float | None


class CharacteristicToken(TypedDict):
    """A token that is routed to an expert more often than the average token."""

    text: str
    seen: int
    taken: int
    lift: float


class RouterFacts(TypedDict):
    """One router: a MoE layer's or an MTP module's."""

    name: str
    load: list[int]
    """Tokens routed to each expert."""
    max_violation: float
    """MaxVio of that load."""
    bias: list[float | None] | None
    """The correction biases; null where the router has none."""
    class_lift: list[list[float | None]]
    """Experts × classes: how often a class's tokens are routed to the expert, relative to all tokens."""
    telling: list[list[CharacteristicToken]]
    """For each expert its most characteristic tokens."""
    co_firing: list[list[float | None]]
    """Row i: experts 0 … i−1; how often they are selected together with expert i, relative to chance."""


class LatentFacts(TypedDict):
    """The dimensions that one layer's cached latents use."""

    layer: int
    singular_values: list[float | None]
    participation: float
    entropy: float
    dimensions_99: int
    """The fewest dimensions that hold 99 % of the energy (squared singular values)."""
    centred_participation: float
    centred_dimensions_99: int
    """The same after subtracting the mean latent."""


class AttentionFacts(TypedDict):
    """Which attention weights were kept."""

    keys: int
    """The most keys per token and head."""
    least: float
    """The smallest weight kept."""
    every: int
    """Kept for every `every`-th token of an excerpt."""
    share: float | None
    """The share of all weight that was kept."""


class Facts(TypedDict):
    """Everything."""

    model: ModelFacts
    text: TextFacts
    classes: list[ClassFacts]
    routers: list[RouterFacts]
    latents: list[LatentFacts]
    drafts: list[DraftFacts]
    """One per MTP module."""
    attention: AttentionFacts
    excerpts: list[ExcerptFacts]


def gather(name: str, model: Model, tokenizer: Tokenizer, source: Source, tokens: Tokens, trace: Trace) -> Facts:
    """Compute all figures from a trace."""
    config = model.config
    return Facts(
        model=_model_facts(name, config),
        text=_text_facts(source, tokens, trace),
        classes=_class_facts(tokens, trace),
        routers=_router_facts(model, tokenizer, tokens, trace),
        latents=_latent_facts(trace),
        drafts=[draft_facts(k, tokens, trace, tokenizer) for k in range(len(trace.drafts))],
        attention=AttentionFacts(
            keys=KEYS_KEPT, least=LEAST_WEIGHT, every=trace.plan.every, share=attention_kept(trace)
        ),
        excerpts=[excerpt_facts(excerpt, tokens, trace, tokenizer) for excerpt in trace.excerpts],
    )


def _model_facts(name: str, config: ModelConfig) -> ModelFacts:
    return ModelFacts(
        name=name,
        layers=config.num_hidden_layers,
        dense_layers=config.first_k_dense_replace,
        heads=config.num_attention_heads,
        experts=config.n_routed_experts,
        experts_per_token=config.num_experts_per_tok,
        shared_experts=config.n_shared_experts,
        groups=config.n_group,
        latent_rank=config.kv_lora_rank,
        rope_width=config.qk_rope_head_dim,
        mtp_modules=config.num_nextn_predict_layers,
    )


def _text_facts(source: Source, tokens: Tokens, trace: Trace) -> TextFacts:
    bits = float(trace.main.nats_N.sum(dtype=np.float64) / np.log(2))
    return TextFacts(
        name=source.name,
        rule="python" if source.python else "plain",
        bytes=tokens.bytes,
        tokens=len(tokens.ids),
        cut=tokens.cut,
        window=max(end - start for start, end in trace.plan.windows),
        windows=len(trace.plan.windows),
        bits_per_byte=round(bits / tokens.bytes, 4),
        bits_per_token=round(bits / len(tokens.ids), 4),
    )


def _class_facts(tokens: Tokens, trace: Trace) -> list[ClassFacts]:
    facts = []
    for place, name in enumerate(tokens.class_names):
        nats = trace.main.nats_N[tokens.classes_N == place]
        bits = round(float(nats.mean(dtype=np.float64) / np.log(2)), 4) if len(nats) else None
        facts.append(ClassFacts(name=name, tokens=len(nats), bits_per_token=bits))
    return facts


def _router_facts(model: Model, tokenizer: Tokenizer, tokens: Tokens, trace: Trace) -> list[RouterFacts]:
    routers = zip(router_names(model.config), model.routers(), trace.experts_LNK, strict=True)
    return [_one_router(name, router, experts_NK, tokenizer, tokens) for name, router, experts_NK in routers]


def _one_router(
    name: str, router: Router, experts_NK: NDArray[np.int16], tokenizer: Tokenizer, tokens: Tokens
) -> RouterFacts:
    passed_N = experts_NK[:, 0] >= 0
    took_NE = taken(experts_NK[passed_N], router.config.n_routed_experts)
    tokens_per_expert_E = took_NE.sum(0).astype(np.int64)
    lift_EG = class_lift(took_NE, tokens.classes_N[passed_N], len(tokens.class_names))
    telling = characteristic_tokens(took_NE, np.asarray(tokens.ids)[passed_N], _CHARACTERISTIC)
    return RouterFacts(
        name=name,
        load=tokens_per_expert_E.tolist(),
        max_violation=round(float(max_violation(torch.from_numpy(tokens_per_expert_E))), 4)
        if tokens_per_expert_E.any()
        else 0.0,
        bias=None if router.config.is_v2 else _rounded(router.e_score_correction_bias.tolist(), 5),
        class_lift=[_rounded(row, 3) for row in lift_EG.tolist()],
        telling=[[_characteristic(one, tokenizer) for one in expert] for expert in telling],
        co_firing=[_rounded(row[:expert], 2) for expert, row in enumerate(co_firing(took_NE).tolist())],
    )


def _characteristic(one: Characteristic, tokenizer: Tokenizer) -> CharacteristicToken:
    text = readable(tokenizer.token_bytes(one.token))
    return CharacteristicToken(text=text, seen=one.seen, taken=one.taken, lift=round(one.lift, 2))


def _latent_facts(trace: Trace) -> list[LatentFacts]:
    facts = []
    for layer, spectrum in enumerate(trace.spectra):
        values, centred = spectrum.singular_values(), ranks(spectrum.singular_values(centred=True))
        used = ranks(values)
        facts.append(
            LatentFacts(
                layer=layer,
                singular_values=_rounded(values.tolist(), 4),
                participation=round(used.participation, 2),
                entropy=round(used.entropy, 2),
                dimensions_99=used.dimensions_99,
                centred_participation=round(centred.participation, 2),
                centred_dimensions_99=centred.dimensions_99,
            )
        )
    return facts


def _rounded(values: Sequence[float], digits: int) -> list[float | None]:
    """NaN, which JSON does not have, becomes null."""
    return [None if math.isnan(value) else round(value, digits) for value in values]
