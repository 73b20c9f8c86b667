"""What every backend promises, against the whole model run without a cache, in float32 with the same weights."""

import random
import statistics
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fathom.engine.backends import Backend
from fathom.engine.batch import ForwardOutput, SequenceChunk
from fathom.engine.engine import Engine
from fathom.engine.sampling.sampler import SamplingParams
from fathom.model.quantize import quantized
from fathom.model.transformer import Model
from tests.engine.backends.make import every_backend, few_programs, make, skip_unless_supported, use
from tests.model.configs import lively_model, tiny

CONFIGS: list[dict[str, Any]] = [
    {"num_nextn_predict_layers": 1},
    {"num_nextn_predict_layers": 2, "q_lora_rank": None, "n_group": 1, "topk_group": 1},
    {
        "num_nextn_predict_layers": 1,
        "first_k_dense_replace": 2,
        "tie_word_embeddings": True,
        "num_attention_heads": 17,
    },
]
WIDE = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "q_lora_rank": 32, "v_head_dim": 32}


@pytest.fixture(autouse=True)
def quick_interpreter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "name" in request.fixturenames:
        few_programs(monkeypatch, request.getfixturevalue("name"))


@dataclass
class Whole:
    """A sequence, and what the whole model computes for it at once, without a cache."""

    tokens: list[int]
    h_SD: Tensor
    logits_SO: Tensor
    experts_LSK: Tensor
    mtp_h_SD: Tensor
    """Row i: the first MTP module's, of (h_i, token i+1)."""
    mtp_logits_SO: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: Model, tokens: list[int]) -> "Whole":
        states = model.forward_hidden(torch.tensor([tokens]), mtp=True)
        ids = states.router.topk_ids_LBSK[: model.config.num_hidden_layers - model.config.first_k_dense_replace]
        experts_LSK = (
            torch.stack([layer[0] for layer in ids])
            if ids
            else torch.empty(0, len(tokens), model.config.num_experts_per_tok, dtype=torch.int64)
        )
        h_SD, mtp_h_SD = states.h_BSD[0], states.mtp_h_BSD[0][0]
        return cls(tokens, h_SD, model.logits(h_SD), experts_LSK, mtp_h_SD, model.logits(mtp_h_SD))


def token_errors(found_ND: Tensor, expected_ND: Tensor) -> list[float]:
    """Of each token by itself, over its norm."""
    found_ND, expected_ND = found_ND.cpu().float(), expected_ND.cpu().float()
    return ((found_ND - expected_ND).norm(dim=-1) / expected_ND.norm(dim=-1)).tolist()


def on(backend: Backend, h_ND: Tensor) -> Tensor:
    return h_ND.to(backend.cache.latents_LMW.device)


