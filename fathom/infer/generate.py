"""Generation from the latent cache, with or without drafts by the first MTP module (V3 report, section 2.2).

Each prompt is prefilled in a row of its own, where all keys are new and attention takes its expanded form;
then all rows decode together, at positions of their own, with absorbed attention. One step feeds the main
model each row's last token and its draft, and `accept` says what follows. Plain decoding is the same step
without drafts.

A draft of t_{i+2} comes from the module fed with (state h_i, token t_{i+1}). That pair's cache entry lies at
the slot of token i+1, and the module must have seen every pair from the prompt's first on. No pair ends in
token 0, so slot 0 of the module's cache stays empty and is left out of the view it attends.

Shapes: B rows being decoded, S tokens fed, M drafts (0 or 1), T = M + 1, D hidden, O vocabulary, P pairs.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fathom.data.tokenizer import Tokenizer
from fathom.infer.cache import LatentCache
from fathom.infer.sampler import ACCEPT, DRAFT, TOKEN, SamplingParams, draw, probabilities, uniforms
from fathom.infer.speculative import accept
from fathom.model.config import ModelConfig
from fathom.model.transformer import Model

OnToken = Callable[[int, int], None]
"""Hears (place of the prompt, token id) of every generated token as soon as it is certain."""


@dataclass
class Generation:
    """One prompt's continuation, and what it took."""

    ids: list[int] = field(default_factory=list)
    """The generated tokens, without the prompt; a stop token, where one was met, is the last."""
    accepted_mask: list[bool] = field(default_factory=list)
    """For each of `ids`, whether it was a draft that the model accepted."""
    drafted: int = 0
    """Drafts put before the main model."""
    forwards: int = 0
    """Forward passes of the main model after the prefill, which yields the first token."""
    finish_reason: Literal["stop", "length"] = "length"
    """Why it ended: a stop token, or `max_new_tokens`."""

    @property
    def accepted(self) -> int:
        """Drafts accepted."""
        return sum(self.accepted_mask)

    @property
    def acceptance(self) -> float:
        """Share of the drafts accepted; NaN when none was made."""
        return self.accepted / self.drafted if self.drafted else math.nan

    @property
    def tokens_per_forward(self) -> float:
        """Tokens after the first, per forward pass: 1 in plain decoding; NaN when there was none."""
        return (len(self.ids) - 1) / self.forwards if self.forwards else math.nan


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    speculative: bool = True,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
) -> str:
    """The text that follows `prompt`, without the prompt; it ends at the end-of-document token if one comes.

    The begin token precedes the prompt, so an empty prompt begins a document. The parameters are those of
    `SamplingParams` and `generate_ids`.
    """
    params = SamplingParams(temperature, top_k, top_p, min_p, seed)
    ids = tokenizer.encode(prompt)
    found = generate_ids(model, [ids], max_new_tokens, params, speculative, stop_ids=(tokenizer.eos_id,))
    return tokenizer.decode(found[0].ids)


