"""Writing a model as one GGUF file, which llama.cpp runs as it lies (its architecture `deepseek2`).

The tensors are ours under llama.cpp's names, except that W_kvb is cut into its key half, transposed per head, and its
value half: llama.cpp runs the absorbed form of latent attention alone. Matrices are written in the type asked for;
norms, routers and correction biases stay float32. What llama.cpp would compute differently is refused, not written.
"""

import json
import math
import os
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fathom.checkpoint.hf.safetensors_io import check_disk, sync
from fathom.checkpoint.hf.save import Verified
from fathom.checkpoint.hf.weights import ModelWeights, Weights
from fathom.config import ConfigError
from fathom.data.tokenizer import (
    FIM_MIDDLE,
    FIM_PREFIX,
    FIM_SUFFIX,
    PRE_TOKENIZER_NAME,
    PRE_TOKENIZER_PATTERNS,
    Tokenizer,
)
from fathom.model.config import ModelConfig
from fathom.model.rope import mscale, rope_table, softmax_scale
from fathom.model.rope_scaling import YarnScaling
from fathom.model.transformer import Model

try:
    import gguf

    from fathom.checkpoint.gguf.tensors import KINDS, DType, GGUFTensor, compare_file, encoded, gguf_tensors
except ImportError as error:
    raise ImportError("GGUF files are written with the gguf package: pip install 'fathom-lm[gguf]'") from error

_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


def save_gguf(model: Model, tokenizer: Tokenizer | None, path: str | Path, dtype: DType = "bf16") -> None:
    """Write the model, and the tokenizer with its chat template, as the GGUF file `path`.

    `q8_0` stores blocks of 32 numbers in 34 bytes; matrices whose rows are no multiple of 32 long stay bfloat16. The
    file is written aside and then renamed: an interrupted write leaves nothing at `path`, or what was there before.

    llama.cpp drafts with one MTP module, and only when queries are compressed; modules it has no use for are left out,
    with a warning. Raises ValueError for a model or a tokenizer that it would run differently.
    """
    write_gguf(ModelWeights(model), tokenizer, Path(path), dtype)


def write_gguf(
    weights: Weights, tokenizer: Tokenizer | None, target: Path, dtype: DType, verify: bool = False
) -> Verified | None:
    """The same from weights wherever they are; a few rows of one tensor are in memory at a time.

    With `verify` the file is read back and compared with its source before it gets its name. Raises ValueError also
    where the disk is too full, or the comparison fails.
    """
    if dtype not in KINDS:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(KINDS)}")
    if target.is_dir():
        raise ValueError(f"path is {str(target)!r}, a directory; a GGUF model is a file")
    config = weights.config
    _check_config(config)
    vocabulary = None if tokenizer is None else _vocabulary(tokenizer, config.vocab_size)
    modules = _drafting_modules(config)
    tensors = gguf_tensors(weights, modules)
    check_disk(target, sum(tensor.bytes(dtype) for tensor in tensors))
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with closing(gguf.GGUFWriter(aside, "deepseek2")) as writer:
            writer.add_type("model")
            writer.add_name(target.stem)
            writer.add_file_type(_FILE_TYPES[dtype])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            _add_config(writer, config, modules)
            if tokenizer is None or vocabulary is None:
                writer.add_tokenizer_model("none")
            else:
                _add_tokenizer(writer, tokenizer, vocabulary)
            _write_tensors(writer, weights, tensors, dtype)
        sync(aside)
        found = Verified(len(tensors), compare_file(weights, tensors, aside, dtype)) if verify else None
        os.replace(aside, target)
        sync(target.parent)
        return found
    finally:
        aside.unlink(missing_ok=True)


def _write_tensors(writer: gguf.GGUFWriter, weights: Weights, tensors: list[GGUFTensor], dtype: DType) -> None:
    """Write the table of tensors, then one after the other, piece by piece, each from an aligned place on."""
    for tensor in tensors:
        size, kind = tensor.bytes(dtype), tensor.kind(dtype)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    (file,) = writer.fout
    for tensor in tensors:
        writer.write_padding(file, file.tell())
        for piece in encoded(weights, tensor, dtype):
            piece.tofile(file)
    writer.write_padding(file, file.tell())


