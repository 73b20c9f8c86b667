"""The whole model: gradients against finite differences, causality, independent rows, MTP's alignment."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fathom.model.config import ModelConfig
from fathom.model.rope import rope_table
from fathom.model.rope_scaling import YarnScaling
from fathom.model.transformer import Model
from tests.model.configs import lively_model, model_configs, random_tokens, relative_error, tiny

seeds = st.integers(0, 2**32 - 1)


def training_loss(model: Model, tokens_BT: Tensor) -> Tensor:
    """Cross-entropy of the next token, of MTP's, and the balance loss: all that training differentiates."""
    modules = model.config.num_nextn_predict_layers
    length = tokens_BT.shape[1] - 1 - modules
    hidden = model.forward_hidden(tokens_BT[:, :length], mtp=True, lookahead_BM=tokens_BT[:, length : length + modules])
    loss = 0.1 * hidden.router.balance_loss
    for ahead, h_BSD in enumerate((hidden.h_BSD, *hidden.mtp_h_BSD), start=1):
        targets_BS = tokens_BT[:, ahead : ahead + length]
        loss = loss + F.cross_entropy(model.logits(h_BSD).flatten(0, 1), targets_BS.flatten())
    return loss


def finite_difference(function: Callable[[], Tensor], parameter: Tensor, step: Tensor, size: float) -> float:
    """(f(p + size·step) − f(p − size·step)) / 2·size, leaving p as it was."""
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter.copy_(kept + size * step)
        above = function()
        parameter.copy_(kept - size * step)
        below = function()
        parameter.copy_(kept)
    return float((above - below) / (2 * size))


@pytest.mark.parametrize(
    "config",
    [
        tiny(num_nextn_predict_layers=2),
        tiny(num_nextn_predict_layers=1, tie_word_embeddings=True, q_lora_rank=None, norm_topk_prob=False),
        tiny(rope_scaling=YarnScaling(4.0, 8, mscale=0.7, mscale_all_dim=1.0), num_nextn_predict_layers=1),
    ],
    ids=["two modules", "tied, direct queries, plain weights", "yarn"],
)
def test_gradients_of_every_parameter_equal_finite_differences(config: ModelConfig) -> None:
    model = lively_model(config, seed=3, std=0.3, dtype=torch.float64)
    tokens_BT = random_tokens(config, 2, 9)
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(training_loss(model, tokens_BT), list(parameters.values()))
    generator = torch.Generator().manual_seed(0)
    for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
        step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        # Small enough that no token changes its experts, where the loss would jump.
        slope = finite_difference(lambda: training_loss(model, tokens_BT), parameter, step, 1e-6)
        assert float((grad * step).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-7), name
        assert grad.abs().max() > 0, f"the loss does not depend on {name}"


@settings(max_examples=20, deadline=None)
@given(model_configs(), seeds)
@torch.no_grad()
def test_hidden_and_logits_compose_the_call(config: ModelConfig, seed: int) -> None:
    model, tokens_BS = lively_model(config, seed), random_tokens(config, 2, 5, seed)
    out = model(tokens_BS)
    assert out.mtp_logits is None
    assert out.logits_BSO.shape == (2, 5, config.vocab_size)
    assert torch.equal(out.logits_BSO, model.logits(model.hidden(tokens_BS)))
    hidden, with_mtp = model.forward_hidden(tokens_BS, mtp=True), model(tokens_BS, mtp=True)
    assert torch.equal(with_mtp.logits_BSO, out.logits_BSO)
    assert with_mtp.mtp_logits is not None
    assert len(with_mtp.mtp_logits) == len(hidden.mtp_h_BSD) == config.num_nextn_predict_layers
    for ahead, (logits, h_BSD) in enumerate(zip(with_mtp.mtp_logits, hidden.mtp_h_BSD, strict=True), start=1):
        assert torch.equal(logits, model.logits(h_BSD)) and logits.shape[1] == 5 - ahead