@torch.inference_mode()
def generate_ids(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    params: SamplingParams | None = None,
    speculative: bool = True,
    stop_ids: Collection[int] = (),
    on_token: OnToken | None = None,
) -> list[Generation]:
    """Continue each prompt by at most `max_new_tokens` tokens, greedily without `params`; in the prompts'
    order.

    With `speculative` the model's first MTP module drafts one token per step; a model without modules has no
    drafter and decodes plainly. Drafting changes no result: greedy tokens are the same (up to rounding, which
    may differ between a pass over one token and over two), sampled ones follow the same distribution. Prompt
    number r draws from random numbers of its own, whatever the other prompts are. The cache has the weights'
    type.

    Raises ValueError for an empty prompt, an id outside the vocabulary, or more tokens than
    max_position_embeddings.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    for place, prompt in enumerate(prompts):
        _check_prompt(place, prompt, max_new_tokens, model.config)
    if not prompts:
        return []
    drafting = speculative and len(model.mtp) > 0
    rows = [_Row(place, list(prompt)) for place, prompt in enumerate(prompts)]
    ending = _Ending(max_new_tokens, frozenset(stop_ids), on_token)
    decoder = _Decoder(model, params or SamplingParams(), drafting, rows, ending)
    decoder.prefill()
    while decoder.rows:
        decoder.step()
    return [row.generation for row in rows]


def _check_prompt(place: int, prompt: Sequence[int], max_new_tokens: int, config: ModelConfig) -> None:
    if not prompt:
        raise ValueError(f"prompt {place} is empty; it must hold at least one token, such as the begin token")
    for token in prompt:
        if not 0 <= token < config.vocab_size:
            raise ValueError(f"prompt {place} holds token {token}; ids must be below vocab_size ({config.vocab_size})")
    if len(prompt) + max_new_tokens > config.max_position_embeddings:
        raise ValueError(
            f"prompt {place} has {len(prompt)} tokens and max_new_tokens is {max_new_tokens}; together they "
            f"must be at most max_position_embeddings ({config.max_position_embeddings})"
        )


@dataclass
class _Row:
    """A sequence: the prompt and what has been generated so far."""

    place: int
    tokens: list[int]
    generation: Generation = field(default_factory=Generation)
    finished: bool = False


@dataclass(frozen=True)
class _Ending:
    """When a sequence ends, and who hears of its tokens."""

    max_new_tokens: int
    stop_ids: frozenset[int]
    on_token: OnToken | None

    def append(self, row: _Row, token: int, accepted: bool) -> None:
        """Add a token that is certain; what was decided beyond a row's end is dropped."""
        if row.finished:
            return
        row.tokens.append(token)
        row.generation.ids.append(token)
        row.generation.accepted_mask.append(accepted)
        if token in self.stop_ids:
            row.finished, row.generation.finish_reason = True, "stop"
        elif len(row.generation.ids) == self.max_new_tokens:
            row.finished = True
        if self.on_token is not None:
            self.on_token(row.place, token)


class _Drafts(NamedTuple):
    """Drafts of the rows' next tokens, and the distributions they were drawn from."""

    ids_BM: Tensor
    probs_BMO: Tensor


