"""Evaluation of a run on its held-out split: bits per byte, balance, and how often MTP's drafts are accepted.

A collective call: every rank measures some of the rows and continues some of the prompts, and all get the result. No
rank waits for another that evaluates alone, which on a large corpus would outlast the collective's timeout.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fathom.data.batch import Batch
from fathom.data.dataset import TokenRows
from fathom.data.tokenize import TokenizedCorpus
from fathom.distributed.ranks import Ranks
from fathom.eval.acceptance import Acceptance, draft_acceptance
from fathom.eval.bits import Evaluation, evaluate
from fathom.model.transformer import Model
from fathom.train.run import Run
from fathom.train.setup import compute_dtype, open_rows

_PROMPTS, _NEW_TOKENS = 50, 256
"""Greedy continuations that the acceptance rate is measured on."""


@dataclass(frozen=True)
class EvalResult:
    """One evaluation."""

    held_out: Evaluation
    acceptance: float | None
    """Acceptance rate of drafts in greedy continuations; None without MTP modules."""
    tokens_per_forward: float | None

    def metrics(self) -> dict[str, float]:
        """The values that go into metrics.jsonl and onto the screen."""
        values = {"val_bpb": self.held_out.bits_per_byte}
        if self.held_out.max_vio_global:
            values["val_max_vio"] = max(self.held_out.max_vio_global)
        if self.acceptance is not None:
            values["mtp_acceptance"] = self.acceptance
            values["mtp_agreement"] = self.held_out.mtp_agreement[0]
        return values

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        found = dict(vars(self.held_out))
        loads = found.pop("tokens_per_expert_LE").tolist()
        return found | {
            "loads": loads,
            "mtp_acceptance": self.acceptance,
            "tokens_per_forward": self.tokens_per_forward,
        }


class Validation:
    """Evaluations on the run's held-out split."""

    def __init__(self, run: Run, corpus: TokenizedCorpus, ranks: Ranks) -> None:
        self._run, self._corpus, self._ranks = run, corpus, ranks
        self._rows = open_rows(corpus, run, "valid")

    def evaluate(self, model: Model, sequences: int | None) -> EvalResult:
        """Evaluate on `sequences` evenly spaced rows; on every held-out token with None, or where there are no more.

        Layers run eagerly: compiling them once more, without gradients, costs more than it saves.
        """
        corpus, train = self._corpus, self._run.train
        if sequences is None or sequences >= len(self._rows):
            count, size = len(self._rows), train.micro_batch_size
            spans = [(first, min(size, count - first)) for first in range(0, count, size)]
            batches, total_bytes = _HeldOutRows(self._rows, spans, self._rows.tail()), corpus.valid_bytes
        else:
            batches = _spaced_rows(self._rows, sequences)
            # UTF-8 bytes that the targets spell: of a part of the tokens, that part of all bytes.
            total_bytes = round(corpus.valid_bytes * (sequences * train.sequence_length) / corpus.valid_tokens)
        with torch.compiler.set_stance("force_eager"):
            held_out = evaluate(model, batches, total_bytes, compute_dtype(self._run), ranks=self._ranks)
            drafts = self._acceptance(model, sequences) if model.mtp else None
        if drafts is None:
            return EvalResult(held_out, None, None)
        return EvalResult(held_out, drafts.acceptance, drafts.tokens_per_forward)

    def _acceptance(self, model: Model, sequences: int | None) -> Acceptance:
        # Beginnings of held-out rows; prompt and continuation stay within the trained length.
        new_tokens = min(_NEW_TOKENS, self._run.train.sequence_length // 2)
        length = min(128, self._run.train.sequence_length - new_tokens)
        rows = _spaced_rows(self._rows, _PROMPTS if sequences is None else min(_PROMPTS, sequences))
        own_rows = range(self._ranks.rank, len(rows), self._ranks.world)
        prompts = [rows[index].tokens_BT[0, :length].tolist() for index in own_rows]
        own = draft_acceptance(model, prompts, new_tokens) if prompts else Acceptance(0, 0, 0, 0)
        return Acceptance(*map(sum, zip(*self._ranks.gather(own), strict=True)))


class _HeldOutRows(Sequence[Batch]):
    """Batches of held-out rows, given by (first row, count), and what the rows leave over; read when needed."""

    def __init__(self, rows: TokenRows, spans: list[tuple[int, int]], tail: Batch | None = None) -> None:
        self._rows, self._spans, self._tail = rows, spans, tail

    def __len__(self) -> int:
        return len(self._spans) + (self._tail is not None)

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]  # no slices
        if self._tail is not None and index == len(self._spans):
            return self._tail
        return self._rows.sequential(*self._spans[index])


def _spaced_rows(rows: TokenRows, count: int) -> _HeldOutRows:
    """`count` rows, or all where there are fewer, evenly spaced, each a batch of its own."""
    count = min(count, len(rows))
    return _HeldOutRows(rows, [(index * len(rows) // count, 1) for index in range(count)])
