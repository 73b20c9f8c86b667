"""Every usual format, encoding and compression; what cannot be read is counted and listed, or refused."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fathom.data.corpus import DataConfig, read_corpus, scan_corpus, split_corpus
from fathom.data.readers import Skipped
from fathom.data.tokenize import tokenize_corpus

ROWS: list[dict[str, Any]] = [{"id": 1, "text": 'größer,\r\n"als"'}, {"id": 2, "text": "zwei\n"}]
TEXTS = [row["text"] for row in ROWS]


def texts(path: Path, skipped: Skipped | None = None, column: str = "text") -> list[str]:
    return [document.text for document in read_corpus(DataConfig(corpus=str(path), text_column=column), skipped)]


def table(mark: str) -> str:
    quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
    return f"id{mark}text\r\n" + "".join(f"{n}{mark}{text}\r\n" for n, text in enumerate(quoted))


def zstd(data: bytes) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    return arrow.compress(data, codec="zstd", asbytes=True)


FORMATS = {
    "rows.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "ROWS.NDJSON": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
    "array.json": json.dumps(ROWS),
    "pretty.JSON": json.dumps(ROWS, indent=2),
    "lines.json": "".join(json.dumps(row) + "\n" for row in ROWS),
    "table.csv": table(","),
    "european.CSV": table(";"),
    "table.tsv": table("\t"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_rows(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FORMATS[name].encode())
    assert texts(tmp_path / name) == TEXTS
    with pytest.raises(ValueError, match=rf"{name}.*no column 'body'; there are id, text: set text_column"):
        texts(tmp_path / name, column="body")


@pytest.mark.parametrize("name", [*FORMATS, "plain.txt", "README.md", "main.py"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_names_the_encoding(name: str, encoding: str, tmp_path: Path) -> None:
    plain = name not in FORMATS
    (tmp_path / name).write_bytes((TEXTS[0] if plain else FORMATS[name]).encode(encoding))
    assert texts(tmp_path / name) == (TEXTS[:1] if plain else TEXTS)


@pytest.mark.parametrize("name", ["rows.jsonl", "table.csv", "plain.txt"])
@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".ZST", zstd), ("", gzip.compress)],
)
def test_any_of_them_may_be_compressed(
    name: str, suffix: str, compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    (tmp_path / (name + suffix)).write_bytes(compress(FORMATS.get(name, TEXTS[0]).encode()))
    assert texts(tmp_path / (name + suffix)) == (TEXTS if name in FORMATS else TEXTS[:1])


def test_parquet_is_recognised_by_its_content(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name in ("rows.Parquet", "rows"):
        parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / name)
        assert texts(tmp_path / name) == TEXTS


@pytest.mark.parametrize(
    "content", ['{"name": "package",\n "version": 1}', '{"name": "package"}', "[1, 2]", "{ // c\n}"]
)
def test_json_that_is_no_table_is_a_text(content: str, tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text(content)
    assert texts(tmp_path) == [content]


def test_a_json_file_may_be_one_row(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(ROWS[0], indent=1))
    assert texts(tmp_path) == TEXTS[:1]


BROKEN = {
    "image.png": b"\x89PNG\0\0",
    "latin.txt": "Größe".encode("latin-1"),
    "half.json": b'[{"text": "a"}, {"te',
    "half.jsonl.gz": gzip.compress(b'{"text": "fine"}\n' * 9000)[:-40],
    "notes.bz2": b"BZh9 is no compression",
    "rows.jsonl": b'{"text": "fine"}\n{"text": \n[]\n{"text": 7}\n{"body": "x"}\n{"text": "fine"}\n',
    "table.csv": b'id,text\n1,fine\n2,"bro"ken\n3,gr\xf6\xdfer\n4,fine\n5,"no end\n',
    "other.csv": b"a,b\n1,2\n",
    "rows.parquet": b"not at all",
}
COUNTS = {"rows.jsonl": 4, "table.csv": 3}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_counted_and_listed_or_refused(name: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(BROKEN[name])
    (tmp_path / "zz.txt").write_text("fine")
    skipped = Skipped()
    found = texts(tmp_path, skipped)
    assert set(found) == {"fine"}
    if name in COUNTS:
        assert found == ["fine"] * 3  # the rows around the broken ones, and the other file
    assert skipped.count == COUNTS.get(name, 1) == len(skipped.examples)
    assert all(name in message for message in skipped.examples)
    stats = scan_corpus(DataConfig(corpus=str(tmp_path)))
    assert (stats.skipped, stats.skipped_examples) == (skipped.count, tuple(skipped.examples))
    with pytest.raises(ValueError, match=name):
        scan_corpus(DataConfig(corpus=str(tmp_path), strict=True))
    (tmp_path / "zz.txt").unlink()
    if set(found[:-1]) == set():
        with pytest.raises(ValueError, match=rf"holds no text: 1 of its texts cannot be read; .*{name}"):
            scan_corpus(DataConfig(corpus=str(tmp_path)))


def test_a_tokenised_corpus_lists_what_was_skipped(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "broken.jsonl").write_text("nothing\n" * 50)
    (corpus / "text.md").write_text("".join(f"{n} green bottles\n" for n in range(500)))
    config = DataConfig(corpus=str(corpus))
    tokenized = tokenize_corpus(config, 300, tmp_path / "tokenised")
    assert tokenized.skipped == 50
    assert len(tokenized.skipped_examples) == 20
    assert "broken.jsonl:1: not valid JSON" in tokenized.skipped_examples[0]
    assert all(document.name == "text.md" for document, _ in split_corpus(config, scan_corpus(config)))
    with pytest.raises(ValueError, match=r"broken.jsonl:1: not valid JSON"):
        tokenize_corpus(DataConfig(corpus=str(corpus), strict=True), 300, tmp_path / "strict")