class _Decoder:
    """The unfinished sequences; `rows[b]` has row b of the cache and of the drafts."""

    def __init__(self, model: Model, params: SamplingParams, drafting: bool, rows: list[_Row], ending: _Ending) -> None:
        weight = model.embed_tokens.weight
        slots = max(len(row.tokens) for row in rows) + ending.max_new_tokens
        self.model, self.params, self.drafting, self.ending = model, params, drafting, ending
        self.device = weight.device
        self.cache = LatentCache(model.config, len(rows), slots, weight.dtype, self.device)
        self.rows = rows
        self.drafts = self._no_drafts(len(rows))

    def prefill(self) -> None:
        """Read every prompt, and decide its first token and its first draft."""
        drafts = []
        for b, row in enumerate(self.rows):
            length = len(row.tokens)
            prompt_1S = self._tensor([row.tokens])
            positions_1S = torch.arange(length, device=self.device)[None]
            # A view with room for nothing else has attention take its expanded form; the module's likewise.
            cache_LBTW = self.cache.view(slice(b, b + 1), length)
            h_1SD = self.model.cached_states(prompt_1S, positions_1S, cache_LBTW)
            probs_1O = probabilities(self.model.logits(h_1SD[:, -1]), self.params)
            token_1 = draw(probs_1O, self._uniforms([row], [length], 1)[:, 0, TOKEN])
            self.ending.append(row, int(token_1), accepted=False)
            if self.drafting:
                next_1S = torch.cat((prompt_1S[:, 1:], token_1[:, None]), dim=1)
                drafts.append(self._draft(slice(b, b + 1), next_1S, h_1SD, [1], [length + 1]))
        if self.drafting:
            self.drafts = _Drafts(*(torch.cat(parts) for parts in zip(*drafts, strict=True)))
        self._drop_finished()

    def step(self) -> None:
        """One forward pass of the main model, which decides one token of every row, or two."""
        ids_BM, drafts = self.drafts.ids_BM, self.drafts.ids_BM.shape[1]
        starts = [len(row.tokens) for row in self.rows]
        last_B1 = self._tensor([row.tokens[-1:] for row in self.rows])
        fed_BT = torch.cat((last_B1, ids_BM), dim=1)
        positions_BT = self._positions([start - 1 for start in starts], drafts + 1)
        cache_LBTW = self.cache.view(slice(len(self.rows)), max(starts) + drafts)
        h_BTD = self.model.cached_states(fed_BT, positions_BT, cache_LBTW)

        probs_BTO = probabilities(self.model.logits(h_BTD).flatten(0, 1), self.params).unflatten(0, fed_BT.shape)
        chance_BTU = self._uniforms(self.rows, starts, drafts + 1)
        counts_B, next_B = accept(
            ids_BM, self.drafts.probs_BMO, probs_BTO, chance_BTU[:, :drafts, ACCEPT], chance_BTU[..., TOKEN]
        )
        # The decided tokens; behind a rejected draft's successor stands a repetition that nobody reads.
        decided_BT = torch.cat((ids_BM, next_B[:, None]), dim=1).scatter(1, counts_B[:, None], next_B[:, None])
        counts = counts_B.tolist()
        for row, count, tokens in zip(self.rows, counts, decided_BT.tolist(), strict=True):
            row.generation.forwards += 1
            row.generation.drafted += drafts
            for i in range(count + 1):
                self.ending.append(row, tokens[i], accepted=i < count)

        kept = self._drop_finished()
        if self.drafting and kept:
            # Rows that took no draft feed their repetition too; its slot is written again before it is read.
            starts, counts = [starts[b] for b in kept], [counts[b] for b in kept]
            ends = [start + count + 1 for start, count in zip(starts, counts, strict=True)]
            self.drafts = self._draft(slice(len(kept)), decided_BT[kept], h_BTD[kept], starts, ends)

    def _draft(self, rows: slice, tokens_BP: Tensor, h_BPD: Tensor, starts: list[int], ends: list[int]) -> _Drafts:
        """Feed the module (state, token) pairs, the tokens from `starts` on; draft the tokens at `ends`."""
        pairs = tokens_BP.shape[1]
        # The view begins at slot 1, and positions count from there: rotary positions are relative.
        slots_BP = self._positions([start - 1 for start in starts], pairs)
        cache_LBTW = self.cache.view(rows, max(starts) + pairs)[:, :, 1:]
        h_BPD = self.model.cached_mtp_states(0, tokens_BP, h_BPD, slots_BP, cache_LBTW)
        last_B = self._tensor([end - start - 1 for start, end in zip(starts, ends, strict=True)])
        logits_BO = self.model.logits(h_BPD[torch.arange(len(starts), device=self.device), last_B])
        probs_BO = probabilities(logits_BO, self.params)
        ids_B = draw(probs_BO, self._uniforms(self.rows[rows], ends, 1)[:, 0, DRAFT])
        return _Drafts(ids_B[:, None], probs_BO[:, None])

    def _drop_finished(self) -> list[int]:
        """Let finished rows leave the batch; returns where those that stay stood."""
        kept = [b for b, row in enumerate(self.rows) if not row.finished]
        if len(kept) < len(self.rows):
            self.rows = [self.rows[b] for b in kept]
            self.cache.keep(kept)
            self.drafts = _Drafts(*(part_BM[kept] for part_BM in self.drafts))
        return kept

    def _no_drafts(self, rows: int) -> _Drafts:
        shape = (rows, 0, self.model.config.vocab_size)
        ids_BM = torch.zeros(shape[:2], dtype=torch.int64, device=self.device)
        return _Drafts(ids_BM, torch.zeros(shape, device=self.device))

    def _positions(self, firsts: list[int], count: int) -> Tensor:
        """`count` positions of each row from its first on, (B, count)."""
        return self._tensor(firsts)[:, None] + torch.arange(count, device=self.device)

    def _uniforms(self, rows: list[_Row], firsts: list[int], count: int) -> Tensor:
        return uniforms(self.params.seed, [row.place for row in rows], firsts, count).to(self.device)

    def _tensor(self, numbers: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(numbers, device=self.device)
