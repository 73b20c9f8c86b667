"""The GPU's kernels without gradients against plain torch, in Triton's interpreter where there is no GPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from fathom.engine.backends import Backend, choose
from fathom.engine.backends.eager import EagerBackend
from fathom.engine.batch import SequenceChunk
from fathom.model.layers import RMSNorm
from fathom.ops import cpu, gpu
from fathom.ops.attention import SeqLens, heads_reference, varlen_attention
from fathom.ops.attention import expanded_attention_reference as expanded_reference
from fathom.ops.attention.kv_cache import write_kv_cache, write_kv_cache_reference
from fathom.ops.attention.triton_heads import heads
from fathom.ops.moe import combine, dispatch, routed_experts, routed_experts_reference
from fathom.ops.moe import triton_permute as rows
from fathom.ops.rope import Rope
from fathom.ops.swiglu import swiglu
from fathom.ops.swiglu import triton as activation
from tests.engine.backends.test_conformance import token_errors
from tests.gpu import DEVICE, ON_GPU, PRODUCT_DTYPES
from tests.model.configs import lively_model, tiny
from tests.ops.errors import scale_free_error

DTYPES = [torch.float32, torch.bfloat16]
EXACT = {torch.float32: 1e-11, torch.bfloat16: 2e-5}


def act_as_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Use the GPU's kernels, on the CPU too, and none of the CPU's."""
    if not ON_GPU:
        patch.setattr(gpu, "usable", lambda *tensors: not any(t.dtype == torch.float64 for t in tensors))
        patch.setattr(cpu, "usable", lambda *tensors: False)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    act_as_a_gpu(monkeypatch)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def rope(*shape: int) -> Rope:
    angles = random(*shape, seed=9)
    return Rope(angles.cos(), angles.sin())


