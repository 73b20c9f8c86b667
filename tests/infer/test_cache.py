"""The cache is one tensor of C+R numbers per token, layer and MTP module."""

import pytest
import torch

from fathom.infer.cache import LatentCache
from fathom.model.config import ModelConfig
from tests.model.configs import tiny


def test_one_allocation_of_exactly_the_latents() -> None:
    config = tiny(num_nextn_predict_layers=2)
    cache = LatentCache(config, rows=3, slots=7, dtype=torch.bfloat16)
    (latents_LBTW,) = vars(cache).values()
    assert latents_LBTW.shape == (
        config.num_hidden_layers + 2,
        3,
        7,
        config.kv_lora_rank + config.qk_rope_head_dim,
    )
    assert latents_LBTW.untyped_storage().nbytes() == 3 * 7 * cache.bytes_per_token
    assert cache.bytes_per_token == 5 * 18 * 2
    assert not latents_LBTW.any()


def test_the_released_model_takes_70272_bytes_per_token_and_one_layer_more_for_drafting() -> None:
    cache = LatentCache(ModelConfig(num_nextn_predict_layers=0), 1, 1, torch.bfloat16)
    assert cache.bytes_per_token == 70272
    assert LatentCache(ModelConfig(), 1, 1, torch.bfloat16).bytes_per_token == 70272 * 62 // 61


def test_views_share_memory_and_rows_close_ranks() -> None:
    cache = LatentCache(tiny(), rows=4, slots=5, dtype=torch.float32)
    view_LBTW = cache.view(slice(1, 4), 3)
    assert view_LBTW.shape[1:3] == (3, 3)
    view_LBTW[:] = torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    cache.keep([0, 2, 3])
    assert cache.latents_LBTW[:, :3, :3].unique(dim=1)[0, :, 0, 0].tolist() == [0, 2, 3]
    assert [cache.latents_LBTW[0, row, 0, 0].item() for row in range(3)] == [0, 2, 3]


@pytest.mark.parametrize("length", [0, 6])
def test_a_view_beyond_the_slots_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"length is {length}; this cache has slots for 1 to 5 tokens"):
        LatentCache(tiny(), 1, 5, torch.float32).view(slice(1), length)


@pytest.mark.parametrize(("field", "rows", "slots"), [("rows", 0, 3), ("slots", 2, 0)])
def test_an_empty_cache_is_refused(field: str, rows: int, slots: int) -> None:
    with pytest.raises(ValueError, match=f"{field} is 0; a cache needs at least 1"):
        LatentCache(tiny(), rows, slots, torch.float32)
