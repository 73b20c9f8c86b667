"""The same model as `transformers` builds it: its configuration, its routers' choices, and quiet loading."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3PreTrainedModel,
    DeepseekV3TopkRouter,
)

from fathom.model.config import ModelConfig

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}
"""Its plain definitions, not its fused ones: those take no odd widths."""

_SAME = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "first_k_dense_replace",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
]


def peer_config(config: ModelConfig) -> DeepseekV3Config:
    """`transformers`' configuration, filled by hand rather than by the writer that is on trial."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (yarn := config.rope_scaling) is not None:
        rope |= {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_position_embeddings,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
        }
        rope |= {"mscale": yarn.mscale} if yarn.mscale else {}
        rope |= {"mscale_all_dim": yarn.mscale_all_dim} if yarn.mscale_all_dim else {}
    return DeepseekV3Config(
        **{name: getattr(config, name) for name in _SAME},
        num_key_value_heads=config.num_attention_heads,
        num_mtp_layers=config.num_nextn_predict_layers,
        rope_parameters=rope,
        bos_token_id=0,
        eos_token_id=1,
        **PLAIN,
    )


def peer_model(config: ModelConfig) -> DeepseekV3ForCausalLM:
    with quietly():
        return DeepseekV3ForCausalLM(peer_config(config)).eval()


@contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def mtp_layers_known(depth: int) -> Iterator[None]:
    """`transformers` knows the MTP layers of 61-layer models alone; tell it where another depth has them."""
    known = DeepseekV3PreTrainedModel._keys_to_ignore_on_load_unexpected
    layers = "|".join(str(depth + k) for k in range(4))
    DeepseekV3PreTrainedModel._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.({layers})\..*"]
    try:
        yield
    finally:
        DeepseekV3PreTrainedModel._keys_to_ignore_on_load_unexpected = known


def load_peer(directory: Path, depth: int) -> tuple[DeepseekV3ForCausalLM, dict[str, Any]]:
    """Load a directory and what `transformers` has to say about its tensors."""
    with quietly(), mtp_layers_known(depth):
        model, info = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True, **PLAIN
        )
    return model.eval(), info


SMALLEST_MARGIN = 1e-5
"""Selections closer than this may differ between two right programs in float32."""


class Choice(NamedTuple):
    """One router's decision."""

    ids_NK: Tensor
    margin: float
    """The smallest change of a score that could alter any token's choice."""


@contextmanager
def noted_choices(model: torch.nn.Module) -> Iterator[list[Choice]]:
    """What every router of the model chooses from now on."""
    choices: list[Choice] = []

    def note_choice(gate: DeepseekV3TopkRouter, _: Any, out: tuple[Tensor, Tensor, Tensor]) -> None:
        logits_NE, _weights_NK, ids_NK = out
        choices.append(Choice(ids_NK, _margin(gate, logits_NE)))

    routers = [module for module in model.modules() if isinstance(module, DeepseekV3TopkRouter)]
    hooks = [router.register_forward_hook(note_choice) for router in routers]
    try:
        yield choices
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def run_peer(model: DeepseekV3ForCausalLM, tokens_BS: Tensor, **inputs: Tensor) -> tuple[Tensor, list[Choice]]:
    """Logits, and every router's choice."""
    with noted_choices(model) as choices:
        return model(tokens_BS, use_cache=False, **inputs).logits, choices


def _margin(gate: DeepseekV3TopkRouter, logits_NE: Tensor) -> float:
    biased_NE = logits_NE.double().sigmoid() + gate.e_score_correction_bias.double()
    grouped_NGe = biased_NE.unflatten(1, (gate.num_group, -1))
    group_NG = grouped_NGe.sort(dim=-1, descending=True).values[..., :2].sum(-1)
    worst_chosen_N1 = group_NG.sort(dim=-1, descending=True).values[:, gate.topk_group - 1, None]
    open_NG1 = (group_NG >= worst_chosen_N1).unsqueeze(-1)
    within_NE = grouped_NGe.masked_fill(~open_NG1, float("-inf")).flatten(1)
    return min(_gap(group_NG, gate.topk_group), _gap(within_NE, gate.top_k))


def _gap(scores: Tensor, count: int) -> float:
    """Smallest distance between the last score taken and the first one left."""
    if count == scores.shape[1]:
        return float("inf")
    ordered = scores.sort(dim=-1, descending=True).values
    return float((ordered[:, count - 1] - ordered[:, count]).min())
