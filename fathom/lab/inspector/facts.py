"""What the inspector found, in the words of its JSON: the page is drawn from these keys, and `--json` writes them.

`read_text` notes what the model did; here it becomes figures that a person, or another program, can read.
Probabilities and weights are rounded to four digits. Lists of experts, layers and classes are in their order; places in
the text count from 0.
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
from fathom.lab.inspector.reading import KEYS_KEPT, Reading
from fathom.lab.inspector.spectrum import ranks
from fathom.lab.inspector.statistics import Telling, class_lift, co_firing, taken, telling_tokens
from fathom.lab.inspector.text import Source, Tokens, spelling
from fathom.lab.routers import router_names
from fathom.model.balance import max_violation
from fathom.model.config import ModelConfig
from fathom.model.router import Router
from fathom.model.transformer import Model

_TELLING = 8
"""Tokens named for each expert."""


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
    """What was read, and how well it was predicted."""

    name: str
    rule: str
    """How tokens were classed: "python" or "plain"."""
    bytes: int
    tokens: int
    cut: bool
    """Whether the text goes on beyond what was read."""
    window: int
    """Tokens of the longest window; each is read on its own, after a begin token."""
    windows: int
    bits_per_byte: float
    bits_per_token: float


class ClassFacts(TypedDict):
    """The tokens of one class."""

    name: str
    tokens: int
    bits_per_token: float | None


class TellingFacts(TypedDict):
    """A token that takes an expert more often than the average token does."""

    text: str
    seen: int
    taken: int
    lift: float


class RouterFacts(TypedDict):
    """One router: a MoE layer's or an MTP module's."""

    name: str
    load: list[int]
    """Tokens of the text that each expert received."""
    max_violation: float
    """MaxVio of that load."""
    bias: list[float | None] | None
    """The correction biases; null where the router has none."""
    class_lift: list[list[float | None]]
    """Experts × classes: times the average that a class's tokens take an expert."""
    telling: list[list[TellingFacts]]
    """For each expert the tokens that say most about it."""
    co_firing: list[list[float | None]]
    """Row i: experts 0 … i−1; how often they fire together with expert i, in times of what chance would give."""


class LatentFacts(TypedDict):
    """What one layer's cached latents use of their width."""

    layer: int
    singular_values: list[float | None]
    participation: float
    entropy: float
    dimensions_99: int
    """The fewest dimensions that hold 99 % of the energy (squared singular values)."""
    centred_participation: float
    centred_dimensions_99: int
    """The same of the latents less their mean."""


class AttentionFacts(TypedDict):
    """What was kept of the attention weights."""

    keys: int
    """At most so many keys per token and head."""
    least: float
    """None that weighs less."""
    every: int
    """Of every so-many-th token of an excerpt."""
    share: float | None
    """The share of all weight that this kept."""


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


def gather(name: str, model: Model, tokenizer: Tokenizer, source: Source, tokens: Tokens, reading: Reading) -> Facts:
    """Turn what was noted into figures."""
    config = model.config
    return Facts(
        model=_model_facts(name, config),
        text=_text_facts(source, tokens, reading),
        classes=_class_facts(tokens, reading),
        routers=_router_facts(model, tokenizer, tokens, reading),
        latents=_latent_facts(reading),
        drafts=[draft_facts(k, tokens, reading, tokenizer) for k in range(len(reading.drafts))],
        attention=AttentionFacts(
            keys=KEYS_KEPT, least=LEAST_WEIGHT, every=reading.plan.every, share=attention_kept(reading)
        ),
        excerpts=[excerpt_facts(excerpt, tokens, reading, tokenizer) for excerpt in reading.excerpts],
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


def _text_facts(source: Source, tokens: Tokens, reading: Reading) -> TextFacts:
    bits = float(reading.said.nats_N.sum(dtype=np.float64) / np.log(2))
    return TextFacts(
        name=source.name,
        rule="python" if source.python else "plain",
        bytes=tokens.bytes,
        tokens=len(tokens.ids),
        cut=tokens.cut,
        window=max(end - start for start, end in reading.plan.windows),
        windows=len(reading.plan.windows),
        bits_per_byte=round(bits / tokens.bytes, 4),
        bits_per_token=round(bits / len(tokens.ids), 4),
    )


def _class_facts(tokens: Tokens, reading: Reading) -> list[ClassFacts]:
    facts = []
    for place, name in enumerate(tokens.class_names):
        nats = reading.said.nats_N[tokens.classes_N == place]
        bits = round(float(nats.mean(dtype=np.float64) / np.log(2)), 4) if len(nats) else None
        facts.append(ClassFacts(name=name, tokens=len(nats), bits_per_token=bits))
    return facts


def _router_facts(model: Model, tokenizer: Tokenizer, tokens: Tokens, reading: Reading) -> list[RouterFacts]:
    routers = zip(router_names(model.config), model.routers(), reading.experts_LNK, strict=True)
    return [_one_router(name, router, experts_NK, tokenizer, tokens) for name, router, experts_NK in routers]


def _one_router(
    name: str, router: Router, experts_NK: NDArray[np.int16], tokenizer: Tokenizer, tokens: Tokens
) -> RouterFacts:
    passed_N = experts_NK[:, 0] >= 0
    took_NE = taken(experts_NK[passed_N], router.config.n_routed_experts)
    tokens_per_expert_E = took_NE.sum(0).astype(np.int64)
    lift_EG = class_lift(took_NE, tokens.classes_N[passed_N], len(tokens.class_names))
    telling = telling_tokens(took_NE, np.asarray(tokens.ids)[passed_N], _TELLING)
    return RouterFacts(
        name=name,
        load=tokens_per_expert_E.tolist(),
        max_violation=round(float(max_violation(torch.from_numpy(tokens_per_expert_E))), 4)
        if tokens_per_expert_E.any()
        else 0.0,
        bias=None if router.config.is_v2 else _rounded(router.e_score_correction_bias.tolist(), 5),
        class_lift=[_rounded(row, 3) for row in lift_EG.tolist()],
        telling=[[_telling(one, tokenizer) for one in expert] for expert in telling],
        co_firing=[_rounded(row[:expert], 2) for expert, row in enumerate(co_firing(took_NE).tolist())],
    )


def _telling(one: Telling, tokenizer: Tokenizer) -> TellingFacts:
    text = spelling(tokenizer.token_bytes(one.token))
    return TellingFacts(text=text, seen=one.seen, taken=one.taken, lift=round(one.lift, 2))


def _latent_facts(reading: Reading) -> list[LatentFacts]:
    facts = []
    for layer, spectrum in enumerate(reading.spectra):
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


def _rounded(numbers: Sequence[float], digits: int) -> list[float | None]:
    """NaN, for which JSON has no number, becomes null."""
    return [None if math.isnan(number) else round(number, digits) for number in numbers]
