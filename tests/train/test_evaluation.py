"""Evaluations during a run and at its end are bounded, and cover everything where the held-out split is smaller."""

import json
from dataclasses import replace
from pathlib import Path

from fathom.data.tokenize import open_tokenized
from fathom.distributed.ranks import Ranks
from fathom.metrics import read_metrics
from fathom.train.evaluation import Validation
from fathom.train.pretrain import train
from fathom.train.run import Run
from fathom.train.setup import build_state, open_rows, resolve, tokenize_once


def test_evenly_spaced_rows_or_every_token(tiny_run: Run, one_rank: Ranks, tmp_path: Path) -> None:
    prepared = tokenize_once(tiny_run, tmp_path / "data", one_rank)
    run = resolve(tiny_run, prepared, one_rank)
    model = build_state(run, one_rank).model
    validation = Validation(run, prepared, one_rank)
    rows, length = len(open_rows(prepared, run, "valid")), run.train.sequence_length
    assert validation.evaluate(model, 3).held_out.tokens == 3 * length
    everything = validation.evaluate(model, None)
    assert everything.held_out.tokens == prepared.valid_tokens - 1
    for more in (rows, rows + 5):
        assert validation.evaluate(model, more).held_out.loss == everything.held_out.loss


def test_the_last_evaluation_is_bounded_by_its_own_field(tiny_run: Run, one_rank: Ranks, tmp_path: Path) -> None:
    settings = replace(tiny_run.train, steps=2, eval_every=1, eval_sequences=1, final_eval_sequences=2)
    train(replace(tiny_run, train=settings), tmp_path / "bounded", one_rank)
    result = json.loads((tmp_path / "bounded" / "evaluation.json").read_text())
    assert (result["step"], result["tokens"]) == (2, 2 * settings.sequence_length)
    evaluated = [row["step"] for row in read_metrics(tmp_path / "bounded" / "metrics.jsonl") if "val_bpb" in row]
    assert evaluated == [1, 2]
    train(replace(tiny_run, train=replace(settings, final_eval_sequences=10_000)), tmp_path / "all", one_rank)
    result = json.loads((tmp_path / "all" / "evaluation.json").read_text())
    assert result["tokens"] == open_tokenized(tmp_path / "all" / "data").valid_tokens - 1
