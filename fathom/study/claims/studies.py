"""The claims: what is varied, what is kept equal, what is measured, and what decides.

A study's variants differ in one thing alone. Stages run one after another, and a later one may depend on what an
earlier one found: a learning rate that was tuned, or how many steps fit into the seconds another variant took.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any, Literal

from fathom.data.corpus import DataConfig
from fathom.study.claims.scales import Scale, base
from fathom.study.claims.statistics import Expectation
from fathom.study.claims.trial import Record
from fathom.study.claims.variants import Costs, Variant, costs, fitted

Found = Mapping[str, Mapping[int, Record]]
"""The records of each entry by seed."""

TUNING_SEED = 1000
"""Learning rates are tried with this seed, which no comparison uses."""

_NO_COST = 0.005
_LITTLE = 0.01
"""«Costs nothing» and «costs little», as shares of the baseline's bits per byte; fixed before anything was run."""


@dataclass(frozen=True)
class Entry:
    """One row of a study's table."""

    name: str
    variant: Variant
    tuning: bool = False
    """Run with the tuning seed alone and left out of the table."""
    timed: bool = False
    """Its length follows from measured seconds, so it differs from machine to machine."""


@dataclass(frozen=True)
class Comparison:
    """One paired difference, variant minus baseline."""

    variant: str
    baseline: str
    metric: str
    expectation: Expectation
    margin: float = 0.0
    """For «close»: the share of the baseline's mean that may be lost."""
    decides: bool = True
    """Whether the claim's verdict rests on it."""


@dataclass(frozen=True)
class Figure:
    """What a study's picture shows."""

    kind: Literal["bars", "curves"]
    metric: str
    label: str


@dataclass(frozen=True)
class Study:
    """One claim."""

    name: str
    claim: str
    equal: str
    """What all variants have in common."""
    papers: str
    """What the papers report, for comparison."""
    columns: tuple[str, ...]
    """Metrics of the table (document.METRICS)."""
    timings: tuple[str, ...]
    """Metrics of the table of timings."""
    comparisons: tuple[Comparison, ...]
    figure: Figure
    stages: tuple[Callable[[Scale, DataConfig, Found], list[Entry]], ...]
    facts: Callable[[Found], list[str]] = lambda found: []
    """Sentences that follow from the results."""


def value(record: Record, metric: str) -> float:
    """A metric of one run: a result, a timing, or a cost counted on the model. NaN where it has none."""
    for part in ("results", "timing", "costs"):
        if metric in record[part]:
            return float(record[part][metric])
    return math.nan


def _model(variant: Variant, **changes: Any) -> Variant:
    return replace(variant, run=replace(variant.run, model=replace(variant.run.model, **changes)))


def _schedule(variant: Variant, **changes: Any) -> Variant:
    return replace(variant, run=replace(variant.run, schedule=replace(variant.run.schedule, **changes)))


def _train(variant: Variant, **changes: Any) -> Variant:
    return replace(variant, run=replace(variant.run, train=replace(variant.run.train, **changes)))


def _rate(variant: Variant, rate: float) -> Variant:
    return replace(variant, run=replace(variant.run, optimizer=replace(variant.run.optimizer, learning_rate=rate)))


def _recipe(scale: Scale, data: DataConfig) -> Variant:
    """The recipe without MTP, which claims 2 to 4 share: measured in all their ways, it is trained once."""
    return replace(base(scale, data), measures=("denial", "drafting"))


def _with_mtp(scale: Scale, data: DataConfig, modules: int) -> Variant:
    return replace(_model(base(scale, data), num_nextn_predict_layers=modules), measures=("drafting",))


def _parameters(cost: Costs) -> int:
    return cost.parameters


def _flops(cost: Costs) -> int:
    return cost.flops_per_token


def _plain_attention(variant: Variant, scale: Scale, kv_heads: int) -> Variant:
    return replace(_model(variant, qk_rope_head_dim=scale.head_width, q_lora_rank=None), kv_heads=kv_heads)


def _dense(variant: Variant) -> Variant:
    return _model(variant, first_k_dense_replace=variant.run.model.num_hidden_layers)


