"""Estimates before a run: weights by the byte, and a refusal that says what to change."""

from dataclasses import replace

import pytest
import torch

from fathom import presets
from fathom.model.config import ModelConfig
from fathom.train.estimate import estimate, memory_refusal
from fathom.train.gpu_memory import gpu_memory
from fathom.train.run import OptimizerConfig, Run, TrainConfig

CPU, GIB = torch.device("cpu"), 2**30


def test_weights_gradients_and_moments_are_counted() -> None:
    run = presets.nano()
    counts = run.model.parameter_counts()
    needs = estimate(
        replace(run, optimizer=replace(run.optimizer, name="adamw")), torch.bfloat16, sequences=10, device=CPU
    )
    assert needs.weights == 16 * (counts.total + counts.mtp)
    assert needs.tokens == 10 * run.train.sequence_length


def test_a_run_that_fits_is_not_refused() -> None:
    run = presets.nano()
    needs = estimate(run, torch.bfloat16, sequences=10, device=CPU)
    assert memory_refusal(run, needs, free=needs.memory) is None


def test_the_refusal_advises_a_smaller_micro_batch_or_model() -> None:
    run = presets.nano()
    needs = estimate(run, torch.bfloat16, sequences=10, device=CPU)
    assert "micro-batch-size (8)" in (memory_refusal(run, needs, free=needs.memory - 1) or "")
    assert "smaller model" in (memory_refusal(run, needs, free=needs.weights - 1) or "")
    alone = replace(run, train=replace(run.train, micro_batch_size=1))
    assert "train.activation_checkpointing" in (memory_refusal(alone, needs, free=needs.memory - 1) or "")
    last = replace(alone, train=replace(alone.train, activation_checkpointing=True))
    assert "sequence-length" in (memory_refusal(last, needs, free=needs.memory - 1) or "")


def test_recomputing_keeps_less() -> None:
    run = presets.small()
    again = replace(run, train=replace(run.train, activation_checkpointing=True))
    needs, less = (estimate(r, torch.bfloat16, sequences=10, device=CPU) for r in (run, again))
    assert less.weights == needs.weights and less.activations < needs.activations / 2


def _stack() -> ModelConfig:
    """Four layers of 16b-a3b, as benchmarks/train_gpu.py trains them."""
    preset = presets.moe_16b_a3b().model
    return replace(preset, num_hidden_layers=4, num_nextn_predict_layers=0, vocab_size=32768)


def _whole() -> ModelConfig:
    """Its smaller model."""
    sizes = {"hidden_size": 1280, "intermediate_size": 3584, "moe_intermediate_size": 640, "num_hidden_layers": 8}
    experts = {"n_routed_experts": 48, "n_shared_experts": 1, "num_experts_per_tok": 4, "num_attention_heads": 8}
    return replace(_stack(), **sizes, **experts, routed_scaling_factor=1.0)


def _on_gpu(model: ModelConfig, batch: int = 16, micro_batch: int = 4, kind: str = "adamw") -> Run:
    train = TrainConfig(batch_size=batch, micro_batch_size=micro_batch, sequence_length=4096, compute_dtype="bfloat16")
    return Run(model=model, train=train, optimizer=OptimizerConfig(name=kind))


@pytest.mark.parametrize(("model", "measured"), [(_stack(), 42.15 * GIB), (_whole(), 24.41 * GIB)])
def test_a_gpus_memory_is_what_was_measured(model: ModelConfig, measured: float) -> None:
    """On an H200 with torch 2.11, by benchmarks/train_gpu.py; the gates' inputs were still kept in float32 then."""
    memory = gpu_memory(_on_gpu(model), itemsize=2)
    gates = 4 * 4096 * 4 * model.hidden_size * model.num_moe_layers
    assert memory.total + gates == pytest.approx(measured, rel=0.01)


def test_what_a_gpu_holds_depends_on_how_often_gradients_are_added() -> None:
    once, twice, often = (gpu_memory(_on_gpu(_stack(), 4 * passes), itemsize=2) for passes in (1, 2, 4))
    assert once.copies == twice.copies == often.copies
    assert once.total < twice.total < often.total
    assert often.gradients == often.weights


def test_a_gpus_other_choices() -> None:
    plain, muon = (gpu_memory(_on_gpu(_stack(), kind=kind), itemsize=2) for kind in ("adamw", "muon"))
    assert muon.moments < plain.moments
    run = _on_gpu(_stack())
    again = gpu_memory(replace(run, train=replace(run.train, activation_checkpointing=True)), itemsize=2)
    assert again.total < plain.total and again.kept < plain.kept / 4
    wide = gpu_memory(run, itemsize=4)
    assert wide.copies == 0 and wide.kept > 1.5 * plain.kept
    needs = estimate(run, torch.bfloat16, sequences=10, device=torch.device("cuda"))
    assert needs.memory == plain.total and needs.weights < plain.total
