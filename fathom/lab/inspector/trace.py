"""Running a model over a text in windows: statistics of every token, and everything about a few excerpts.

Each window starts with BOS, which is not counted, so every token of the text is predicted once. Memory grows by a few
values per token: of the latents only their Gram matrix is kept (`spectrum.py`), and attention only of the excerpts. An
excerpt is the beginning of a window, so it contains everything that its tokens attend to.

Shapes: N tokens of the text, T tokens of an excerpt, BOS included, L routers (MoE layers, then MTP modules),
K experts per token, Q tokens of an excerpt whose attention is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fathom.lab.inspector.attention import KeptAttention
from fathom.lab.inspector.spectrum import Spectrum
from fathom.lab.inspector.window import Prediction, Window, trace_window
from fathom.model.config import ModelConfig
from fathom.model.transformer import Model

EXCERPT_TOKENS = 256
"""Longest excerpt."""
KEYS_KEPT = 8
"""Keys kept per head and token."""
ATTENTION_BUDGET = 600_000
"""The most weights kept over all excerpts; with many layers and heads, attention of fewer tokens is kept."""


@dataclass(frozen=True)
class Predictions:
    """One head's most likely token for every token of the text; −1 and NaN where it made no prediction."""

    top_N: NDArray[np.int64]
    top_p_N: NDArray[np.float32]
    nats_N: NDArray[np.float32]
    """−ln p: by the main head, of the text's token; by an MTP module, of the main head's most likely token."""


@dataclass(frozen=True)
class Excerpt:
    """A part of the text that is shown token by token."""

    start: int
    """The position in the text of the token after BOS."""
    experts_LTK: NDArray[np.int16]
    """−1 where a token did not pass through the layer."""
    weights_LTK: NDArray[np.float32]
    queries_Q: tuple[int, ...]
    """Positions in the excerpt, where 0 is BOS."""
    attention: tuple[KeptAttention, ...]
    """One per layer."""


@dataclass(frozen=True)
class Plan:
    """How a text is split."""

    windows: tuple[tuple[int, int], ...]
    """Start and end of each in the text."""
    excerpts: dict[int, int]
    """Length of the excerpt at the beginning of a window, by the window's index."""
    every: int
    """Attention is kept for every `every`-th token of an excerpt."""


@dataclass(frozen=True)
class Trace:
    """The result of all windows."""

    plan: Plan
    tokens_N: NDArray[np.int64]
    main: Predictions
    drafts: tuple[Predictions, ...]
    experts_LNK: NDArray[np.int16]
    spectra: tuple[Spectrum, ...]
    excerpts: tuple[Excerpt, ...]


def plan_windows(config: ModelConfig, tokens: int, window: int, shown: int) -> Plan:
    """Split `tokens` tokens into windows of at most `window`, of which about `shown` tokens are shown.

    Excerpts are spread evenly over the text. A window and BOS fit into the model's context.
    """
    size = max(1, min(window, config.max_position_embeddings - 1))
    windows = tuple((start, min(start + size, tokens)) for start in range(0, tokens, size))
    length = min(size, EXCERPT_TOKENS, shown)
    count = min(len(windows), max(1, shown // length))
    # The last window may be short: prefer the others.
    full = max(1, len(windows) - (windows[-1][1] - windows[-1][0] < length))
    count = min(count, full)
    chosen = [(2 * place + 1) * full // (2 * count) for place in range(count)]
    excerpts = {number: min(length, windows[number][1] - windows[number][0]) for number in chosen}
    weights = sum(excerpts.values()) * config.num_hidden_layers * config.num_attention_heads * KEYS_KEPT
    return Plan(windows, excerpts, every=-(-weights // ATTENTION_BUDGET))


def trace_text(model: Model, tokens: Sequence[int], bos: int, plan: Plan) -> Trace:
    """Run the model over the tokens, window by window, each after the token `bos`."""
    config, count = model.config, len(tokens)
    routers = config.num_moe_layers + config.num_nextn_predict_layers
    tokens_N = np.asarray(tokens, np.int64)
    main, *drafts = (_no_predictions(count) for _ in range(1 + config.num_nextn_predict_layers))
    experts_LNK = np.full((routers, count, config.num_experts_per_tok), -1, np.int16)
    spectra = tuple(Spectrum(config.kv_lora_rank) for _ in range(config.num_hidden_layers))
    excerpts = []
    for number, (start, end) in enumerate(plan.windows):
        shown = plan.excerpts.get(number, 0)
        queries = range(plan.every, shown + 1, plan.every)
        ids_S = torch.tensor([bos, *tokens[start:end]], device=model.embed_tokens.weight.device)
        window = trace_window(model, ids_S, queries, KEYS_KEPT)
        window_predictions = (window.main, *window.drafts)
        for k, (predictions, prediction) in enumerate(zip((main, *drafts), window_predictions, strict=False)):
            _store(predictions, prediction, start + k, end)
        for router, choice in enumerate(window.choices):
            experts_LNK[router, start:end] = choice.experts_SK[1:].numpy()
        for spectrum, c_SC in zip(spectra, window.latents, strict=True):
            spectrum.add(c_SC[1:])
        if shown:
            excerpts.append(_excerpt(window, routers, start, shown + 1, tuple(queries)))
    return Trace(plan, tokens_N, main, tuple(drafts), experts_LNK, spectra, tuple(excerpts))


def _no_predictions(count: int) -> Predictions:
    nothing_N = np.full(count, np.nan, np.float32)
    return Predictions(np.full(count, -1, np.int64), nothing_N, nothing_N.copy())


def _store(predictions: Predictions, prediction: Prediction, start: int, end: int) -> None:
    """Store a head's predictions of the tokens `start` to `end` of the text."""
    predictions.top_N[start:end] = prediction.top_N.numpy()
    predictions.top_p_N[start:end] = prediction.top_p_N.numpy()
    predictions.nats_N[start:end] = prediction.target_nats_N.numpy()


def _excerpt(window: Window, routers: int, start: int, length: int, queries: tuple[int, ...]) -> Excerpt:
    """The first `length` tokens of a window, BOS included."""
    ids = [choice.experts_SK[:length].numpy() for choice in window.choices]
    weights = [choice.weights_SK[:length].numpy() for choice in window.choices]
    shape = (routers, length, ids[0].shape[1] if ids else 0)
    experts_LTK, weights_LTK = np.full(shape, -1, np.int16), np.zeros(shape, np.float32)
    for router in range(len(ids)):
        experts_LTK[router], weights_LTK[router] = ids[router], weights[router]
    return Excerpt(start, experts_LTK, weights_LTK, queries, window.attention)
