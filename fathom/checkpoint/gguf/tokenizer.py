"""The tokenizer in a GGUF file."""

import json
from typing import Any, NamedTuple

import gguf

from fathom.data.tokenizer import (
    FIM_MIDDLE,
    FIM_PREFIX,
    FIM_SUFFIX,
    PRE_TOKENIZER_NAME,
    PRE_TOKENIZER_PATTERNS,
    Tokenizer,
    is_control,
)


class Vocabulary(NamedTuple):
    """A byte-level BPE vocabulary in llama.cpp's form."""

    tokens: list[str]
    types: list[gguf.TokenType]
    merges: list[str]


def gguf_vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """The tokens in the order of their ids, `size` of them: ids without a token get a placeholder.

    Raises ValueError for a tokenizer that llama.cpp would run differently.
    """
    if tokenizer.vocab_size > size:
        raise ValueError(f"vocab_size is {size}; the tokenizer needs at least {tokenizer.vocab_size}")
    content = json.loads(tokenizer.tokenizer_json)
    _check_tokenizer(content)
    affixes = tokenizer.prefix_ids, tokenizer.suffix_ids
    if affixes[0] not in ([], [tokenizer.bos_id]) or affixes[1] not in ([], [tokenizer.eos_id]):
        raise ValueError(f"tokenizer.json puts the ids {affixes} around a text; llama.cpp puts BOS and EOS alone")
    tokens = [f"<｜unused▁{number}｜>" for number in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for token, number in content["model"]["vocab"].items():
        tokens[number], types[number] = token, gguf.TokenType.NORMAL
    for added in content["added_tokens"]:
        # llama.cpp recognises user-defined tokens in any text, control tokens only on request.
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if is_control(added) else gguf.TokenType.USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    if not merges:
        raise ValueError("tokenizer.json has no merges; llama.cpp needs at least one")
    return Vocabulary(tokens, types, merges)


def _check_tokenizer(content: dict[str, Any]) -> None:
    """Refuse a tokenizer that would split text differently there: llama.cpp identifies pre-tokenizers by name alone."""
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
    # Line breaks appear in such files as themselves or escaped.
    patterns = tuple(
        str(step.get("pattern", {}).get("Regex")).replace("\r", r"\r").replace("\n", r"\n") for step in steps[:-1]
    )
    if patterns != PRE_TOKENIZER_PATTERNS or steps[-1].get("type") != "ByteLevel":
        raise ValueError(
            f"tokenizer.json: pre_tokenizer is not that of DeepSeek-V3, which llama.cpp names {PRE_TOKENIZER_NAME}"
        )


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Add the vocabulary, the control tokens and the chat template."""
    writer.add_tokenizer_model("gpt2")  # its name for every byte-level BPE
    writer.add_tokenizer_pre(PRE_TOKENIZER_NAME)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(bool(tokenizer.prefix_ids))
    writer.add_add_eos_token(bool(tokenizer.suffix_ids))
    fim = {gguf.Keys.Tokenizer.FIM_PRE_ID: FIM_PREFIX, gguf.Keys.Tokenizer.FIM_SUF_ID: FIM_SUFFIX}
    fim[gguf.Keys.Tokenizer.FIM_MID_ID] = FIM_MIDDLE
    for key, token in fim.items():
        if (number := tokenizer.token_id(token)) is not None:
            writer.add_uint32(key, number)
    if (template := tokenizer.config.get("chat_template")) is not None:
        writer.add_chat_template(template)
