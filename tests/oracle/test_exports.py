"""`fathom export` read by `transformers`: every format loads, computes the same, and drafts with our MTP module.

Its reader of FP8 blocks, which a CPU has to use, takes widths that 128 divides alone (5.23: Fp8Dequantize divides rows
by the number of scales), and so not DeepSeek-V3's own kv_a_proj_with_mqa of 576 rows; here all blocks are whole.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from fathom.checkpoint.hf.model import load_model, save_model
from fathom.cli import main
from fathom.engine.engine import Engine
from fathom.engine.sampling.sampler import SamplingParams
from tests.model.configs import lively_model, random_tokens, relative_error, tiny
from tests.oracle.peers import PLAIN, mtp_layers_known, quietly

pytest.importorskip("accelerate", reason="transformers reads FP8 with accelerate")

pytestmark = pytest.mark.oracle

FORMS = {"f32": ["hf", "--dtype", "f32"], "bf16": ["hf"], "fp8": ["fp8"]}
WHOLE = tiny(
    hidden_size=128, intermediate_size=256, moe_intermediate_size=128, kv_lora_rank=128, q_lora_rank=128,
    qk_nope_head_dim=64, qk_rope_head_dim=128, v_head_dim=64, num_attention_heads=2, num_nextn_predict_layers=1,
)  # fmt: skip
CONTINUATION = 24


@pytest.fixture(scope="module", params=FORMS)
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in one of the formats."""
    folder = tmp_path_factory.mktemp("export")
    save_model(lively_model(WHOLE, seed=4, std=0.1), folder / "model")
    main(["export", str(folder / "model"), "--out", str(folder / "out"), "--to", *FORMS[request.param]])
    return folder / "out"


@pytest.fixture(scope="module")
def theirs(export: Path) -> DeepseekV3ForCausalLM:
    """As `transformers` reads it: FP8 is dequantised to bfloat16 as it is loaded."""
    dtype = torch.float32 if "float32" in (export / "config.json").read_text() else torch.bfloat16
    with quietly(), mtp_layers_known(WHOLE.num_hidden_layers):
        model, info = AutoModelForCausalLM.from_pretrained(export, dtype=dtype, output_loading_info=True, **PLAIN)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def test_weights_and_logits_are_the_same(export: Path, theirs: DeepseekV3ForCausalLM) -> None:
    dtype = theirs.lm_head.weight.dtype
    ours = load_model(export, dtype)
    mine = dict(ours.named_parameters())
    for name, weight in theirs.named_parameters():
        assert weight.dtype == dtype and torch.equal(weight, mine[name.removeprefix("model.")]), name
    tokens_BS = random_tokens(WHOLE, 2, 17)
    with torch.no_grad():
        # The same weights, computed in float32: two correct programs may round differently in bfloat16.
        found, expected = ours.float()(tokens_BS).logits_BSO, theirs.float()(tokens_BS, use_cache=False).logits
    assert relative_error(found, expected) <= 1e-5


def test_drafts_of_our_module_leave_the_greedy_text_as_it_is(export: Path, theirs: DeepseekV3ForCausalLM) -> None:
    theirs.float().config.dtype = torch.float32  # by which its MTP model is loaded
    prompt = random_tokens(WHOLE, 1, 9, seed=1)
    options: dict[str, Any] = {"max_new_tokens": CONTINUATION, "do_sample": False, "eos_token_id": None}
    with quietly(), mtp_layers_known(WHOLE.num_hidden_layers):
        plain = theirs.generate(prompt, pad_token_id=0, **options)
        drafted = theirs.generate(prompt, pad_token_id=0, use_mtp=True, **options)
    assert drafted.tolist() == plain.tolist()
    engine = Engine(load_model(export).float(), speculative=1)
    answer = engine.submit(prompt[0].tolist(), SamplingParams(max_tokens=CONTINUATION, ignore_eos=True))
    while engine.has_work:
        engine.step()
    assert prompt[0].tolist() + answer.token_ids == drafted[0].tolist()
    assert len(set(answer.token_ids)) > 3, "a continuation that repeats itself proves little"
