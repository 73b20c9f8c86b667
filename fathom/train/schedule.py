"""Everything that changes with the step, as pure functions of (configuration, step): a resumed run needs no state.

The report's schedules (section 4.2) are given in tokens of 14.8T; here they are fractions of the run's steps.
"""

import math
from typing import NamedTuple

import numpy as np

from fathom.train.run import Run, ScheduleConfig, TrainConfig

_CONSTANT_UNTIL = 10 / 14.8
_COSINE_UNTIL = 14.3 / 14.8
_LAST = (14.3 + 0.333) / 14.8


class StepHyperparameters(NamedTuple):
    """What the schedules give for one step."""

    learning_rate: float
    max_grad_norm: float
    bias_update_speed: float
    """γ, by how much each correction bias moves."""
    mtp_loss_weight: float
    """λ, the weight of the MTP losses' mean."""


def hyperparameters(run: Run, step: int) -> StepHyperparameters:
    """Those of `step` (from 0)."""
    steps = run.train.steps
    return StepHyperparameters(
        learning_rate=run.optimizer.learning_rate * learning_rate_factor(run.schedule, step, steps),
        max_grad_norm=run.optimizer.max_grad_norm,
        bias_update_speed=bias_update_speed(run.schedule, step, steps),
        mtp_loss_weight=mtp_loss_weight(run.schedule, step, steps),
    )


def learning_rate_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """Factor on the peak learning rate at `step` (from 0) of `steps`."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    progress = step / steps
    if config.lr_schedule == "wsd":
        # The rate would reach zero one step after the last: no step is wasted on a rate of 0.
        decay = (1 - progress) / config.decay_fraction if config.decay_fraction else 1.0
        return warmup * min(1.0, decay)
    return warmup * _report_factor(progress)


def _report_factor(progress: float) -> float:
    """2.2e-4 to 10T tokens, cosine to 2.2e-5 at 14.3T, 2.2e-5 for 333B tokens, 7.3e-6 for the last 167B."""
    if progress < _CONSTANT_UNTIL:
        return 1.0
    if progress < _COSINE_UNTIL:
        angle = math.pi * (progress - _CONSTANT_UNTIL) / (_COSINE_UNTIL - _CONSTANT_UNTIL)
        return 0.1 + 0.45 * (1 + math.cos(angle))
    return 0.1 if progress < _LAST else 7.3e-6 / 2.2e-4


def mtp_loss_weight(config: ScheduleConfig, step: int, steps: int) -> float:
    """λ at this step."""
    return config.mtp_loss_weight if step / steps < _CONSTANT_UNTIL else config.mtp_loss_weight_late


def bias_update_speed(config: ScheduleConfig, step: int, steps: int) -> float:
    """γ at this step."""
    return config.bias_update_speed if step / steps < 1 - config.bias_freeze_fraction else 0.0


def batch_sizes(config: TrainConfig) -> np.ndarray:
    """Sequences of every step (steps,): constant, or ramping linearly in whole micro-batches."""
    sizes = np.full(config.steps, config.batch_size, dtype=np.int64)
    if config.batch_ramp_start is not None and config.batch_ramp_steps:
        ramp = min(config.batch_ramp_steps, config.steps)
        rising = np.linspace(config.batch_ramp_start, config.batch_size, config.batch_ramp_steps, endpoint=False)
        micro = config.micro_batch_size
        sizes[:ramp] = rising[:ramp] // micro * micro
    return sizes
