"""Ablation 6: the whole recipe against a dense transformer, both with tuned learning rates."""

from dataclasses import replace

from fathom.data.corpus import DataConfig
from fathom.lab.ablations.design import (
    TUNING_SEED,
    Ablation,
    Comparison,
    Entry,
    Figure,
    Found,
    mean_of,
    time_matched,
    value,
)
from fathom.lab.ablations.recipe import (
    all_dense,
    flops_of,
    plain_attention,
    with_learning_rate,
    with_model,
    with_mtp,
    with_train,
    without_mtp,
)
from fathom.lab.ablations.scales import Scale, base
from fathom.lab.ablations.variants import Variant, costs, fitted


def _sides(scale: Scale, data: DataConfig) -> dict[str, Variant]:
    """The whole recipe, and a dense transformer that spends the same FLOPs on a token as the recipe's main model."""
    target = costs(base(scale, data)).flops_per_token
    dense = replace(plain_attention(all_dense(base(scale, data)), scale, scale.heads), measures=())
    return {"whole recipe": with_mtp(scale, data, 1), "dense": fitted(dense, flops_of, target)}


def _trials(scale: Scale, data: DataConfig, found: Found) -> list[Entry]:
    sides = _sides(scale, data).items()
    return [
        Entry(f"{name}, rate {rate:g}", with_learning_rate(v, rate), tuning=True)
        for name, v in sides
        for rate in scale.learning_rates
    ]


def _tuned(scale: Scale, data: DataConfig, found: Found) -> dict[str, Variant]:
    """Each side with the learning rate whose trial reached the lowest training loss."""
    return {
        name: with_learning_rate(
            v,
            min(
                scale.learning_rates, key=lambda rate: value(found[f"{name}, rate {rate:g}"][TUNING_SEED], "last_loss")
            ),
        )
        for name, v in _sides(scale, data).items()
    }


def _together(scale: Scale, data: DataConfig, found: Found) -> list[Entry]:
    recipe, dense = _tuned(scale, data, found).values()
    without = replace(with_model(recipe, num_nextn_predict_layers=0), measures=without_mtp(scale, data).measures)
    return [
        Entry("dense", dense),
        Entry("dense with MLA", replace(all_dense(without), measures=())),
        Entry("MLA and experts", without),
        Entry("whole recipe", recipe),
        Entry("whole recipe, half the tokens", with_train(recipe, steps=scale.steps // 2)),
        Entry("dense, twice the tokens", with_train(dense, steps=2 * scale.steps)),
    ]


def _together_time_matched(scale: Scale, data: DataConfig, found: Found) -> list[Entry]:
    dense = Entry("dense", _tuned(scale, data, found)["dense"])
    return [time_matched(dense, "whole recipe", "equal seconds", found)]


def _same_quality(found: Found, name: str) -> list[str]:
    """What the dense model needs to match another's quality, from its two training lengths."""
    quality = mean_of(found, name, "bits_per_byte")
    once, twice = "dense", "dense, twice the tokens"
    first, second = (mean_of(found, length, "bits_per_byte") for length in (once, twice))
    share = (quality - first) / (second - first)
    ratios = []
    for metric in ("flops", "train_seconds"):
        low, high = (mean_of(found, length, metric) for length in (once, twice))
        ratios.append(low * (high / low) ** share / mean_of(found, name, metric))
    where = "between" if 0 <= share <= 1 else "extrapolated beyond"
    return [
        f"To reach the {quality:.3f} bits per byte of «{name}» the dense transformer needs {ratios[0]:.2f} times the "
        f"FLOPs and {ratios[1]:.2f} times the training time ({where} its two training lengths, on a log scale)."
    ]


def _part_by_part(found: Found) -> list[str]:
    """What each part of the recipe adds to the duration of a step, and to quality after the same tokens."""
    rows = ("dense", "dense with MLA", "MLA and experts", "whole recipe")
    parts = []
    for before, after, part in zip(rows, rows[1:], ("MLA", "the experts", "the MTP module"), strict=False):
        longer = mean_of(found, after, "seconds_per_step") / mean_of(found, before, "seconds_per_step") - 1
        gained = mean_of(found, after, "bits_per_byte") - mean_of(found, before, "bits_per_byte")
        parts.append(f"{part} {longer:+.0%} and {gained:+.4f}")
    speeds = [mean_of(found, n, "flops") / mean_of(found, n, "train_seconds") / 1e9 for n in (rows[0], rows[2])]
    optimizers = [mean_of(found, n, "optimizer_per_step") / mean_of(found, n, "seconds_per_step") for n in rows[::3]]
    return [
        "What each part adds to the duration of a step, and to bits per byte after the same tokens: "
        f"{', '.join(parts)} (the first with the recipe's learning rate).",
        f"At equal FLOPs per token the dense transformer reaches {speeds[0]:.0f} GFLOP/s and MLA with experts "
        f"{speeds[1]:.0f}; the optimizer takes {optimizers[0]:.0%} of a dense step and {optimizers[1]:.0%} of the "
        "whole recipe's.",
    ]


def _costs_of_quality(found: Found) -> list[str]:
    return _same_quality(found, "whole recipe") + _same_quality(found, "MLA and experts") + _part_by_part(found)


TOGETHER = Ablation(
    name="together",
    claim="All together the recipe reaches a dense transformer's quality at a fraction of the cost.",
    equal="tokenizer, text, layers and their width, FLOPs per token of the main model, optimizer (Muon); the dense "
    "side has multi-head attention, RoPE and RMSNorm; each side at the best of the same learning rates, each tried "
    "once; then the same tokens, and the same seconds",
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
    stages=(_trials, _together, _together_time_matched),
    facts=_costs_of_quality,
)
