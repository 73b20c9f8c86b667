"""Adapters in PEFT's format: `peft` on top of `transformers` gives our logits, per-expert adapters included."""

from pathlib import Path

import pytest
import torch

from fathom.checkpoint.hf.model import save_model
from fathom.posttrain.config import LoraConfig
from fathom.posttrain.lora import merged_model
from fathom.posttrain.lora_files import write_peft
from tests.model.configs import lively_model, random_tokens, tiny
from tests.posttrain.models import adapted

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft", reason="peft is not installed: pip install --target DIR peft, and PYTHONPATH=DIR")
pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("experts", [False, True], ids=["layers", "experts too"])
@pytest.mark.parametrize("q_lora_rank", [10, None])
def test_peft_gives_our_logits(tmp_path: Path, experts: bool, q_lora_rank: int | None) -> None:
    model = lively_model(tiny(q_lora_rank=q_lora_rank, num_nextn_predict_layers=1))
    save_model(model, tmp_path / "base")
    tokens_BS = random_tokens(model.config, 2, 20)
    with torch.no_grad():
        plain = model(tokens_BS).logits_BSO
        ours = adapted(model, experts)(tokens_BS).logits_BSO
        write_peft(model, LoraConfig(3, alpha=5, experts=experts), str(tmp_path / "base"), tmp_path / "adapter")
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(tokens_BS).logits
        assert (ours - plain).abs().max() > 0.1
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        # What is merged opens by itself.
        save_model(merged_model(model), tmp_path / "merged")
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens_BS).logits
        torch.testing.assert_close(ours, merged, atol=1e-5, rtol=1e-5)
