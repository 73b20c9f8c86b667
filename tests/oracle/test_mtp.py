"""`transformers` as the reference for multi-token prediction and for decoding from the latent cache."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DeepseekV3ForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from fathom.checkpoint.hf.model import save_model
from fathom.model.config import ModelConfig
from fathom.model.transformer import Model
from tests.model.configs import lively_model, model_configs, random_tokens, relative_error, rows_of_a_cache, tiny
from tests.oracle.peers import SMALLEST_MARGIN, load_peer, mtp_layers_known, noted_choices

pytestmark = pytest.mark.oracle

CONTINUATION = 20


@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    config=model_configs(modules=(1, 2)),
    shape=st.tuples(st.integers(1, 3), st.integers(3, 12)),
    seed=st.integers(0, 2**32 - 1),
)
def test_mtp_logits_equal_those_of_transformers(
    tmp_path_factory: pytest.TempPathFactory, config: ModelConfig, shape: tuple[int, int], seed: int
) -> None:
    note(f"{config}")
    directory = tmp_path_factory.mktemp("model")
    ours = lively_model(config, seed)
    save_model(ours, directory)
    tokens_BS = random_tokens(config, *shape, seed)
    main, modules = load_both(directory, config.num_hidden_layers)
    with noted_choices(main) as main_choices, noted_choices(modules) as choices:
        expected = their_mtp_logits(main, modules, tokens_BS)
    assert len(choices) == config.num_nextn_predict_layers
    assume(all(choice.margin > SMALLEST_MARGIN for choice in main_choices + choices))

    with torch.no_grad():
        found = ours(tokens_BS, mtp=True).mtp_logits
    assert found is not None and len(found) == len(expected) == config.num_nextn_predict_layers
    for found_BSO, expected_BSO in zip(found, expected, strict=True):
        assert relative_error(found_BSO, expected_BSO) <= 1e-5


def test_greedy_decoding_from_the_cache_equals_generate(tmp_path: Path) -> None:
    config = tiny(num_nextn_predict_layers=1)
    ours = lively_model(config, seed=5, std=0.25)
    save_model(ours, tmp_path / "model")
    theirs, modules = load_both(tmp_path / "model", config.num_hidden_layers)
    del modules
    for length in (1, 2, 7):
        prompt_BS = random_tokens(config, 1, length, seed=length)
        expected = theirs.generate(
            prompt_BS, max_new_tokens=CONTINUATION, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        found = greedy(ours, prompt_BS, CONTINUATION)
        assert torch.equal(found, expected)
        assert found[0, length:].unique().numel() > 3, "a continuation that repeats itself proves little"


def load_both(directory: Path, depth: int) -> tuple[DeepseekV3ForCausalLM, MtpModel]:
    main, _ = load_peer(directory, depth)
    with mtp_layers_known(depth):
        return main, MtpModel.from_pretrained(main).eval()


@torch.no_grad()
def their_mtp_logits(main: DeepseekV3ForCausalLM, modules: MtpModel, tokens_BS: Tensor) -> list[Tensor]:
    """Each module run once over whole sequences: position i takes token i+k and the previous hidden state at i."""
    hidden_BSD = main.model(tokens_BS, use_cache=False).last_hidden_state
    length = tokens_BS.shape[1]
    cache = MtpCache(config=modules.config)
    logits = []
    for k in range(1, modules.num_mtp_layers + 1):
        positions_BS = torch.arange(k, length)[None]
        hidden_BSD = modules.forward_layer(
            k - 1, hidden_BSD[:, : length - k], positions_BS, cache, input_ids=tokens_BS[:, k:]
        )
        logits.append(modules._project_to_logits(hidden_BSD))
    return logits


@torch.no_grad()
def greedy(model: Model, prompt_BS: Tensor, count: int) -> Tensor:
    """Prefill, then one token at a time from the latent cache."""
    config, tokens_BS = model.config, prompt_BS
    slots = prompt_BS.shape[1] + count
    cache_LBTW = torch.zeros(config.num_hidden_layers, 1, slots, config.cache_width)
    new_BS = prompt_BS
    for _ in range(count):
        used = tokens_BS.shape[1]
        positions_BS = torch.arange(used - new_BS.shape[1], used)[None]
        h_ND = model.forward_with_cache(new_BS[0], rows_of_a_cache(positions_BS, cache_LBTW, used))[0]
        new_BS = model.logits(h_ND[-1:]).argmax(-1)[None]
        tokens_BS = torch.cat((tokens_BS, new_BS), dim=1)
    return tokens_BS
