"""Evaluation of a run on its held-out split: bits per byte, balance, and how often MTP's drafts are accepted.

A collective call: every rank measures some of the rows and continues some of the prompts, and all get the result. No
rank waits for another that evaluates alone, which on a large corpus would outlast the collective's timeout.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fathom.config import atomic_write
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
        found = self.held_out
        return {
            "bits_per_byte": found.bits_per_byte,
            "loss": found.loss,
            "tokens": found.tokens,
            "mtp_losses": found.mtp_losses,
            "mtp_agreement": found.mtp_agreement,
            "loads": found.tokens_per_expert_LE.tolist(),
            "max_vio_global": found.max_vio_global,
            "max_vio_batch": found.max_vio_batch,
            "mtp_acceptance": self.acceptance,
            "tokens_per_forward": self.tokens_per_forward,
        }


class Validation:
    """Evaluations on the run's held-out split."""

    def __init__(self, run: Run, corpus: TokenizedCorpus, ranks: Ranks) -> None:
        self._run, self._prepared, self._ranks = run, corpus, ranks
        self._rows = open_rows(corpus, run, "valid")

    def evaluate(self, model: Model, sequences: int | None) -> EvalResult:
        """Evaluate on `sequences` evenly spaced rows; on every held-out token with None, or where there are no more.

        Layers run eagerly: compiling them once more, without gradients, costs more than it saves.
        """
        everything = sequences is None or sequences >= len(self._rows)
        batches = _WholeSplit(self._rows, self._run) if everything else _SpacedRows(self._rows, sequences or 0)
        with torch.compiler.set_stance("force_eager"):
            dtype, total_bytes = compute_dtype(self._run), self._bytes(None if everything else len(batches))
            held_out = evaluate(model, batches, total_bytes, dtype, ranks=self._ranks)
            drafts = self._acceptance(model, sequences) if model.mtp else None
        if drafts is None:
            return EvalResult(held_out, None, None)
        return EvalResult(held_out, drafts.acceptance, drafts.tokens_per_forward)

    def _bytes(self, rows: int | None) -> int:
        """UTF-8 bytes that the targets spell: of a part of the tokens, that part of all bytes."""
        corpus = self._prepared
        if rows is None:
            return corpus.valid_bytes
        return round(corpus.valid_bytes * (rows * self._run.train.sequence_length) / corpus.valid_tokens)

    def _acceptance(self, model: Model, sequences: int | None) -> Acceptance:
        prompts = self._prompts(sequences)[self._ranks.rank :: self._ranks.world]
        own = draft_acceptance(model, prompts, self._new_tokens) if prompts else Acceptance(0, 0, 0, 0)
        return sum(self._ranks.gather(own), start=Acceptance(0, 0, 0, 0))

    @property
    def _new_tokens(self) -> int:
        return min(_NEW_TOKENS, self._run.train.sequence_length // 2)

    def _prompts(self, sequences: int | None) -> list[list[int]]:
        """Beginnings of held-out rows; prompt and continuation stay within the trained length."""
        count = _PROMPTS if sequences is None else min(_PROMPTS, sequences)
        length = min(128, self._run.train.sequence_length - self._new_tokens)
        return [batch.tokens_BT[0, :length].tolist() for batch in _SpacedRows(self._rows, count)]


class _WholeSplit(Sequence[Batch]):
    """All rows in micro-batches, and what they leave over; each batch is read when it is needed."""

    def __init__(self, rows: TokenRows, run: Run) -> None:
        self._rows, self._size, self._tail = rows, run.train.micro_batch_size, rows.tail()

    def __len__(self) -> int:
        return -(-len(self._rows) // self._size) + (self._tail is not None)

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]  # no slices
        first = index * self._size
        if first < len(self._rows):
            return self._rows.sequential(first, min(self._size, len(self._rows) - first))
        if self._tail is None or index >= len(self):
            raise IndexError(f"there is no batch {index}; there are {len(self)}")
        return self._tail


class _SpacedRows(Sequence[Batch]):
    """`count` rows, or all where there are fewer, evenly spaced, each a batch of its own."""

    def __init__(self, rows: TokenRows, count: int) -> None:
        self._rows, self._count = rows, min(count, len(rows))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]  # no slices
        if index >= self._count:
            raise IndexError(f"there is no batch {index}; there are {self._count}")
        return self._rows.sequential(index * len(self._rows) // self._count, 1)


def save_evaluation(result: EvalResult, step: int, directory: Path) -> None:
    """Write evaluation.json: the newest evaluation."""
    atomic_write(directory / "evaluation.json", json.dumps({"step": step, **result.to_json()}, indent=2) + "\n")
