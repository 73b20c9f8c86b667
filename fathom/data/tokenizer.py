"""A byte-level BPE with the pre-tokenizer and the special tokens of DeepSeek-V3's released tokenizer.

Byte-level means that every text can be encoded and comes back unchanged: the alphabet is the 256 bytes. The
pre-tokenizer cuts text before merging, so that no token spans two words or more than three digits.

Text is data: whatever a user or a document writes, `Tokenizer.encode` yields no control token, a literal
`<｜end▁of▁sentence｜>` included. Control tokens enter a sequence by their ids alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

# llama.cpp's name of the pattern below; it is written into GGUF files.
PRE_TOKENIZER_NAME = "deepseek-v3"
# Applied one after the other: digits by threes, runs of Chinese and Japanese, then everything else.
PRE_TOKENIZER_PATTERNS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"  # punctuation opening a word, such as ".join"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"  # a word with the blank before it
    r"| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"  # blanks up to, not including, the one that belongs to the next word
    r"|\s+",
)

# DeepSeek's spelling: U+FF5C bars and U+2581 underlines, which ordinary text hardly ever contains.
BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
FIM_PREFIX = "<｜fim▁begin｜>"
FIM_SUFFIX = "<｜fim▁hole｜>"
FIM_MIDDLE = "<｜fim▁end｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
SYSTEM = "<｜System｜>"  # ours: DeepSeek puts a system prompt right behind BOS
SPECIAL_TOKENS = (BOS, EOS, PAD, FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE, USER, ASSISTANT, SYSTEM)

SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)

# BOS, then each message's role token and content; EOS closes an assistant's.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    f"{{% if message['role'] == 'system' %}}{{{{ '{SYSTEM}' + message['content'] }}}}"
    f"{{% elif message['role'] == 'user' %}}{{{{ '{USER}' + message['content'] }}}}"
    f"{{% elif message['role'] == 'assistant' %}}{{{{ '{ASSISTANT}' + message['content'] + eos_token }}}}"
    "{% else %}{{ raise_exception('role ' + message['role'] + ' is not known') }}{% endif %}"
    f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '{ASSISTANT}' }}}}{{% endif %}}"
)

# Long texts are encoded in chunks of about this many characters.
CHUNK_CHARACTERS = 1 << 16
# A newline before visible text ends a pre-token, so cutting there changes no token.
_CHUNK_END = re.compile(r"\n(?=\S)")


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level vocabularies spell bytes with: printable ones as they are, others from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTES = _byte_alphabet()


class Tokenizer:
    """Ids from text and back, over a Hugging Face tokenizer.json and tokenizer_config.json."""

    def __init__(self, tokenizer_json: str, config: dict[str, Any]) -> None:
        """From the contents of the two files, which `save_tokenizer` writes back unchanged."""
        self.tokenizer_json = tokenizer_json
        self.config = config
        content = json.loads(tokenizer_json)
        self._hidden_ids = {token["id"] for token in content["added_tokens"] if token["special"]}
        # `encode_special_tokens` makes the spelling of a special token in a text ordinary text. It covers only tokens
        # declared special, and DeepSeek's own file does not declare its role and FIM tokens so.
        for token in content["added_tokens"]:
            token["special"] = True
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        self._backend.encode_special_tokens = True
        self._ids: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self._texts = _Texts(self)

        self.vocab_size = max(self._ids.values()) + 1  # ids may have holes
        self.bos_id = self._named_id("bos_token")
        self.eos_id = self._named_id("eos_token")
        self.pad_id = self._named_id("pad_token") if config.get("pad_token") else self.eos_id
        self.fim_prefix_id = self.token_id(FIM_PREFIX)
        self.fim_suffix_id = self.token_id(FIM_SUFFIX)
        self.fim_middle_id = self.token_id(FIM_MIDDLE)
        self.user_id = self.token_id(USER)
        self.assistant_id = self.token_id(ASSISTANT)
        self.system_id = self.token_id(SYSTEM)

    def token_id(self, token: str) -> int | None:
        """The id of the token with exactly this spelling; None where the vocabulary lacks it."""
        return self._ids.get(token)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        ids = self.encode_batch([text])[0]
        return [self.bos_id, *ids] if bos else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, without BOS, computed in parallel."""
        chunks = [(index, chunk) for index, text in enumerate(texts) for chunk in split_chunks(text)]
        encodings = self._backend.encode_batch_fast([chunk for _, chunk in chunks], add_special_tokens=False)
        ids: list[list[int]] = [[] for _ in texts]
        for (index, _), encoding in zip(chunks, encodings, strict=True):
            ids[index] += encoding.ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text, without special tokens and ids beyond the vocabulary."""
        return self.text_bytes(map(int, ids)).decode(errors="replace")

    def text_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the text, without special tokens; they may begin or end within a character."""
        return b"".join(map(self._texts.__getitem__, ids))

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token decodes to, for a control token its spelling; b"" for ids beyond the vocabulary."""
        spelled = self._backend.id_to_token(token)
        if spelled is None:
            return b""
        if all(character in _BYTES for character in spelled):
            return bytes(_BYTES[character] for character in spelled)
        return str(spelled).encode()

    def _named_id(self, field: str) -> int:
        named = self.config.get(field)
        # Older files spell a token out as {"content": ..., "lstrip": ...}.
        token = named["content"] if isinstance(named, dict) else named
        if token not in self._ids:
            raise ValueError(f"tokenizer_config.json: {field} is {token!r}, which is no token of tokenizer.json")
        return self._ids[token]


class _Texts(dict[int, bytes]):
    """The bytes that each token adds to a text, cached on first use."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> bytes:
        tokenizer = self._tokenizer
        text = b"" if token in tokenizer._hidden_ids else tokenizer.token_bytes(token)
        if 0 <= token < tokenizer.vocab_size:  # other ids are unbounded
            self[token] = text
        return text


