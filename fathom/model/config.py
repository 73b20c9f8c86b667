"""The architecture as data: config.json's own names, its rules, and what a model of that shape costs.

A `ModelConfig` *is* a Hugging Face `config.json` of model type `deepseek_v3` (or of its older relative `deepseek_v2`):
the same keys, read and written in the spellings that `transformers`, vLLM, SGLang and llama.cpp expect. Keys that would
change the mathematics are refused, never dropped. Parameter and FLOP counts follow the conventions of the DeepSeek-V3
report (arXiv 2412.19437, section 4).
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from fathom.config import ConfigError

# Keys that only one value of which is the mathematics implemented here. Absent means that value.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "moe_layer_freq": (1,),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "rope_interleave": (True,),
}
_FIXED_ELSEWHERE: dict[str, tuple[Any, ...]] = {"mlp_bias": (False,)}
"""The same, of keys that only other programs write."""

# What config.json may call itself. Kimi-K2 is a DeepSeek-V3 under its own name.
_MODEL_TYPES = ("deepseek_v3", "kimi_k2", "deepseek_v2")
_RELATIVES = {
    "deepseek_v32": "DeepSeek-V3.2, whose indexer chooses the tokens that attention sees",
    "deepseek_v4": "DeepSeek-V4, with hyper-connections and compressed sparse attention",
    "kimi_k25": "Kimi-K2.5, with a vision tower around its language model",
    "kimi_linear": "Kimi-Linear, with linear attention in most layers",
}
"""Models that look like this architecture and are not."""
# What these keys of V2 mean when they are absent or null (`transformers`' DeepseekV2Config).
_V2_DEFAULTS = {
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
}

# Keys that say nothing about the forward pass: bookkeeping, file formats, serving and training hints.
_IGNORED = frozenset(
    [
        "architectures",
        "auto_map",
        "_name_or_path",
        "name_or_path",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "pretraining_tp",
        "ep_size",
        "aux_loss_alpha",
        "seq_aux",
        "head_dim",
        "qk_head_dim",
        "quantization_config",
        "output_router_logits",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "is_encoder_decoder",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "problem_type",
        "num_local_experts",
    ]
)


@dataclass(frozen=True)
class YarnScaling:
    """YaRN context extension, the released models' `rope_scaling` (arXiv 2309.00071; DeepSeek-V3 report, 4.3)."""

    factor: float
    """How many times longer the context becomes (the released models: 40)."""
    original_max_position_embeddings: int
    """Context length before the extension (the released models: 4096)."""
    beta_fast: float = 32.0
    """Dimensions that turn more often than this within the original length keep their frequency."""
    beta_slow: float = 1.0
    """Dimensions that turn less often than this within the original length are slowed by `factor`."""
    mscale: float = 0.0
    """Temperature of cos and sin; 0 means not given."""
    mscale_all_dim: float = 0.0
    """Temperature of the attention scale; 0 means not given."""

    def __post_init__(self) -> None:
        _check(self.factor > 0, "rope_scaling.factor", self.factor, "a positive number")
        length = self.original_max_position_embeddings
        _check(length > 0, "rope_scaling.original_max_position_embeddings", length, "a positive integer")
        _check(
            self.beta_fast >= self.beta_slow > 0,  # equal in Kimi-K2
            "rope_scaling.beta_fast, beta_slow",
            (self.beta_fast, self.beta_slow),
            "two positive numbers, beta_fast the larger (or both equal)",
        )


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters; the correction biases are counted, as in the released weights' notes."""

    total: int
    """All parameters of the main model: every layer, every expert, embedding and head; without MTP modules."""
    active: int
    """Parameters one token passes through, the input embedding and the head included."""
    embedding: int
    """The input embedding alone."""
    mtp: int
    """The MTP modules' own parameters (embedding and head are the main model's)."""
    active_matrices: int
    """Weights that multiply one token's activations: active, without embedding, norms and biases."""
    active_mtp_matrices: int
    """The same for the MTP modules, each with its use of the shared head."""


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
    """Routed experts in a MoE layer E."""
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
    """Token that begins a document."""
    eos_token_id: int | None = 1
    """Token that ends a document."""
    other_eos_token_ids: tuple[int, ...] = ()
    """More tokens that end a text: config.json's eos_token_id may be a list, of which these are the rest."""
    pad_token_id: int | None = None
    """Token that fills batches up; never a target."""

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            _check(isinstance(value, int) and value >= 1, name, value, "an integer of at least 1")
        for name in ("first_k_dense_replace", "num_nextn_predict_layers"):
            value = getattr(self, name)
            _check(isinstance(value, int) and value >= 0, name, value, "an integer of at least 0")
        rank = self.q_lora_rank
        _check(rank is None or rank >= 1, "q_lora_rank", rank, "an integer of at least 1, or null")
        _check(
            self.first_k_dense_replace <= self.num_hidden_layers,
            "first_k_dense_replace",
            self.first_k_dense_replace,
            f"at most num_hidden_layers ({self.num_hidden_layers})",
        )
        _check(
            self.qk_rope_head_dim % 2 == 0,
            "qk_rope_head_dim",
            self.qk_rope_head_dim,
            "an even number: positions rotate pairs of dimensions",
        )
        self._check_routing()
        for name in ("rope_theta", "rms_norm_eps", "initializer_range", "routed_scaling_factor"):
            value = getattr(self, name)
            _check(value > 0, name, value, "a positive number")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            inside = value is None or (isinstance(value, int) and 0 <= value < self.vocab_size)
            _check(inside, name, value, f"null or a token id below vocab_size ({self.vocab_size})")
        others = self.other_eos_token_ids
        inside = all(isinstance(token, int) and 0 <= token < self.vocab_size for token in others)
        _check(inside, "eos_token_id", others, f"token ids below vocab_size ({self.vocab_size})")

    def _check_routing(self) -> None:
        experts, groups = self.n_routed_experts, self.n_group
        _check(
            experts % groups == 0 and experts // groups >= 2,
            "n_group",
            groups,
            f"a divisor of n_routed_experts ({experts}) that leaves at least 2 experts in each group",
        )
        _check(self.topk_group <= groups, "topk_group", self.topk_group, f"at most n_group ({groups})")
        reachable = self.topk_group * (experts // groups)
        _check(
            self.num_experts_per_tok <= reachable,
            "num_experts_per_tok",
            self.num_experts_per_tok,
            f"at most {reachable}: topk_group ({self.topk_group}) groups of {experts // groups} experts",
        )

        self._check_method()

    def _check_method(self) -> None:
        """Only combinations that were released, so that other programs compute the same."""
        for name in ("scoring_func", "topk_method"):
            choices = get_args(get_type_hints(ModelConfig)[name])
            _check(getattr(self, name) in choices, name, getattr(self, name), " or ".join(map(repr, choices)))
        if not self.is_v2:
            _check(
                self.topk_method == "noaux_tc", "topk_method", self.topk_method, "'noaux_tc' when scores are sigmoids"
            )
            return
        method = self.topk_method
        _check(method != "noaux_tc", "scoring_func", self.scoring_func, "'sigmoid' when topk_method is 'noaux_tc'")
        # DeepSeek's own code then leaves the scaling factor out, and `transformers` does not normalise at all.
        _check(not self.norm_topk_prob, "norm_topk_prob", self.norm_topk_prob, "false when scores are softmax")
        modules = self.num_nextn_predict_layers
        _check(modules == 0, "num_nextn_predict_layers", modules, "0 when scores are softmax, as in DeepSeek-V2")
        grouped = method == "group_limited_greedy"
        _check(grouped or self.n_group == 1, "n_group", self.n_group, "1 when topk_method is 'greedy'")

    # ------------------------------------------------------------------------------------------ derived sizes

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
        """Numbers cached per token and layer, C + R."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of the main model; each MTP module adds one more router."""
        return self.num_hidden_layers - self.first_k_dense_replace

    def parameter_counts(self) -> ParameterCounts:
        """Exact numbers of parameters, total and active per token, from the formulas (no model is built)."""
        d, f = self.hidden_size, self.moe_intermediate_size
        attention, attention_norms = self._attention_counts()
        norms = attention_norms + 2 * d
        expert, shared = 3 * d * f, 3 * d * f * self.n_shared_experts
        gate = self.n_routed_experts * d
        dense_layer = attention + 3 * d * self.intermediate_size
        moe_active = attention + gate + shared + self.num_experts_per_tok * expert
        moe_total = attention + gate + shared + self.n_routed_experts * expert
        bias = 0 if self.is_v2 else self.n_routed_experts
        embedding = self.vocab_size * d
        head = 0 if self.tie_word_embeddings else embedding

        dense, sparse, modules = (
            self.first_k_dense_replace,
            self.num_moe_layers,
            self.num_nextn_predict_layers,
        )
        small = self.num_hidden_layers * norms + sparse * bias + d
        matrices = dense * dense_layer + sparse * moe_active + embedding
        return ParameterCounts(
            total=dense * dense_layer + sparse * moe_total + small + embedding + head,
            active=dense * dense_layer + sparse * moe_active + small + embedding + head,
            embedding=embedding,
            mtp=modules * (moe_total + norms + bias + 2 * d * d + 3 * d),
            active_matrices=matrices,
            active_mtp_matrices=modules * (moe_active + 2 * d * d + embedding),
        )

    def _attention_counts(self) -> tuple[int, int]:
        """(matrix weights, norm weights) of one layer's attention."""
        d, heads, rank = self.hidden_size, self.num_attention_heads, self.q_lora_rank
        width = heads * self.qk_head_dim
        query, query_norm = (d * width, 0) if rank is None else (d * rank + rank * width, rank)
        latent = d * self.cache_width + self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        return query + latent + heads * self.v_head_dim * d, query_norm + self.kv_lora_rank

    def flops_per_token(self, sequence_length: int, mtp: bool = False) -> int:
        """Model FLOPs to train on one token: 6 per active matrix weight, plus causal attention's products.

        The head counts, the embedding look-up does not; recomputation is not counted. `mtp` adds the MTP modules.
        """
        counts = self.parameter_counts()
        weights, layers = counts.active_matrices, self.num_hidden_layers
        if mtp:
            weights, layers = weights + counts.active_mtp_matrices, layers + self.num_nextn_predict_layers
        products = 3 * layers * self.num_attention_heads * (self.qk_head_dim + self.v_head_dim) * sequence_length
        return 6 * weights + products

    # ------------------------------------------------------------------------------------------- config.json

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """Read the content of a config.json; raises ConfigError for a key whose meaning is not implemented here."""
        raw = dict(raw)
        _settle_model_type(raw)
        values: dict[str, Any] = {"rope_scaling": _read_rope(raw)}
        for key, allowed in (_FIXED | _FIXED_ELSEWHERE).items():
            if (value := raw.pop(key, None)) is not None:
                choices = " or ".join(map(repr, allowed))
                _check(value in allowed, key, value, f"{choices}: nothing else is implemented")
        # Checkpoints without MTP modules often leave the key out; `transformers` has a second name for it.
        modules = raw.pop("num_mtp_layers", 0)
        raw.setdefault("num_nextn_predict_layers", modules)
        raw.setdefault("initializer_range", 0.02)
        values["other_eos_token_ids"] = _split_eos(raw)
        known = {f.name for f in dataclasses.fields(cls)} - values.keys()
        for key, value in raw.items():
            if key in known:
                values[key] = _convert(key, value)
            elif key not in _IGNORED and key != "num_key_value_heads":
                raise ConfigError(_unknown(key, value, known))
        config = cls(**values)
        kv_heads = raw.get("num_key_value_heads")
        matches = kv_heads is None or kv_heads == config.num_attention_heads
        _check(matches, "num_key_value_heads", kv_heads, f"num_attention_heads ({config.num_attention_heads})")
        return config

    def to_dict(self, dtype: str = "float32") -> dict[str, Any]:
        """The content of a config.json that `transformers` 4 and 5, vLLM, SGLang and llama.cpp's converter read."""
        raw: dict[str, Any] = {
            "architectures": ["DeepseekV2ForCausalLM" if self.is_v2 else "DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v2" if self.is_v2 else "deepseek_v3",
            **{key: allowed[0] for key, allowed in _FIXED.items()},
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "other_eos_token_ids"},
            "num_key_value_heads": self.num_attention_heads,
            "ep_size": 1,
            "dtype": dtype,
            "torch_dtype": dtype,
            "use_cache": True,
        }
        if self.other_eos_token_ids:
            raw["eos_token_id"] = [self.eos_token_id, *self.other_eos_token_ids]
        parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if (yarn := self.rope_scaling) is not None:
            # 0 is this dataclass's «not given»; other programs want the key to be absent.
            given = {k: v for k, v in dataclasses.asdict(yarn).items() if v or not k.startswith("mscale")}
            raw["rope_scaling"] = {"type": "yarn", **given}
            parameters = {"rope_type": "yarn", "rope_theta": self.rope_theta, **given}
        raw["rope_parameters"] = parameters
        return raw


_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "max_position_embeddings",
)


