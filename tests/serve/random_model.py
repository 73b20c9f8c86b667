"""A small model with random weights whose output depends on its input, and a tokenizer of several scripts."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import tokenizers
import torch

from fathom.checkpoint.hf.model import save_model
from fathom.data.tokenizer import Tokenizer, save_tokenizer, train_tokenizer
from fathom.model.config import ModelConfig
from fathom.model.transformer import Model

TEXT = 'The number is {"a": 12, "name": true}, größer als 7. 数据 😀\n def f(x): return [x, "y"]\n'

CONFIG = ModelConfig(
    vocab_size=400,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=4,
    q_lora_rank=None,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    num_nextn_predict_layers=1,
    max_position_embeddings=512,
)


def with_tokens(tokenizer: Tokenizer, template: str | None, added: Sequence[str], special: bool = False) -> Tokenizer:
    """The same tokenizer with another chat template and further tokens."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.tokenizer_json)
    backend.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False) for token in added])
    config = tokenizer.config | ({} if template is None else {"chat_template": template})
    return Tokenizer(backend.to_str(), config)


@torch.no_grad()
def save_random_model(
    directory: Path, spare_ids: bool = True, template: str | None = None, added: Sequence[str] = ()
) -> Path:
    """Write it; its logits spread far enough that greedy choices are clear. `spare_ids`: beyond the tokenizer's.

    `template`: a chat template instead of the tokenizer's own; `added`: further tokens.
    """
    torch.manual_seed(5)
    tokenizer = with_tokens(train_tokenizer([TEXT * 40], CONFIG.vocab_size - len(added)), template, added)
    model = Model(CONFIG if spare_ids else replace(CONFIG, vocab_size=tokenizer.vocab_size))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.12)
    save_model(model, directory)
    save_tokenizer(tokenizer, directory)
    return directory