# ------------------------------------------------------------------------------------------------ 1: attention


def _attention(scale: Scale, data: DataConfig, found: Found) -> list[Entry]:
    start = replace(_dense(base(scale, data)), measures=("cache",))
    plain = _plain_attention(start, scale, scale.heads)
    target = costs(plain).parameters
    variants = {
        "MHA": plain,
        "GQA, 2 groups": _plain_attention(start, scale, 2),
        "MQA": _plain_attention(start, scale, 1),
        "MLA": _model(start, q_lora_rank=scale.query_rank),
        "MLA, queries not compressed": start,
    }
    return [Entry(name, fitted(variant, _parameters, target)) for name, variant in variants.items()]


ATTENTION = Study(
    name="attention",
    claim="Multi-head latent attention costs no quality against multi-head attention while caching far less.",
    equal="parameters (the dense feed-forward's width makes up for what attention saves), depth, heads and their value "
    "width, tokens and their order, optimizer; every layer dense",
    papers="DeepSeek-V2 (arXiv 2405.04434) compares the attentions in its appendix D: MHA above GQA above MQA on four "
    "benchmarks with dense 7B models (Table 8), and MLA above MHA on most benchmarks of two MoE sizes with 14 % and "
    "4 % of MHA's cache (Table 9). The 671B model caches 70,272 bytes per token, 1.8 % of what multi-head attention "
    "with its heads would.",
    columns=("parameters", "flops_per_token", "bits_per_byte", "cache_bytes_per_token"),
    timings=("seconds_per_step", "decode_1024", "decode_4096", "decode_16384"),
    comparisons=(
        Comparison("MLA", "MHA", "bits_per_byte", "close", _NO_COST),
        Comparison("MLA", "MHA", "cache_bytes_per_token", "lower"),
        Comparison("MLA, queries not compressed", "MHA", "bits_per_byte", "close", _NO_COST, decides=False),
        Comparison("MLA", "MQA", "bits_per_byte", "lower", decides=False),
        Comparison("MQA", "MHA", "bits_per_byte", "higher", decides=False),
    ),
    figure=Figure("bars", "bits_per_byte", "bits per byte, minus MHA's"),
    stages=(_attention,),
)

# -------------------------------------------------------------------------------------------------- 2: experts


def _experts(scale: Scale, data: DataConfig, found: Found) -> list[Entry]:
    recipe = _recipe(scale, data)
    fine = replace(recipe, measures=("denial",))
    none = _model(fine, n_routed_experts=scale.experts, num_experts_per_tok=scale.taken)
    two = _model(fine, n_routed_experts=scale.experts - 2, num_experts_per_tok=scale.taken - 2, n_shared_experts=2)
    coarse = _model(
        fine,
        n_routed_experts=scale.experts // 4,
        num_experts_per_tok=scale.taken // 4,
        moe_intermediate_size=4 * scale.expert_width,
    )
    return [
        Entry("dense", replace(_dense(recipe), measures=())),
        Entry("top-2 of 8 wide", replace(coarse, shared_experts=False)),
        Entry("fine-grained", replace(none, shared_experts=False)),
        Entry("fine-grained, 1 shared", recipe),
        Entry("fine-grained, 2 shared", two),
    ]


def _experts_by_the_clock(scale: Scale, data: DataConfig, found: Found) -> list[Entry]:
    """The dense and the coarse model with as many steps as take the fine-grained one's seconds."""
    entries = _experts(scale, data, found)[:2]
    return [_as_long(entry, "fine-grained, 1 shared", "equal seconds", found) for entry in entries]