def _check(right: bool, name: str, value: Any, expected: str) -> None:
    if not right:
        raise ConfigError(f"{name} is {value!r}; it must be {expected}")


def _settle_model_type(raw: dict[str, Any]) -> None:
    """Take model_type out of `raw`, check that the router fits it, and fill in what DeepSeek-V2 leaves out."""
    kind = raw.pop("model_type", None)
    if kind is None:
        raise ConfigError("model_type is missing: a DeepSeek-V3 config.json says «deepseek_v3»")
    known = " or ".join(map(repr, _MODEL_TYPES))
    if isinstance(kind, str) and kind in _RELATIVES:
        raise ConfigError(f"model_type is {kind!r}: this is {_RELATIVES[kind]}, which is not implemented; {known} are")
    _check(kind in _MODEL_TYPES, "model_type", kind, f"{known}: nothing else is implemented")
    if "index_topk" in raw:
        raise ConfigError(f"index_topk is {raw['index_topk']!r}: this is {_RELATIVES['deepseek_v32']}; not implemented")
    if kind == "deepseek_v2":
        for key, value in _V2_DEFAULTS.items():
            if raw.get(key) is None:
                raw[key] = value
        scores = raw["scoring_func"]
        _check(scores == "softmax", "model_type", kind, f"'deepseek_v3' when scoring_func is {scores!r}")
        return
    for key, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        found = raw.pop(key, None)
        _check(found in (value, None), key, found, f"{value!r} in a {kind}")