# ----------------------------------------------------------------------------------- what llama.cpp can run


def _check_config(config: ModelConfig) -> None:
    """Refuse what llama.cpp has no words for, or would compute differently."""
    _check(not config.is_v2, "scoring_func", config.scoring_func, "'sigmoid': what llama.cpp makes of V2 is not tested")
    depth, vocabulary = config.num_hidden_layers, config.vocab_size
    # It recognises three released models without query compression by these numbers, and then ignores q_lora_rank.
    lite = depth in (26, 27) or (depth == 48 and vocabulary == 128256)
    _check(
        config.q_lora_rank is None or not lite,
        "q_lora_rank",
        config.q_lora_rank,
        f"null with {depth} layers and {vocabulary} tokens: llama.cpp takes such a model for one without query "
        "compression",
    )
    _check(depth <= 511, "num_hidden_layers", depth, "at most 511")  # 512 with the MTP module
    _check(config.n_routed_experts <= 1024, "n_routed_experts", config.n_routed_experts, "at most 1024")
    if (yarn := config.rope_scaling) is not None:
        # Read for other architectures, constants for this one.
        _check(yarn.beta_fast == 32, "rope_scaling.beta_fast", yarn.beta_fast, "32, as llama.cpp assumes")
        _check(yarn.beta_slow == 1, "rope_scaling.beta_slow", yarn.beta_slow, "1, as llama.cpp assumes")
        # Below one turn of the fastest pair, 2π positions, the ramp's ends change places, and it is read differently.
        length = yarn.original_max_position_embeddings
        _check(length >= 7, "rope_scaling.original_max_position_embeddings", length, "at least 7")


def _check(right: bool, name: str, value: Any, expected: str) -> None:
    if not right:
        raise ConfigError(f"{name} is {value!r}; for a GGUF file it must be {expected}")


def _drafting_modules(config: ModelConfig) -> int:
    """How many MTP modules llama.cpp can draft with, 0 or 1; it would stop the whole program at any other model."""
    modules = config.num_nextn_predict_layers
    if modules and config.q_lora_rank is None:
        warnings.warn(
            f"num_nextn_predict_layers is {modules}, but llama.cpp drafts only with models that compress queries "
            "(q_lora_rank is null): the file holds no MTP module",
            stacklevel=4,
        )
        return 0
    if modules > 1:
        warnings.warn(
            f"num_nextn_predict_layers is {modules}, but llama.cpp drafts with one module: the file holds the first",
            stacklevel=4,
        )
    return min(modules, 1)


# ------------------------------------------------------------------------------------------------- metadata


def _add_config(writer: gguf.GGUFWriter, config: ModelConfig, modules: int) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers + modules)
    if modules:
        writer.add_nextn_predict_layers(modules)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_attention(writer, config)
    _add_experts(writer, config)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling is not None:
        _add_yarn(writer, config, config.rope_scaling)


