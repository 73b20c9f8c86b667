"""A byte-level BPE with the pre-tokenizer and the special tokens of DeepSeek-V3's released tokenizer.

Byte-level means that every text can be encoded and comes back unchanged: the alphabet is the 256 bytes. The
pre-tokenizer cuts text before merging, so that no token spans two words or more than three digits.

Text is data: whatever a user or a document writes, `Tokenizer.encode` yields no control token, a literal
`<｜end▁of▁sentence｜>` included. Control tokens enter a sequence by their ids alone.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from fathom.data import tiktoken
from fathom.data.byte_alphabet import bytes_of

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


class Tokenizer:
    """Ids from text and back, over a Hugging Face tokenizer.json and tokenizer_config.json."""

    def __init__(self, tokenizer_json: str, config: dict[str, Any]) -> None:
        """From the contents of the two files, which `save_tokenizer` writes back unchanged."""
        self.tokenizer_json = tokenizer_json
        self.config = config
        content = json.loads(tokenizer_json)
        added = content["added_tokens"]
        hidden = {token["content"] for token in added if token["special"]}
        # `encode_special_tokens` makes the spelling of a special token in a text ordinary text.
        for token in added:
            token["special"] = is_control(token)
        self._backend = _read_backend(json.dumps(content))
        self._backend.encode_special_tokens = True
        self._added = {number: token.content for number, token in self._backend.get_added_tokens_decoder().items()}
        self._hidden_ids = {number for number, spelled in self._added.items() if spelled in hidden}
        self._ids: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self._texts = _Texts(self)

        self.vocab_size = max(self._ids.values()) + 1  # ids may have holes
        bos, pad = (self._named_id(name) if config.get(name) else None for name in ("bos_token", "pad_token"))
        self.eos_id = self._named_id("eos_token")
        self.bos_id = self.eos_id if bos is None else bos
        """What begins a document: EOS where the tokenizer has no BOS."""
        self.pad_id = self.eos_id if pad is None else pad
        self.prefix_ids, self.suffix_ids = self._affixes()
        """What `encode` puts before and after a text, mostly BOS and nothing."""
        self.fim_prefix_id = self.token_id(FIM_PREFIX)
        self.fim_suffix_id = self.token_id(FIM_SUFFIX)
        self.fim_middle_id = self.token_id(FIM_MIDDLE)
        self.user_id = self.token_id(USER)
        self.assistant_id = self.token_id(ASSISTANT)
        self.system_id = self.token_id(SYSTEM)

    def token_id(self, token: str) -> int | None:
        """The id of the token with exactly this spelling; None where the vocabulary lacks it."""
        return self._ids.get(token)

    def absent_ids(self, size: int) -> list[int]:
        """The ids below `size`, a model's vocabulary, that no token has."""
        return sorted(set(range(size)) - set(self._ids.values()))

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """The ids of a text; with `bos` also what the tokenizer puts before and after it, as in `transformers`."""
        ids = self.encode_batch([text])[0]
        return [*self.prefix_ids, *ids, *self.suffix_ids] if bos else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, without BOS, computed in parallel. Raises ValueError for a lone surrogate."""
        chunks = [(index, chunk) for index, text in enumerate(texts) for chunk in split_chunks(text)]
        try:
            with _panics_as_errors("a text cannot be tokenised"):
                encodings = self._backend.encode_batch_fast([chunk for _, chunk in chunks], add_special_tokens=False)
        except TypeError as error:
            lone = re.search("[\ud800-\udfff]", "".join(texts))
            if lone is None:
                raise
            raise ValueError(f"the text has {lone[0]!r}, half of a surrogate pair; UTF-8 has no such thing") from error
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
        """The bytes a token decodes to, for an added token its spelling; b"" for ids beyond the vocabulary."""
        if (added := self._added.get(token)) is not None:
            return added.encode()
        spelled = self._backend.id_to_token(token)
        return b"" if spelled is None else bytes_of(spelled)

    def byte_position(self, text: str, position: int) -> int:
        """How many bytes of the text's tokens come before its character at `position`.

        The bytes are those of the text as the tokenizer normalises it, which may join characters beside one another.
        """
        normalizer = self._backend.normalizer
        if normalizer is None:
            return len(text[:position].encode())
        start, whole = normalizer.normalize_str(text[:position]), normalizer.normalize_str(text)
        while not whole.startswith(start):  # the character before is joined to the one behind
            start = start[:-1]
        return len(start.encode())

    def spelling_out(self, text: str) -> Tokenizer:
        """The same tokenizer, but that special tokens found in `text` are not left out of texts."""
        other = copy.copy(self)
        other._hidden_ids = {token for token in self._hidden_ids if self._added[token] not in text}
        other._texts = _Texts(other)
        return other

    def _named_id(self, field: str) -> int:
        named = self.config.get(field)
        # Older files spell a token out as {"content": ..., "lstrip": ...}.
        token = named.get("content") if isinstance(named, dict) else named
        if not isinstance(token, str) or token not in self._ids:
            raise ValueError(f"tokenizer_config.json: {field} is {token!r}, which is no token of tokenizer.json")
        return self._ids[token]

    def _affixes(self) -> tuple[list[int], list[int]]:
        """What the post-processor adds before and after a text."""
        with _panics_as_errors("tokenizer.json is damaged"):
            plain = self._backend.encode("a", add_special_tokens=False).ids
            whole = self._backend.encode("a").ids
        start = next((at for at in range(len(whole)) if plain and whole[at : at + len(plain)] == plain), len(whole))
        before, after = whole[:start], whole[start + len(plain) :]
        # DeepSeek's own files leave BOS to the class they name.
        by_class = str(self.config.get("tokenizer_class")).startswith("Llama") and self.config.get("add_bos_token")
        return ([self.bos_id] if by_class and not before else before), after


def is_control(added: dict[str, Any]) -> bool:
    """Whether no text becomes this added token; all other added tokens are found in texts.

    Control tokens are the special ones, and DeepSeek's roles, which its own file does not declare special.
    """
    return bool(added["special"]) or (added["content"].startswith("<｜") and added["content"].endswith("｜>"))


def _read_backend(tokenizer_json: str) -> tokenizers.Tokenizer:
    try:
        with _panics_as_errors("tokenizer.json is damaged"):
            return tokenizers.Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the package raises no narrower one
        raise ValueError(f"tokenizer.json is not a tokenizer: {error}") from error


@contextmanager
def _panics_as_errors(what: str) -> Iterator[None]:
    """Raise ValueError, which begins with `what`, where the package's Rust code panics.

    It does so for some damaged files, and where its threads cannot be started (under `ulimit -v`).
    """
    try:
        yield
    except BaseException as error:  # a panic is no Exception, and its class cannot be imported
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: the package tokenizers panicked: {error}") from error


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
    with _panics_as_errors("no tokenizer can be trained"):
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
    """Read what `save_tokenizer` wrote, DeepSeek-V3's own or any other byte-level tokenizer, or Kimi's tiktoken.model.

    Raises FileNotFoundError where a file is missing, ValueError for one that is damaged or not byte-level.
    """
    directory = Path(directory)
    file, ranks = directory / "tokenizer.json", directory / tiktoken.FILE
    content = _read_json(file) if file.is_file() or not ranks.is_file() else None
    config = _read_json(directory / "tokenizer_config.json")
    template = directory / "chat_template.jinja"
    if template.is_file():  # where newer programs keep it
        config["chat_template"] = template.read_text(encoding="utf-8")
    try:
        content = tiktoken.read_tiktoken(ranks, config) if content is None else {"added_tokens": []} | content
        decoder = (content.get("decoder") or {}).get("type")
        if decoder != "ByteLevel":
            # Bits per byte, and encoding in chunks, rely on getting every text back byte by byte.
            raise ValueError(f"{file.name}: decoder is {decoder}; only ByteLevel tokenizers are read")
        return Tokenizer(json.dumps(content, ensure_ascii=False), config)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        kind = type(error).__name__
        raise ValueError(f"{directory}: tokenizer.json or tokenizer_config.json is damaged: {kind}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing; a tokenizer directory holds tokenizer.json and tokenizer_config.json"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content