def _unknown(key: str, value: Any, known: set[str]) -> str:
    close = difflib.get_close_matches(key, sorted(known), n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return (
        f"config key {key!r} (value {value!r}) is not one of DeepSeek-V3's: it may change the mathematics, so it is "
        f"refused, not dropped{hint}"
    )


def _convert(key: str, value: Any) -> Any:
    """Check a JSON value's type against the field's; integers are welcome where a float is expected."""
    annotation = next(f.type for f in dataclasses.fields(ModelConfig) if f.name == key)
    if value is None:
        _check("None" in str(annotation), key, value, f"a value of type {annotation}")
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation == "float":
        _check(number, key, value, "a number")
        return float(value)
    if annotation == "bool":
        _check(isinstance(value, bool), key, value, "true or false")
    elif str(annotation).startswith("Literal"):
        _check(isinstance(value, str), key, value, "a string")
    else:
        _check(isinstance(value, int) and number, key, value, "an integer")
    return value


def _split_eos(raw: dict[str, Any]) -> tuple[int, ...]:
    """Leave the first of several end tokens in `raw`; returns the others."""
    given = raw.get("eos_token_id")
    if not isinstance(given, list):
        return ()
    whole = bool(given) and all(type(token) is int for token in given)
    _check(whole, "eos_token_id", given, "a token id or a list of at least one")
    raw["eos_token_id"], *others = given
    return tuple(others)


def _read_rope(raw: dict[str, Any]) -> YarnScaling | None:
    """Take both spellings of the rotary settings out of `raw`; leaves `rope_theta` behind as a plain key."""
    spellings: dict[str, YarnScaling | None] = {}
    for name in ("rope_parameters", "rope_scaling"):
        given = raw.pop(name, None)
        _check(given is None or isinstance(given, dict), name, given, "null or an object")
        if not given:
            continue
        rope = dict(given)
        if (theta := rope.pop("rope_theta", None)) is not None:
            plain = raw.setdefault("rope_theta", theta)
            _check(plain == theta, "rope_theta", plain, f"the same as {name}.rope_theta ({theta!r})")
        spellings[name] = _read_yarn(rope)
    found = list(spellings.values())
    # Which of the two is believed differs between programs.
    _check(len(set(found)) < 2, "rope_scaling", found[-1:], f"the same as rope_parameters ({found[:1]})")
    return found[0] if found else None


def _read_yarn(rope: dict[str, Any]) -> YarnScaling | None:
    """The content of rope_scaling or rope_parameters; None when its type is default."""
    kinds = {str(rope.pop(key)) for key in ("type", "rope_type") if key in rope} or {"default"}
    if kinds == {"default"}:
        _check(not rope, "rope_parameters", rope, "only rope_type and rope_theta when the type is default")
        return None
    _check(kinds == {"yarn"}, "rope_scaling.type", sorted(kinds), "'yarn' or 'default'")
    for key, only in (("truncate", True), ("partial_rotary_factor", 1.0), ("attention_factor", None)):
        if key in rope:
            value = rope.pop(key)
            _check(value in (only, None), f"rope_scaling.{key}", value, f"{only!r}: nothing else is implemented")
    fields = {f.name for f in dataclasses.fields(YarnScaling)}
    unknown = sorted(set(rope) - fields)
    _check(not unknown, "rope_scaling", unknown, f"made of {', '.join(sorted(fields))} alone")
    for key in ("factor", "original_max_position_embeddings"):
        _check(rope.get(key) is not None, f"rope_scaling.{key}", None, "given when the type is yarn")
    for key, value in rope.items():
        number = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
        _check(number, f"rope_scaling.{key}", value, "a number")
    return YarnScaling(**{key: value for key, value in rope.items() if value is not None})