@pytest.mark.parametrize(("tokens", "choices", "experts"), [(1, 1, 1), (7, 3, 5), (300, 4, 9), (64, 6, 64)])
def test_pairs_are_sorted_as_by_torch(tokens: int, choices: int, experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several blocks, with an expert that no token chose; then again with one expert's choices replaced by −1."""
    monkeypatch.setattr(rows, "_PAIRS", 256)
    draw = torch.Generator().manual_seed(tokens)
    ids_NK = torch.rand(tokens, max(experts - 1, 1), generator=draw).argsort(1)[:, :choices].contiguous()
    sort_indices_R, inverse_indices_NK, ends_E, tokens_per_expert_E = (
        t.cpu() for t in rows.dispatch(ids_NK.to(DEVICE), experts)
    )
    ids_P, pair_P = ids_NK.flatten().sort(stable=True)
    assert torch.equal(sort_indices_R, pair_P) and torch.equal(
        sort_indices_R[inverse_indices_NK].flatten(), torch.arange(ids_P.numel())
    )
    assert torch.equal(tokens_per_expert_E, ids_P.bincount(minlength=experts)) and torch.equal(
        ends_E, tokens_per_expert_E.cumsum(0).int()
    )
    ids_NK = ids_NK.masked_fill(ids_NK == experts // 2, -1)
    sort_indices_R, inverse_indices_NK, ends_E, tokens_per_expert_E = (
        t.cpu() for t in rows.dispatch(ids_NK.to(DEVICE), experts)
    )
    ids_P, pair_P = ids_NK.flatten().sort(stable=True)
    none = int((ids_P < 0).sum())
    here_NK, pair_NK = ids_NK >= 0, torch.arange(ids_P.numel()).view_as(ids_NK)
    assert torch.equal(sort_indices_R, torch.cat((pair_P[none:], torch.full((none,), -1))))
    assert torch.equal(inverse_indices_NK >= 0, here_NK)
    assert torch.equal(sort_indices_R[inverse_indices_NK[here_NK]], pair_NK[here_NK])
    assert torch.equal(tokens_per_expert_E, ids_P[none:].bincount(minlength=experts))
    assert torch.equal(ends_E, tokens_per_expert_E.cumsum(0).int())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [3, 64, 1030])
def test_rows_are_moved_activated_and_summed(width: int, dtype: torch.dtype) -> None:
    x_ND, sort_indices_R = (
        random(5, width, seed=1, dtype=dtype),
        torch.tensor([4, 0, 9, 3, 7, 5, 1, 2, 6, 8], device=DEVICE),
    )
    assert torch.equal(rows.gather(x_ND, sort_indices_R, 2), x_ND[sort_indices_R // 2])
    gate, up = random(2, 3, width, seed=2, dtype=dtype), random(2, 3, width, seed=3, dtype=dtype)
    expected = F.silu(gate.double()) * up.double()
    assert scale_free_error(activation.swiglu(gate, up), expected) < EXACT[dtype]
    gate_up_RG, weights_NK = random(10, 2 * width, seed=4, dtype=dtype), random(5, 2, seed=5).sigmoid()
    gate_RF, up_RF = gate_up_RG.double().chunk(2, dim=1)
    expected = F.silu(gate_RF) * up_RF * weights_NK.flatten()[sort_indices_R, None].double()
    assert scale_free_error(activation.weighted_swiglu(gate_up_RG, sort_indices_R, weights_NK), expected) < EXACT[dtype]
    y_RD, inverse_indices_NK = random(10, width, seed=6, dtype=dtype), sort_indices_R.argsort().view(5, 2)
    assert (
        scale_free_error(rows.combine(y_RD, inverse_indices_NK), y_RD.double()[inverse_indices_NK].sum(1))
        < EXACT[dtype]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("count", "nope", "rotated", "value"), [(3, 6, 4, 5), (17, 64, 32, 64), (1, 3, 0, 3)])
def test_heads_are_the_references(count: int, nope: int, rotated: int, value: int, dtype: torch.dtype) -> None:
    """As many queries as keys with shared angles, fewer with their own; values padded, and where they lay."""
    for batch, length, keys, angles in ((2, 4, 4, (4,)), (1, 3, 7, (1, 3)), (1, 2, 5, (2,))):
        q_BSHX = random(batch, length, count, nope + rotated, seed=1, dtype=dtype)
        kv_BTHY = random(batch, keys, count, nope + value, seed=2, dtype=dtype)
        wide = random(batch, keys, rotated + 3, seed=3, dtype=dtype)
        inputs = q_BSHX, kv_BTHY, wide[..., 3:], rope(*angles, rotated // 2)
        expected = heads_reference(*inputs)
        for pads in (False, True):
            q, k, v = heads(*inputs, pads=pads)
            assert scale_free_error(q, expected[0]) < EXACT[dtype] and torch.equal(k, expected[1])
            assert torch.equal(v[..., :value], expected[2]) and (not pads or (v[..., value:] == 0).all())
            assert v.shape[-1] == (nope + rotated if pads else value)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("dtype", PRODUCT_DTYPES, ids=str)
def test_latents_are_written_to_their_slots(dtype: torch.dtype) -> None:
    slot_mapping_N = torch.tensor([4, 0, 6], device=DEVICE)
    caches = [torch.zeros(9, 14 + 6, device=DEVICE, dtype=dtype) for _ in range(2)]
    norm_C = 1 + 0.1 * random(14, seed=2, dtype=dtype)
    inputs = random(3, 20, seed=1, dtype=dtype), norm_C, 1e-6, rope(1, 3, 3), slot_mapping_N
    write_kv_cache(*inputs, caches[0])
    write_kv_cache_reference(*inputs, caches[1])
    assert scale_free_error(*caches) < EXACT[dtype]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("dtype", PRODUCT_DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [((4,), (4,)), ((3,), (9,)), ((5, 1, 70, 2), (5, 130, 70, 9))])
def test_varlen_sequences_attend_by_themselves(
    lengths: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype
) -> None:
    queries, keys = lengths
    q_NHX = random(sum(queries), 3, 16 + 8, seed=1, dtype=dtype)
    kv_THY, k_rope_TR = random(sum(keys), 3, 16 + 12, seed=2, dtype=dtype), random(sum(keys), 8, seed=3, dtype=dtype)
    positions_rope = rope(sum(queries), 4)
    found = varlen_attention(q_NHX, kv_THY, k_rope_TR, positions_rope, SeqLens.of(queries, keys, DEVICE), 0.3)
    for q, cos, sin, kv, k_rope, out in zip(
        *(t.split(queries) for t in (q_NHX, *positions_rope)),
        *(t.split(keys) for t in (kv_THY, k_rope_TR)),
        found.split(queries),
        strict=True,
    ):
        expected = expanded_reference(*(t.double()[None] for t in (q, kv, k_rope)), Rope(cos, sin), 0.3)[0]
        assert scale_free_error(out, expected) < (1e-11 if dtype == torch.float32 else 1e-4)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.parametrize("dtype", PRODUCT_DTYPES, ids=str)
def test_without_gradients_the_result_is_the_same(dtype: torch.dtype, choices: int) -> None:
    """The operations themselves, through whatever they choose; some choices are none."""
    x_ND, weights_NK = random(9, 32, seed=1, dtype=dtype), random(9, choices, seed=2).sigmoid()
    gate_up_EGD, down_EDF = random(5, 48, 32, seed=3, dtype=dtype) / 6, random(5, 32, 24, seed=4, dtype=dtype) / 5
    ids_NK = random(9, 5, seed=5).argsort(1)[:, :choices]
    ids_NK = ids_NK.masked_fill(ids_NK == 2, -1)
    with torch.no_grad():
        order = dispatch(ids_NK, 5)
        found_ND = routed_experts(x_ND, order, weights_NK, gate_up_EGD, down_EDF)
    wide = (t.double() for t in (weights_NK, gate_up_EGD, down_EDF))
    expected_ND = routed_experts_reference(x_ND.double(), ids_NK, *wide)
    assert scale_free_error(found_ND, expected_ND) < (1e-11 if dtype == torch.float32 else 3e-5)
    norm = RMSNorm(32, 1e-6).to(DEVICE, dtype).requires_grad_(False)
    assert scale_free_error(norm(x_ND), F.rms_norm(x_ND.double(), (32,), eps=1e-6)) < EXACT[dtype]
    assert scale_free_error(swiglu(x_ND, x_ND), F.silu(x_ND.double()) * x_ND.double()) < EXACT[dtype]
    summed_ND = (x_ND.double()[ids_NK] * (ids_NK >= 0).unsqueeze(2)).sum(1)
    assert scale_free_error(combine(x_ND, ids_NK), summed_ND) < EXACT[dtype]


@pytest.mark.parametrize("dtype", PRODUCT_DTYPES, ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {"moe_intermediate_size": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
        {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    ],
)
def test_prefill_equals_plain_torch(
    changes: dict[str, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of many lengths in one pass, then their second parts; the second model's rows are too odd for torch's
    `grouped_mm`."""
    model = lively_model(tiny(num_hidden_layers=2, num_nextn_predict_layers=1, **changes), seed=4).to(dtype)
    lengths, size = (20, 1, 9, 3, 3, 33, 11), 8
    pages = [list(range(20 * i, 20 * i + 20)) for i in range(len(lengths))]

    def read(backend: Backend) -> list[Tensor]:
        found = []
        for start in (0, 70):
            chunks = [
                SequenceChunk(
                    [token % 61 for token in range(length if start == 0 else 8 - row)], start and length, pages[row]
                )
                for row, length in enumerate(lengths)
            ]
            count = sum(len(chunk.tokens) for chunk in chunks)
            main = backend.forward(chunks, range(0, count, 3))
            later = [chunk._replace(start=chunk.start + 1) for chunk in chunks]
            module = backend.forward_mtp(later, main.h_ND, range(0, count, 5))
            found += [main.h_ND, main.logits_NO, main.routed.weights_LNK.sort().values[0], module.h_ND]
        return found

    theirs = choose(lively_model(model.config, seed=4).to(dtype).float(), 150, size, 128, eager=True)
    expected = read(theirs)
    act_as_a_gpu(monkeypatch)
    ours = choose(model.to(DEVICE), 150, size, 128, eager=True)
    assert isinstance(ours, EagerBackend)
    ours._varlen = True
    for found, there in zip(read(ours), expected, strict=True):
        errors = sorted(token_errors(found, there))
        assert errors[-1] <= 2e-5 if dtype == torch.float32 else errors[len(errors) // 2] <= 0.02
