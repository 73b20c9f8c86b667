"""`transformers`' eager attention weights against those computed from the latents."""

from pathlib import Path

import pytest
import torch

from fathom.checkpoint.hf.model import save_model
from fathom.lab.inspector.window import trace_window
from tests.model.configs import lively_model, random_tokens, tiny

transformers = pytest.importorskip("transformers")
from tests.oracle.peers import load_peer, quietly  # noqa: E402

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("rank", [None, 10])
def test_attention_maps_are_those_of_transformers(rank: int | None, tmp_path: Path) -> None:
    config = tiny(q_lora_rank=rank)
    model, tokens_BS = lively_model(config, seed=2, std=0.3), random_tokens(config, 1, 11)
    save_model(model, tmp_path / "model")
    theirs, _ = load_peer(tmp_path / "model", config.num_hidden_layers)
    with torch.no_grad(), quietly():
        expected = theirs(tokens_BS, use_cache=False, output_attentions=True).attentions
    window = trace_window(model, tokens_BS[0], range(11), keys=11)
    assert len(expected) == len(window.attention) == config.num_hidden_layers
    for their_BHST, kept in zip(expected, window.attention, strict=True):
        found_HST = torch.zeros_like(their_BHST[0]).scatter(2, kept.keys_HQM, kept.weights_HQM)
        # What weighs less than a hundredth was left out.
        torch.testing.assert_close(found_HST, their_BHST[0].where(found_HST > 0, 0), atol=1e-5, rtol=1e-4)
        assert (their_BHST[0][found_HST == 0] < 0.0101).all()
