"""The ablations: statistics with known answers, baselines against other programs, runs that repeat and are kept."""

import io
import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch.nn.functional import cross_entropy

from fathom.config import ConfigError
from fathom.data.batch import next_token_batch
from fathom.data.corpus import DataConfig
from fathom.data.tokenize import TokenizedCorpus
from fathom.lab.ablations.attention import GroupedQueryAttention
from fathom.lab.ablations.command import AblationsCommand, run_ablations
from fathom.lab.ablations.definitions import ABLATIONS
from fathom.lab.ablations.design import Comparison, Entry, Found
from fathom.lab.ablations.document import write_document
from fathom.lab.ablations.experts import without_best_experts
from fathom.lab.ablations.prediction import ApartLoss, ApartModel
from fathom.lab.ablations.runner import Runner, Task
from fathom.lab.ablations.scales import ALL, MINUTES, Scale, base
from fathom.lab.ablations.statistics import Expectation, Interval, interval, judge, overall, paired_difference
from fathom.lab.ablations.summary import found_path, path_of, summarize
from fathom.lab.ablations.trial import run_trial
from fathom.lab.ablations.variants import Variant, build_model, costs, fitted
from fathom.model.config import ModelConfig
from fathom.model.moe import MoE
from fathom.ops.rope import Rope
from fathom.train.loss import PretrainLoss
from fathom.train.optim import build_optimizers
from fathom.train.run import OptimizerConfig
from tests.model.configs import lively_model, tiny

CORPUS = Path(__file__).parents[3] / "fathom" / "lab"


def test_an_interval_with_a_known_answer() -> None:
    """Student's own table: 2.776 for 4 degrees of freedom."""
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776 * math.sqrt(2.5 / 5)
    assert (
        found.mean == 3
        and found.low == pytest.approx(3 - half, abs=1e-3)
        and found.high == pytest.approx(3 + half, abs=1e-3)
    )
    assert interval([2.0]) == Interval(2.0, -math.inf, math.inf)
    with pytest.raises(ValueError, match="at least one"):
        interval([math.nan])


def test_intervals_have_their_nominal_coverage() -> None:
    rng = random.Random(0)
    covered = 0
    for _ in range(2000):
        found = interval([rng.gauss(0.3, 2.0) for _ in range(4)])
        covered += found.low <= 0.3 <= found.high
    assert 0.93 < covered / 2000 < 0.97


def test_pairing_removes_what_the_seeds_share() -> None:
    rng = random.Random(1)
    noise = {seed: rng.gauss(0, 1) for seed in range(5)}
    baseline = {seed: 2 + noise[seed] for seed in noise}
    variant = {seed: 1.9 + noise[seed] + rng.gauss(0, 0.01) for seed in noise}
    found = paired_difference(variant, baseline)
    assert found.low < -0.1 < found.high and judge(found, "lower") == "holds"
    assert judge(found, "higher") == "does not hold at this scale"
    with pytest.raises(ValueError, match="seeds are"):
        paired_difference(variant, {0: 1.0})


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 0.5))
def test_the_rule(mean: float, half: float, margin: float) -> None:
    found = Interval(mean, mean - half, mean + half)
    mirrored = Interval(-mean, -found.high, -found.low)
    assert judge(found, "higher") == judge(mirrored, "lower")
    close = judge(found, "close", margin)
    assert (close == "holds") == (found.high < margin)
    assert (close == "does not hold at this scale") == (found.low > margin)
    assert overall(["holds", close]) == close