@settings(max_examples=10, deadline=None)
@given(model_configs(modules=(0, 0)), seeds, st.integers(0, 4))
@torch.no_grad()
def test_stages_on_models_that_hold_their_own_layers_compose_the_whole(
    config: ModelConfig, seed: int, cut: int
) -> None:
    """Two ranks of a pipeline: each has identities in the place of the other's modules."""
    model, tokens_BS = lively_model(config, seed), random_tokens(config, 2, 5, seed)
    whole = model.forward_hidden(tokens_BS)
    cut = min(cut, config.num_hidden_layers)
    first, second = (copy.deepcopy(model) for _ in range(2))
    for index in range(config.num_hidden_layers):
        (second if index < cut else first).layers[index] = torch.nn.Identity()
    first.norm = second.embed_tokens = torch.nn.Identity()  # type: ignore[assignment]
    rope = rope_table(config, torch.arange(5))
    x_BSD, routing = first.run_layers(range(cut), first.embed(tokens_BS), rope)
    x_BSD, more = second.run_layers(range(cut, config.num_hidden_layers), x_BSD, rope)
    assert torch.equal(second.finish(x_BSD), whole.h_BSD)
    for found, expected in zip((*routing, *more), whole.router.layers, strict=True):
        assert found.rerouted_BS is None and all(map(torch.equal, found[:4], expected[:4]))


@torch.no_grad()
def test_old_names_give_the_same_and_warn() -> None:
    config = tiny()
    model, tokens_BS = lively_model(config), random_tokens(config, 2, 5)
    new = model.forward_hidden(tokens_BS)
    with pytest.warns(DeprecationWarning, match="Model.states is now called forward_hidden") as caught:
        old = model.states(tokens_BS)
    assert caught[0].filename == __file__ and torch.equal(old.h_BSD, new.h_BSD)
    with pytest.warns(DeprecationWarning, match="loads_LE is now called tokens_per_expert_LE") as caught:
        assert torch.equal(new.router.loads_LE, new.router.tokens_per_expert_LE)
    assert caught[0].filename == __file__


@settings(max_examples=20, deadline=None)
@given(model_configs(modules=(1, 3)), seeds)
@torch.no_grad()
def test_lookahead_covers_every_position_and_changes_none(config: ModelConfig, seed: int) -> None:
    modules, length = config.num_nextn_predict_layers, 6
    model = lively_model(config, seed, dtype=torch.float64)
    tokens_BT = random_tokens(config, 2, length + modules, seed)
    tokens_BS, lookahead_BM = tokens_BT.split((length, modules), dim=1)
    known, cut = (
        model.forward_hidden(tokens_BS, mtp=True, lookahead_BM=lookahead_BM),
        model.forward_hidden(tokens_BS, mtp=True),
    )
    whole = model.forward_hidden(tokens_BT, mtp=True)
    assert torch.equal(known.h_BSD, cut.h_BSD)
    for ahead, h_BSD in enumerate(known.mtp_h_BSD, start=1):
        assert h_BSD.shape[1] == length
        assert relative_error(h_BSD[:, : length - ahead], cut.mtp_h_BSD[ahead - 1]) <= 1e-10
        assert relative_error(h_BSD, whole.mtp_h_BSD[ahead - 1][:, :length]) <= 1e-10


