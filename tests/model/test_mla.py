"""The two forms of latent attention compute the same, and the cache holds C+R elements per token.

Contract of unused slots: finite values beyond a query's position never reach its result. (Zero times NaN is NaN, so
caches are allocated with zeros; rejected drafts leave finite values behind.)
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fathom.model.cached_batch import prefer_expanded
from fathom.model.config import ModelConfig
from fathom.model.mla import MultiHeadLatentAttention
from fathom.model.rope import rope_table
from fathom.model.rope_scaling import YarnScaling
from fathom.model.transformer import Model
from fathom.ops.rope import apply_rope
from tests.model.configs import (
    enliven,
    lively_model,
    model_configs,
    random_tokens,
    relative_error,
    rows_of_a_cache,
    tiny,
)

GARBAGE = 1e4
seeds = st.integers(0, 2**32 - 1)


def attention(config: ModelConfig, seed: int) -> MultiHeadLatentAttention:
    layer = MultiHeadLatentAttention(config).double()
    enliven(layer, seed, std=0.4)
    return layer


def random_hidden(config: ModelConfig, batch: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, config.hidden_size, generator=generator, dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(model_configs(), st.integers(1, 3), st.integers(1, 9), seeds)
@torch.no_grad()
def test_absorbed_equals_expanded(config: ModelConfig, batch: int, length: int, seed: int) -> None:
    layer, x_BSD = attention(config, seed), random_hidden(config, batch, length, seed)
    positions_S = torch.arange(length)
    rope = rope_table(config, positions_S)
    q_BSHX, (c_BSC, k_rope_BSR) = layer.queries(x_BSD), layer.latents(x_BSD, rope)
    expanded_BSHV = layer.expanded(q_BSHX, c_BSC, k_rope_BSR, rope)
    cache_BTW = torch.cat((c_BSC, k_rope_BSR), dim=-1)
    absorbed_BSHV = layer.absorbed(q_BSHX, cache_BTW, positions_S.expand(batch, -1), rope)
    assert relative_error(absorbed_BSHV, expanded_BSHV) <= 1e-10


@torch.no_grad()
def test_forward_equals_attention_written_out() -> None:
    """Scores, scale and output of spec's table, position by position, from the projections' weights."""
    config = tiny(rope_scaling=YarnScaling(8.0, 16, mscale=0.7, mscale_all_dim=0.9))
    layer, x_BSD = attention(config, 3), random_hidden(config, 2, 6, 3)
    rope = rope_table(config, torch.arange(6))
    q_nope, q_rope = layer.queries(x_BSD).split((config.qk_nope_head_dim, config.qk_rope_head_dim), -1)
    q_rope, (c_BSC, k_rope) = apply_rope(q_rope, rope), layer.latents(x_BSD, rope)
    up_HYC = layer.kv_b_proj.weight.unflatten(0, (config.num_attention_heads, -1))
    mscale = 0.1 * 0.9 * torch.tensor(8.0, dtype=torch.float64).log() + 1
    scale = mscale**2 / (config.qk_nope_head_dim + config.qk_rope_head_dim) ** 0.5
    heads = torch.zeros(2, 6, config.num_attention_heads, config.v_head_dim, dtype=torch.float64)
    for b in range(2):
        for h in range(config.num_attention_heads):
            keys, values = (c_BSC[b] @ up_HYC[h].T).split((config.qk_nope_head_dim, config.v_head_dim), -1)
            for i in range(6):
                scores = keys[: i + 1] @ q_nope[b, i, h] + k_rope[b, : i + 1] @ q_rope[b, i, h]
                heads[b, i, h] = (scores * scale).softmax(0) @ values[: i + 1]
    assert relative_error(layer(x_BSD, rope), heads.flatten(2) @ layer.o_proj.weight.T) <= 1e-12


@settings(max_examples=25, deadline=None)
@given(model_configs(), st.integers(1, 3), st.lists(st.integers(1, 4), min_size=1, max_size=5), seeds)
@torch.no_grad()
def test_cached_chunks_equal_one_pass(config: ModelConfig, batch: int, chunks: list[int], seed: int) -> None:
    """Chunks of any size; unused slots, among the attended ones and past them, hold garbage."""
    model, length = lively_model(config, seed, dtype=torch.float64), sum(chunks)
    tokens_BS = random_tokens(config, batch, length, seed)
    cache_LBTW = poisoned_cache(config, batch, length + 3)
    found, start = [], 0
    for number, size in enumerate(chunks):
        positions_BS = torch.arange(start, start + size).expand(batch, -1)
        visible = start + size + number % 3
        chunk_BS = tokens_BS[:, start : start + size]
        # Both forms, whichever would be cheaper; the expanded one takes one sequence, and no slots past its end.
        expand = batch == 1 and number % 2 == 0
        seen = start + size if expand else visible
        rows = rows_of_a_cache(positions_BS, cache_LBTW, seen, expand)
        found.append(model.forward_with_cache(chunk_BS.flatten(), rows)[0].unflatten(0, (batch, size)))
        start += size
    assert relative_error(torch.cat(found, dim=1), model.hidden(tokens_BS)) <= 1e-9


@torch.no_grad()
def test_rows_of_a_batch_may_be_at_different_positions() -> None:
    config = tiny()
    model = lively_model(config, dtype=torch.float64)
    tokens_BS, used = random_tokens(config, 3, 9), [2, 5, 7]
    cache_LBTW = poisoned_cache(config, 3, 9)
    for row, length in enumerate(used):
        positions_BS = torch.arange(length)[None]
        own = rows_of_a_cache(positions_BS, cache_LBTW[:, row : row + 1].contiguous())
        model.forward_with_cache(tokens_BS[row, :length], own)
        cache_LBTW[:, row : row + 1] = own.cache_LMW.unflatten(1, (1, 9))
    positions_BS = torch.tensor(used)[:, None] + torch.arange(2)
    new_BS = tokens_BS.gather(1, positions_BS)
    found_BSD = model.forward_with_cache(new_BS.flatten(), rows_of_a_cache(positions_BS, cache_LBTW))[0].unflatten(
        0, (3, 2)
    )
    whole_BSD = model.hidden(tokens_BS)
    expected_BSD = torch.stack([whole_BSD[row, start : start + 2] for row, start in enumerate(used)])
    assert relative_error(found_BSD, expected_BSD) <= 1e-9


@torch.no_grad()
def test_a_rejected_draft_leaves_no_trace() -> None:
    config = tiny()
    model = lively_model(config, dtype=torch.float64)
    tokens_BS = random_tokens(config, 1, 6)
    cache_LBTW = poisoned_cache(config, 1, 8)
    positions_BS = torch.arange(8)[None]
    model.forward_with_cache(tokens_BS[0, :4], rows_of_a_cache(positions_BS[:, :4], cache_LBTW, 4))
    draft_BS = (tokens_BS[:, 4:] + 1) % config.vocab_size
    model.forward_with_cache(draft_BS[0], rows_of_a_cache(positions_BS[:, 4:6], cache_LBTW, 6))
    # The draft's second token is still in slot 5, which is among the attended ones.
    found_ND = model.forward_with_cache(tokens_BS[0, 4:5], rows_of_a_cache(positions_BS[:, 4:5], cache_LBTW, 6))[0]
    assert relative_error(found_ND, model.hidden(tokens_BS)[0, 4:5]) <= 1e-9


@pytest.mark.parametrize("module", [0, 1])
@torch.no_grad()
def test_mtp_modules_decode_from_their_cache(module: int) -> None:
    """Token by token as in one pass; module 2 takes module 1's hidden states."""
    config = tiny(num_nextn_predict_layers=2)
    model = lively_model(config, dtype=torch.float64)
    tokens_BS = random_tokens(config, 2, 8)
    hidden = model.forward_hidden(tokens_BS, mtp=True)
    before_BSD = (hidden.h_BSD, *hidden.mtp_h_BSD)[module]
    expected_BSD, ahead = hidden.mtp_h_BSD[module], module + 1
    # Slots count from the module's own first entry: positions are relative.
    slots_BS = torch.arange(8 - ahead).expand(2, -1)
    cache_LBTW = poisoned_cache(config, 2, 8 - ahead, layers=config.num_hidden_layers + 2)
    found = [
        model.forward_mtp_with_cache(
            module, tokens_BS[:, i + ahead], before_BSD[:, i], rows_of_a_cache(slots_BS[:, i, None], cache_LBTW)
        )
        for i in range(8 - ahead)
    ]
    assert relative_error(torch.stack(found, dim=1), expected_BSD) <= 1e-9


