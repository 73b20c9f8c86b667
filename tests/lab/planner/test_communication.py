"""Bytes on the wires against counting tokens one by one on random routing."""

from dataclasses import replace

import pytest
import torch

from fathom.lab.planner.assumptions import Assumptions
from fathom.lab.planner.communication import (
    Traffic,
    blocks_touched,
    dispatch_and_combine,
    expert_traffic,
    gradient_traffic,
    stage_traffic,
    tensor_traffic,
)
from fathom.lab.planner.hardware import GPUS, Cluster
from fathom.lab.planner.layout import Layout
from fathom.model.config import ModelConfig
from tests.model.configs import tiny

CONFIG = tiny(n_routed_experts=64, n_group=8, topk_group=4, num_experts_per_tok=6, hidden_size=32)
CLUSTER = Cluster(GPUS["h800"], 64, 4)
TOKENS = 20_000


def routing(config: ModelConfig) -> torch.Tensor:
    """Experts (N, K) of tokens routed uniformly within uniformly chosen groups."""
    draw = torch.Generator().manual_seed(0)
    size = config.n_routed_experts // config.n_group
    groups_NG = torch.rand(TOKENS, config.n_group, generator=draw).argsort(1)[:, : config.topk_group]
    within_NE = torch.rand(TOKENS, config.topk_group * size, generator=draw).argsort(1)[:, : config.num_experts_per_tok]
    return groups_NG.gather(1, within_NE // size) * size + within_NE % size


def distinct(ids_NK: torch.Tensor, size: int, blocks: int) -> torch.Tensor:
    """Which of `blocks` blocks of `size` experts each token is routed to, (N, blocks)."""
    return torch.zeros(len(ids_NK), blocks, dtype=torch.bool).scatter(1, ids_NK // size, True)


@pytest.mark.parametrize("blocks", [1, 2, 4, 8, 16, 64])
@pytest.mark.parametrize("groups", [(8, 4), (8, 1), (1, 1), (4, 3)])
def test_blocks_touched(blocks: int, groups: tuple[int, int]) -> None:
    config = replace(CONFIG, n_group=groups[0], topk_group=groups[1])
    counted = distinct(routing(config), config.n_routed_experts // blocks, blocks).sum(1).float().mean().item()
    assert blocks_touched(config, blocks) == pytest.approx(counted, rel=0.01)


def test_the_671b_model_reaches_at_most_four_nodes() -> None:
    assert 3.5 < blocks_touched(ModelConfig(), 8) < 4


@pytest.mark.parametrize("expert", [4, 16, 32])
def test_expert_traffic(expert: int) -> None:
    """A token is sent to each other node once, and within a node to each other GPU."""
    layout, experts = Layout(expert=expert), CONFIG.n_routed_experts
    per_node = CLUSTER.per_node
    ranks_NR = distinct(routing(CONFIG), experts // expert, expert)
    nodes = expert // per_node
    home_N = torch.arange(TOKENS) % expert
    nodes_NM = ranks_NR.unflatten(1, (nodes, per_node)).any(2)
    away = nodes_NM.sum() - nodes_NM.gather(1, (home_N // per_node)[:, None]).sum()
    # In whichever node a token arrives, it lands on the GPU with its own number there.
    landing_N1 = (home_N % per_node)[:, None]
    same = (
        ranks_NR.unflatten(1, (nodes, per_node)).transpose(1, 2).gather(1, landing_N1[:, :, None].expand(-1, 1, nodes))
    )
    handed_on = ranks_NR.sum() - same.sum()
    found = expert_traffic(CONFIG, layout, CLUSTER, 2.0)
    scale = CONFIG.hidden_size * 2.0 / TOKENS
    assert found.network == pytest.approx(away.item() * scale, rel=0.02, abs=1e-9)
    assert found.link == pytest.approx(handed_on.item() * scale, rel=0.02)


def test_fp8_halves_dispatch_but_not_combine() -> None:
    wide, narrow = Layout(expert=16), Layout(expert=16, precision="fp8")
    out, back = dispatch_and_combine(CONFIG, narrow, CLUSTER)
    wide_out, wide_back = dispatch_and_combine(CONFIG, wide, CLUSTER)
    assert out.network == pytest.approx(wide_out.network * (1 + 4 / 128) / 2)
    assert back == wide_back == wide_out
    assert dispatch_and_combine(CONFIG, Layout(), CLUSTER) == (Traffic(0, 0), Traffic(0, 0))


def test_pipeline_and_tensor_parallel_traffic_by_hand() -> None:
    layout = Layout(pipeline=8, micro_batch=2, length=100)
    assert stage_traffic(CONFIG, layout, CLUSTER) == Traffic(2 * 100 * 32 * 2, 0)
    assert stage_traffic(CONFIG, replace(layout, pipeline=4), CLUSTER) == Traffic(0, 2 * 100 * 32 * 2)
    assert stage_traffic(CONFIG, replace(layout, pipeline=1), CLUSTER) == Traffic(0, 0)
    # Gather and scatter around attention and feed-forward, three quarters of the bytes to others.
    assert tensor_traffic(CONFIG, replace(layout, tensor=4)) == Traffic(0, 4 * 32 * 2 * 3 / 4)


@pytest.mark.parametrize(("zero", "bytes_"), [(0, 8), (1, 6), (2, 6), (3, 4 + 4 * 5)])
def test_gradients_by_hand(zero: int, bytes_: int) -> None:
    # 64 data parallel ranks, of which 16 share the experts: 4 hold the same ones. Five micro-batches.
    layout = Layout(expert=16, zero=zero, micro_batch=1, global_batch=320)  # type: ignore[arg-type]
    found = gradient_traffic(1000, 500, layout, CLUSTER)
    assert found.network == pytest.approx(bytes_ * (1000 * 63 / 64 + 500 * 3 / 4))
    alone = Layout(global_batch=5)
    assert gradient_traffic(1000, 500, alone, Cluster(GPUS["h800"], 1, 4)) == Traffic(0, 0)


def test_the_slower_link_decides() -> None:
    assumed = Assumptions(network=1.0, link=0.5)
    assert Traffic(50e9, 50e9).seconds(CLUSTER, assumed) == 1.0
    assert Traffic(50e9, 200e9).seconds(CLUSTER, assumed) == 2.0