@settings(max_examples=20, deadline=None)
@given(model_configs(modules=(1, 2)), seeds, st.integers(0, 6))
@torch.no_grad()
def test_a_token_changes_no_earlier_position(config: ModelConfig, seed: int, changed: int) -> None:
    model, tokens_BS = lively_model(config, seed, dtype=torch.float64), random_tokens(config, 1, 7, seed)
    other_BS = tokens_BS.clone()
    other_BS[0, changed] = (other_BS[0, changed] + 1) % config.vocab_size
    before, after = model(tokens_BS, mtp=True), model(other_BS, mtp=True)
    assert before.mtp_logits is not None and after.mtp_logits is not None
    passes = [before.logits_BSO, *before.mtp_logits], [after.logits_BSO, *after.mtp_logits]
    for ahead, (one_BSO, two_BSO) in enumerate(zip(*passes, strict=True)):
        # Module k takes the token k places ahead, so position t − k is the first that depends on token t.
        first = min(max(changed - ahead, 0), one_BSO.shape[1])
        assert torch.allclose(one_BSO[:, :first], two_BSO[:, :first], rtol=0, atol=1e-10)
        if first < one_BSO.shape[1]:
            assert not torch.allclose(one_BSO[:, first], two_BSO[:, first], rtol=0, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(model_configs(), seeds)
@torch.no_grad()
def test_rows_of_a_batch_are_independent(config: ModelConfig, seed: int) -> None:
    model, tokens_BS = lively_model(config, seed, dtype=torch.float64), random_tokens(config, 3, 6, seed)
    whole = model(tokens_BS, mtp=True)
    for row in range(3):
        alone = model(tokens_BS[row : row + 1], mtp=True)
        assert relative_error(alone.logits_BSO[0], whole.logits_BSO[row]) <= 1e-10
        for one, all_rows in zip(alone.mtp_logits or (), whole.mtp_logits or (), strict=True):
            assert relative_error(one[0], all_rows[row]) <= 1e-10


@settings(max_examples=20, deadline=None)
@given(model_configs(), st.integers(1, 3), st.integers(3, 7), seeds)
@torch.no_grad()
def test_no_token_is_dropped(config: ModelConfig, batch: int, length: int, seed: int) -> None:
    model = lively_model(config, seed)
    router = model(random_tokens(config, batch, length, seed), mtp=True).router
    layers, modules = config.num_moe_layers, config.num_nextn_predict_layers
    tokens = [batch * length] * layers + [batch * (length - k) for k in range(1, modules + 1)]
    assert router.tokens_per_expert_LE.shape == (layers + modules, config.n_routed_experts)
    assert router.tokens_per_expert_LE.dtype == torch.int64
    assert router.tokens_per_expert_LE.sum(1).tolist() == [count * config.num_experts_per_tok for count in tokens]
    for tokens_per_expert_E, ids_BSK in zip(router.tokens_per_expert_LE, router.topk_ids_LBSK, strict=True):
        assert torch.equal(ids_BSK.flatten().bincount(minlength=config.n_routed_experts), tokens_per_expert_E)
        assert all(len(set(ids)) == config.num_experts_per_tok for ids in ids_BSK.flatten(0, 1).tolist())
    assert len(model.routers()) == layers + modules


@torch.no_grad()
def test_compute_type_is_that_of_the_activations() -> None:
    config = tiny(num_nextn_predict_layers=1)
    model, tokens_BS = lively_model(config), random_tokens(config, 2, 6)
    hidden = model.forward_hidden(tokens_BS, mtp=True, compute_dtype=torch.bfloat16)
    assert hidden.h_BSD.dtype == hidden.mtp_h_BSD[0].dtype == torch.bfloat16
    exact = model.forward_hidden(tokens_BS, mtp=True)
    assert exact.h_BSD.dtype == torch.float32
    assert relative_error(hidden.h_BSD.float(), exact.h_BSD) < 0.1


@pytest.mark.parametrize(
    "tokens_BS",
    [torch.tensor([1, 2, 3]), torch.rand(2, 3), torch.zeros(2, 0, dtype=torch.int64), torch.tensor(3)],
    ids=["one dimension", "floats", "empty", "scalar"],
)
def test_wrong_tokens_are_named(tokens_BS: Tensor) -> None:
    with pytest.raises(ValueError, match=r"integers of shape \(batch, length\), got torch\."):
        Model(tiny())(tokens_BS)


def test_sequences_too_short_for_mtp_are_named() -> None:
    with pytest.raises(ValueError, match="too short for MTP module 2"):
        Model(tiny(num_nextn_predict_layers=2))(torch.tensor([[1, 2]]), mtp=True)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_begin_as_the_report_says(tied: bool) -> None:
    config = tiny(hidden_size=64, vocab_size=500, tie_word_embeddings=tied, num_nextn_predict_layers=1)
    model = Model(config)
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        elif parameter.numel() > 1000:
            assert parameter.std().item() == pytest.approx(config.initializer_range, rel=0.15), name
            assert parameter.mean().abs().item() < 0.1 * config.initializer_range, name
    assert all((router.e_score_correction_bias == 0).all() for router in model.routers())
