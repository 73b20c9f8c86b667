"""Estimates before a run: weights by the byte, and a refusal that says what to change."""

from dataclasses import replace

import torch

from fathom import presets
from fathom.train.estimate import estimate, memory_refusal


def test_weights_gradients_and_moments_are_counted() -> None:
    run = presets.nano()
    counts = run.model.parameter_counts()
    needs = estimate(replace(run, optimizer=replace(run.optimizer, kind="adamw")), torch.bfloat16, sequences=10)
    assert needs.weights == 16 * (counts.total + counts.mtp)
    assert needs.tokens == 10 * run.train.sequence_length


def test_a_run_that_fits_is_not_refused() -> None:
    run = presets.nano()
    needs = estimate(run, torch.bfloat16, sequences=10)
    assert memory_refusal(run, needs, free=needs.memory) is None


def test_the_refusal_advises_a_smaller_micro_batch_or_model() -> None:
    run = presets.nano()
    needs = estimate(run, torch.bfloat16, sequences=10)
    assert "micro-batch-size (8)" in (memory_refusal(run, needs, free=needs.memory - 1) or "")
    assert "smaller model" in (memory_refusal(run, needs, free=needs.weights - 1) or "")
    alone = replace(run, train=replace(run.train, micro_batch_size=1))
    assert "train.recompute" in (memory_refusal(alone, needs, free=needs.memory - 1) or "")
    last = replace(alone, train=replace(alone.train, recompute=True))
    assert "sequence-length" in (memory_refusal(last, needs, free=needs.memory - 1) or "")


def test_recomputing_keeps_less() -> None:
    run = presets.small()
    again = replace(run, train=replace(run.train, recompute=True))
    needs, less = (estimate(r, torch.bfloat16, sequences=10) for r in (run, again))
    assert less.weights == needs.weights and less.activations < needs.activations / 2
