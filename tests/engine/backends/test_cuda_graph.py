"""The GPU's way through a decoding step: its kernels and graphs against plain torch in float32 with the same weights.

Without a GPU the kernels run in Triton's interpreter, step by step and without graphs, and in float32 alone: the
interpreter multiplies bfloat16 wrongly.
"""

import copy
import random
import statistics
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fathom.engine.backends.cuda_graph import GraphedModel
from fathom.engine.backends.eager import Runner, SequenceChunk
from fathom.engine.core import Core
from fathom.engine.sampling.sampler import SamplingParams
from fathom.model.quantize import quantized
from fathom.model.transformer import Model
from fathom.ops.attention import triton as attention
from tests.gpu import DEVICE, ON_GPU, PRODUCT_DTYPES
from tests.model.configs import lively_model, tiny

pytestmark = pytest.mark.slow
CONFIGS: list[dict[str, Any]] = [
    {"num_hidden_layers": 2},
    {"num_hidden_layers": 2, "num_nextn_predict_layers": 2, "q_lora_rank": None, "n_group": 1, "topk_group": 1},
    {"num_hidden_layers": 2, "first_k_dense_replace": 2, "tie_word_embeddings": True, "num_attention_heads": 17},
]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pasts in fewer parts, as with many tokens: the interpreter takes its time for every program."""
    if not ON_GPU:
        monkeypatch.setattr(attention, "_PROGRAMS", 24)


def graphed(model: Model, pages: int, page_size: int, positions: int) -> Runner:
    """A runner on the GPU, or on the CPU as it were on one."""
    runner = Runner(copy.deepcopy(model).to(DEVICE), pages, page_size, positions, eager=True)
    runner.few = GraphedModel(runner.model, runner.cache.latents_LMW, page_size, positions)
    return runner


def token_errors(found_ND: torch.Tensor, expected_ND: torch.Tensor) -> list[float]:
    """Of each token by itself, over its norm."""
    found_ND, expected_ND = found_ND.cpu(), expected_ND.cpu()
    return ((found_ND - expected_ND).norm(dim=-1) / expected_ND.norm(dim=-1)).tolist()


@pytest.mark.parametrize("dtype", PRODUCT_DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_a_step_is_the_model(seed: int, dtype: torch.dtype) -> None:
    """Random chunks of random sequences, behind one another in scattered pages, through model and module."""
    rng = random.Random(seed)
    model = lively_model(tiny(**{"num_nextn_predict_layers": 1, **CONFIGS[seed]}), seed=seed).to(dtype)
    words, size = model.config.vocab_size, rng.choice([1, 3, 8, 200])
    ours = graphed(model, 300, size, 100 * size)
    theirs = Runner(copy.deepcopy(model).float(), 300, size, 100 * size, eager=True)
    pages, lengths = rng.sample(range(300), 300), [0, 0, 0]
    held = [pages[i * 100 : (i + 1) * 100] for i in range(3)]
    errors: list[float] = []
    for _ in range(3):
        chunks = []
        for row in range(3):
            count = min(rng.randint(1, 9 if seed == 0 else 2), 99 - lengths[row])
            chunks.append(SequenceChunk([rng.randrange(words) for _ in range(count)], lengths[row], held[row]))
            lengths[row] += count
        logits_indices = rng.sample(range(sum(len(s.tokens) for s in chunks)), 2)
        found, expected = (runner.main(chunks, logits_indices) for runner in (ours, theirs))
        errors += token_errors(found.h_ND, expected.h_ND) + token_errors(found.logits_NO, expected.logits_NO)
        if dtype == torch.float32:
            assert torch.equal(found.routed.experts_LNK.cpu().sort().values, expected.routed.experts_LNK.sort().values)
            weights = [t.routed.weights_LNK.cpu().sort().values for t in (found, expected)]
            assert torch.allclose(*weights, rtol=1e-4, atol=1e-6)
        later = [chunk._replace(start=chunk.start + 1) for chunk in chunks]
        drafted, expected_drafted = (
            runner.draft(later, expected.h_ND.to(runner.cache.latents_LMW.device), logits_indices)
            for runner in (ours, theirs)
        )
        errors += token_errors(drafted.h_ND, expected_drafted.h_ND)
        errors += token_errors(drafted.logits_NO, expected_drafted.logits_NO)
    if dtype == torch.float32:
        assert max(errors) <= 2e-5
    else:
        # A token whose routing is a near tie may take another expert; most do not.
        assert statistics.quantiles(errors, n=10)[-1] <= 0.02
        assert statistics.median(errors) <= 0.006


@pytest.mark.parametrize("dtype", PRODUCT_DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "latent", "page_size"), [(3, 32, 256), (21, 17, 7)])
def test_long_pasts_are_attended_in_parts(heads: int, latent: int, page_size: int, dtype: torch.dtype) -> None:
    """More parts than a token may have of the least size; odd widths."""
    length = 2500
    model = lively_model(tiny(num_attention_heads=heads, kv_lora_rank=latent), seed=5).to(dtype)
    ours = graphed(model, length // page_size + 2, page_size, length + 1)
    theirs = Runner(copy.deepcopy(model).float(), length // page_size + 2, page_size, length + 1, eager=True)
    past_LMW = torch.randn(ours.cache.latents_LMW.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for runner in (ours, theirs):
        runner.cache.latents_LMW.copy_(past_LMW)
    chunks = [SequenceChunk([1, 2], length - 2, range(length // page_size + 1)), SequenceChunk([4], 130, range(19))]
    found, expected = (runner.main(chunks, range(3)) for runner in (ours, theirs))
    assert max(token_errors(found.logits_NO, expected.logits_NO)) <= (2e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_packed_weights_are_read_where_they_lie(precision: Any) -> None:
    wide = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "q_lora_rank": 32}
    model = lively_model(tiny(**wide, v_head_dim=32, num_nextn_predict_layers=1), seed=5, std=0.2)
    packed = quantized(model, precision)
    ours, theirs = graphed(packed, 4, 8, 64), Runner(packed, 4, 8, 64, eager=True)
    chunks = [SequenceChunk([3, 1, 4, 1, 5], 0, [0, 1]), SequenceChunk([9, 2], 0, [2])]
    found, expected = (runner.main(chunks, range(7)) for runner in (ours, theirs))
    assert max(token_errors(found.logits_NO, expected.logits_NO)) <= 2e-5
    modules = [SequenceChunk([1, 4, 1, 5], 1, [0, 1])]
    found, expected = (
        runner.draft(modules, expected.h_ND[:4].to(runner.cache.latents_LMW.device), [3]) for runner in (ours, theirs)
    )
    assert max(token_errors(found.logits_NO, expected.logits_NO)) <= 2e-5


def test_what_a_module_remembers_is_what_drafting_writes() -> None:
    model = lively_model(tiny(num_nextn_predict_layers=1), seed=3)
    runners = [graphed(model, 40, 4, 100) for _ in range(2)]
    chunks = [SequenceChunk([1, 2, 3, 2, 1], 1, range(5)), SequenceChunk([0, 3], 1, range(20, 25))]
    h_ND = torch.randn(7, model.config.hidden_size, device=DEVICE)
    runners[0].draft(chunks, h_ND, [4])
    runners[1].write_mtp_kv_cache(chunks, h_ND)
    # All but the page that takes what belongs nowhere.
    drafted, remembered = (runner.cache.latents_LMW[:, : 40 * 4] for runner in runners)
    assert remembered[-1].any() and not remembered[:-1].any()
    assert torch.equal(drafted, remembered)


def test_a_token_is_the_same_alone_and_in_company() -> None:
    """In float32 the company changes no more than the last bits: products of other heights may sum otherwise."""
    model = lively_model(tiny(num_hidden_layers=2), seed=2)
    rng = random.Random(0)
    chunks = [
        SequenceChunk([rng.randrange(61) for _ in range(length)], 0, [place]) for place, length in enumerate((1, 3, 4))
    ]
    together = graphed(model, 8, 8, 64).main(chunks, range(8))
    first = 0
    for chunk in chunks:
        count = len(chunk.tokens)
        alone = graphed(model, 8, 8, 64).main([chunk], range(count))
        assert max(token_errors(alone.logits_NO, together.logits_NO[first : first + count])) <= 1e-6
        first += count


def test_an_engine_with_drafts_gives_the_tokens_of_one_without() -> None:
    """Through Core: prompts by plain torch, steps by graphs of several sizes, with one to three drafts and none."""
    model = lively_model(tiny(vocab_size=8, num_hidden_layers=2, num_nextn_predict_layers=1), seed=4)
    prompts = [[1, 2, 3], [4, 5]]
    found = []
    for drafts in (0, 2):
        core = Core(model.to(DEVICE), speculative=drafts, max_batch=4, page_size=4)
        few = GraphedModel(core.runner.model, core.runner.cache.latents_LMW, 4, core.max_length + drafts + 2)
        core.runner.few = few
        handles = [core.submit(prompt, SamplingParams(max_tokens=5, ignore_eos=True)) for prompt in prompts]
        while core.has_work:
            core.step()
        found.append([handle.token_ids for handle in handles])
    assert found[0] == found[1]
