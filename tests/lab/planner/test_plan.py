"""Plans: the report's figure, parts computed by hand, invariants of any plan, and the search."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom import presets
from fathom.checkpoint.info import cache_bytes
from fathom.cli import main
from fathom.config import ConfigError
from fathom.lab.planner.assumptions import Assumptions
from fathom.lab.planner.compute import layer_time
from fathom.lab.planner.hardware import GPUS, Cluster
from fathom.lab.planner.layout import Layout
from fathom.lab.planner.memory import serving_memory
from fathom.lab.planner.placement import ranks
from fathom.lab.planner.plan import Plan, make_plan
from fathom.lab.planner.search import candidates, search
from fathom.lab.planner.show import sensitivity
from fathom.lab.planner.work import Layer, layers

V3 = presets.deepseek_v3_671b().model
SMALL = presets.moe_16b_a3b().model
H800S = Cluster(GPUS["h800"], 2048, 8)
REPORT = Layout(
    pipeline=16, expert=64, schedule="dualpipe", micro_batch=1, global_batch=15360, precision="fp8", moments="bf16"
)
ASSUMED = Assumptions()


def report_plan() -> Plan:
    return make_plan(V3, REPORT, H800S, ASSUMED)


def test_the_reports_gpu_hours_within_a_tenth() -> None:
    plan = report_plan()
    assert plan.gpu_hours(1e12) == pytest.approx(180e3, rel=0.10)
    assert plan.gpu_hours(14.8e12) == pytest.approx(2.664e6, rel=0.10)
    assert plan.fits  # and the report needed no tensor parallelism


def test_four_layers_take_as_long_as_in_the_published_trace() -> None:
    """128.5 ms for a forward and a backward chunk of four MoE layers and 4096 tokens, routing balanced."""
    layer = next(layer for layer in layers(V3, REPORT) if layer.name == "moe")
    seconds = layer_time(layer, REPORT, H800S, replace(ASSUMED, imbalance=1.0)).total * 4 * 4096
    assert seconds == pytest.approx(0.1285, rel=0.03)


@pytest.mark.parametrize("name", list(presets.ALL))
def test_layers_hold_every_parameter_and_flop(name: str) -> None:
    config = presets.ALL[name]().model
    layout = Layout(length=512)
    found, counts = layers(config, layout), config.parameter_counts()
    assert sum(layer.shared_parameters + layer.expert_parameters for layer in found) == counts.total + counts.mtp
    flops = sum(6 * (layer.weights + layer.exact) + 3 * layer.scores for layer in found)
    assert flops == config.flops_per_token(512, mtp=True)


def test_a_layers_time_by_hand() -> None:
    layer = Layer("moe", 100, 10, 20, 300, 900, 40, 60, 0, 0, routed_weights=50)
    gpu = replace(GPUS["h800"], bf16=10.0, fp8=20.0, bandwidth=5.0, multiprocessors=100)
    assumed = Assumptions(
        gemm_fp8=0.5, gemm_bf16=1.0, attention_forward=0.5, attention_backward=0.25, memory=0.2, imbalance=1.2,
        communication_multiprocessors=20,
    )  # fmt: skip
    cluster = Cluster(gpu, 16, 8)
    time = layer_time(layer, replace(REPORT, recompute="selective", expert=16), cluster, assumed)
    # Four fifths compute. (100 + 0.2·50) weights at 10, 10 exact ones at 10: 24 FLOPs of them a token forward, 30 s.
    product = 2 * (110 / 10 + 10 / 10) / 0.8
    assert time.forward == pytest.approx(product + 300 / (10 * 0.8 * 0.5) + 40 / 1.0)
    assert time.inputs == pytest.approx(product + 900 / (10 * 0.8 * 0.25) + 40 + 2 * 20 / (10 * 0.8))
    assert time.weights == pytest.approx(product + 20)
    halved = layer_time(layer, replace(REPORT, tensor=2, expert=16), cluster, assumed)
    assert halved.forward == pytest.approx(time.forward / 2)


def test_memory_by_hand() -> None:
    """One stage, no parallelism but eight data parallel ranks: 2 + 4 bytes a parameter and an eighth of 12."""
    cluster = Cluster(GPUS["h800"], 8, 8)
    plan = make_plan(SMALL, Layout(global_batch=8), cluster, ASSUMED)
    numbers = SMALL.parameter_counts().total + SMALL.parameter_counts().mtp
    assert plan.memory.weights == 2 * numbers
    assert plan.memory.gradients == 4 * numbers
    assert plan.memory.optimizer == pytest.approx(12 * numbers / 8)
    shared_out = make_plan(SMALL, Layout(global_batch=8, zero=3, moments="bf16"), cluster, ASSUMED).memory
    assert shared_out.weights + shared_out.gradients + shared_out.optimizer == pytest.approx((2 + 4 + 8) * numbers / 8)


layouts = st.builds(
    Layout,
    pipeline=st.sampled_from([1, 2, 4, 8]),
    tensor=st.sampled_from([1, 2, 4]),
    expert=st.sampled_from([1, 8, 16, 64]),
    schedule=st.sampled_from(["1f1b", "zb1p", "dualpipe"]),
    zero=st.sampled_from([0, 1, 2, 3]),
    micro_batch=st.sampled_from([1, 2]),
    global_batch=st.just(4096),
    recompute=st.sampled_from(["none", "selective", "full"]),
    precision=st.sampled_from(["bf16", "fp8"]),
)


def planned(layout: Layout, gpus: int) -> Plan | None:
    try:
        return make_plan(SMALL, layout, Cluster(GPUS["h100"], gpus, 8), ASSUMED)
    except ConfigError:
        return None


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_invariants_of_every_plan(data: st.DataObject) -> None:
    try:
        layout = data.draw(layouts)
    except ConfigError:  # DualPipe with one stage
        return
    plan = planned(layout, 64)
    if plan is None:
        return
    assert plan.memory.total == pytest.approx(sum(asdict(plan.memory).values()))
    assert plan.time.total == pytest.approx(sum(asdict(plan.time).values()))
    assert min(asdict(plan.time).values()) >= 0
    assert min(asdict(plan.memory).values()) >= 0
    assert 0 < plan.mfu() < 2  # of the bf16 peak; FP8 has twice that
    more = planned(layout, 128)
    assert more is None or more.memory.total <= plan.memory.total * (1 + 1e-9)
    for stronger in (
        ("full",) if layout.recompute == "selective" else ("selective",) if layout.recompute == "none" else ()
    ):
        less = planned(replace(layout, recompute=stronger), 64)
        assert less is not None
        assert stronger == "full" or less.memory.activations <= plan.memory.activations
        assert less.time.total >= plan.time.total


def test_every_layer_is_on_one_rank_or_dualpipes_two() -> None:
    for schedule, copies in (("1f1b", 1), ("dualpipe", 2)):
        layout = replace(REPORT, schedule=schedule)  # type: ignore[arg-type]
        everyone = ranks(V3, layout, H800S, ASSUMED)
        assert len(everyone) == 16
        assert sum(len(rank.layers) for rank in everyone) == copies * len(layers(V3, layout))


def test_every_assumption_matters_in_the_right_direction() -> None:
    effects = {name: effect for name, _, _, effect in sensitivity(report_plan())}
    better = {"overlap_alone", "gradient_overlap"}
    assert effects.keys() == {field.name for field in fields(Assumptions)} - {"reserved"}
    assert all(effect < 0 if name in better else effect >= 0 for name, effect in effects.items())
    assert effects["gemm_fp8"] > effects["network"]


def test_search_finds_the_best_of_all_that_fit() -> None:
    cluster, given_layout = Cluster(GPUS["h200"], 8, 4), Layout(global_batch=32)
    best = search(SMALL, given_layout, cluster, ASSUMED)
    plans = [make_plan(SMALL, layout, cluster, ASSUMED) for layout in candidates(SMALL, given_layout, cluster)]
    fitting = [plan for plan in plans if plan.fits]
    assert best.fits and 0 < len(fitting) < len(plans)
    assert best.time.total == min(plan.time.total for plan in fitting)


def test_search_reports_when_nothing_fits() -> None:
    with pytest.raises(ConfigError, match="gpus is 8; no layout fits: the smallest needs"):
        search(V3, Layout(global_batch=64), Cluster(GPUS["h100"], 8, 8), ASSUMED)


def test_serving_counts_cache_as_info_does() -> None:
    nano = presets.nano().model
    found = serving_memory(nano, Cluster(GPUS["h100"], 8, 8), "bf16", context=1000, batch=10)
    assert found.cache == 10_000 * cache_bytes(nano, mtp=True) == 10_000 * 5 * 80 * 2
    assert found.gpus == 1
    assert serving_memory(nano, Cluster(GPUS["h100"], 8, 8), "bf16", 10**6, 500).gpus == 6  # 400 GB in pieces of 72


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline": 6}, "gpus is 2048; it must be a multiple of pipeline x tensor"),
        ({"tensor": 16, "expert": 1}, "tensor is 16; it must be a divisor of gpus_per_node"),
        ({"expert": 512}, "expert is 512; it must be a divisor of data x tensor"),
        ({"global_batch": 100}, "global_batch is 100; it must be a multiple of data x micro_batch"),
        ({"global_batch": 128 * 16}, "global_batch is 2048; it must be 32 or more micro-batches"),
        ({"pipeline": 64}, "pipeline is 64; it must be at most 62"),
    ],
)
def test_impossible_layouts_name_the_field(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(V3, replace(REPORT, **changes), H800S, ASSUMED)  # type: ignore[arg-type]


def test_values_out_of_range_name_the_field() -> None:
    with pytest.raises(ConfigError, match=r"gemm_fp8 is 1\.5; it must be a share"):
        Assumptions(gemm_fp8=1.5)
    with pytest.raises(ConfigError, match="chunks is 1; it must be 2 or more"):
        Layout(schedule="interleaved")
    with pytest.raises(ConfigError, match="precision is 'fp8'; it must be bf16"):
        make_plan(SMALL, Layout(precision="fp8"), Cluster(GPUS["a100"], 8, 8), ASSUMED)
    with pytest.raises(ConfigError, match="gpus is 12"):
        Cluster(GPUS["a100"], 12, 8)


# ---------------------------------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    words = "plan deepseek-v3-671b --gpus 2048 --pipeline 16 --expert 64 --schedule dualpipe --precision fp8"
    main([*words.split(), "--moments", "bf16", "--tokens", "14.8e12", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["budget"]["gpu_hours"] == pytest.approx(2.664e6, rel=0.1)
    assert found["budget"]["cost"] == pytest.approx(2 * found["budget"]["gpu_hours"])
    assert found["layout"]["global_batch"] == 15360 and found["layout"]["data"] == 128
    assert found["assumptions"] == asdict(ASSUMED)


def test_the_command_reads_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(presets.bench_small().model.to_dict()))
    main(["plan", str(path), "--gpus", "8", "--expert", "8", "--global-batch", "64", "--sensitivity", "--price", "3"])
    text = capsys.readouterr().out
    for expected in ("activations", "dispatch", "bubble", "gemm-bf16", "GPU-hours if", "To serve", "at 3 an hour"):
        assert expected in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nosuch", "there is no preset or directory 'nosuch'"),
        ("nano --gpu h900", "gpu is 'h900'; it must be one of h800"),
        ("nano --tokens 0", "tokens is 0.0; it must be a positive number"),
        ("nano --gpu cpu --pipeline 2", "pipeline is 2; it must be 1 on this machine"),
        ("nano --gpu cpu --precision fp8", "precision is 'fp8'; it must be bf16 on this machine"),
        ("nano --micro-batch 0", "micro_batch is 0; it must be 1 or more"),
    ],
)
def test_invalid_input_is_one_clear_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", *words.split()])
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
