"""Kimi's tokenizer, a `tiktoken.model`: byte strings with their ranks, read as the BPE of a tokenizer.json.

tiktoken merges the two neighbours whose concatenation has the lowest rank; a BPE has a list of pairs instead, here all
that make up a token, in the order of its rank. Where two splits of one token overlap in a text ("aa" + "a", "a" +
"aa"), tiktoken takes the leftmost and a BPE the first in the list; vocabularies that were trained by merging hardly
have such tokens.
"""

import base64
import binascii
from pathlib import Path
from typing import Any

from fathom.data.byte_alphabet import spell_bytes

FILE = "tiktoken.model"

_CASELESS = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        # A word with the character before it: capitals and then small letters, of which either may be missing.
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_CASELESS}]*[\p{{Ll}}{_CASELESS}]+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_CASELESS}]+[\p{{Ll}}{_CASELESS}]*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""How Kimi-K2's tokenizer cuts text before merging."""


def read_tiktoken(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The content of the tokenizer.json that is equal to a tiktoken.model, with the added tokens of `config`.

    `config` is the content of tokenizer_config.json. Raises ValueError for a file that is damaged.
    """
    ranks = _read_ranks(file)
    vocab = {spell_bytes(token): rank for token, rank in ranks.items()}
    added, taken = [], set(ranks.values())
    for key, token in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        number, content = int(key), str(token["content"])
        if number in taken:
            raise ValueError(
                f"{file.name}: token {number} is one of its own, and added_tokens_decoder in tokenizer_config.json "
                f"makes it {content!r}"
            )
        vocab[content] = number
        flags = {name: bool(token.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        added.append({"id": number, "content": content, **flags})
    splits = {"type": "Split", "pattern": {"Regex": _PATTERN}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [splits, to_bytes]},
        "decoder": to_bytes,
        "model": {"type": "BPE", "vocab": vocab, "merges": _merges(ranks), "ignore_merges": True},
    }


def _read_ranks(file: Path) -> dict[bytes, int]:
    """One token a line: its bytes in base64, a blank, its rank, which is its id."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{file.name}, line {number}: no token in base64 with its rank: {line[:80]!r}") from error
    bytes_missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if bytes_missing or len(set(ranks.values())) < len(ranks) or min(ranks.values()) < 0:
        raise ValueError(
            f"{file.name}: ranks must be different numbers from 0 on, and each of the 256 bytes must have one"
        )
    return ranks


def _merges(ranks: dict[bytes, int]) -> list[list[str]]:
    """Every pair of tokens that together are one, in the order in which tiktoken would merge them."""
    spelled = {token: spell_bytes(token) for token in ranks}
    pairs = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                pairs.append((rank, ranks[left], ranks[right], spelled[left], spelled[right]))
    return [[left, right] for _, _, _, left, right in sorted(pairs)]
