"""Schedules: the report's own numbers, and the shape of warm-up, stable, decay."""

from dataclasses import replace

import pytest

from fathom import presets
from fathom.train.run import ScheduleConfig, TrainConfig
from fathom.train.schedule import batch_sizes, bias_update_speed, learning_rate_factor, mtp_loss_weight

REPORT = ScheduleConfig(lr_schedule="report", warmup_steps=2000)
STEPS = 1_480_000  # a step per 10M of the report's 14.8T tokens


@pytest.mark.parametrize(
    ("trillions", "rate"),
    [(1.0, 2.2e-4), (9.9, 2.2e-4), (12.15, (2.2e-4 + 2.2e-5) / 2), (14.3, 2.2e-5), (14.6, 2.2e-5), (14.7, 7.3e-6)],
)
def test_report_learning_rate(trillions: float, rate: float) -> None:
    step = round(trillions * 1e12 / 1e7)
    assert 2.2e-4 * learning_rate_factor(REPORT, step, STEPS) == pytest.approx(rate, rel=1e-3)


def test_report_warmup_is_linear() -> None:
    assert learning_rate_factor(REPORT, 0, STEPS) == pytest.approx(1 / 2000)
    assert learning_rate_factor(REPORT, 999, STEPS) == pytest.approx(0.5)
    assert learning_rate_factor(REPORT, 1999, STEPS) == 1.0


def test_wsd_rises_stays_and_decays_to_almost_zero() -> None:
    config = ScheduleConfig(lr_schedule="wsd", warmup_steps=10, decay_fraction=0.4)
    factors = [learning_rate_factor(config, step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert set(factors[10:61]) == {1.0}
    assert factors[60:] == sorted(factors[60:], reverse=True)
    assert factors[-1] == pytest.approx(0.025)


def test_mtp_weight_and_bias_speed_change_where_the_report_changes_them() -> None:
    assert mtp_loss_weight(REPORT, round(0.67 * STEPS), STEPS) == 0.3
    assert mtp_loss_weight(REPORT, round(0.68 * STEPS), STEPS) == 0.1
    assert bias_update_speed(REPORT, round(14.29 / 14.8 * STEPS), STEPS) == 0.001
    assert bias_update_speed(REPORT, round(14.31 / 14.8 * STEPS), STEPS) == 0.0


def test_batch_ramp_grows_in_whole_micro_batches() -> None:
    config = TrainConfig(steps=20, batch_size=32, micro_batch_size=8, batch_ramp_start=8, batch_ramp_steps=12)
    sizes = batch_sizes(config).tolist()
    assert sizes[0] == 8
    assert sizes == sorted(sizes)
    assert set(sizes) == {8, 16, 24, 32}
    assert sizes[12:] == [32] * 8
    assert batch_sizes(replace(config, batch_ramp_start=None)).tolist() == [32] * 20


def test_the_large_preset_reads_the_reports_tokens() -> None:
    run = presets.deepseek_v3_671b()
    tokens = int(batch_sizes(run.train).sum()) * run.train.sequence_length
    assert tokens == pytest.approx(14.8e12, rel=0.01)
