"""Every kind of corpus, the split, and what happens when a file is not what it should be."""

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.data.corpus import (
    DataConfig,
    Document,
    is_heldout,
    read_corpus,
    scan_corpus,
    split_corpus,
    tail_start,
)


def texts(corpus: Path | str, **fields: Any) -> dict[str, str]:
    return {document.name: document.text for document in read_corpus(DataConfig(corpus=str(corpus), **fields))}


# --- the standard library


@pytest.fixture(scope="module")
def stdlib() -> list[Document]:
    return list(read_corpus(DataConfig()))


def test_stdlib_holds_readable_code_only(stdlib: list[Document]) -> None:
    names = [document.name for document in stdlib]
    assert names == sorted(names)
    assert {"ast.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "encodings",
        "pydoc_data",
        "__pycache__",
    }
    assert not any(part.startswith(("test_", "_sysconfigdata", "config-")) for part in parts)
    assert "html/entities.py" not in names
    assert 5e6 < sum(len(document.text) for document in stdlib) < 20e6


def test_stdlib_holds_out_whole_packages(stdlib: list[Document]) -> None:
    heldout = [document for document in stdlib if is_heldout(document.group, 0.05)]
    share = sum(len(d.text.encode()) for d in heldout) / sum(len(d.text.encode()) for d in stdlib)
    assert 0.03 <= share <= 0.08
    assert len(heldout) >= 20
    groups = {document.name: document.group for document in stdlib}
    assert groups["json/decoder.py"] == groups["json/__init__.py"] == "json"
    assert groups["ast.py"] == "ast"


# --- files


def test_directory_glob_and_file_agree(corpus: Path) -> None:
    whole = texts(corpus)
    assert len(whole) == 60
    assert list(whole) == sorted(whole)
    assert texts(corpus / "**" / "*.txt") == whole
    assert texts(corpus / "part1" / "*.txt") == {Path(k).name: v for k, v in whole.items() if k.startswith("part1")}
    assert texts(corpus / "part0" / "03.txt") == {"03.txt": whole["part0/03.txt"]}


def test_a_directorys_hidden_and_empty_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "lines.txt").write_bytes(b"one\r\ntwo")
    assert texts(tmp_path) == {"lines.txt": "one\r\ntwo"}