def split_chunks(text: str) -> Iterator[str]:
    """The text in chunks of about `CHUNK_CHARACTERS`, cut so that their ids, joined, are those of the whole.

    A single string of gigabytes would otherwise be one task for one core, and hold a record per token in
    memory. (Under another pre-tokenizer than the one above, a cut may change a token beside it, never the
    text.)
    """
    start = 0
    while match := _CHUNK_END.search(text, start + CHUNK_CHARACTERS):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a BPE of `vocab_size` tokens, special ones first; fewer where no more pairs occur twice."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size is {vocab_size}; it must be at least {SMALLEST_VOCABULARY}: "
            f"256 bytes and {len(SPECIAL_TOKENS)} special tokens"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    splits = [
        pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated") for pattern in PRE_TOKENIZER_PATTERNS
    ]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    # For programs that read the file: they prepend BOS as `encode` does.
    begin = (BOS, backend.token_to_id(BOS))
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[begin])
    return Tokenizer(backend.to_str(), _new_config())


def _new_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write the two files that `transformers.AutoTokenizer` and `load_tokenizer` read."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(tokenizer.tokenizer_json, encoding="utf-8")
    config = json.dumps(tokenizer.config, ensure_ascii=False, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(config, encoding="utf-8")


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Read what `save_tokenizer` wrote, or DeepSeek-V3's own or any other byte-level tokenizer."""
    directory = Path(directory)
    content = _read_json(directory / "tokenizer.json")
    config = _read_json(directory / "tokenizer_config.json")
    decoder = (content.get("decoder") or {}).get("type")
    if decoder != "ByteLevel":
        # Bits per byte, and encoding in chunks, rely on getting every text back byte by byte.
        raise ValueError(f"{directory / 'tokenizer.json'}: decoder is {decoder}; only ByteLevel tokenizers are read")
    template = directory / "chat_template.jinja"
    if template.is_file():  # where newer programs keep it
        config["chat_template"] = template.read_text(encoding="utf-8")
    try:
        return Tokenizer(json.dumps(content, ensure_ascii=False), config)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing; a tokenizer directory holds tokenizer.json and tokenizer_config.json"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content
