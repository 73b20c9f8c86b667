"""Kimi's tiktoken.model against the tiktoken package, and what is said of a damaged one."""

import base64
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.data import tiktoken
from fathom.data.byte_alphabet import bytes_of
from fathom.data.tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer, save_tokenizer
from tests.data.conftest import TEXTS

BOS, EOS, USER, TOOL = "[BOS]", "[EOS]", "<|im_user|>", "<|tool_call_begin|>"


@pytest.fixture(scope="module")
def ranks(tokenizer: Tokenizer) -> dict[bytes, int]:
    """The merges of a trained BPE, in the order in which it found them."""
    vocab = json.loads(tokenizer.tokenizer_json)["model"]["vocab"]
    plain = sorted((number, spelled) for spelled, number in vocab.items() if spelled not in SPECIAL_TOKENS)
    return {bytes_of(spelled): rank for rank, (_, spelled) in enumerate(plain)}


def write(directory: Path, ranks: dict[bytes, int], **changes: Any) -> Path:
    """A directory as Kimi-K2 is published: no tokenizer.json, ids with holes between the added tokens."""
    directory.mkdir(exist_ok=True)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (directory / tiktoken.FILE).write_text("".join(lines))
    added = {BOS: (0, True), EOS: (1, True), USER: (4, True), TOOL: (7, False)}
    decoder = {str(len(ranks) + at): {"content": token, "special": flag} for token, (at, flag) in added.items()}
    config = {"tokenizer_class": "TikTokenTokenizer", "bos_token": BOS, "eos_token": EOS, "pad_token": None}
    config |= {"added_tokens_decoder": decoder}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | changes))
    return directory


@pytest.fixture(scope="module")
def kimi(ranks: dict[bytes, int], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write(tmp_path_factory.mktemp("kimi"), ranks))


def test_texts_have_the_ids_that_the_tiktoken_package_gives(kimi: Tokenizer, ranks: dict[bytes, int]) -> None:
    peer = pytest.importorskip("tiktoken").Encoding(
        "peer", pat_str=tiktoken._PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    alphabet = "".join(TEXTS) + "汉字 ひらがな Don't IT'S naïve 1234 \r\n\t  ǅ\u0301"
    for seed in range(300):
        draw = random.Random(seed)
        start = draw.randrange(len(alphabet))
        text = alphabet[start : start + 40] + "".join(draw.choices(alphabet, k=30))
        assert kimi.encode(text) == peer.encode_ordinary(text), repr(text)


@settings(max_examples=60)
@given(st.text())
def test_every_text_comes_back(kimi: Tokenizer, text: str) -> None:
    assert kimi.decode(kimi.encode(text)) == text


def test_added_tokens_keep_their_ids(kimi: Tokenizer, ranks: dict[bytes, int], tmp_path: Path) -> None:
    base = len(ranks)
    assert (kimi.bos_id, kimi.eos_id, kimi.token_id(USER), kimi.vocab_size) == (base, base + 1, base + 4, base + 8)
    assert kimi.absent_ids(base + 10) == [base + 2, base + 3, base + 5, base + 6, base + 8, base + 9]
    assert kimi.encode("a", bos=True) == kimi.encode("a", bos=False), "Kimi puts no BOS before a text"
    assert base + 4 not in kimi.encode(f"x{USER}y") and base + 7 in kimi.encode(f"x{TOOL}y")
    assert kimi.decode([base + 1, *kimi.encode("x"), base + 7]) == f"x{TOOL}"
    save_tokenizer(kimi, tmp_path)
    assert load_tokenizer(tmp_path).encode("the cat " + TOOL) == kimi.encode("the cat " + TOOL)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "each of the 256 bytes"),
        ("YQ== 0\n", "each of the 256 bytes"),
        ("YQ== 0\nnonsense\n", "line 2"),
        ("YQ== zero\n", "line 1"),
        ("%%% 0\n", "line 1"),
        ("\x00\x01", "line 1"),
    ],
)
def test_a_damaged_file_is_named(text: str, words: str, ranks: dict[bytes, int], tmp_path: Path) -> None:
    write(tmp_path, ranks)
    (tmp_path / tiktoken.FILE).write_text(text)
    with pytest.raises(ValueError, match=rf"tiktoken\.model.*{words}"):
        load_tokenizer(tmp_path)


def test_an_added_token_with_the_id_of_another_is_named(ranks: dict[bytes, int], tmp_path: Path) -> None:
    write(tmp_path, ranks, added_tokens_decoder={"0": {"content": BOS, "special": True}})
    with pytest.raises(ValueError, match=r"tiktoken\.model: token 0 .* makes it '\[BOS\]'"):
        load_tokenizer(tmp_path)