@pytest.mark.oracle
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_query_attention_is_llamas(kv_heads: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    torch.manual_seed(kv_heads)
    config = tiny(num_attention_heads=4, v_head_dim=8, qk_rope_head_dim=8)
    ours = GroupedQueryAttention(config, kv_heads)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs_config = LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=8,
        attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )
    theirs = LlamaAttention(theirs_config, 0)
    # Llama rotates halves, we rotate neighbours: rows of q and k are permuted.
    order = torch.arange(8).reshape(4, 2).T.flatten()
    state = {}
    for name, weight in ours.state_dict().items():
        heads = {"q_proj.weight": 4, "k_proj.weight": kv_heads}.get(name)
        state[name] = weight if heads is None else weight.unflatten(0, (heads, 8))[:, order].flatten(0, 1)
    theirs.load_state_dict(state)
    x_BSD = torch.randn(2, 9, config.hidden_size)
    positions = torch.arange(9)[None].expand(2, -1)
    cosine, sine = LlamaRotaryEmbedding(theirs_config)(x_BSD, positions)
    mask = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        expected, _ = theirs(x_BSD, (cosine, sine), mask)
        found = ours(x_BSD, Rope(cosine[0, :, :4], sine[0, :, :4]))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_kv_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="kv_heads is 3"):
        GroupedQueryAttention(tiny(num_attention_heads=4, v_head_dim=8, qk_rope_head_dim=8), 3)


def test_tokens_are_routed_past_their_masked_experts() -> None:
    model = lively_model(tiny(), seed=3)
    gate = next(module for module in model.modules() if isinstance(module, MoE)).gate
    ids = torch.randint(0, model.config.vocab_size, (2, 6))
    with torch.no_grad():
        before = model(ids).logits_BSO
        scores_NE = torch.rand(20, model.config.n_routed_experts)
        best_NK = scores_NE.argsort(descending=True)[:, : model.config.num_experts_per_tok]
        with without_best_experts(model, 1):
            denied = next(module for module in model.modules() if isinstance(module, MoE)).gate
            denied.e_score_correction_bias.zero_()
            chosen_NK = denied.select(scores_NE)
            assert not torch.equal(model(ids).logits_BSO, before)
        assert not (chosen_NK == best_NK[:, :1]).any()
        assert torch.equal(model(ids).logits_BSO, before)
    assert next(module for module in model.modules() if isinstance(module, MoE)).gate is gate


def variants() -> list[Variant]:
    plain = base(MINUTES, DataConfig(corpus=str(CORPUS)))
    dense = replace(plain.run.model, first_k_dense_replace=plain.run.model.num_hidden_layers)
    wide = replace(dense, qk_rope_head_dim=dense.v_head_dim)
    return [
        plain,
        replace(plain, shared_experts=False),
        replace(plain, run=replace(plain.run, model=dense)),
        replace(plain, run=replace(plain.run, model=wide), kv_heads=2),
        replace(
            plain, run=replace(plain.run, model=replace(plain.run.model, num_nextn_predict_layers=1)), shared_ends=False
        ),
    ]


def test_costs_are_those_of_the_model() -> None:
    for variant in variants():
        model = build_model(variant)
        counted = costs(variant)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        biases = sum(buffer.numel() for name, buffer in model.named_buffers() if "correction_bias" in name)
        assert counted.parameters + counted.mtp_parameters == parameters + biases
    fit = fitted(variants()[3], lambda found: found.parameters, costs(variants()[2]).parameters)
    assert costs(fit).parameters == pytest.approx(costs(variants()[2]).parameters, rel=0.02)


def test_variants_of_a_seed_share_their_weights() -> None:
    first, second = (dict(build_model(variant.with_seed(5)).named_parameters()) for variant in variants()[:2])
    shared = [name for name in first if name in second and first[name].shape == second[name].shape]
    assert len(shared) > 10 and all(torch.equal(first[name], second[name]) for name in shared)
    other = dict(build_model(variants()[0].with_seed(6)).named_parameters())
    assert not torch.equal(first["embed_tokens.weight"], other["embed_tokens.weight"])


def small(variant: Variant) -> Variant:
    run = variant.run
    model: ModelConfig = replace(run.model, hidden_size=32, num_hidden_layers=2, kv_lora_rank=16)
    train = replace(run.train, steps=4, batch_size=2, micro_batch_size=2, sequence_length=32, eval_sequences=4)
    return replace(variant, run=replace(run, model=model, train=train))


