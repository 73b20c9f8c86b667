"""Quantised models: every backend computes with the matrices that the int8 and int4 values stand for."""

import copy

import pytest
import torch

from fathom.engine.backends import choose
from fathom.engine.backends.cpu import CpuBackend
from fathom.engine.batch import SequenceChunk
from fathom.engine.engine import Engine
from fathom.engine.kv_cache import LatentCache
from fathom.engine.sampling.sampler import SamplingParams
from fathom.model.quantize import quantized
from fathom.model.transformer import Model
from fathom.ops import cpu
from fathom.quantization.integer import Precision
from fathom.quantization.weight_only import stored
from tests.model.configs import lively_model, tiny

WIDE = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "q_lora_rank": 32, "v_head_dim": 32}


def dequantized(model: Model, original: Model) -> Model:
    """An ordinary model with exactly the weights that the quantised one stands for."""
    plain = copy.deepcopy(original)
    for name, module in plain.named_modules():
        for parameter, value in module.named_parameters(recurse=False):
            value.data = getattr(model.get_submodule(name), parameter).detach().to(value.dtype).clone()
    return plain


@pytest.mark.parametrize("eager", [False, True], ids=["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantized_model_computes_what_its_dequantized_weights_do(
    precision: Precision, dtype: torch.dtype, eager: bool
) -> None:
    if not eager and not cpu.available():
        pytest.skip(f"the kernels are not built: {cpu.missing()}")
    config = tiny(**WIDE, num_nextn_predict_layers=1)
    model = lively_model(config, seed=5, std=0.2).to(dtype)
    low_bit = quantized(model, precision)
    expected = choose(dequantized(low_bit, model), 4, 8, 64, eager)
    found = choose(low_bit, 4, 8, 64, eager)
    assert isinstance(found, CpuBackend) == (not eager)
    chunks = [SequenceChunk([3, 1, 4, 1, 5], 0, [0, 1]), SequenceChunk([9, 2], 0, [2])]
    theirs, ours = (backend.forward(chunks, range(7)) for backend in (expected, found))
    # The int8 kernel scales the sum of a row, plain torch every weight, which bfloat16 then rounds.
    tolerance = 2e-5 if dtype == torch.float32 else 0.03
    scale = theirs.logits_NO.abs().max()
    assert (ours.logits_NO - theirs.logits_NO).abs().max() < tolerance * scale
    modules = [SequenceChunk([1, 4, 1, 5], 1, [0, 1])]
    drafted, ours_drafted = (backend.forward_mtp(modules, theirs.h_ND[:4], [3]) for backend in (expected, found))
    assert (ours_drafted.logits_NO - drafted.logits_NO).abs().max() < tolerance * drafted.logits_NO.abs().max()


def test_tensors_that_are_not_quantized_are_shared() -> None:
    model = lively_model(tiny(**WIDE), seed=6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    low_bit = quantized(model, "int8")
    qweight, scales = stored(low_bit.lm_head, "weight")
    assert qweight.dtype == torch.int8 and scales is not None
    assert stored(model.lm_head, "weight")[0] is model.lm_head.weight
    assert low_bit.embed_tokens.weight is model.embed_tokens.weight
    attention = low_bit.get_submodule("layers.0.self_attn")
    assert attention.kv_b_proj.weight is model.get_submodule("layers.0.self_attn").kv_b_proj.weight
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in low_bit.parameters())
    config = low_bit.config
    assert LatentCache(config, 2, 4, torch.float32, torch.device("cpu")).latents_LMW.dtype == torch.float32


@pytest.mark.parametrize("tied", [False, True])
def test_sampled_tokens_are_those_of_the_dequantized_model(tied: bool) -> None:
    model = lively_model(tiny(**WIDE, num_nextn_predict_layers=1, tie_word_embeddings=tied), seed=7, std=0.3)
    low_bit = quantized(model, "int4")
    params = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
    texts = []
    for which in (low_bit, dequantized(low_bit, model)):
        engine = Engine(which, speculative=2)
        handle = engine.submit([1, 2, 3] * 20, params)
        while engine.has_work:
            engine.step()
        texts.append(handle.token_ids)
    assert texts[0] == texts[1] and len(set(texts[0])) > 3


def test_an_unknown_precision_and_an_unsuitable_width_are_named() -> None:
    model = lively_model(tiny())
    with pytest.raises(ValueError, match=r"'int3'.*int8 or int4"):
        quantized(model, "int3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.\w+\.weight: int4 needs .* multiple of 32"):
        quantized(model, "int4")