def _as_long(entry: Entry, model: str, label: str, found: Found) -> Entry:
    """`entry` with about as many steps as take the seconds that `model` took.

    In sixteenths of the run, which is no coarser than the clock: a study that is repeated mostly has the same lengths.
    """
    seconds = {name: _mean(found, name, "seconds_per_step") for name in (entry.name, model)}
    steps = next(iter(found[model].values()))["variant"]["run"]["train"]["steps"]
    part = max(1, steps // 16)
    longer = part * max(1, round(steps * seconds[model] / seconds[entry.name] / part))
    return Entry(f"{entry.name}, {label}", replace(_train(entry.variant, steps=longer), measures=()), timed=True)


def _mean(found: Found, name: str, metric: str) -> float:
    return mean(value(record, metric) for record in found[name].values())


EXPERTS = Study(
    name="experts",
    claim="Fine-grained and shared experts beat coarse ones and a dense feed-forward at the same compute.",
    equal="active FLOPs per token; among the mixtures also all parameters; tokens and their order, optimizer, "
    "balancing",
    papers="DeepSeekMoE (arXiv 2401.06066), Table 1, 2B parameters and 100B tokens of the Pile: loss 2.060 dense, "
    "1.867 GShard's top-2 of 16, 1.808 DeepSeekMoE with 7 of 63 fine-grained experts and one shared. Its Figure 4 "
    "shows the loss of DeepSeekMoE rising faster than GShard's as the best routed experts are denied: its experts "
    "replace each other less.",
    columns=("parameters", "flops_per_token", "tokens", "bits_per_byte", "max_vio_global", "denied_8", "denied_4"),
    timings=("seconds_per_step", "train_seconds"),
    comparisons=(
        Comparison("fine-grained, 1 shared", "dense", "bits_per_byte", "lower"),
        Comparison("fine-grained", "top-2 of 8 wide", "bits_per_byte", "lower"),
        Comparison("fine-grained, 1 shared", "fine-grained", "bits_per_byte", "lower"),
        Comparison("fine-grained, 2 shared", "fine-grained, 1 shared", "bits_per_byte", "lower", decides=False),
        Comparison("fine-grained, 1 shared", "top-2 of 8 wide", "denied_8", "higher", decides=False),
        Comparison("fine-grained, 1 shared", "dense, equal seconds", "bits_per_byte", "lower", decides=False),
        Comparison("fine-grained, 1 shared", "top-2 of 8 wide, equal seconds", "bits_per_byte", "lower", decides=False),
    ),
    figure=Figure("bars", "bits_per_byte", "bits per byte, minus the dense model's"),
    stages=(_experts, _experts_by_the_clock),
)

# ------------------------------------------------------------------------------------------------ 3: balancing


def _balancing(scale: Scale, data: DataConfig, found: Found) -> list[Entry]:
    recipe = _recipe(scale, data)
    none = _train(_schedule(replace(recipe, measures=()), bias_speed=0.0), balance_alpha=0.0)
    return [
        Entry("none", none),
        Entry("auxiliary loss, 0.001", _train(none, balance_alpha=0.001)),
        Entry("auxiliary loss, 0.01", _train(none, balance_alpha=0.01)),
        Entry("bias, speed 0.0001", _schedule(none, bias_speed=0.0001)),
        Entry("bias, speed 0.001", _schedule(none, bias_speed=0.001)),
        Entry("bias, speed 0.01", _schedule(none, bias_speed=0.01)),
        Entry("bias, speed 0.01, and sequence-wise loss", recipe),
    ]


BALANCING = Study(
    name="balancing",
    claim="The bias balances the experts without hurting; the auxiliary loss hurts.",
    equal="the model and its parameters, tokens and their order, optimizer; the auxiliary loss is the sequence-wise "
    "one, with 10 and 100 times the weight that it has beside the bias",
    papers="Loss-Free Balancing (arXiv 2408.15664), Table 2: validation perplexity 9.50 and 7.92 with the bias at 1B "
    "and 3B parameters, 9.56 and 7.97 with an auxiliary loss of 0.001; global MaxVio 0.04 and 0.04 against 0.72 and "
    "0.52. It finds the bias speed 0.001 best, for runs of far more steps: a bias moves by at most its speed a step. "
    "The DeepSeek-V3 report (arXiv 2412.19437), Table 5, finds the bias better on most benchmarks at 15.7B and 228.7B "
    "parameters.",
    columns=("bits_per_byte", "max_vio_global", "max_vio_batch", "last_max_vio"),
    timings=("seconds_per_step",),
    comparisons=(
        Comparison("bias, speed 0.01", "none", "max_vio_global", "lower"),
        Comparison("bias, speed 0.01", "none", "bits_per_byte", "close", _NO_COST),
        Comparison("auxiliary loss, 0.01", "bias, speed 0.01", "bits_per_byte", "higher"),
        Comparison("auxiliary loss, 0.001", "bias, speed 0.01", "bits_per_byte", "higher", decides=False),
        Comparison("bias, speed 0.01", "auxiliary loss, 0.01", "max_vio_global", "lower", decides=False),
        Comparison(
            "bias, speed 0.01, and sequence-wise loss", "bias, speed 0.01", "max_vio_batch", "lower", decides=False
        ),
    ),
    figure=Figure("curves", "max_vio", "MaxVio of the worst layer, each training batch"),
    stages=(_balancing,),
)

# -------------------------------------------------------------------------------------- 4: multi-token prediction


def _mtp(scale: Scale, data: DataConfig, found: Found) -> list[Entry]:
    one = _with_mtp(scale, data, 1)
    return [
        Entry("no module", _recipe(scale, data)),
        Entry("1 module, λ 0.3 then 0.1", one),
        Entry("1 module, λ 0.1", _schedule(one, mtp_weight=0.1, mtp_weight_late=0.1)),
        Entry("1 module, λ 0.3", _schedule(one, mtp_weight=0.3, mtp_weight_late=0.3)),
        Entry("1 module, own embedding and head", replace(one, shared_ends=False, measures=())),
        Entry("2 modules, λ 0.3 then 0.1", _with_mtp(scale, data, 2)),
    ]


def _mtp_by_the_clock(scale: Scale, data: DataConfig, found: Found) -> list[Entry]:
    """The model without modules with as many steps as take the others' seconds."""
    none = Entry("no module", _recipe(scale, data))
    lengths = {"as long as with 1": "1 module, λ 0.3 then 0.1", "as long as with 2": "2 modules, λ 0.3 then 0.1"}
    return [_as_long(none, model, label, found) for label, model in lengths.items()]


PREDICTION = Study(
    name="prediction",
    claim="Multi-token prediction gives a better model and faster decoding.",
    equal="the main model and its parameters, tokens and their order, optimizer; the modules' training time comes on "
    "top, or (by the clock) the model without modules reads more in the same time",
    papers="The DeepSeek-V3 report, Table 4: with one module better on most benchmarks at 15.7B and 228.7B parameters "
    "(1.33T and 540B tokens). Section 5.4.3: 85 to 90 % of second tokens accepted, 1.8 times the tokens per second.",
    columns=(
        "mtp_parameters",
        "flops_per_token",
        "tokens",
        "bits_per_byte",
        "mtp_agreement_1",
        "mtp_agreement_2",
        "accepted_1",
        "accepted_2",
        "tokens_per_forward",
    ),
    timings=("seconds_per_step", "train_seconds", "plain_tokens_per_second", "speedup"),
    comparisons=(
        Comparison("1 module, λ 0.3 then 0.1", "no module", "bits_per_byte", "lower"),
        Comparison("1 module, λ 0.3 then 0.1", "no module", "speedup", "higher"),
        Comparison("1 module, λ 0.3 then 0.1", "no module", "tokens_per_forward", "higher", decides=False),
        Comparison("1 module, λ 0.1", "no module", "bits_per_byte", "lower", decides=False),
        Comparison("1 module, λ 0.3", "no module", "bits_per_byte", "lower", decides=False),
        Comparison("2 modules, λ 0.3 then 0.1", "no module", "bits_per_byte", "lower", decides=False),
        Comparison(
            "1 module, own embedding and head", "1 module, λ 0.3 then 0.1", "bits_per_byte", "higher", decides=False
        ),
        Comparison("1 module, λ 0.3 then 0.1", "no module, as long as with 1", "bits_per_byte", "lower", decides=False),
        Comparison(
            "2 modules, λ 0.3 then 0.1", "no module, as long as with 2", "bits_per_byte", "lower", decides=False
        ),
    ),
    figure=Figure("bars", "bits_per_byte", "bits per byte of the main head, minus no module's"),
    stages=(_mtp, _mtp_by_the_clock),
)

# -------------------------------------------------------------------------------------------------- 5: routing


def _routing(scale: Scale, data: DataConfig, found: Found) -> list[Entry]:
    start = replace(base(scale, data), measures=("groups",))
    every = _model(start, n_routed_experts=scale.experts, n_group=4, topk_group=4)
    return [
        Entry("all 4 groups open", every),
        *(Entry(f"{open_groups} of 4 groups open", _model(every, topk_group=open_groups)) for open_groups in (3, 2, 1)),
        Entry("all 4 groups open, scale 2.5", _model(every, routed_scaling_factor=2.5)),
    ]


ROUTING = Study(
    name="routing",
    claim="Limiting each token to half of the expert groups, and scaling the routed experts' weights, cost little.",
    equal="the model and its parameters, tokens and their order, optimizer, balancing",
    papers="The DeepSeek-V3 report opens 4 of 8 groups to each token, so that its experts lie on at most 4 nodes, and "
    "scales weights by 2.5 (section 2.1.2, 4.2); it shows no ablation of either.",
    columns=("bits_per_byte", "groups_touched", "max_vio_global"),
    timings=("seconds_per_step",),
    comparisons=(
        Comparison("2 of 4 groups open", "all 4 groups open", "bits_per_byte", "close", _LITTLE),
        Comparison("2 of 4 groups open", "all 4 groups open", "groups_touched", "lower"),
        Comparison("all 4 groups open, scale 2.5", "all 4 groups open", "bits_per_byte", "close", _LITTLE),
        Comparison("3 of 4 groups open", "all 4 groups open", "bits_per_byte", "close", _LITTLE, decides=False),
        Comparison("1 of 4 groups open", "all 4 groups open", "bits_per_byte", "close", _LITTLE, decides=False),
    ),
    figure=Figure("bars", "bits_per_byte", "bits per byte, minus that of all groups open"),
    stages=(_routing,),
)

# ------------------------------------------------------------------------------------------- 6: all together


def _sides(scale: Scale, data: DataConfig) -> dict[str, Variant]:
    """The whole recipe, and a dense transformer that spends the same FLOPs on a token as the recipe's main model."""
    target = costs(base(scale, data)).flops_per_token
    dense = replace(_plain_attention(_dense(base(scale, data)), scale, scale.heads), measures=())
    return {"whole recipe": _with_mtp(scale, data, 1), "dense": fitted(dense, _flops, target)}


def _trials(scale: Scale, data: DataConfig, found: Found) -> list[Entry]:
    sides = _sides(scale, data).items()
    return [Entry(f"{name}, rate {rate:g}", _rate(v, rate), tuning=True) for name, v in sides for rate in scale.rates]


def _tuned(scale: Scale, data: DataConfig, found: Found) -> dict[str, Variant]:
    """Each side at the rate whose trial ended with the lowest training loss."""
    return {
        name: _rate(
            v, min(scale.rates, key=lambda rate: value(found[f"{name}, rate {rate:g}"][TUNING_SEED], "last_loss"))
        )
        for name, v in _sides(scale, data).items()
    }


def _together(scale: Scale, data: DataConfig, found: Found) -> list[Entry]:
    recipe, dense = _tuned(scale, data, found).values()
    without = replace(_model(recipe, num_nextn_predict_layers=0), measures=_recipe(scale, data).measures)
    return [
        Entry("dense", dense),
        Entry("dense with MLA", replace(_dense(without), measures=())),
        Entry("MLA and experts", without),
        Entry("whole recipe", recipe),
        Entry("whole recipe, half the tokens", _train(recipe, steps=scale.steps // 2)),
        Entry("dense, twice the tokens", _train(dense, steps=2 * scale.steps)),
    ]


def _together_by_the_clock(scale: Scale, data: DataConfig, found: Found) -> list[Entry]:
    dense = Entry("dense", _tuned(scale, data, found)["dense"])
    return [_as_long(dense, "whole recipe", "equal seconds", found)]


def _same_quality(found: Found, name: str) -> list[str]:
    """What the dense model spends to get as far as another, between (or beyond) its two lengths."""
    quality = _mean(found, name, "bits_per_byte")
    once, twice = "dense", "dense, twice the tokens"
    first, second = (_mean(found, length, "bits_per_byte") for length in (once, twice))
    share = (quality - first) / (second - first)
    ratios = []
    for metric in ("flops", "train_seconds"):
        low, high = (_mean(found, length, metric) for length in (once, twice))
        ratios.append(low * (high / low) ** share / _mean(found, name, metric))
    where = "between" if 0 <= share <= 1 else "extrapolated beyond"
    return [
        f"To reach the {quality:.3f} bits per byte of «{name}» the dense transformer takes {ratios[0]:.2f} times its "
        f"FLOPs and {ratios[1]:.2f} times its seconds ({where} the dense model's two lengths, on a logarithmic scale)."
    ]


def _part_by_part(found: Found) -> list[str]:
    """What each part of the recipe adds, to a step's seconds and to quality at the same tokens."""
    rows = ("dense", "dense with MLA", "MLA and experts", "whole recipe")
    parts = []
    for before, after, part in zip(rows, rows[1:], ("MLA", "the experts", "the MTP module"), strict=False):
        longer = _mean(found, after, "seconds_per_step") / _mean(found, before, "seconds_per_step") - 1
        gained = _mean(found, after, "bits_per_byte") - _mean(found, before, "bits_per_byte")
        parts.append(f"{part} {longer:+.0%} and {gained:+.4f}")
    speeds = [_mean(found, n, "flops") / _mean(found, n, "train_seconds") / 1e9 for n in (rows[0], rows[2])]
    optimizers = [_mean(found, n, "optimizer_per_step") / _mean(found, n, "seconds_per_step") for n in rows[::3]]
    return [
        "What each part adds to the seconds of a step, and to bits per byte after the same tokens: "
        f"{', '.join(parts)} (the first with the recipe's learning rate).",
        f"At equal FLOPs per token the dense transformer computes {speeds[0]:.0f} GFLOP/s and MLA with experts "
        f"{speeds[1]:.0f}: small products of few tokens per expert, routing, and an optimizer that orthogonalises all "
        f"experts, also those that few tokens took ({optimizers[0]:.0%} of a dense step, {optimizers[1]:.0%} of the "
        "whole recipe's).",
    ]


def _costs_of_quality(found: Found) -> list[str]:
    return _same_quality(found, "whole recipe") + _same_quality(found, "MLA and experts") + _part_by_part(found)


TOGETHER = Study(
    name="together",
    claim="All together the recipe reaches a dense transformer's quality at a fraction of the cost.",
    equal="tokenizer, text, layers and their width, FLOPs per token of the main model, optimizer (Muon); the dense "
    "side has multi-head attention, RoPE and RMSNorm; each side at the best of the same learning rates, tried once each; "
    "then the same tokens, and the same seconds",
    papers="DeepSeek-V3 took 2.788M H800 GPU-hours for 14.8T tokens at 37B active of 671B parameters, and the report "
    "finds it level with dense models of 405B parameters (Tables 1 and 3). DeepSeekMoE 16B matches a dense 7B model "
    "with 40 % of its computation (arXiv 2401.06066, section 5). nanochat's log (19 February 2026) found experts in "
    "DeepSeek-V3's style better step by step and slower by the clock, with the share of peak FLOPs falling from 46 % "
    "to 35 %.",
    columns=("parameters", "mtp_parameters", "flops_per_token", "learning_rate", "tokens", "bits_per_byte"),
    timings=("seconds_per_step", "optimizer_per_step", "train_seconds"),
    comparisons=(
        Comparison("whole recipe", "dense", "bits_per_byte", "lower"),
        Comparison("whole recipe", "dense, equal seconds", "bits_per_byte", "lower"),
    ),
    figure=Figure("bars", "bits_per_byte", "bits per byte, minus the dense transformer's"),
    stages=(_trials, _together, _together_by_the_clock),
    facts=_costs_of_quality,
)

STUDIES = {study.name: study for study in (ATTENTION, EXPERTS, BALANCING, PREDICTION, ROUTING, TOGETHER)}