@pytest.mark.slow
def test_runs_are_reproducible_and_made_once(tmp_path: Path) -> None:
    data = DataConfig(corpus=str(CORPUS))
    calls: list[Variant] = []

    def counted(variant: Variant, directory: Path) -> dict[str, Any]:
        calls.append(variant)
        return run_trial(variant, directory)

    console = Console(file=io.StringIO())
    scale = replace(MINUTES, vocabulary=320)
    runner = Runner(tmp_path, 1, console, counted)
    prepared = runner.prepare(scale, data)
    tasks = [Task("a", small(variant).with_seed(seed)) for variant in variants()[:2] for seed in (0, 1)]
    tasks = [replace(task, variant=_vocabulary(task.variant, 320)) for task in tasks]
    first = runner.records(tasks, prepared)
    assert len(calls) == 4 and len({record["results"]["bits_per_byte"] for record in first}) == 4
    assert Runner(tmp_path, 1, console, counted).records(tasks, prepared) == first and len(calls) == 4
    again = Runner(tmp_path / "again", 1, console, counted)
    repeated = again.records(tasks, again.prepare(scale, data))
    assert [record["results"] for record in repeated] == [record["results"] for record in first]


def _vocabulary(variant: Variant, size: int) -> Variant:
    return replace(variant, run=replace(variant.run, model=replace(variant.run.model, vocab_size=size)))


@pytest.mark.parametrize("scale", ALL.values(), ids=ALL)
def test_what_is_held_fixed_is_equal(scale: Scale) -> None:
    """Parameters of the attentions, and FLOPs of the feed-forwards and of ablation 6's two sides, within 2 %."""
    data = DataConfig(corpus=str(CORPUS))

    def spread(name: str, metric: str) -> float:
        counts = [getattr(costs(entry.variant), metric) for entry in ABLATIONS[name].stages[0](scale, data, {})]
        return max(counts) / min(counts)

    assert spread("attention", "parameters") < 1.02
    assert spread("experts", "flops_per_token") < 1.02
    trials = ABLATIONS["together"].stages[0](scale, data, {})
    plain = [replace(t.variant.run, model=replace(t.variant.run.model, num_nextn_predict_layers=0)) for t in trials]
    flops = [costs(replace(t.variant, run=run)).flops_per_token for t, run in zip(trials, plain, strict=True)]
    assert max(flops) / min(flops) < 1.02
    budget = [sum(t.name.startswith(side) for t in trials) for side in ("dense", "whole recipe")]
    assert budget[0] == budget[1] >= 3


def simulated(effects: dict[str, float], noise: float) -> Found:
    """Records of one metric: a base, an offset per seed, an effect, and a little noise."""
    rng = random.Random(5)
    shared = {seed: rng.gauss(0, 0.1) for seed in range(5)}
    return {
        name: {
            seed: {
                "results": {"quality": 2 + shared[seed] + effect + rng.gauss(0, noise)},
                "timing": {"busy": 1.0},
                "costs": {},
                "machine": {},
                "variant": {},
            }
            for seed in shared
        }
        for name, effect in effects.items()
    }


@pytest.mark.parametrize(
    ("effect", "noise", "expected", "margin", "verdict"),
    [
        (-0.03, 0.005, "lower", 0.0, "holds"),
        (0.03, 0.005, "lower", 0.0, "does not hold at this scale"),
        (-0.03, 0.1, "lower", 0.0, "undecided"),
        (0.03, 0.005, "higher", 0.0, "holds"),
        (0.003, 0.001, "close", 0.005, "holds"),
        (0.02, 0.001, "close", 0.005, "does not hold at this scale"),
    ],
)
def test_a_simulated_effect_is_found(
    effect: float, noise: float, expected: Expectation, margin: float, verdict: str, tmp_path: Path
) -> None:
    """From records to verdict, where the spread between seeds is far larger than the effect."""
    comparison = Comparison("new", "old", "quality", expected, margin)
    ablation = replace(ABLATIONS["routing"], columns=("quality",), timings=(), comparisons=(comparison,), stages=())
    entries = [Entry(name, base(MINUTES, DataConfig())) for name in ("old", "new")]
    prepared = SimpleNamespace(config=DataConfig(), corpus_hash="0" * 64)
    found = simulated({"old": 0.0, "new": effect}, noise)
    summary = summarize(ablation, MINUTES, entries, found, cast(TokenizedCorpus, prepared), "")
    assert summary["verdict"] == verdict
    compared = summary["comparisons"][0]
    assert compared["low"] < effect < compared["high"] and (compared["high"] - compared["low"]) < 12 * noise


