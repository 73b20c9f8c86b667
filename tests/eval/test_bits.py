"""Evaluation against the same figures computed directly in float64, one target at a time."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.data.batch import PADDING_DOCUMENT, Batch, document_ids, next_token_batch
from fathom.eval import bits
from fathom.eval.bits import Evaluation, evaluate
from fathom.model.config import ModelConfig
from fathom.model.transformer import Model
from tests.model.configs import lively_model, random_tokens, tiny

END = 1


Rows = list[tuple[Tensor, Tensor]]
"""Tokens and their documents, batch by batch."""


def make_rows(config: ModelConfig, length: int = 9) -> Rows:
    """Two batches whose rows hold several documents each, and a padded row as the end of a file leaves it."""
    width = length + 1 + config.num_nextn_predict_layers
    batches = []
    for seed, rows in ((0, 3), (1, 2)):
        tokens_BW = random_tokens(config, rows, width, seed)
        tokens_BW[:, 4] = END
        batches.append((tokens_BW, document_ids(tokens_BW, END)))
    tokens_BW = random_tokens(config, 1, width, seed=2)
    tokens_BW[:, 5:] = END
    documents_BW = document_ids(tokens_BW, END)
    documents_BW[:, 6:] = PADDING_DOCUMENT
    return [*batches, (tokens_BW, documents_BW)]


def as_batches(config: ModelConfig, rows: Rows) -> list[Batch]:
    return [
        next_token_batch(tokens_BW, config.num_nextn_predict_layers, documents_BW) for tokens_BW, documents_BW in rows
    ]


def make_batches(config: ModelConfig) -> list[Batch]:
    return as_batches(config, make_rows(config))


@torch.no_grad()
def direct(model: Model, rows: Rows, modules: int) -> dict[str, Any]:
    """Every target by itself: which head predicts it where, what it costs, and what each head guesses."""
    nats: list[list[float]] = [[] for _ in range(1 + modules)]
    agreed: list[list[bool]] = [[] for _ in range(modules)]
    for tokens_BW, documents_BW in rows:
        length = tokens_BW.shape[1] - 1 - modules
        states = model.forward_hidden(tokens_BW[:, :length], mtp=modules > 0, lookahead_BM=tokens_BW[:, length:-1])
        heads = [model.logits(h_BSD) for h_BSD in (states.h_BSD, *states.mtp_h_BSD)]
        for b in range(tokens_BW.shape[0]):
            for k, logits_BSO in enumerate(heads):
                for i in range(length):
                    here, there = documents_BW[b, i].item(), documents_BW[b, i + k + 1].item()
                    if there == PADDING_DOCUMENT or (k > 0 and here != there):
                        continue
                    nats[k].append(F.cross_entropy(logits_BSO[b, i], tokens_BW[b, i + k + 1]).item())
                    if k > 0 and i + k < length:
                        main_guess = heads[0][b, i + k].argmax()
                        agreed[k - 1].append(bool(logits_BSO[b, i].argmax() == main_guess))
    return {
        "tokens": len(nats[0]),
        "sum": sum(nats[0]),
        "losses": [sum(head) / len(head) for head in nats],
        "agreement": [sum(module) / len(module) for module in agreed],
    }


@pytest.mark.parametrize("modules", [0, 1, 2])
def test_figures_are_those_of_a_direct_computation(modules: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "_CHUNK_TOKENS", 7)  # so that chunks end in the middle of rows
    config = tiny(vocab_size=7, num_nextn_predict_layers=modules)
    model = lively_model(config, seed=3, std=0.2, dtype=torch.float64)
    rows = make_rows(config)
    found, expected = evaluate(model, as_batches(config, rows), total_bytes=123), direct(model, rows, modules)
    assert found.tokens == expected["tokens"] == 3 * 9 + 2 * 9 + 5
    assert found.loss == pytest.approx(expected["losses"][0], rel=1e-12)
    assert found.bits_per_byte == pytest.approx(expected["sum"] / math.log(2) / 123, rel=1e-12)
    assert list(found.mtp_losses) == pytest.approx(expected["losses"][1:], rel=1e-12)
    assert list(found.mtp_agreement) == pytest.approx(expected["agreement"], rel=1e-12)
    assert len(found.mtp_losses) == len(found.mtp_agreement) == modules
    if modules:
        assert 0 < found.mtp_agreement[0] < 1


def test_balance_counts_every_real_token_once() -> None:
    config = tiny(num_nextn_predict_layers=2)
    model, batches = lively_model(config, seed=3), make_batches(config)
    found = evaluate(model, batches, total_bytes=1)
    # Of the padded row, six tokens are real: inputs 0 to 5 of the main layers, tokens k to 5 of module k.
    real = [3 * 9 + 2 * 9 + 6] * config.num_moe_layers + [45 + 5, 45 + 4]
    assert found.tokens_per_expert_LE.sum(1).tolist() == [count * config.num_experts_per_tok for count in real]
    whole = evaluate(model, batches[:2], total_bytes=1)
    loads_NLE = torch.stack([model_loads(model, batch) for batch in batches[:2]])
    assert torch.equal(whole.tokens_per_expert_LE, loads_NLE.sum(0))
    vio_NL = loads_NLE.amax(-1) / loads_NLE.double().mean(-1) - 1
    assert whole.max_vio_batch == pytest.approx(vio_NL.mean(0).tolist())
    summed_LE = loads_NLE.sum(0).double()
    assert whole.max_vio_global == pytest.approx((summed_LE.amax(-1) / summed_LE.mean(-1) - 1).tolist())


@torch.no_grad()
def model_loads(model: Model, batch: Batch) -> Tensor:
    return model.forward_hidden(batch.inputs, mtp=True, lookahead_BM=batch.lookahead).router.tokens_per_expert_LE


def test_batches_of_any_size_give_the_same_figures() -> None:
    config = tiny(num_nextn_predict_layers=1)
    model, rows = lively_model(config, dtype=torch.float64), make_rows(config)
    singles = [tuple(t[b : b + 1] for t in both) for both in rows for b in range(len(both[0]))]
    whole, single = (evaluate(model, as_batches(config, each), 9) for each in (rows, singles))
    assert single.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=1e-12)
    assert single.mtp_losses == pytest.approx(whole.mtp_losses, rel=1e-12)
    assert single.mtp_agreement == whole.mtp_agreement
    assert torch.equal(single.tokens_per_expert_LE, whole.tokens_per_expert_LE)
    assert single.max_vio_global == whole.max_vio_global


def test_a_uniform_model_needs_log2_of_the_vocabulary_per_token() -> None:
    config = tiny(num_nextn_predict_layers=1, vocab_size=32)
    model = lively_model(config)
    torch.nn.init.zeros_(model.lm_head.weight)
    found = evaluate(model, make_batches(config), total_bytes=100)
    assert found.bits_per_byte == pytest.approx(5 * found.tokens / 100)
    assert found.mtp_losses == pytest.approx([math.log(32)])


def test_activations_may_be_narrower_than_the_weights() -> None:
    config = tiny(num_nextn_predict_layers=1)
    model, batches = lively_model(config), make_batches(config)
    wide, narrow = evaluate(model, batches, 9), evaluate(model, batches, 9, compute_dtype=torch.bfloat16)
    assert narrow.loss != wide.loss
    assert narrow.loss == pytest.approx(wide.loss, rel=0.02)


def test_a_router_without_tokens_in_a_batch_is_left_out_of_its_mean() -> None:
    """A tail of two real tokens gives the second module nothing to route."""
    config = tiny(num_nextn_predict_layers=2)
    model, batches = lively_model(config), make_batches(config)
    tokens_BW, documents_BW = make_rows(config)[2]
    documents_BW[:, 2:] = PADDING_DOCUMENT
    tail = next_token_batch(tokens_BW, 2, documents_BW)
    alone, followed = evaluate(model, batches[:1], 9), evaluate(model, [batches[0], tail], 9)
    assert followed.max_vio_batch[-1] == alone.max_vio_batch[-1]
    assert followed.max_vio_batch[0] != alone.max_vio_batch[0]


def test_a_model_of_dense_layers_has_no_balance() -> None:
    config = tiny(first_k_dense_replace=3)
    found: Evaluation = evaluate(lively_model(config), make_batches(config), 9)
    assert found.tokens_per_expert_LE.shape == (0, config.n_routed_experts)
    assert found.max_vio_global == found.max_vio_batch == ()


def test_impossible_requests_are_named() -> None:
    config = tiny(num_nextn_predict_layers=1)
    model, batches = lively_model(config), make_batches(config)
    with pytest.raises(ValueError, match="total_bytes is 0; it must be"):
        evaluate(model, batches, 0)
    with pytest.raises(ValueError, match="batches hold no target"):
        evaluate(model, [], 9)
    padding = [
        next_token_batch(tokens_BW, 1, torch.full_like(tokens_BW, PADDING_DOCUMENT))
        for tokens_BW, _ in make_rows(config)
    ]
    with pytest.raises(ValueError, match="batches hold no target"):
        evaluate(model, padding, 9)
    with pytest.raises(ValueError, match="targets for 3 heads; it must have 2: the main one and 1 MTP modules"):
        evaluate(model, make_batches(tiny(num_nextn_predict_layers=2)), 9)
