"""What `tokenizers` and `transformers` do with added tokens, BOS and post-processors is what is done here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from fathom.data.tokenizer import BOS, EOS, Tokenizer, load_tokenizer, save_tokenizer

ADDED = ["đem", "ilÖveyou", "日本", " spaced", "naïve", "Ġraw", "<tool_call>", "    "]


@pytest.fixture(scope="module")
def extended(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose tokenizer has added tokens that are not special."""
    directory = tmp_path_factory.mktemp("extended")
    save_tokenizer(tokenizer, directory)
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.add_tokens([tokenizers.AddedToken(each, special=False, normalized=False) for each in ADDED])
    backend.save(str(directory / "tokenizer.json"))
    return directory


@settings(max_examples=80)
@given(st.lists(st.sampled_from([*ADDED, "a", "x ", "\n", "def f(x):"]), max_size=6).map("".join))
def test_added_tokens_are_found_in_texts_and_come_back(extended: Path, text: str) -> None:
    ours, theirs = load_tokenizer(extended), tokenizers.Tokenizer.from_file(str(extended / "tokenizer.json"))
    ids = ours.encode(text, bos=False)
    assert ids == theirs.encode(text, add_special_tokens=False).ids
    assert ours.decode(ids) == text


@pytest.mark.parametrize("added", ADDED)
def test_an_added_token_is_spelled_as_it_is(extended: Path, added: str) -> None:
    tokenizer = load_tokenizer(extended)
    number = tokenizer.token_id(added)
    assert number is not None
    assert tokenizer.decode([number]) == added and tokenizer.token_bytes(number) == added.encode()


def changed(directory: Path, config: dict[str, Any], change: Callable[[Any], None] = lambda _: None) -> Path:
    """Change the two files of a tokenizer; None takes a key away."""
    file = directory / "tokenizer_config.json"
    found = json.loads(file.read_text()) | config
    file.write_text(json.dumps({key: value for key, value in found.items() if value != "absent"}))
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    change(backend)
    backend.save(str(directory / "tokenizer.json"))
    return directory


def drop(backend: Any) -> None:
    backend.post_processor = processors.TemplateProcessing(single="$A")


def bos_and_eos(backend: Any) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, backend.token_to_id(BOS)), (EOS, backend.token_to_id(EOS))]
    )


@pytest.mark.parametrize(
    ("config", "change"),
    [
        ({}, lambda _: None),
        ({"bos_token": "absent"}, drop),
        ({"bos_token": None, "add_bos_token": False}, drop),
        ({"add_bos_token": False}, drop),
        ({"add_bos_token": "absent"}, drop),
        ({"add_bos_token": False}, lambda _: None),
        ({"add_eos_token": True}, bos_and_eos),
        ({"pad_token": "absent"}, lambda _: None),
        ({"eos_token": {"content": EOS, "lstrip": False, "__type": "AddedToken"}}, lambda _: None),
    ],
)
def test_what_is_put_before_and_after_a_text_is_what_transformers_puts(
    tokenizer: Tokenizer, tmp_path: Path, config: dict[str, Any], change: Callable[[Any], None]
) -> None:
    transformers = pytest.importorskip("transformers")
    save_tokenizer(tokenizer, tmp_path)
    changed(tmp_path, config, change)
    ours = load_tokenizer(tmp_path)
    assert ours.encode("def f(x)") == transformers.AutoTokenizer.from_pretrained(tmp_path)("def f(x)").input_ids
    assert ours.decode(ours.encode("def f(x)")) == "def f(x)"


def test_without_bos_a_document_begins_with_eos(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path)
    found = load_tokenizer(changed(tmp_path, {"bos_token": None}, drop))
    assert found.bos_id == found.eos_id == tokenizer.eos_id and found.prefix_ids == []


def test_deepseeks_own_file_leaves_bos_to_the_class_it_names(released_style: Path) -> None:
    changed(released_style, {"tokenizer_class": "LlamaTokenizerFast"}, drop)
    assert load_tokenizer(released_style).encode("x")[0] == 0


DAMAGE = [
    ("tokenizer.json", {"model": 3}),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}),
    ("tokenizer.json", {"added_tokens": 3}),
    ("tokenizer.json", {"added_tokens": [{"id": 0}]}),
    ("tokenizer.json", {"added_tokens": [None]}),
    ("tokenizer.json", {"decoder": 3}),
    ("tokenizer.json", {"decoder": None}),
    ("tokenizer.json", {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}}}),
    ("tokenizer_config.json", {"eos_token": None}),
    ("tokenizer_config.json", {"eos_token": 5}),
    ("tokenizer_config.json", {"eos_token": {"text": EOS}}),
    ("tokenizer_config.json", {"bos_token": ["x"]}),
    ("tokenizer_config.json", {"pad_token": float("nan")}),
]


@pytest.mark.parametrize(("file", "changes"), DAMAGE)
def test_a_damaged_tokenizer_is_one_error_that_names_file_and_field(
    tokenizer: Tokenizer, tmp_path: Path, file: str, changes: dict[str, Any]
) -> None:
    save_tokenizer(tokenizer, tmp_path)
    content = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(content | changes))
    with pytest.raises(ValueError) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and file in str(error.value)
