"""The ablations: for each claim what is varied, what is held fixed, what is measured, and what decides the verdict.

The variants of an ablation differ in one thing only. The last ablation, of the whole recipe, is in whole_recipe.py.
"""

from dataclasses import replace

from fathom.data.corpus import DataConfig
from fathom.lab.ablations.design import Ablation, Comparison, Entry, Figure, Found, mean_of, time_matched
from fathom.lab.ablations.recipe import (
    all_dense,
    parameters_of,
    plain_attention,
    with_model,
    with_mtp,
    with_schedule,
    with_train,
    without_mtp,
)
from fathom.lab.ablations.scales import Scale, base
from fathom.lab.ablations.variants import costs, fitted
from fathom.lab.ablations.whole_recipe import TOGETHER

_NO_COST = 0.005
_LITTLE = 0.01
"""Margins for «no cost» and «little cost», as fractions of the baseline's bits per byte; fixed before any run."""

# ------------------------------------------------------------------------------------------------ 1: attention


def _attention(scale: Scale, data: DataConfig, found: Found) -> list[Entry]:
    start = replace(all_dense(base(scale, data)), measures=("cache",))
    plain = plain_attention(start, scale, scale.heads)
    target = costs(plain).parameters
    variants = {
        "MHA": plain,
        "GQA, 2 groups": plain_attention(start, scale, 2),
        "MQA": plain_attention(start, scale, 1),
        "MLA": with_model(start, q_lora_rank=scale.query_rank),
        "MLA, queries not compressed": start,
    }
    return [Entry(name, fitted(variant, parameters_of, target)) for name, variant in variants.items()]


