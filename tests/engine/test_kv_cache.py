"""The latent cache takes what it says, and nothing else."""

import pytest
import torch

from fathom.engine.kv_cache import LatentCache
from fathom.model.config import ModelConfig
from tests.model.configs import tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_allocation_is_latents_and_shared_keys_alone(dtype: torch.dtype) -> None:
    config = tiny(num_nextn_predict_layers=1)
    cache = LatentCache(config, pages=7, page_size=4, dtype=dtype)
    layers, width = config.num_hidden_layers + 1, config.kv_lora_rank + config.qk_rope_head_dim
    allocated = cache.latents_LMW.untyped_storage().nbytes()
    # One page more than asked for takes what belongs nowhere.
    assert allocated == layers * (7 + 1) * 4 * width * dtype.itemsize
    assert cache.bytes_per_token == layers * width * dtype.itemsize
    assert cache.null_slot == 28


def test_the_released_model_takes_70272_bytes_per_token() -> None:
    config = ModelConfig(num_nextn_predict_layers=0)
    assert LatentCache(config, 1, 1, torch.bfloat16).bytes_per_token == 70272
