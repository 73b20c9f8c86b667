"""Reading a text with a model in windows: what statistics need of every token, and everything about a few excerpts.

Each window begins with the begin token, which is read but not counted, so every token of the text is predicted once.
Memory is bounded by the number of tokens read: of each a few numbers are kept, of the latents their products alone
(`spectrum.py`), and attention of the excerpts only. An excerpt is the beginning of a window: all that its tokens could
attend to lies within it.

Shapes: N tokens of the text, T tokens of an excerpt with the begin token, L routers (MoE layers, then MTP modules),
K experts per token, Q tokens of an excerpt whose attention is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fathom.lab.inspector.attention import KeptAttention
from fathom.lab.inspector.spectrum import Spectrum
from fathom.lab.inspector.window import Guess, Window, read_window
from fathom.model.config import ModelConfig
from fathom.model.transformer import Model

EXCERPT_TOKENS = 256
"""Longest excerpt."""
KEYS_KEPT = 8
"""Keys kept per head and token."""
ATTENTION_BUDGET = 600_000
"""Weights kept at most over all excerpts; a model of many layers and heads keeps fewer tokens' attention."""


@dataclass(frozen=True)
class Guesses:
    """One head's first choices for every token of the text; −1 and NaN where it made none."""

    first_N: NDArray[np.int64]
    first_p_N: NDArray[np.float32]
    nats_N: NDArray[np.float32]
    """−ln p: by the main head, of the text's token; by an MTP module, of the main head's first choice."""


@dataclass(frozen=True)
class Excerpt:
    """A stretch of the text shown token by token."""

    start: int
    """The place in the text of the token after the begin token."""
    experts_LTK: NDArray[np.int16]
    """−1 where a token did not pass."""
    weights_LTK: NDArray[np.float32]
    queries_Q: tuple[int, ...]
    """Places in the excerpt, 0 being the begin token."""
    attention: tuple[KeptAttention, ...]
    """One per layer."""


@dataclass(frozen=True)
class Plan:
    """How a text is cut."""

    windows: tuple[tuple[int, int], ...]
    """Start and end of each in the text."""
    excerpts: dict[int, int]
    """Numbers of the windows that begin with an excerpt, and how many of their tokens it has."""
    every: int
    """Attention is kept of every so-many-th token of an excerpt."""


@dataclass(frozen=True)
class Reading:
    """All that was seen."""

    plan: Plan
    tokens_N: NDArray[np.int64]
    said: Guesses
    drafts: tuple[Guesses, ...]
    experts_LNK: NDArray[np.int16]
    spectra: tuple[Spectrum, ...]
    excerpts: tuple[Excerpt, ...]


def plan_reading(config: ModelConfig, tokens: int, window: int, shown: int) -> Plan:
    """Cut `tokens` tokens into windows of at most `window`, of which about `shown` tokens are shown.

    Excerpts are spread evenly over the text. A window has no more tokens than the model's context less the begin token.
    """
    size = max(1, min(window, config.max_position_embeddings - 1))
    windows = tuple((start, min(start + size, tokens)) for start in range(0, tokens, size))
    length = min(size, EXCERPT_TOKENS, shown)
    count = min(len(windows), max(1, shown // length))
    # The last window may be a short rest: the others come first.
    full = max(1, len(windows) - (windows[-1][1] - windows[-1][0] < length))
    count = min(count, full)
    chosen = [(2 * place + 1) * full // (2 * count) for place in range(count)]
    excerpts = {number: min(length, windows[number][1] - windows[number][0]) for number in chosen}
    weights = sum(excerpts.values()) * config.num_hidden_layers * config.num_attention_heads * KEYS_KEPT
    return Plan(windows, excerpts, every=-(-weights // ATTENTION_BUDGET))


def read_text(model: Model, tokens: Sequence[int], begin: int, plan: Plan) -> Reading:
    """Read the text's tokens, window by window, each after the token `begin`."""
    config, count = model.config, len(tokens)
    routers = config.num_moe_layers + config.num_nextn_predict_layers
    tokens_N = np.asarray(tokens, np.int64)
    said, *drafts = (_no_guesses(count) for _ in range(1 + config.num_nextn_predict_layers))
    experts_LNK = np.full((routers, count, config.num_experts_per_tok), -1, np.int16)
    spectra = tuple(Spectrum(config.kv_lora_rank) for _ in range(config.num_hidden_layers))
    excerpts = []
    for number, (start, end) in enumerate(plan.windows):
        shown = plan.excerpts.get(number, 0)
        queries = range(plan.every, shown + 1, plan.every)
        ids_S = torch.tensor([begin, *tokens[start:end]], device=model.embed_tokens.weight.device)
        window = read_window(model, ids_S, queries, KEYS_KEPT)
        for k, (guesses, guess) in enumerate(zip((said, *drafts), (window.said, *window.drafts), strict=False)):
            _note(guesses, guess, start + k, end)
        for router, choice in enumerate(window.choices):
            experts_LNK[router, start:end] = choice.experts_SK[1:].numpy()
        for spectrum, c_SC in zip(spectra, window.latents, strict=True):
            spectrum.add(c_SC[1:])
        if shown:
            excerpts.append(_excerpt(window, routers, start, shown + 1, tuple(queries)))
    return Reading(plan, tokens_N, said, tuple(drafts), experts_LNK, spectra, tuple(excerpts))


def _no_guesses(count: int) -> Guesses:
    nothing_N = np.full(count, np.nan, np.float32)
    return Guesses(np.full(count, -1, np.int64), nothing_N, nothing_N.copy())


def _note(guesses: Guesses, guess: Guess, start: int, end: int) -> None:
    """A head's guesses are of the tokens `start` to `end` of the text."""
    guesses.first_N[start:end] = guess.first_N.numpy()
    guesses.first_p_N[start:end] = guess.first_p_N.numpy()
    guesses.nats_N[start:end] = guess.asked_nats_N.numpy()


def _excerpt(window: Window, routers: int, start: int, length: int, queries: tuple[int, ...]) -> Excerpt:
    """The first `length` tokens of a window, the begin token among them."""
    ids = [choice.experts_SK[:length].numpy() for choice in window.choices]
    weights = [choice.weights_SK[:length].numpy() for choice in window.choices]
    shape = (routers, length, ids[0].shape[1] if ids else 0)
    experts_LTK, weights_LTK = np.full(shape, -1, np.int16), np.zeros(shape, np.float32)
    for router in range(len(ids)):
        experts_LTK[router], weights_LTK[router] = ids[router], weights[router]
    return Excerpt(start, experts_LTK, weights_LTK, queries, window.attention)
