"""The architecture as data: config.json's own names, and the rules that its values keep.

A `ModelConfig` *is* a Hugging Face `config.json` of model type `deepseek_v3` (or of its older relative `deepseek_v2`):
the same keys with the same meaning. The dialects in which programs write that file are read and written in
`hf_config.py`, parameters and FLOPs are counted in `counts.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from fathom.config import check
from fathom.model import counts, hf_config
from fathom.model.counts import ParameterCounts
from fathom.model.rope_scaling import YarnScaling


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a DeepSeek-V3 model. Fields are config.json's keys; absent ones mean the 671B model's values."""

    vocab_size: int = 129280
    """Vocabulary size O."""
    hidden_size: int = 7168
    """Width of the residual stream D."""
    intermediate_size: int = 18432
    """Width of the dense layers' SwiGLU."""
    moe_intermediate_size: int = 2048
    """Width of one expert F."""
    num_hidden_layers: int = 61
    """Number of transformer layers L, MTP modules not counted."""
    first_k_dense_replace: int = 3
    """How many layers, counted from the first, are dense; every later one is MoE."""
    num_attention_heads: int = 128
    """Attention heads H."""
    q_lora_rank: int | None = 1536
    """Rank of the query latent Q; None: queries are projected directly."""
    kv_lora_rank: int = 512
    """Rank of the key/value latent C, the larger part of the cache."""
    qk_nope_head_dim: int = 128
    """Width of a head's query and key without position P."""
    qk_rope_head_dim: int = 64
    """Width of a head's query and of the shared key with position R."""
    v_head_dim: int = 128
    """Width of a head's value V."""
    n_routed_experts: int = 256
    """Routed experts in a MoE layer E; may be 0 where no layer is MoE."""
    n_shared_experts: int = 1
    """Shared experts: one SwiGLU of this many experts' width."""
    num_experts_per_tok: int = 8
    """Routed experts each token takes K."""
    n_group: int = 8
    """Groups G the routed experts are cut into."""
    topk_group: int = 4
    """Groups each token may choose its experts from."""
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    """How the router's outputs become affinities; softmax is DeepSeek-V2's."""
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = "noaux_tc"
    """How experts are chosen. noaux_tc: biased scores, groups by the sum of their two best. DeepSeek-V2's, without
    bias: greedy, the best of all; group_limited_greedy, the best of the groups whose best is best."""
    norm_topk_prob: bool = True
    """Normalise the chosen experts' weights to sum 1."""
    routed_scaling_factor: float = 2.5
    """Factor on the routed experts' weights."""
    num_nextn_predict_layers: int = 1
    """Multi-token prediction modules."""
    max_position_embeddings: int = 4096
    """Longest context the model is meant for."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: YarnScaling | None = None
    """YaRN context extension, if any."""
    rms_norm_eps: float = 1e-6
    """Epsilon of the RMS norms (the two latent norms always use 1e-6)."""
    tie_word_embeddings: bool = False
    """Share the embedding with the output head."""
    initializer_range: float = 0.006
    """Standard deviation of the initial weights (report, section 4.2)."""
    bos_token_id: int | None = 0
    """BOS: the token that begins a document."""
    eos_token_id: int | None = 1
    """EOS: the token that ends a document."""
    other_eos_token_ids: tuple[int, ...] = ()
    """More tokens that end a text: config.json's eos_token_id may be a list, of which these are the rest."""
    pad_token_id: int | None = None
    """Padding; never a target."""

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_routing()
        self._check_tokens()

    def _check_sizes(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type == "int":
                least = 0 if name in _MAY_BE_ZERO else 1
                fits = isinstance(value, int) and least <= value < 2**31
                check(fits, name, value, f"an integer of at least {least} and below 2**31")
            elif field.type == "float":
                check(value > 0, name, value, "a positive number")
        rank, dense, rotated = self.q_lora_rank, self.first_k_dense_replace, self.qk_rope_head_dim
        check(rank is None or rank >= 1, "q_lora_rank", rank, "an integer of at least 1, or null")
        most = self.num_hidden_layers
        check(dense <= most, "first_k_dense_replace", dense, f"at most num_hidden_layers ({most})")
        pairs = "an even number: positions rotate pairs of dimensions"
        check(rotated % 2 == 0, "qk_rope_head_dim", rotated, pairs)

    def _check_tokens(self) -> None:
        size = self.vocab_size
        single = {name: (getattr(self, name),) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        for name, tokens in [*single.items(), ("eos_token_id", self.other_eos_token_ids)]:
            for token in tokens:
                inside = token is None or (isinstance(token, int) and 0 <= token < size)
                check(inside, name, token, f"null or a token id below vocab_size ({size})")

    def _check_routing(self) -> None:
        experts, groups = self.n_routed_experts, self.n_group
        if experts == 0:
            sparse = self.num_moe_layers + self.num_nextn_predict_layers
            check(sparse == 0, "n_routed_experts", 0, f"at least 1: {sparse} layers are MoE, MTP modules included")
            return
        check(
            experts % groups == 0 and experts // groups >= 2,
            "n_group",
            groups,
            f"a divisor of n_routed_experts ({experts}) that leaves at least 2 experts in each group",
        )
        check(self.topk_group <= groups, "topk_group", self.topk_group, f"at most n_group ({groups})")
        reachable = self.topk_group * (experts // groups)
        check(
            self.num_experts_per_tok <= reachable,
            "num_experts_per_tok",
            self.num_experts_per_tok,
            f"at most {reachable}: topk_group ({self.topk_group}) groups of {experts // groups} experts",
        )
        self._check_router_kind()

    def _check_router_kind(self) -> None:
        """Only combinations that were released, so that other programs compute the same."""
        hints, method = get_type_hints(ModelConfig), self.topk_method
        for name in ("scoring_func", "topk_method"):
            choices = get_args(hints[name])
            check(getattr(self, name) in choices, name, getattr(self, name), " or ".join(map(repr, choices)))
        if not self.is_v2:
            check(method == "noaux_tc", "topk_method", method, "'noaux_tc' when scores are sigmoids")
            return
        check(method != "noaux_tc", "scoring_func", self.scoring_func, "'sigmoid' when topk_method is 'noaux_tc'")
        # DeepSeek's own code then leaves the scaling factor out, and `transformers` does not normalise at all.
        check(not self.norm_topk_prob, "norm_topk_prob", self.norm_topk_prob, "false when scores are softmax")
        modules = self.num_nextn_predict_layers
        check(modules == 0, "num_nextn_predict_layers", modules, "0 when scores are softmax, as in DeepSeek-V2")
        grouped = method == "group_limited_greedy"
        check(grouped or self.n_group == 1, "n_group", self.n_group, "1 when topk_method is 'greedy'")

    # --- derived sizes

    @property
    def is_v2(self) -> bool:
        """Whether the router is DeepSeek-V2's: softmax scores, no correction bias."""
        return self.scoring_func == "softmax"

    @property
    def qk_head_dim(self) -> int:
        """Width of a whole query or key head, P + R."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Values cached per token and layer, C + R."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of the main model; each MTP module adds one more router."""
        return self.num_hidden_layers - self.first_k_dense_replace

    # --- counts, config.json

    def parameter_counts(self) -> ParameterCounts:
        """Exact numbers of parameters, total and active per token (`counts.py`)."""
        return counts.parameter_counts(self)

    def flops_per_token(self, sequence_length: int, mtp: bool = False) -> int:
        """Model FLOPs to train on one token (`counts.py`); `mtp` adds the MTP modules."""
        return counts.flops_per_token(self, sequence_length, mtp)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """Read the content of a config.json; raises ConfigError for a key whose meaning is not implemented."""
        return hf_config.from_dict(cls, raw)

    def to_dict(self, dtype: str = "float32") -> dict[str, Any]:
        """The content of a config.json that `transformers` 4 and 5, vLLM, SGLang and llama.cpp's converter read."""
        return hf_config.to_dict(self, dtype)


_MAY_BE_ZERO = ("first_k_dense_replace", "num_nextn_predict_layers", "n_routed_experts")
