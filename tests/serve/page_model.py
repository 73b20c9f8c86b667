"""A tiny model that repeats one sentence, so that the page can be tested on a real server.

The layers add nothing to the residual stream, so the next token follows from the last one alone, and the prediction
module, rigged in the same way, drafts it without fail. The routers' weights are random: tokens take different experts.
"""

from pathlib import Path

import torch

from fathom.checkpoint.hf.model import save_model
from fathom.data.tokenizer import save_tokenizer, train_tokenizer
from fathom.model.config import ModelConfig
from fathom.model.transformer import Model

SEEN = "Look: <img src=x onerror=\"document.title='owned'\"> & grüße,\n    one two three"
SENTENCE = f"{SEEN} 😀\n"
"""No token occurs twice in it. Its markup must appear as text; the smiley's bytes are a token each."""

CONFIG = ModelConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=32,
    moe_intermediate_size=8,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    num_attention_heads=2,
    q_lora_rank=None,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=16,
    num_experts_per_tok=3,
    num_nextn_predict_layers=1,
    max_position_embeddings=4096,
)


@torch.no_grad()
def save_talking_model(directory: Path) -> None:
    """Write the model and its tokenizer, as `fathom serve` takes them."""
    tokenizer = train_tokenizer([SEEN * 50], CONFIG.vocab_size)
    chain = tokenizer.encode(SENTENCE, bos=False)
    assert len(set(chain)) == len(chain) < CONFIG.hidden_size, [tokenizer.decode([token]) for token in chain]
    torch.manual_seed(0)
    model = Model(CONFIG)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
            weight.zero_()
        elif name.endswith("mlp.gate.weight"):
            weight.normal_(std=0.2)
    # A direction for every token of the sentence; all others share that of its last, so any prompt leads to its start.
    places = torch.full((CONFIG.vocab_size,), len(chain) - 1)
    places[chain] = torch.arange(len(chain))
    directions = torch.eye(CONFIG.hidden_size)
    model.embed_tokens.weight.copy_(directions[places])
    model.lm_head.weight.zero_()
    model.lm_head.weight[chain] = 2.5 * directions[: len(chain)].roll(1, 0)  # chain[i] follows direction i − 1
    eh_proj = model.mtp[0].eh_proj.weight
    eh_proj.zero_()
    eh_proj[:, : CONFIG.hidden_size] = directions
    save_model(model, directory)
    save_tokenizer(tokenizer, directory)
