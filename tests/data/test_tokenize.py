"""What `tokenize_corpus` writes is the corpus, whole, once, and never half."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.data import tokenize
from fathom.data.corpus import DataConfig, is_heldout, read_corpus
from fathom.data.tokenize import TokenizedCorpus, choose_fim, fim_segments, open_tokenized, tokenize_corpus
from fathom.data.tokenizer import Tokenizer, save_tokenizer

VOCABULARY = 400


def documents_of(path: Path, tokenized: TokenizedCorpus) -> Iterator[list[int]]:
    """The documents of a token file, without their begin and end tokens."""
    document: list[int] = []
    for token in np.fromfile(path, dtype=tokenized.token_dtype).tolist():
        document.append(token)
        if token == tokenized.tokenizer.eos_id:
            assert document[0] == tokenized.tokenizer.bos_id
            yield document[1:-1]
            document = []
    assert not document


@pytest.fixture
def config(corpus: Path) -> DataConfig:
    return DataConfig(corpus=str(corpus), heldout=0.2)


def test_files_hold_the_corpus(config: DataConfig, tmp_path: Path) -> None:
    tokenized = tokenize_corpus(config, VOCABULARY, tmp_path / "tokenised")
    decode = tokenized.tokenizer.decode
    splits: dict[bool, list[str]] = {True: [], False: []}
    for document in read_corpus(config):
        splits[is_heldout(document.group, config.heldout)].append(document.text)
    assert [decode(ids) for ids in documents_of(tokenized.train_path, tokenized)] == splits[False]
    assert [decode(ids) for ids in documents_of(tokenized.valid_path, tokenized)] == splits[True]
    assert tokenized.valid_text_path.read_bytes().decode() == "".join(splits[True])
    assert (tokenized.train_documents, tokenized.valid_documents) == (len(splits[False]), len(splits[True]))
    assert tokenized.train_bytes == len("".join(splits[False]).encode())
    assert tokenized.valid_bytes == tokenized.valid_text_path.stat().st_size
    assert tokenized.valid_tokens * 2 == tokenized.valid_path.stat().st_size
    assert len(tokenized.heldout_documents) == tokenized.valid_documents
    assert tokenized.token_dtype == "uint16"


def test_meta_json_stands_alone(config: DataConfig, tmp_path: Path) -> None:
    tokenized = tokenize_corpus(config, VOCABULARY, tmp_path / "tokenised", seed=3)
    meta = json.loads((tmp_path / "tokenised" / "meta.json").read_text())
    assert meta["config"] == asdict(config)
    assert (meta["seed"], meta["requested_vocab_size"]) == (3, VOCABULARY)
    assert (meta["vocab_size"], meta["bos_id"], meta["eos_id"]) == (tokenized.vocab_size, 0, 1)
    assert {path.name for path in (tmp_path / "tokenised").iterdir()} == tokenize.FILES


def test_tokenizer_learns_from_training_documents_only(corpus: Path, tmp_path: Path) -> None:
    config = DataConfig(corpus=str(corpus), heldout=0.2)
    for path in corpus.rglob("*.txt"):
        if is_heldout(path.relative_to(corpus).as_posix(), config.heldout):
            path.write_text("zyzzyva " * 100)
    tokenizer = tokenize_corpus(config, VOCABULARY, tmp_path / "tokenised").tokenizer
    assert len(tokenizer.encode("zyzzyva", bos=False)) >= 6


def test_small_writes_give_the_same_files(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, fim_rate=0.5)
    whole = tokenize_corpus(config, VOCABULARY, tmp_path / "whole")
    monkeypatch.setattr(tokenize, "CHARACTERS_PER_WRITE", 50)
    pieces = tokenize_corpus(config, VOCABULARY, tmp_path / "pieces")
    assert pieces.train_path.read_bytes() == whole.train_path.read_bytes()


def test_progress_ends_at_one(config: DataConfig, tmp_path: Path) -> None:
    heard: dict[str, list[float]] = {}
    tokenize_corpus(
        config,
        VOCABULARY,
        tmp_path / "p",
        progress=lambda stage, done: heard.setdefault(stage, []).append(done),
    )
    assert list(heard) == ["reading the corpus", "training the tokenizer", "tokenising"]
    assert all(done == sorted(done) and done[-1] == 1.0 for done in heard.values())


# --- using again, and interruption


def retokenised(config: DataConfig, vocab_size: int, directory: Path, seed: int = 0) -> bool:
    """Prepares, and tells whether that took more than opening what was there."""
    stages = set()
    tokenize_corpus(config, vocab_size, directory, seed, progress=lambda stage, done: stages.add(stage))
    return "tokenising" in stages


def test_reused_only_while_nothing_changed(config: DataConfig, corpus: Path, tmp_path: Path) -> None:
    directory = tmp_path / "tokenised"
    first = tokenize_corpus(config, VOCABULARY, directory)
    assert not retokenised(config, VOCABULARY, directory)
    assert retokenised(config, 300, directory)
    assert open_tokenized(directory).vocab_size == 300
    assert retokenised(config, 300, directory, seed=1)
    assert retokenised(replace(config, heldout=0.3), 300, directory, seed=1)
    assert retokenised(config, 300, directory, seed=1)
    (corpus / "new.txt").write_text("a new file\n")
    assert retokenised(config, 300, directory, seed=1)
    changed = open_tokenized(directory)
    assert changed.corpus_hash != first.corpus_hash
    assert changed.train_documents + changed.valid_documents == 61


def test_remote_data_sets_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"story number {n}"} for n in range(100)]
    remote = SimpleNamespace(load_dataset=lambda *names, **options: iter(rows))
    monkeypatch.setitem(sys.modules, "datasets", remote)
    config = DataConfig(corpus="hf:stories")
    assert retokenised(config, VOCABULARY, tmp_path / "tokenised")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert not retokenised(config, VOCABULARY, tmp_path / "tokenised")


def test_same_call_gives_the_same_bytes(config: DataConfig, tmp_path: Path) -> None:
    config = replace(config, fim_rate=0.5)
    first, second = (tokenize_corpus(config, VOCABULARY, tmp_path / name) for name in ("first", "second"))
    for name in tokenize.FILES:
        assert (first.directory / name).read_bytes() == (second.directory / name).read_bytes()


def test_interrupted_leaves_nothing_and_killed_is_cleaned_up(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tokenize_corpus(config, VOCABULARY, tmp_path / "tokenised")

    def interrupt(stage: str, done: float) -> None:
        if done > 0.5 and stage == "tokenising":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(config, VOCABULARY, tmp_path / "tokenised", seed=1, progress=interrupt)
    assert open_tokenized(tmp_path / "tokenised").seed == before.seed
    partial = tmp_path / ".tokenised.killed.tmp"
    assert not partial.exists()
    # What a killed process leaves behind.
    partial.mkdir()
    (partial / "train.bin").write_bytes(b"half")
    assert tokenize_corpus(config, VOCABULARY, tmp_path / "tokenised", seed=1).seed == 1
    assert not partial.exists()


def test_bad_requests_are_refused_and_other_files_kept(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds other files: thesis.tex"):
        tokenize_corpus(config, VOCABULARY, tmp_path / "mine")
    with pytest.raises(ValueError, match="is a file"):
        tokenize_corpus(config, VOCABULARY, tmp_path / "mine" / "thesis.tex")
    with pytest.raises(ValueError, match="seed is -1"):
        tokenize_corpus(config, VOCABULARY, tmp_path / "tokenised", seed=-1)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_damage_is_noticed(config: DataConfig, tmp_path: Path) -> None:
    directory = tmp_path / "tokenised"
    with pytest.raises(FileNotFoundError, match=r"meta.json is missing"):
        open_tokenized(directory)
    tokenized = tokenize_corpus(config, VOCABULARY, directory)
    tokenized.train_path.write_bytes(tokenized.train_path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"train.bin has \d+ bytes, not the \d+ of meta.json"):
        open_tokenized(directory)
    tokenize_corpus(config, VOCABULARY, directory)
    (directory / "valid.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"valid.bin is missing"):
        open_tokenized(directory)
    tokenize_corpus(config, VOCABULARY, directory)
    meta = json.loads((directory / "meta.json").read_text())
    for content, message in (
        ("{", "not valid JSON.*tokenise the corpus again"),
        (json.dumps(meta | {"format_version": 99}), "format_version is 99"),
        (json.dumps(meta | {"surprise": 1}), "surprise"),
    ):
        (directory / "meta.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            open_tokenized(directory)


# --- small corpora and other tokenizers


def test_single_file(tmp_path: Path) -> None:
    text = "".join(f"{n} green bottles\n" for n in range(500))
    (tmp_path / "song.txt").write_text(text)
    tokenized = tokenize_corpus(DataConfig(corpus=str(tmp_path / "song.txt")), VOCABULARY, tmp_path / "tokenised")
    (train,), (valid,) = (
        [tokenized.tokenizer.decode(ids) for ids in documents_of(path, tokenized)]
        for path in (tokenized.train_path, tokenized.valid_path)
    )
    assert train + valid == text
    assert tokenized.heldout_documents == ("song.txt",)


def test_too_small_to_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="too small to hold anything out: 1 bytes"):
        tokenize_corpus(DataConfig(corpus=str(tmp_path / "a.txt")), VOCABULARY, tmp_path / "tokenised")
    assert not (tmp_path / "tokenised").exists()


def test_given_tokenizer_is_used(
    config: DataConfig, tokenizer: Tokenizer, released_style: Path, tmp_path: Path
) -> None:
    config = replace(config, tokenizer=str(released_style))
    tokenized = tokenize_corpus(config, 1 << 17, tmp_path / "tokenised")
    assert tokenized.tokenizer.encode("width") == tokenizer.encode("width")
    assert not retokenised(config, 1 << 17, tmp_path / "tokenised")
    with pytest.raises(ValueError, match="vocab_size is 300, but the tokenizer in"):
        tokenize_corpus(config, 300, tmp_path / "tokenised")
    with pytest.raises(ValueError, match="lacks fill-in-the-middle tokens"):
        tokenize_corpus(replace(config, fim_rate=0.1), 1 << 17, tmp_path / "tokenised")
    # Another tokenizer in the same place.
    save_tokenizer(tokenizer, released_style)
    assert tokenize_corpus(config, 1 << 17, tmp_path / "tokenised").tokenizer.pad_id == tokenizer.pad_id


# --- fill in the middle


@given(text=st.text(min_size=1), seed=st.integers(0, 2**32), index=st.integers(0, 2**32))
def test_fim_can_be_undone(tokenizer: Tokenizer, text: str, seed: int, index: int) -> None:
    cuts = choose_fim(len(text), 1.0, seed, index)
    assert cuts is not None
    begin, *segments, end = fim_segments(text, cuts, tokenizer)
    assert (begin, end) == (tokenizer.bos_id, tokenizer.eos_id)
    parts: dict[int, str] = {}
    for segment in segments:
        if isinstance(segment, int):
            control = segment
            parts[control] = ""
        else:
            parts[control] += segment
    assert list(parts) == [tokenizer.fim_prefix_id, tokenizer.fim_suffix_id, tokenizer.fim_middle_id]
    prefix, suffix, middle = parts.values()
    assert prefix + middle + suffix == text


def test_fim_rate_is_kept() -> None:
    chosen = [choose_fim(100, 0.1, seed=5, index=index) is not None for index in range(4000)]
    assert 0.08 < sum(chosen) / len(chosen) < 0.12
    assert not any(choose_fim(100, 0.0, seed=5, index=index) for index in range(100))


def test_fim_touches_training_documents_only(config: DataConfig, tmp_path: Path) -> None:
    tokenized = tokenize_corpus(replace(config, fim_rate=1.0), VOCABULARY, tmp_path / "tokenised")
    fim_id = tokenized.tokenizer.fim_prefix_id
    assert all(ids[0] == fim_id for ids in documents_of(tokenized.train_path, tokenized))
    assert not any(fim_id in ids for ids in documents_of(tokenized.valid_path, tokenized))