def test_every_ablation_has_a_deciding_comparison() -> None:
    assert len(ABLATIONS) == 6
    for ablation in ABLATIONS.values():
        assert any(comparison.decides for comparison in ablation.comparisons), ablation.name


@pytest.mark.slow
def test_a_repeated_ablation_gives_the_same_table(tmp_path: Path) -> None:
    """Every value that does not depend on a clock, every interval and every verdict."""
    tiny_scale = replace(MINUTES, steps=3, batch=2, micro_batch=2, length=32, vocabulary=320, held_out_rows=4)
    ablation, data = ABLATIONS["routing"], DataConfig(corpus=str(CORPUS))
    summaries = []
    for attempt in ("first", "second"):
        runner = Runner(tmp_path / attempt, 1, Console(file=io.StringIO()), run_trial)
        entries, found = runner.run([ablation], tiny_scale, data, [0, 1])[ablation.name]
        summaries.append(summarize(ablation, tiny_scale, entries, found, runner.prepare(tiny_scale, data), ""))
        for row in summaries[-1]["rows"]:
            assert row["metrics"].pop("seconds_per_step")["mean"] > 0
        del summaries[-1]["busy"], summaries[-1]["train_seconds"]
    assert summaries[0] == summaries[1]
    assert len({row["metrics"]["bits_per_byte"]["mean"] for row in summaries[0]["rows"]}) > 1


def test_the_committed_pages_follow_from_the_committed_results(tmp_path: Path) -> None:
    """They were not edited by hand, and they contain every ablation."""
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
    docs = Path(__file__).parents[3] / "docs"
    shutil.copytree(docs / "ablations", tmp_path / "ablations")
    pages = write_document(tmp_path)
    assert [page.name for page in pages] == ["ablations-minutes.md", "ablations.md"]
    for page in pages:
        assert page.read_text() == (docs / page.name).read_text()


def test_results_of_an_earlier_release_are_found_in_claims(tmp_path: Path) -> None:
    new, old = path_of(tmp_path, "minutes", "routing"), tmp_path / "claims" / "minutes" / "routing.json"
    assert found_path(tmp_path, "minutes", "routing") is None
    old.parent.mkdir(parents=True)
    old.touch()
    with pytest.warns(DeprecationWarning, match="move it there"):
        assert found_path(tmp_path, "minutes", "routing") == old
    new.parent.mkdir(parents=True)
    new.touch()
    assert found_path(tmp_path, "minutes", "routing") == new


@pytest.mark.parametrize("scale", ["minutes", "hours"])
def test_the_committed_verdicts_follow_from_the_committed_values(scale: str) -> None:
    """Recomputed by scipy's own paired interval."""
    from scipy.stats import ttest_rel

    docs = Path(__file__).parents[3] / "docs"
    committed = [name for name in ABLATIONS if path_of(docs, scale, name).exists()]
    assert committed
    for name in committed:
        summary = json.loads(path_of(docs, scale, name).read_text())
        metrics = {row["name"]: row["metrics"] for row in summary["rows"]}
        for c in summary["comparisons"]:
            values = [list(metrics[c[side]][c["metric"]]["values"].values()) for side in ("variant", "baseline")]
            if len(set(values[0])) == len(set(values[1])) == 1:
                continue
            low, high = ttest_rel(*values).confidence_interval(0.95)
            assert (c["low"], c["high"]) == (pytest.approx(low, rel=1e-6), pytest.approx(high, rel=1e-6))
            margin = c["margin"] if c["expectation"] == "close" else 0.0
            below, above = (high < margin, low > margin) if c["expectation"] != "higher" else (low > 0, high < 0)
            assert c["verdict"] == ("holds" if below else "does not hold at this scale" if above else "undecided"), (
                f"{name}: {c['variant']}"
            )


