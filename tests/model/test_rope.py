"""Rotary positions: interleaved pairs as complex numbers, relative by nature, stretched by YaRN."""

import math

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from fathom.model.config import ModelConfig
from fathom.model.rope import rope_table, softmax_scale
from fathom.model.rope_scaling import YarnScaling
from fathom.ops.rope import Rope, apply_rope
from tests.model.configs import model_configs, tiny, yarns

positions_S = torch.tensor([0, 1, 2, 17, 130, 4095])


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def rotated(x: Tensor, rope: Rope) -> Tensor:
    """Each interleaved pair as a complex number, rotated by its angle: (…, J) complex."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(rope.cos.double(), rope.sin.double())


def test_interleaved_pairs_rotate_as_complex_numbers() -> None:
    rope = rope_table(tiny(qk_rope_head_dim=8), positions_S)
    x_BSR = random(2, 6, 8)
    halves = apply_rope(x_BSR, rope).unflatten(-1, (2, -1))
    found = torch.complex(halves[..., 0, :], halves[..., 1, :])
    assert torch.allclose(found, rotated(x_BSR, rope), rtol=0, atol=1e-12)


def test_heads_and_rows_share_or_own_their_positions() -> None:
    config, x_BSHR = tiny(), random(3, 6, 2, 4)
    shared = apply_rope(x_BSHR, rope_table(config, positions_S))
    own = apply_rope(x_BSHR, rope_table(config, positions_S.expand(3, -1)))
    single = torch.stack([apply_rope(x_BSHR[:, :, h], rope_table(config, positions_S)) for h in range(2)], dim=2)
    assert torch.equal(shared, own) and torch.equal(shared, single)


@pytest.mark.parametrize("yarn", [None, YarnScaling(4.0, 64)])
def test_scores_depend_on_distance_alone(yarn: YarnScaling | None) -> None:
    config = tiny(qk_rope_head_dim=8, rope_scaling=yarn)
    q_1R, k_1R = random(2, 1, 1, 8)

    def score(query: int, key: int) -> Tensor:
        rotated_q = apply_rope(q_1R, rope_table(config, torch.tensor([query])))
        return (rotated_q * apply_rope(k_1R, rope_table(config, torch.tensor([key])))).sum()

    for distance in (0, 1, 5, 100):
        assert torch.isclose(score(distance, 0), score(distance + 77, 77), rtol=0, atol=1e-4)
    assert not torch.isclose(score(1, 0), score(0, 1), rtol=0, atol=1e-2)


def test_angles_are_float32_whatever_the_activations() -> None:
    rope = rope_table(tiny(), positions_S)
    assert rope.cos.dtype == rope.sin.dtype == torch.float32
    assert apply_rope(torch.ones(1, 6, 4, dtype=torch.bfloat16), rope).dtype == torch.bfloat16


def written_out_yarn(config: ModelConfig, yarn: YarnScaling) -> tuple[list[float], float]:
    """Angle per position of each pair, and the factor on cos and sin, in Python's floats."""
    size, theta, s = config.qk_rope_head_dim, config.rope_theta, yarn.factor

    def dimension(rotations: float) -> float:
        return size * math.log(yarn.original_max_position_embeddings / (2 * math.pi * rotations)) / (
            2 * math.log(theta)
        )  # fmt: skip

    low = max(math.floor(dimension(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension(yarn.beta_slow)), size - 1)
    if low == high:
        high += 0.001
    frequencies = []
    for pair in range(size // 2):
        slowed = min(max((pair - low) / (high - low), 0), 1)
        plain = theta ** (-2 * pair / size)
        frequencies.append(plain / s * slowed + plain * (1 - slowed))
    return frequencies, temperatures(yarn)[0]


def temperatures(yarn: YarnScaling) -> tuple[float, float]:
    """The factors on cos and sin, and on the attention scale."""

    def mscale(m: float) -> float:
        return 0.1 * m * math.log(yarn.factor) + 1 if yarn.factor > 1 else 1.0

    both = yarn.mscale and yarn.mscale_all_dim
    of_rope = mscale(yarn.mscale) / mscale(yarn.mscale_all_dim) if both else mscale(1)
    return of_rope, mscale(yarn.mscale_all_dim) ** 2 if yarn.mscale_all_dim else 1.0


@settings(max_examples=100, deadline=None)
@given(model_configs(), yarns())
def test_yarn_is_the_formula(config: ModelConfig, yarn: YarnScaling) -> None:
    config = tiny(qk_rope_head_dim=config.qk_rope_head_dim, rope_theta=config.rope_theta, rope_scaling=yarn)
    frequencies, magnitude = written_out_yarn(config, yarn)
    angles_SJ = torch.arange(9)[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    rope = rope_table(config, torch.arange(9))
    assert torch.allclose(rope.cos.double(), angles_SJ.cos() * magnitude, rtol=0, atol=5e-6)
    assert torch.allclose(rope.sin.double(), angles_SJ.sin() * magnitude, rtol=0, atol=5e-6)
    plain_scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    assert math.isclose(softmax_scale(config), plain_scale * temperatures(yarn)[1], rel_tol=1e-12)


def test_the_released_settings_slow_the_low_frequencies_only() -> None:
    """s = 40, L0 = 4096, R = 64: pairs up to 10 as they were, from 23 on 40 times slower."""
    yarn = YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)
    released, plain = ModelConfig(rope_scaling=yarn), ModelConfig()
    one = torch.tensor([1])
    slowed_J = rope_table(plain, one).sin[0].double().asin() / rope_table(released, one).sin[0].double().asin()
    assert torch.allclose(slowed_J[:11], torch.ones(11, dtype=torch.float64), rtol=1e-5)
    assert torch.allclose(slowed_J[23:], torch.full((9,), 40.0, dtype=torch.float64), rtol=1e-4)
    assert (slowed_J.diff()[10:23] > 0).all()
    assert math.isclose(softmax_scale(released), 192**-0.5 * (0.1 * math.log(40) + 1) ** 2)


@pytest.mark.oracle
@settings(max_examples=50, deadline=None)
@given(model_configs(), yarns())
def test_yarn_equals_transformers(config: ModelConfig, yarn: YarnScaling) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from tests.oracle.peers import peer_config

    config = tiny(qk_rope_head_dim=config.qk_rope_head_dim, rope_theta=config.rope_theta, rope_scaling=yarn)
    frequencies_J, magnitude = ROPE_INIT_FUNCTIONS["yarn"](peer_config(config), device="cpu")
    angles_SJ = torch.arange(9.0)[:, None] * frequencies_J
    rope = rope_table(config, torch.arange(9))
    assert torch.allclose(rope.cos, angles_SJ.cos() * magnitude, rtol=0, atol=2e-6)
    assert torch.allclose(rope.sin, angles_SJ.sin() * magnitude, rtol=0, atol=2e-6)
