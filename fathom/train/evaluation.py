"""What a run is judged by on its held-out split: bits per byte, balance, and how often MTP's drafts are right."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fathom.config import atomic_write
from fathom.data.batch import Batch
from fathom.data.tokenize import TokenizedCorpus
from fathom.eval.acceptance import draft_acceptance
from fathom.eval.bits import Evaluation, evaluate
from fathom.model.transformer import Model
from fathom.train.run import Run
from fathom.train.setup import compute_dtype, rows_of

_PROMPTS, _NEW_TOKENS = 50, 256
"""Greedy continuations that MTP acceptance is measured on."""


@dataclass(frozen=True)
class EvalResult:
    """One evaluation."""

    held_out: Evaluation
    acceptance: float | None
    """Share of drafts accepted in greedy continuations; None without MTP modules."""
    tokens_per_forward: float | None

    def metrics(self) -> dict[str, float]:
        """The figures that go into metrics.jsonl and onto the screen."""
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

    def __init__(self, run: Run, prepared: TokenizedCorpus) -> None:
        self._run, self._prepared = run, prepared
        self._rows = rows_of(prepared, run, "valid")

    def measure(self, model: Model, sequences: int | None = None) -> EvalResult:
        """Evaluate on `sequences` evenly spaced rows, or on every held-out token.

        Layers run eagerly: compiling them once more, without gradients, costs more than it saves.
        """
        every = sequences is None or sequences >= len(self._rows)
        batches = self._all() if every else self._spread(sequences or 0)
        prepared = self._prepared
        tokens = sum(int(batch.target_weights()[0]) for batch in batches)
        # A part of the rows spells about that part of the bytes.
        size = prepared.valid_bytes if every else round(prepared.valid_bytes * tokens / prepared.valid_tokens)
        with torch.compiler.set_stance("force_eager"):
            held_out = evaluate(model, batches, size, compute_dtype(self._run))
            drafts = draft_acceptance(model, self._prompts(sequences), self._new_tokens) if model.mtp else None
        if drafts is None:
            return EvalResult(held_out, None, None)
        return EvalResult(held_out, drafts.acceptance, drafts.tokens_per_forward)

    @property
    def _new_tokens(self) -> int:
        return min(_NEW_TOKENS, self._run.train.sequence_length // 2)

    def _all(self) -> list[Batch]:
        size = self._run.train.micro_batch_size
        count = len(self._rows)
        batches = [self._rows.sequential(at, min(size, count - at)) for at in range(0, count, size)]
        tail = self._rows.tail()
        return batches if tail is None else [*batches, tail]

    def _spread(self, sequences: int) -> list[Batch]:
        return [self._rows.sequential(row, 1) for row in self._evenly(sequences)]

    def _prompts(self, sequences: int | None) -> list[list[int]]:
        """Beginnings of held-out rows; prompt and continuation stay within the trained length."""
        count = _PROMPTS if sequences is None else min(_PROMPTS, sequences)
        length = min(128, self._run.train.sequence_length - self._new_tokens)
        return [self._rows.sequential(row, 1).tokens_BT[0, :length].tolist() for row in self._evenly(count)]

    def _evenly(self, count: int) -> list[int]:
        rows = len(self._rows)
        return [i * rows // min(count, rows) for i in range(min(count, rows))]


def save_evaluation(figures: EvalResult, step: int, directory: Path) -> None:
    """Write evaluation.json: the newest evaluation on the whole held-out split."""
    atomic_write(directory / "evaluation.json", json.dumps({"step": step, **figures.to_json()}, indent=2) + "\n")