@pytest.mark.parametrize("copies", [True, False])
def test_modules_with_their_own_embedding_and_head(copies: bool) -> None:
    """With copies of the main model's matrices they compute what sharing ones do; with others, something else."""
    shared = lively_model(tiny(num_nextn_predict_layers=2), seed=1)
    apart = ApartModel(shared.config)
    missing, unexpected = apart.load_state_dict(shared.state_dict(), strict=False)
    assert not unexpected and {name.split(".", 2)[2] for name in missing} == {
        "embed_tokens.weight",
        "shared_head.head.weight",
    }
    with torch.no_grad():
        for module, head in zip(apart.mtp, apart.heads()[1:], strict=True):
            if copies:
                head.weight.copy_(shared.lm_head.weight)
                module.get_parameter("embed_tokens.weight").copy_(shared.embed_tokens.weight)
        ids = torch.randint(0, shared.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
        ours, theirs = apart(ids, mtp=True), shared(ids, mtp=True)
    assert torch.equal(ours.logits_BSO, theirs.logits_BSO)
    for mine, other in zip(ours.mtp_logits or (), theirs.mtp_logits or (), strict=True):
        assert torch.equal(mine, other) == copies


def test_unshared_modules_train_only_their_own_matrices() -> None:
    """A module's loss gives gradients to its own matrices only, and AdamW updates them, not Muon."""
    model = ApartModel(tiny(num_nextn_predict_layers=1))
    ids = torch.randint(0, model.config.vocab_size, (1, 8))
    logits = model(ids, mtp=True).mtp_logits
    assert logits is not None
    logits[0].square().sum().backward()
    own = dict(model.mtp[0].named_parameters())
    assert own["embed_tokens.weight"].grad is not None and own["shared_head.head.weight"].grad is not None
    assert model.lm_head.weight.grad is None
    _, muon = build_optimizers(model, OptimizerConfig(name="muon"))
    taken = {id(parameter) for group in muon.param_groups for parameter in group["params"]}
    assert id(model.heads()[1].weight) not in taken and id(model.lm_head.weight) not in taken


def test_the_loss_of_modules_with_their_own_ends_goes_through_their_heads() -> None:
    model = ApartModel(tiny(num_nextn_predict_layers=2))
    tokens_BW = torch.randint(2, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = next_token_batch(tokens_BW, 2)
    loss = ApartLoss(PretrainLoss(model, 0.0, torch.float32))
    found_H = loss(batch, torch.ones(3), 0.0, 1.0).sums_H
    hidden = model.forward_hidden(tokens_BW[:, :6], mtp=True, lookahead_BM=tokens_BW[:, 6:8])
    for k, h_BSD in enumerate((hidden.h_BSD, *hidden.mtp_h_BSD)):
        logits_NO = (h_BSD @ model.heads()[k].weight.T).flatten(0, 1)
        expected = cross_entropy(logits_NO, tokens_BW[:, k + 1 : k + 7].flatten(), reduction="sum")
        torch.testing.assert_close(found_H[k], expected)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (AblationsCommand(names=("magic",)), "no ablation 'magic'"),
        (AblationsCommand(scale="eons"), "--scale is 'eons'"),
        (AblationsCommand(seeds=0), "--seeds is 0"),
    ],
)
def test_invalid_values_are_named_in_the_error(command: AblationsCommand, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_ablations(command)
