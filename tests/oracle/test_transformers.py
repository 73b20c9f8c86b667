"""`transformers` as the reference: its checkpoints give the same logits here, and ours give them there."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from torch import Tensor

from fathom.checkpoint.hf.model import load_model, save_model
from fathom.model.config import ModelConfig
from fathom.model.transformer import Model
from tests.model.configs import (
    boundaries,
    enliven,
    lively_model,
    model_configs,
    packed_rows,
    random_tokens,
    relative_error,
)
from tests.oracle.peers import SMALLEST_MARGIN, Choice, load_peer, peer_model, quietly, run_peer

pytestmark = pytest.mark.oracle

shapes = st.tuples(st.integers(1, 3), st.integers(1, 13))
stds = st.sampled_from([0.05, 0.1, 0.2])
seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(model_configs(), shapes, stds, seeds, st.sampled_from([3000, 10**9]))
def test_its_checkpoints_give_the_same_logits_and_experts(
    config: ModelConfig, shape: tuple[int, int], std: float, seed: int, max_shard_size: int
) -> None:
    note(f"{config}")
    theirs = peer_model(config)
    enliven(theirs, seed, std)
    tokens_BS = random_tokens(config, *shape, seed)
    logits_BSO, choices = run_peer(theirs, tokens_BS)
    assume(all(choice.margin > SMALLEST_MARGIN for choice in choices))

    with tempfile.TemporaryDirectory() as folder:
        there, back = Path(folder, "theirs"), Path(folder, "ours")
        with quietly():  # it promises MTP modules in config.json and does not save them
            theirs.save_pretrained(there)
            ours = load_model(there)
        assert_same(ours, tokens_BS, logits_BSO, choices)
        save_model(ours, back, max_shard_size=max_shard_size)
        again, info = load_peer(back, config.num_hidden_layers)
    assert_all_keys_fit(info)
    assert_same_tensors(again.state_dict(), theirs.state_dict())
    lift_out_of_the_file(again)
    assert torch.equal(run_peer(again, tokens_BS)[0], logits_BSO)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(model_configs(modules=(1, 2)), shapes, stds, seeds)
def test_our_checkpoints_with_mtp_modules_load_there(
    config: ModelConfig, shape: tuple[int, int], std: float, seed: int
) -> None:
    note(f"{config}")
    ours = lively_model(config, seed, std)
    tokens_BS = random_tokens(config, *shape, seed)
    with tempfile.TemporaryDirectory() as folder:
        save_model(ours, Path(folder, "ours"), max_shard_size=5000)
        theirs, info = load_peer(Path(folder, "ours"), config.num_hidden_layers)
    assert_all_keys_fit(info)
    assert theirs.config.num_nextn_predict_layers == config.num_nextn_predict_layers
    logits_BSO, choices = run_peer(theirs, tokens_BS)
    assume(all(choice.margin > SMALLEST_MARGIN for choice in choices))
    assert_same(ours, tokens_BS, logits_BSO, choices)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(model_configs(modules=(0, 0)), packed_rows(), st.integers(0, 40), seeds)
def test_packed_segments_equal_a_block_diagonal_mask(
    config: ModelConfig, rows: list[list[int]], offset: int, seed: int
) -> None:
    """There the mask isolates segments, whose positions need not begin with 0."""
    ours, tokens_BS = lively_model(config, seed), random_tokens(config, len(rows), sum(rows[0]), seed)
    ids_BS = torch.tensor([[n for n, length in enumerate(row) for _ in range(length)] for row in rows])
    positions_BS = torch.stack([torch.cat([torch.arange(n) + offset * n for n in row]) for row in rows])
    seen_BST = (ids_BS[:, :, None] == ids_BS[:, None]).tril()
    with tempfile.TemporaryDirectory() as folder:
        save_model(ours, Path(folder, "ours"))
        theirs, _ = load_peer(Path(folder, "ours"), config.num_hidden_layers)
    mask_B1ST = torch.zeros(seen_BST.shape).masked_fill(~seen_BST, torch.finfo(torch.float32).min)[:, None]
    logits_BSO, choices = run_peer(theirs, tokens_BS, attention_mask=mask_B1ST, position_ids=positions_BS)
    assume(all(choice.margin > SMALLEST_MARGIN for choice in choices))
    with torch.no_grad():
        hidden = ours.forward_hidden(tokens_BS, positions_BS, boundaries(rows))
    assert relative_error(ours.logits(hidden.h_BSD).detach(), logits_BSO) <= 1e-5


def test_bfloat16_checkpoints_keep_biases_in_float32(tmp_path: Path) -> None:
    """Released biases sit near 5, where neighbouring bfloat16 values are 1/32 apart."""
    config = ModelConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        first_k_dense_replace=1, num_attention_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
        num_nextn_predict_layers=0,
    )  # fmt: skip
    ours = lively_model(config, dtype=torch.bfloat16)
    router = ours.routers()[0]
    router.e_score_correction_bias = 5 + 0.001 * torch.arange(8, dtype=torch.float32)
    save_model(ours, tmp_path / "model")
    theirs, _ = load_peer(tmp_path / "model", config.num_hidden_layers)
    found = theirs.model.layers[1].mlp.gate.e_score_correction_bias
    assert torch.equal(found, router.e_score_correction_bias)


def lift_out_of_the_file(model: torch.nn.Module) -> None:
    """The CPU's kernels depend on a tensor's alignment, which a mapped file decides; copies are aligned as new ones."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def assert_same(ours: Model, tokens_BS: Tensor, logits_BSO: Tensor, choices: list[Choice]) -> None:
    with torch.no_grad():
        hidden = ours.forward_hidden(tokens_BS)
        found_BSO = ours.logits(hidden.h_BSD)
    assert len(hidden.router.topk_ids_LBSK) == len(choices)
    for ids_BSK, choice in zip(hidden.router.topk_ids_LBSK, choices, strict=True):
        assert torch.equal(ids_BSK.flatten(0, 1).sort(-1).values, choice.ids_NK.sort(-1).values)
    assert relative_error(found_BSO, logits_BSO) <= 1e-5


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


def assert_all_keys_fit(info: dict[str, object]) -> None:
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem], f"{problem}: {info[problem]}"
