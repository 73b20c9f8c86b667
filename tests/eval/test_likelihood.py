"""Likelihoods of continuations and texts, against the model's own logits taken one row at a time."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fathom.data.tokenizer import Tokenizer, train_tokenizer
from fathom.eval import likelihood
from fathom.eval.likelihood import Continuation, likelihoods, text_bits, windows
from fathom.model.transformer import Model
from tests.model.configs import lively_model, tiny

CONTEXT = 24


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat sat on the mat\n"] * 3, 280)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Model:
    return lively_model(tiny(vocab_size=tokenizer.vocab_size, max_position_embeddings=CONTEXT), std=0.2)


@torch.no_grad()
def alone(model: Model, context: list[int], ids: list[int]) -> tuple[float, bool]:
    """By the definition: one pass per continuation, in float64 from the logits on."""
    row = (context + ids)[-(CONTEXT + 1) :]
    logits_SO = model(torch.tensor([row[:-1]])).logits_BSO[0, -len(ids) :].double()
    logprobs_S = logits_SO.log_softmax(-1)[range(len(ids)), ids]
    return float(logprobs_S.sum()), logits_SO.argmax(-1).tolist() == ids


@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_batches_find_what_single_rows_give(model: Model, monkeypatch: pytest.MonkeyPatch, batch_tokens: int) -> None:
    monkeypatch.setattr(likelihood, "_BATCH_TOKENS", batch_tokens)
    generator = torch.Generator().manual_seed(0)

    def some(length: int) -> list[int]:
        return torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()

    shapes = [(1, 1), (5, 3), (1, CONTEXT), (20, 5), (40, 6), (23, 2), (3, 9), (24, 1), (2, 2)]
    parts = [(some(context), some(ids)) for context, ids in shapes]
    best = int(model(torch.tensor([parts[0][0]])).logits_BSO[0, -1].argmax())
    parts.append((parts[0][0], [best]))
    found = likelihoods(model, [Continuation(*part) for part in parts])
    for (context, ids), (logprob, greedy) in zip(parts, found, strict=True):
        expected, expected_greedy = alone(model, context, ids)
        assert logprob == pytest.approx(expected, rel=1e-5) and greedy == expected_greedy
    assert found[-1].greedy and not all(each.greedy for each in found)


@given(st.integers(1, 60), st.integers(1, 20))
def test_windows_predict_every_token_once_from_as_much_as_fits(length: int, longest: int) -> None:
    ids = list(range(1, length + 1))
    found = list(windows(ids, 0, longest))
    assert [token for part in found for token in part.ids] == ids
    for part in found:
        # Consecutive numbers: what is predicted follows its context.
        whole = [*part.context, *part.ids]
        assert whole == list(range(whole[0], whole[0] + len(whole)))
        assert len(whole) <= longest + 1
    assert list(found[0].context) == [0]
    assert found[-1].length == min(length, longest) + 1


def test_bits_per_byte_of_a_text(model: Model, tokenizer: Tokenizer) -> None:
    text = "the mat sat on the cät\n" * 6
    ids = tokenizer.encode(text, bos=False)
    assert len(ids) > 2 * CONTEXT
    found = text_bits(model, tokenizer, text)
    assert (found.tokens, found.bytes) == (len(ids), len(text.encode()))
    nats = -sum(alone(model, list(p.context), list(p.ids))[0] for p in windows(ids, tokenizer.bos_id, CONTEXT))
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


def test_what_cannot_be_measured_is_refused(model: Model, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="empty"):
        text_bits(model, tokenizer, "")
    for context, ids in (([], [1]), ([1], []), ([1], [2] * (CONTEXT + 1))):
        with pytest.raises(ValueError, match=f"{len(context)} tokens of context and {len(ids)} to predict"):
            likelihoods(model, [Continuation(context, ids)])