def _add_attention(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """Absorbed latent attention is multi-query attention: one key of width C+R for all heads, its value the first C."""
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_key_length(config.cache_width)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_q_lora_rank(config.q_lora_rank or 0)  # the key must be there


def _add_experts(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    # A choice of all groups is no choice, and llama.cpp stops the program at it.
    if config.topk_group < config.n_group:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)


def _add_yarn(writer: gguf.GGUFWriter, config: ModelConfig, yarn: YarnScaling) -> None:
    """llama.cpp has two numbers for our two temperatures, cut differently.

    It multiplies cos and sin by a magnitude m, and scores by (m · (1 + 0.1 · multiplier · ln factor))²; we multiply
    cos and sin by m and scores by `softmax_scale`. So the multiplier is solved for.
    """
    magnitude = float(rope_table(config, torch.zeros(1, dtype=torch.int64)).cos[0, 0])  # position 0: cos is 1
    sharpening = math.sqrt(softmax_scale(config) * config.qk_head_dim**0.5)
    turn = 0.1 * math.log(yarn.factor)
    multiplier = (sharpening / magnitude - 1) / turn if turn else 0.0
    # m is attn_factor, unless the multiplier is 0: then it is mscale(factor, 1) times as much.
    attn_factor = magnitude if multiplier else magnitude / mscale(yarn.factor, 1.0)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(yarn.factor)
    writer.add_rope_scaling_orig_ctx_len(yarn.original_max_position_embeddings)
    writer.add_rope_scaling_attn_factors(attn_factor)
    writer.add_rope_scaling_yarn_log_mul(0.1 * multiplier)  # this architecture's loader divides by 0.1


# ------------------------------------------------------------------------------------------------ tokenizer


class _Vocabulary(NamedTuple):
    """What llama.cpp needs to know of a byte-level BPE."""

    tokens: list[str]
    types: list[gguf.TokenType]
    merges: list[str]


def _vocabulary(tokenizer: Tokenizer, size: int) -> _Vocabulary:
    """The tokens in the order of their ids, ids without a token filled up, so that there are `size`."""
    if tokenizer.vocab_size > size:
        raise ValueError(f"vocab_size is {size}; the tokenizer needs at least {tokenizer.vocab_size}")
    content = json.loads(tokenizer.tokenizer_json)
    _check_tokenizer(content)
    tokens = [f"<｜unused▁{number}｜>" for number in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for token, number in content["model"]["vocab"].items():
        tokens[number], types[number] = token, gguf.TokenType.NORMAL
    for added in content["added_tokens"]:
        # DeepSeek's own file does not declare its role and FIM tokens special. llama.cpp finds user-defined tokens in
        # any text, control tokens only where it is told to.
        control = added["special"] or (added["content"].startswith("<｜") and added["content"].endswith("｜>"))
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    if not merges:
        raise ValueError("tokenizer.json has no merges; llama.cpp needs at least one")
    return _Vocabulary(tokens, types, merges)


def _check_tokenizer(content: dict[str, Any]) -> None:
    """Refuse a tokenizer that would cut text differently there: pre-tokenizers are known by name alone."""
    model, normalizer = content["model"], content.get("normalizer")
    plain = model.get("type") == "BPE" and not any(
        model.get(key) for key in ("ignore_merges", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    )
    if not plain:
        raise ValueError(f"tokenizer.json: model is {model.get('type')} with options; only plain BPE is written")
    if normalizer is not None and normalizer.get("normalizers") != []:
        raise ValueError(f"tokenizer.json: normalizer is {normalizer.get('type')}; llama.cpp has none for BPE")
    splitters = content.get("pre_tokenizer") or {}
    steps = splitters.get("pretokenizers", [splitters])
    # Line ends stand in such files as themselves or escaped.
    patterns = tuple(
        str(step.get("pattern", {}).get("Regex")).replace("\r", r"\r").replace("\n", r"\n") for step in steps[:-1]
    )
    if patterns != PRE_TOKENIZER_PATTERNS or steps[-1].get("type") != "ByteLevel":
        raise ValueError(
            f"tokenizer.json: pre_tokenizer is not that of DeepSeek-V3, the one llama.cpp knows as {PRE_TOKENIZER_NAME}"
        )


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")  # its name for every byte-level BPE
    writer.add_tokenizer_pre(PRE_TOKENIZER_NAME)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    fim = {gguf.Keys.Tokenizer.FIM_PRE_ID: FIM_PREFIX, gguf.Keys.Tokenizer.FIM_SUF_ID: FIM_SUFFIX}
    fim[gguf.Keys.Tokenizer.FIM_MID_ID] = FIM_MIDDLE
    for key, token in fim.items():
        if (number := tokenizer.token_id(token)) is not None:
            writer.add_uint32(key, number)
    if (template := tokenizer.config.get("chat_template")) is not None:
        writer.add_chat_template(template)