@torch.no_grad()
def test_the_cache_is_the_latent_and_the_shared_key() -> None:
    config = tiny()
    layer, x_BSD = attention(config, 0), random_hidden(config, 2, 5, 0)
    assert config.cache_width == config.kv_lora_rank + config.qk_rope_head_dim
    cache_BTW = torch.full((2, 7, config.cache_width), GARBAGE, dtype=torch.float64)
    positions_BS = torch.tensor([[0, 1, 2, 3, 4], [2, 3, 4, 5, 6]])
    batch = rows_of_a_cache(positions_BS, cache_BTW[None])
    layer(x_BSD.flatten(0, 1)[None], rope_table(config, batch.positions), batch.layer(0))
    written_BSW = torch.cat(layer.latents(x_BSD, rope_table(config, positions_BS)), dim=-1)
    assert torch.equal(cache_BTW[0, :5], written_BSW[0]) and torch.equal(cache_BTW[1, 2:], written_BSW[1])
    assert (cache_BTW[0, 5:] == GARBAGE).all() and (cache_BTW[1, :2] == GARBAGE).all()


def test_the_released_model_caches_70272_bytes_per_token() -> None:
    config = ModelConfig()
    assert config.cache_width * config.num_hidden_layers * 2 == 70272


@torch.no_grad()
def test_decoding_never_expands_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny()
    model: Model = lively_model(config)
    cache_LBTW = torch.zeros(config.num_hidden_layers, 1, 8, config.cache_width)
    tokens_BS = random_tokens(config, 1, 8)
    model.forward_with_cache(tokens_BS[0, :7], rows_of_a_cache(torch.arange(7)[None], cache_LBTW, 7, expand=True))
    # Taking the expanded form would now be an AttributeError.
    monkeypatch.delattr(MultiHeadLatentAttention, "_varlen")
    h_ND = model.forward_with_cache(tokens_BS[0, 7:], rows_of_a_cache(torch.tensor([[7]]), cache_LBTW))[0]
    monkeypatch.undo()
    torch.testing.assert_close(h_ND, model.hidden(tokens_BS)[0, 7:], rtol=1e-4, atol=1e-5)


def test_the_expanded_form_is_cheaper_for_many_queries_alone() -> None:
    """Prefill takes the expanded form; a long cache is never expanded for one token."""
    widths = (64, 32, 64, 256)
    assert prefer_expanded(512, 512, *widths) and prefer_expanded(512, 2048, *widths)
    assert not any(prefer_expanded(1, keys, *widths) for keys in (2, 64, 16384))


def poisoned_cache(config: ModelConfig, batch: int, slots: int, layers: int | None = None) -> Tensor:
    shape = (layers or config.num_hidden_layers, batch, slots, config.cache_width)
    return torch.full(shape, GARBAGE, dtype=torch.float64)