ATTENTION = Ablation(
    name="attention",
    claim="Multi-head latent attention costs no quality against multi-head attention while caching far less.",
    equal="parameters (a wider dense feed-forward compensates for smaller attention), depth, number and value width of "
    "the heads, tokens and their order, optimizer; every layer dense",
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
    recipe = without_mtp(scale, data)
    fine = replace(recipe, measures=("denial",))
    none = with_model(fine, n_routed_experts=scale.experts, num_experts_per_tok=scale.experts_per_token)
    two = with_model(
        fine, n_routed_experts=scale.experts - 2, num_experts_per_tok=scale.experts_per_token - 2, n_shared_experts=2
    )
    coarse = with_model(
        fine,
        n_routed_experts=scale.experts // 4,
        num_experts_per_tok=scale.experts_per_token // 4,
        moe_intermediate_size=4 * scale.expert_width,
    )
    return [
        Entry("dense", replace(all_dense(recipe), measures=())),
        Entry("top-2 of 8 wide", replace(coarse, shared_experts=False)),
        Entry("fine-grained", replace(none, shared_experts=False)),
        Entry("fine-grained, 1 shared", recipe),
        Entry("fine-grained, 2 shared", two),
    ]


def _experts_time_matched(scale: Scale, data: DataConfig, found: Found) -> list[Entry]:
    """The dense and the coarse-grained model, trained for as long as the fine-grained one took."""
    entries = _experts(scale, data, found)[:2]
    return [time_matched(entry, "fine-grained, 1 shared", "equal seconds", found) for entry in entries]


EXPERTS = Ablation(
    name="experts",
    claim="Fine-grained and shared experts beat coarse ones and a dense feed-forward at the same compute.",
    equal="active FLOPs per token; among the MoE models also total parameters; tokens and their order, optimizer, "
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
    stages=(_experts, _experts_time_matched),
)

# ------------------------------------------------------------------------------------------------ 3: balancing


def _balancing(scale: Scale, data: DataConfig, found: Found) -> list[Entry]:
    recipe = without_mtp(scale, data)
    none = with_train(with_schedule(replace(recipe, measures=()), bias_update_speed=0.0), seq_balance_loss_weight=0.0)
    return [
        Entry("none", none),
        Entry("auxiliary loss, 0.001", with_train(none, seq_balance_loss_weight=0.001)),
        Entry("auxiliary loss, 0.01", with_train(none, seq_balance_loss_weight=0.01)),
        Entry("bias, speed 0.0001", with_schedule(none, bias_update_speed=0.0001)),
        Entry("bias, speed 0.001", with_schedule(none, bias_update_speed=0.001)),
        Entry("bias, speed 0.01", with_schedule(none, bias_update_speed=0.01)),
        Entry("bias, speed 0.01, and sequence-wise loss", recipe),
    ]


BALANCING = Ablation(
    name="balancing",
    claim="The bias balances the experts without hurting; the auxiliary loss hurts.",
    equal="the model and its parameters, tokens and their order, optimizer; the auxiliary loss is the sequence-wise "
    "one, with 10 and 100 times its weight in the full recipe",
    papers="Loss-Free Balancing (arXiv 2408.15664), Table 2: validation perplexity 9.50 and 7.92 with the bias at 1B "
    "and 3B parameters, 9.56 and 7.97 with an auxiliary loss of 0.001; global MaxVio 0.04 and 0.04 against 0.72 and "
    "0.52. It finds the update speed 0.001 best, in runs of far more steps: a bias moves by at most its speed a step. "
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
    one = with_mtp(scale, data, 1)
    return [
        Entry("no module", without_mtp(scale, data)),
        Entry("1 module, λ 0.3 then 0.1", one),
        Entry("1 module, λ 0.1", with_schedule(one, mtp_loss_weight=0.1, mtp_loss_weight_late=0.1)),
        Entry("1 module, λ 0.3", with_schedule(one, mtp_loss_weight=0.3, mtp_loss_weight_late=0.3)),
        Entry("1 module, own embedding and head", replace(one, shared_ends=False, measures=())),
        Entry("2 modules, λ 0.3 then 0.1", with_mtp(scale, data, 2)),
    ]


def _mtp_time_matched(scale: Scale, data: DataConfig, found: Found) -> list[Entry]:
    """The model without MTP modules, trained for as long as the models with modules took."""
    none = Entry("no module", without_mtp(scale, data))
    lengths = {"as long as with 1": "1 module, λ 0.3 then 0.1", "as long as with 2": "2 modules, λ 0.3 then 0.1"}
    return [time_matched(none, model, label, found) for label, model in lengths.items()]


def _cost_of_a_draft(found: Found) -> list[str]:
    """Why accepted drafts need not make decoding faster."""
    name = "1 module, λ 0.3 then 0.1"
    tokens, speedup = (mean_of(found, name, metric) for metric in ("tokens_per_forward", "speedup"))
    layers = next(iter(found[name].values()))["variant"]["run"]["model"]["num_hidden_layers"]
    return [
        f"At batch size 1, a forward pass with a draft yields {tokens:.2f} tokens and takes about "
        f"{tokens / speedup:.1f} times as long as one without: it verifies two tokens, then runs the MTP module and "
        f"the head once more, beside a main model of {layers} layers (61 in DeepSeek-V3)."
    ]


PREDICTION = Ablation(
    name="prediction",
    claim="Multi-token prediction gives a better model and faster decoding.",
    equal="the main model and its parameters, tokens and their order, optimizer; the modules' training time is extra, "
    "except in the time-matched rows, where the model without modules trains on more tokens instead",
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
    stages=(_mtp, _mtp_time_matched),
    facts=_cost_of_a_draft,
)

# -------------------------------------------------------------------------------------------------- 5: routing


def _routing(scale: Scale, data: DataConfig, found: Found) -> list[Entry]:
    start = replace(base(scale, data), measures=("groups",))
    every = with_model(start, n_routed_experts=scale.experts, n_group=4, topk_group=4)
    return [
        Entry("all 4 groups open", every),
        *(
            Entry(f"{topk_group} of 4 groups open", with_model(every, topk_group=topk_group))
            for topk_group in (3, 2, 1)
        ),
        Entry("all 4 groups open, scale 2.5", with_model(every, routed_scaling_factor=2.5)),
    ]


ROUTING = Ablation(
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

ABLATIONS = {ablation.name: ablation for ablation in (ATTENTION, EXPERTS, BALANCING, PREDICTION, ROUTING, TOGETHER)}