def check(errors: list[float], dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        assert max(errors) <= 2e-5
    else:
        # A token whose routing is a near tie may take another expert; most do not.
        assert statistics.quantiles(errors, n=10)[-1] <= 0.02
        assert statistics.median(errors) <= 0.006


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_chunks_of_any_length_are_the_whole_model(name: str, seed: int, dtype: torch.dtype) -> None:
    """Random chunks of three sequences, one behind another in scattered pages, through main model and MTP module:
    hidden states, logits, routing, and at last the latents, against those of each sequence in a single chunk."""
    skip_unless_supported(name, dtype)
    interpreted = name == "cuda_graph"
    layers = {"num_hidden_layers": 2} if interpreted else {}
    rng = random.Random(seed)
    model = lively_model(tiny(**CONFIGS[seed], **layers), seed=seed).to(dtype)
    reference = lively_model(tiny(**CONFIGS[seed], **layers), seed=seed).to(dtype).float()
    size, most = rng.choice([1, 3, 8, 200]), (9 if seed == 0 else 2) if interpreted else 12
    sequences = [Whole.of(reference, [rng.randrange(61) for _ in range(100)]) for _ in range(3)]
    backend = make(name, model, 300, size, 100 * size)
    pages = rng.sample(range(300), 300)
    tables = [pages[row * 100 : (row + 1) * 100] for row in range(3)]
    lengths, errors = [0, 0, 0], list[float]()
    for turn in range(3 if interpreted else 8):
        chunks, mtp_chunks, spans = [], [], []
        for row, whole in enumerate(sequences):
            # One chunk is longer than the compiled backends take at once.
            count = 49 if turn == 5 and row == 1 else min(rng.randint(1, most), 97 - lengths[row])
            start, lengths[row] = lengths[row], lengths[row] + count
            chunks.append(SequenceChunk(whole.tokens[start : start + count], start, tables[row]))
            mtp_tokens = whole.tokens[start + 1 : start + 1 + count]
            mtp_chunks.append(SequenceChunk(mtp_tokens, start + 1, tables[row]))
            spans.append((whole, slice(start, start + count)))
        logits_indices = rng.sample(range(sum(len(chunk.tokens) for chunk in chunks)), 2)
        output = backend.forward(chunks, logits_indices)
        h_ND = torch.cat([whole.h_SD[span] for whole, span in spans])
        logits_NO = torch.cat([whole.logits_SO[span] for whole, span in spans])
        errors += token_errors(output.h_ND, h_ND) + token_errors(output.logits_NO, logits_NO[logits_indices])
        assert output.h_ND.dtype == output.logits_NO.dtype == torch.float32
        if dtype == torch.float32:
            experts_LNK = torch.cat([whole.experts_LSK[:, span] for whole, span in spans], dim=1)
            assert torch.equal(output.routed.experts_LNK.cpu().sort().values, experts_LNK.sort().values)
        drafted = backend.forward_mtp(mtp_chunks, on(backend, h_ND), logits_indices)
        mtp_h_ND = torch.cat([whole.mtp_h_SD[span] for whole, span in spans])
        mtp_logits_NO = torch.cat([whole.mtp_logits_SO[span] for whole, span in spans])
        errors += token_errors(drafted.h_ND, mtp_h_ND)
        errors += token_errors(drafted.logits_NO, mtp_logits_NO[logits_indices])
        assert len(drafted.routed.experts_LNK) == 0
    check(errors, dtype)
    expected = make("eager", reference, 300, size, 100 * size)
    for whole, length, table in zip(sequences, lengths, tables, strict=True):
        expected.forward([SequenceChunk(whole.tokens[:length], 0, table)], [])
        expected.write_mtp_kv_cache([SequenceChunk(whole.tokens[1 : length + 1], 1, table)], whole.h_SD[:length])
        slots = [table[t // size] * size + t % size for t in range(length)]
        found_LTW, expected_LTW = (each.cache.latents_LMW[:, slots].cpu().float() for each in (backend, expected))
        # The module's slot 0 is never written, and a second module's cache not at all.
        check(
            token_errors(
                found_LTW[: model.config.num_hidden_layers].flatten(0, 1),
                expected_LTW[: model.config.num_hidden_layers].flatten(0, 1),
            ),
            dtype,
        )
        module = model.config.num_hidden_layers
        check(token_errors(found_LTW[module, 1:], expected_LTW[module, 1:]), dtype)
        assert not found_LTW[module + 1 :].any() and not found_LTW[module, 0].any()


@every_backend
def test_routing_weights_are_those_of_a_single_chunk(name: str) -> None:
    model = lively_model(tiny(num_hidden_layers=2), seed=3)
    tokens = [3, 1, 4, 1, 5, 9]
    whole = make("eager", model, 2, 8, 16).forward([SequenceChunk(tokens, 0, [0])], [])
    backend = make(name, model, 2, 8, 16)
    parts = [backend.forward([SequenceChunk(tokens[start:end], start, [1])], []) for start, end in ((0, 2), (2, 6))]
    experts_LNK, order = torch.cat([part.routed.experts_LNK for part in parts], dim=1).cpu().sort()
    weights_LNK = torch.cat([part.routed.weights_LNK for part in parts], dim=1).cpu().gather(2, order)
    expected_LNK, order = whole.routed.experts_LNK.sort()
    assert torch.equal(experts_LNK, expected_LNK)
    assert torch.allclose(weights_LNK, whole.routed.weights_LNK.gather(2, order), rtol=1e-4, atol=1e-6)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "latent", "page_size"), [(3, 32, 256), (16, 48, 64), (21, 17, 7)])
def test_long_contexts_are_attended_in_parts(
    name: str, heads: int, latent: int, page_size: int, dtype: torch.dtype
) -> None:
    """More parts than a token may have of the smallest size; more heads than a vector has lanes; odd widths."""
    skip_unless_supported(name, dtype)
    if name == "cuda_graph" and heads == 16:
        pytest.skip("the other two shapes cover the kernel's cases")
    length = 2500 if name == "cuda_graph" else 5000
    model = lively_model(tiny(num_attention_heads=heads, kv_lora_rank=latent), seed=5).to(dtype)
    backends = [make(each, model, length // page_size + 2, page_size, length + 1) for each in (name, "eager")]
    if name == "cuda_graph":
        backends[1] = make("eager", model.float(), length // page_size + 2, page_size, length + 1)
    past_LMW = torch.randn(backends[0].cache.latents_LMW.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for backend in backends:
        backend.cache.latents_LMW.copy_(past_LMW)
    tables = (range(length // page_size + 1), range(130 // page_size + 1))
    chunks = [SequenceChunk([1, 2, 3], length - 3, tables[0]), SequenceChunk([4], 130, tables[1])]
    found, expected = (backend.forward(chunks, range(4)) for backend in backends)
    tolerance = 2e-5 if dtype == torch.float32 else 0.03
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert max(token_errors(ours, theirs)) <= tolerance


@every_backend
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_packed_weights_stand_for_their_matrices(name: str, precision: Any) -> None:
    """Main model and MTP module, against plain torch, which multiplies with the widened matrices."""
    model = quantized(lively_model(tiny(**WIDE, num_nextn_predict_layers=1), seed=5, std=0.2), precision)
    ours, theirs = make(name, model, 4, 8, 64), make("eager", model, 4, 8, 64)
    chunks = [SequenceChunk([3, 1, 4, 1, 5], 0, [0, 1]), SequenceChunk([9, 2], 0, [2])]
    found, expected = (backend.forward(chunks, range(7)) for backend in (ours, theirs))
    assert max(token_errors(found.logits_NO, expected.logits_NO)) <= 2e-5
    mtp_chunks = [SequenceChunk([1, 4, 1, 5], 1, [0, 1])]
    found, expected = (
        backend.forward_mtp(mtp_chunks, on(backend, expected.h_ND[:4]), [3]) for backend in (ours, theirs)
    )
    assert max(token_errors(found.logits_NO, expected.logits_NO)) <= 2e-5


@every_backend
def test_cache_only_writes_are_those_of_drafting(name: str) -> None:
    model = lively_model(tiny(num_nextn_predict_layers=1), seed=3)
    backends = [make(name, model, 40, 4, 100) for _ in range(2)]
    chunks = [SequenceChunk([1, 2, 3, 2, 1], 1, range(5)), SequenceChunk([0, 3], 1, range(20, 25))]
    h_ND = torch.randn(7, model.config.hidden_size)
    backends[0].forward_mtp(chunks, on(backends[0], h_ND), [4])
    backends[1].write_mtp_kv_cache(chunks, on(backends[1], h_ND))
    # All but the page that takes what must not be written anywhere else.
    drafted, written = (backend.cache.latents_LMW[:, : 40 * 4] for backend in backends)
    assert written[-1].any() and not written[:-1].any()
    assert torch.equal(drafted, written)


@every_backend
def test_shared_slots_are_not_written(name: str) -> None:
    """Tokens before `write_from` are fed for their hidden state alone, which is the same all the same."""
    model = lively_model(tiny(num_hidden_layers=2), seed=3)
    backend = make(name, model, 4, 4, 16)
    tokens = [5, 6, 7, 8, 9, 10]
    whole = backend.forward([SequenceChunk(tokens, 0, [2, 1])], [5])
    shared_LMW = backend.cache.latents_LMW[:, 8:12].clone()
    backend.cache.latents_LMW[:, 4:8] = 0
    again = backend.forward([SequenceChunk(tokens[3:], 3, [2, 1], write_from=4)], [2])
    assert torch.equal(backend.cache.latents_LMW[:, 8:12], shared_LMW)
    assert backend.cache.latents_LMW[:, 4:6].any() and not backend.cache.latents_LMW[:, :4].any()
    assert max(token_errors(again.logits_NO, whole.logits_NO)) <= 2e-5


@every_backend
def test_a_token_is_the_same_in_every_batch(name: str) -> None:
    """Compiled C++ promises the same bits; elsewhere matmuls of other heights may sum in another order."""
    model = lively_model(tiny(num_hidden_layers=2), seed=2)
    rng = random.Random(0)
    lengths = (1, 3, 4) if name == "cuda_graph" else (1, 7, 3, 8, 5)
    chunks = [SequenceChunk([rng.randrange(61) for _ in range(n)], 0, [page]) for page, n in enumerate(lengths)]
    together = make(name, model, 8, 8, 64).forward(chunks, range(sum(lengths)))
    first = 0
    for chunk, count in zip(chunks, lengths, strict=True):
        alone = make(name, model, 8, 8, 64).forward([chunk], range(count))
        part = ForwardOutput(
            together.h_ND[first : first + count], together.logits_NO[first : first + count], together.routed
        )
        if name == "cpu":
            assert torch.equal(alone.h_ND, part.h_ND) and torch.equal(alone.logits_NO, part.logits_NO)
        else:
            assert max(token_errors(alone.logits_NO, part.logits_NO)) <= 2e-6
        first += count


@every_backend
def test_an_engine_with_drafts_gives_the_tokens_of_one_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill and steps of several sizes, with one to three drafts and none."""
    place = use(monkeypatch, name)
    model = place(lively_model(tiny(vocab_size=8, num_hidden_layers=2, num_nextn_predict_layers=1), seed=4))
    found = []
    for drafts in (0, 2):
        engine = Engine(model, speculative=drafts, max_batch=4, page_size=4)
        answers = engine.generate([[1, 2, 3], [4, 5]], SamplingParams(max_tokens=5, ignore_eos=True))
        found.append([answer.token_ids for answer in answers])
    assert found[0] == found[1]
