"""DeepSeek-V2 against `transformers`' DeepseekV2: softmax scores, groups by their best expert, no bias."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV2ForCausalLM
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

from fathom.checkpoint.hf.model import load_model, save_model
from fathom.model.config import ModelConfig
from tests.model.configs import enliven, model_configs, random_tokens, relative_error
from tests.oracle.peers import PLAIN, SMALLEST_MARGIN, peer_config, quietly

pytestmark = pytest.mark.oracle


@st.composite
def v2_configs(draw: st.DrawFn) -> ModelConfig:
    config = draw(model_configs(modules=(0, 0)))
    v2: dict[str, Any] = {"scoring_func": "softmax", "norm_topk_prob": False}
    # It rotates pairs as complex numbers in place, after other elements, of which there must be an even number.
    v2 |= {"qk_nope_head_dim": 2 * config.qk_nope_head_dim, "kv_lora_rank": 2 * config.kv_lora_rank}
    v2["hidden_size"] = config.hidden_size // config.num_attention_heads * config.num_attention_heads
    if draw(st.booleans()):
        return replace(config, topk_method="group_limited_greedy", **v2)
    return replace(config, topk_method="greedy", n_group=1, topk_group=1, **v2)


def peer_model(config: ModelConfig) -> DeepseekV2ForCausalLM:
    known = peer_config(config).to_dict()
    given_there = {f: known[f] for f in DeepseekV2Config().to_dict() if f in known and f not in ("model_type", "dtype")}
    with quietly():
        return DeepseekV2ForCausalLM(DeepseekV2Config(**given_there, topk_method=config.topk_method, **PLAIN)).eval()


@torch.no_grad()
def run_peer(model: Any, tokens_BS: Tensor) -> tuple[Tensor, list[Tensor], float]:
    """Logits, every router's choice (N, K), and the smallest change of a score that could alter a choice."""
    choices: list[Tensor] = []
    margins: list[float] = []

    def note_choice(gate: DeepseekV2TopkRouter, _: Any, out: tuple[Tensor, Tensor, Tensor]) -> None:
        logits_NE, _weights_NK, ids_NK = out
        choices.append(ids_NK)
        scores_NE = logits_NE.double().softmax(-1)
        if gate.topk_method == "group_limited_greedy":
            grouped_NGe = scores_NE.unflatten(1, (gate.num_group, -1))
            best_NG = grouped_NGe.amax(-1)
            margins.append(gap(best_NG, gate.topk_group))
            worst_N1 = best_NG.sort(-1, descending=True).values[:, gate.topk_group - 1, None]
            scores_NE = grouped_NGe.masked_fill((best_NG < worst_N1)[..., None], 0).flatten(1)
        margins.append(gap(scores_NE, gate.top_k))

    hooks = [m.register_forward_hook(note_choice) for m in model.modules() if isinstance(m, DeepseekV2TopkRouter)]
    try:
        return model(tokens_BS, use_cache=False).logits, choices, min(margins, default=1.0)
    finally:
        for hook in hooks:
            hook.remove()


def gap(scores: Tensor, count: int) -> float:
    """Smallest distance between the last score taken and the first one left."""
    if count == scores.shape[1]:
        return float("inf")
    ordered = scores.sort(dim=-1, descending=True).values
    return float((ordered[:, count - 1] - ordered[:, count]).min())


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(v2_configs(), st.tuples(st.integers(1, 3), st.integers(1, 11)), st.integers(0, 2**32 - 1))
def test_its_checkpoints_give_the_same_logits_there_and_back(
    config: ModelConfig, shape: tuple[int, int], seed: int
) -> None:
    note(f"{config}")
    theirs = peer_model(config)
    enliven(theirs, seed, 0.15)
    tokens_BS = random_tokens(config, *shape, seed)
    logits_BSO, choices, margin = run_peer(theirs, tokens_BS)
    assume(margin > SMALLEST_MARGIN)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(Path(folder, "theirs"))
        ours = load_model(Path(folder, "theirs"))
        assert replace(ours.config, initializer_range=0.02) == config
        save_model(ours, Path(folder, "ours"), max_shard_size=5000)
        with quietly():
            again, info = AutoModelForCausalLM.from_pretrained(
                Path(folder, "ours"), dtype=torch.float32, output_loading_info=True, **PLAIN
            )
    with torch.no_grad():
        hidden = ours.forward_hidden(tokens_BS)
        found_BSO = ours.logits(hidden.h_BSD)
    assert len(choices) == len(hidden.router.topk_ids_LBSK)
    for ids_BSK, ids_NK in zip(hidden.router.topk_ids_LBSK, choices, strict=True):
        assert torch.equal(ids_BSK.flatten(0, 1).sort(-1).values, ids_NK.sort(-1).values)
    assert relative_error(found_BSO, logits_BSO) <= 1e-5
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert relative_error(run_peer(again.eval(), tokens_BS)[0], logits_BSO) <= 1e-6
