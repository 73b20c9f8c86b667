"""GET /fathom/status, as the page's side panel shows it: the model's shape and the engine's state."""

import time
from typing import Any

from fathom.engine.engine import Engine
from fathom.serve.engine_thread import EngineThread


def describe(engine: Engine, name: str, chat: bool) -> dict[str, Any]:
    """The constant part: sizes in parameters and in bytes."""
    config = engine.model.config
    counts = config.parameter_counts()
    per_token = engine.stats().bytes_per_token
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    keys = config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    values = config.num_attention_heads * config.v_head_dim
    return {
        "name": name,
        "layers": config.num_hidden_layers,
        "moe_layers": list(range(config.first_k_dense_replace, config.num_hidden_layers)),
        "experts": config.n_routed_experts,
        "experts_per_token": config.num_experts_per_tok,
        "shared_experts": config.n_shared_experts,
        "groups": config.n_group,
        "context": config.max_position_embeddings,
        "vocabulary": config.vocab_size,
        "parameters": counts.total + counts.mtp,
        "active_parameters": counts.active,
        "cache_bytes_per_token": per_token,
        # Keys and values of all heads, in the data type and layers of the latents.
        "plain_cache_bytes_per_token": per_token // latent * (keys + values),
        "drafts": engine.speculative,
        "chat": chat,
    }


def engine_status(engine_thread: EngineThread) -> dict[str, Any]:
    """The changing part."""
    stats = engine_thread.stats
    return {
        "running": stats.running,
        "waiting": stats.waiting,
        "tokens_per_second": round(engine_thread.tokens_per_second(), 2),
        "generated_tokens": stats.generated_tokens,
        "acceptance": round(stats.accepted / stats.drafted, 4) if stats.drafted else None,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "pages": stats.pages,
        "pages_used": stats.pages_used,
        "pages_reusable": stats.pages_reusable,
        "page_size": stats.page_size,
        "cached_tokens": stats.pages_used * stats.page_size,
        "load": stats.tokens_per_expert_LE.tolist(),
        "uptime_s": round(time.monotonic() - engine_thread.started, 1),
    }
