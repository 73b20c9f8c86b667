"""Every text comes back, no text becomes a control token, and `transformers` reads the same ids."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from fathom.data import tokenizer as tokenizer_module
from fathom.data.tokenizer import (
    ASSISTANT,
    BOS,
    EOS,
    FIM_PREFIX,
    SPECIAL_TOKENS,
    SYSTEM,
    USER,
    Tokenizer,
    load_tokenizer,
    save_tokenizer,
    split_chunks,
    train_tokenizer,
)

CODE = "class A:\n\tx = 1234567  # 日本語のコメント, café\r\n\n    def f(self): return ['a'.join(b)]   \n"


@given(text=st.text(), bos=st.booleans())
def test_round_trip(tokenizer: Tokenizer, text: str, bos: bool) -> None:
    ids = tokenizer.encode(text, bos=bos)
    assert tokenizer.decode(ids) == text
    assert (ids[:1] == [tokenizer.bos_id]) == bos
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "a", " ", "\n", "<｜", "｜>"]), max_size=8).map("".join))
def test_control_tokens_in_text_are_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, bos=False)
    assert min(ids, default=len(SPECIAL_TOKENS)) >= len(SPECIAL_TOKENS)
    assert tokenizer.decode(ids) == text


def test_ids(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert (tokenizer.fim_prefix_id, tokenizer.fim_suffix_id, tokenizer.fim_middle_id) == (3, 4, 5)
    assert (tokenizer.user_id, tokenizer.assistant_id, tokenizer.system_id) == (6, 7, 8)
    assert tokenizer.token_id("no such token") is None
    assert tokenizer.decode([0, *tokenizer.encode("text", bos=False), 1, 2, 10**6]) == "text"


@given(st.lists(st.integers(0, 300), max_size=30))
def test_any_ids_are_the_text_that_others_make_of_them(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Halves of characters and bytes that are none included; by the tokenizers library, without control tokens."""
    theirs = tokenizers.Tokenizer.from_str(tokenizer.tokenizer_json).decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids) == theirs == tokenizer.text_bytes(ids).decode(errors="replace")


def test_batch_equals_single(tokenizer: Tokenizer) -> None:
    texts = [CODE, "", "x", CODE * 3]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text, bos=False) for text in texts]


@given(st.text(alphabet=st.sampled_from("ab1Ü日 .\n\r\t\x00\x1c\x85\u2028"), max_size=80))
def test_pieces_do_not_change_ids(tokenizer: Tokenizer, text: str) -> None:
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "CHUNK_CHARACTERS", 3)
        assert "".join(split_chunks(text)) == text
        assert tokenizer.encode(text) == whole


def test_pre_tokenizer_cuts_digits_by_threes_and_keeps_words_apart() -> None:
    tokenizer = train_tokenizer(["foo.join 123456 " * 50], vocab_size=400)
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("foo.join 123456", bos=False)]
    assert pieces == ["foo", ".join", " ", "123", "456"]


def test_training_is_repeatable_and_bounded(tokenizer: Tokenizer, training_texts: list[str]) -> None:
    assert train_tokenizer(iter(training_texts), vocab_size=400).tokenizer_json == tokenizer.tokenizer_json
    assert tokenizer.vocab_size <= 400
    assert train_tokenizer(["tiny"], vocab_size=5000).vocab_size < 300
    with pytest.raises(ValueError, match="vocab_size is 264; it must be at least 265"):
        train_tokenizer(training_texts, vocab_size=264)


# --- the directory


def test_saved_and_loaded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    loaded = load_tokenizer(tmp_path / "tokenizer")
    assert loaded.encode(CODE) == tokenizer.encode(CODE)
    assert loaded.config == tokenizer.config


def test_transformers_reads_it_alike(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_tokenizer(tokenizer, tmp_path)
    # Beside a model, as in a checkpoint: the model's type must not make another class of it.
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(CODE).input_ids == tokenizer.encode(CODE)
    assert theirs.decode(tokenizer.encode(CODE), skip_special_tokens=True) == CODE
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    assert len(theirs) == tokenizer.vocab_size


def test_chat_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_tokenizer(tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "Bye"},
    ]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert rendered == f"{BOS}{SYSTEM}Be brief.{USER}Hi{ASSISTANT}Yo{EOS}{USER}Bye{ASSISTANT}"
    with pytest.raises(Exception, match="role wizard is not known"):
        theirs.apply_chat_template([{"role": "wizard", "content": ""}], tokenize=False)


def test_reads_released_style(tokenizer: Tokenizer, released_style: Path) -> None:
    (released_style / "chat_template.jinja").write_text("{{ bos_token }}")
    released = load_tokenizer(released_style)
    assert (released.bos_id, released.eos_id, released.pad_id) == (0, 1, 1)
    assert (released.fim_prefix_id, released.user_id) == (None, 6)
    assert released.encode(CODE + USER + FIM_PREFIX) == tokenizer.encode(CODE + USER + FIM_PREFIX)
    assert released.config["chat_template"] == "{{ bos_token }}"
    # What their file shows to readers stays visible.
    assert released.decode([released.bos_id, 6, *released.encode("x", bos=False)]) == USER + "x"


def test_bad_directories_are_explained(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json is missing"):
        load_tokenizer(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    with pytest.raises(ValueError, match="bos_token is '<s>', which is no token"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json is not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    content = json.loads(tokenizer.tokenizer_json) | {"decoder": {"type": "Metaspace"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="decoder is Metaspace"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [("model", "continuing_subword_prefix", "x" * 1000), ("post_processor", "special_tokens", {})],
)
def test_a_tokenizer_that_makes_the_package_panic_is_a_damaged_file(
    part: str, field: str, value: object, tmp_path: Path
) -> None:
    """A panic is no Exception. One comes as the file is read, the other as a text is encoded."""
    save_tokenizer(train_tokenizer(["a text of words, and words"], 300), tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content[part][field] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{tmp_path}: tokenizer.json is .*the package tokenizers panicked"):
        load_tokenizer(tmp_path)


def test_a_pattern_that_backtracks_for_ever_is_an_error_in_time(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(["a text of words, and words"], 300), tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    split = content["pre_tokenizer"]["pretokenizers"][0]
    assert split["type"] == "Split"
    split["pattern"] = {"Regex": "(a+)+$"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("words")) == "words"
    began = time.process_time()
    with pytest.raises(ValueError, match=r"a text cannot be tokenised: .* retry-limit-in-match over"):
        tokenizer.encode("a" * 60 + "!")
    assert time.process_time() - began < 5


NO_THREADS = """
import resource
from pathlib import Path
from fathom.data.tokenizer import train_tokenizer
status = Path("/proc/self/status").read_text()
size = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmSize")) << 10
resource.setrlimit(resource.RLIMIT_AS, (size + (3 << 20), size + (3 << 20)))
try:
    train_tokenizer(["a text of words"] * 1000, 300)
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_threads_that_cannot_be_started_are_an_error() -> None:
    """As under `ulimit -v`."""
    done = subprocess.run([sys.executable, "-c", NO_THREADS], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(
        "no tokenizer can be trained: the package tokenizers panicked: The global thread pool"
    )