def test_json_lines(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"body": text, "id": 7}) for text in ("first", "", None, "dritte ü"))
    (tmp_path / "a.jsonl").write_text(lines + "\n\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert texts(tmp_path / "a.jsonl", text_column="body") == {"a.jsonl:1": "first", "a.jsonl:4": "dritte ü"}
    assert list(texts(tmp_path, text_column="body")) == [
        "a.jsonl:1",
        "a.jsonl:4",
        "b.jsonl.gz:1",
        "b.jsonl.gz:4",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', "bad.jsonl:2: not valid JSON"),
        (b"[1]", "bad.jsonl:2: a JSON list"),
        (b'{"body": "x", "id": 1}', "bad.jsonl:2: no column 'text'; there are body, id"),
        (b'{"text": 5}', "bad.jsonl:2: column 'text' holds int"),
        (b'{"text": "\xff"}', "bad.jsonl:2: not UTF-8"),
        (b'{"text": "\\ud800"}', "bad.jsonl:2: column 'text' holds an unpaired surrogate"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message):
        texts(tmp_path / "bad.jsonl")


def test_parquet(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(arrow.table({"text": ["a", None, "c"], "id": [1, 2, 3]}), path, row_group_size=2)
    assert texts(path) == {"rows.parquet:0": "a", "rows.parquet:2": "c"}
    with pytest.raises(ValueError, match=r"rows.parquet: no column 'body'; there are text, id"):
        texts(path, text_column="body")
    with pytest.raises(ValueError, match="column 'id' holds int"):
        texts(path, text_column="id")
    path.write_bytes(b"text, not parquet")
    with pytest.raises(ValueError, match=r"rows.parquet is not a Parquet file"):
        texts(path)


def test_missing_empty_and_undecodable_corpora(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        texts(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="matches no files"):
        texts(tmp_path / "*.txt")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 text: byte 2 is 0xf6"):
        texts(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="holds no text"):
        scan_corpus(DataConfig(corpus=str(tmp_path / "empty.txt")))


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        texts("hf:stories")


@pytest.mark.parametrize(
    ("corpus", "arguments"),
    [
        ("hf:stories", ("stories", None, "train")),
        ("hf:owner/stories:test", ("owner/stories", None, "test")),
        ("hf:owner/stories/small", ("owner/stories", "small", "train")),
    ],
)
def test_hugging_face(monkeypatch: pytest.MonkeyPatch, corpus: str, arguments: tuple[str, str | None, str]) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> Iterator[dict[str, str]]:
        asked.append((name, config, split))
        assert streaming
        return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert texts(corpus) == {f"{corpus}:0": "one", f"{corpus}:1": "two"}
    assert asked == [arguments]
    with pytest.raises(ValueError, match="no column 'body'; there are text"):
        texts(corpus, text_column="body")
    with pytest.raises(ValueError, match="should read hf:NAME"):
        texts("hf:owner//small")


def test_hugging_face_failure_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise RuntimeError("connection refused")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match=r"'owner/stories'.*connection refused.*network"):
        texts("hf:owner/stories")


@pytest.mark.parametrize(
    "fields", [{"heldout": 0.0}, {"heldout": 1.0}, {"fim_rate": 1.5}, {"corpus": ""}, {"text_column": ""}]
)
def test_config_refuses(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        DataConfig(**fields)


# --- hash and split


def test_hash_follows_names_and_texts(tmp_path: Path) -> None:
    def digest(**files: str) -> str:
        directory = tmp_path / "-".join([*files, *files.values()])
        directory.mkdir()
        for name, text in files.items():
            (directory / name).write_text(text)
        return scan_corpus(DataConfig(corpus=str(directory))).sha256

    assert len({digest(a="bc"), digest(ab="c"), digest(a="b"), digest(a="b", c="d")}) == 4
    first = scan_corpus(DataConfig(corpus=str(tmp_path / "a-bc"))).sha256
    (tmp_path / "a-bc").rename(tmp_path / "moved")
    assert scan_corpus(DataConfig(corpus=str(tmp_path / "moved"))).sha256 == first


def test_larger_share_keeps_what_a_smaller_one_holds_out() -> None:
    names = [f"file{n}" for n in range(2000)]
    small, large = ({name for name in names if is_heldout(name, share)} for share in (0.05, 0.2))
    assert small < large
    assert 60 < len(small) < 140


def test_split_of_many_documents_is_whole(corpus: Path) -> None:
    config = DataConfig(corpus=str(corpus), heldout=0.2)
    stats = scan_corpus(config)
    assert stats.by_document
    split = list(split_corpus(config, stats))
    assert [document for document, _ in split] == list(read_corpus(config))
    assert {heldout for _, heldout in split} == {True, False}


def test_single_file_gives_up_its_end(tmp_path: Path) -> None:
    text = "".join(f"line {n}\n" for n in range(1000))
    (tmp_path / "story.txt").write_text(text)
    config = DataConfig(corpus=str(tmp_path / "story.txt"))
    stats = scan_corpus(config)
    assert not stats.by_document
    (head, head_heldout), (tail, tail_heldout) = split_corpus(config, stats)
    assert (head_heldout, tail_heldout) == (False, True)
    assert head.text + tail.text == text
    assert head.text.endswith("\n")
    assert abs(len(tail.text) / len(text) - 0.05) < 0.002


@given(st.text(alphabet="ab\n", min_size=2, max_size=200), st.floats(0.01, 0.99))
def test_tail_leaves_both_sides_filled(text: str, share: float) -> None:
    cut = tail_start(text, share)
    assert 0 < cut < len(text)
    assert (len(text) - cut) <= max(2 * share * len(text), 1) + 1
