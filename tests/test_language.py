"""The tree speaks the field's language: words and names that were replaced do not come back.

A newcomer knows vLLM, torchtitan, transformers and the DeepSeek papers. A name of our own costs every reader a look-up,
so each of these was replaced by the field's.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PHRASES = {
    "reading prompts": "prefill",
    "read a prompt": "prefill",
    "reads a prompt": "prefill",
    "read its prompt": "in prefill",
    "reads its prompt": "in prefill",
    "prompts are read": "prefill",
    "linear map": "linear layer",
    "linear maps": "linear layers",
    "begin token": "BOS token",
    "as many as pay": "adaptive draft length",
    "drafts as pay": "adaptive draft length",
    "drafts as pays": "adaptive draft length",
    "drafts where they pay": "adaptive draft length",
    "share accepted": "acceptance rate",
    "in company": "in a batch",
    "who is none": "padding",
    "reading of a prompt": "prefill",
    "how-manieth": "at which top-k rank",
    "in any company": "in any batch",
    "where nobody": "without",
    "nobody trains": "without gradients",
    "nobody wants": "without",
    "nobody decodes": "prefill-only",
    "of which nobody": "without",
    "knows nothing": "is independent of",
    "know nothing": "are independent of",
    "get on by": "run",
    "next to no holes": "almost no fragmentation",
}
"""What was written in comments, messages and pages, whatever the line breaks, and what is written instead."""

NAMES = {
    "cached_states": "forward_with_cache",
    "loads_LE": "tokens_per_expert_LE",
    "ragged_attention": "varlen attention",
    "NarrowCopy": "Bf16Weights",
    "StepFacts": "StepMetrics",
    "WeightAverage": "EMA",
    "TextStream": "IncrementalDetokenizer",
    "RaggedPiece": "VarlenBatch",
    "DecodePiece": "DecodeBatch",
    "Stretch": "SequenceChunk",
    "before_ND": "prev_hidden_ND",
    "hopeless": "is_unprofitable",
    "remember_mtp": "write_mtp_kv_cache",
    "RouterSummary": "RouterOutputs",
    "load_LE": "tokens_per_expert_LE",
    "rows_of": "open_rows",
    "state_around": "init_train_state",
    "_for_few": "a Backend of its own",
    "own_products": "has_bf16_gemm",
    "OWN_PRODUCTS": "has_bf16_gemm",
    "head_of": "a model of the ablation's own",
    "embedding_of": "a model of the ablation's own",
    "query_ends": "cu_seqlens_q",
    "writes_N": "slot_mapping",
    "wide_linear": "fp32_linear",
    "grouped_outer": "grouped_wgrad",
    "open_groups": "topk_group",
    "in_words": "render_tools",
    "call_in": "parse_tool_call",
}
"""Identifiers, and their successors."""

EXEMPT = {
    "CHANGELOG.md": "lists old and new names",
    "tests/test_language.py": "this list",
    "fathom/model/outputs.py": "the old names, for one release",
    "tests/model/test_transformer.py": "tests of the old names",
    "fathom/train/run.py": "old keys of run.json and old flags, for one release",
    "tests/test_config.py": "tests of the old names",
}
SUFFIXES = {".py", ".md", ".cpp", ".h", ".js", ".html", ".css", ".sh", ".toml", ".cff"}


def sources() -> list[Path]:
    """Everything that people read: code, pages, scripts."""
    folders = [ROOT / name for name in ("fathom", "tests", "docs", "benchmarks", "scripts", "examples")]
    found = [path for folder in folders for path in folder.rglob("*") if path.suffix in SUFFIXES]
    found += [path for path in ROOT.iterdir() if path.suffix in SUFFIXES or path.name == "Makefile"]
    return sorted(path for path in found if str(path.relative_to(ROOT)) not in EXEMPT)


def pattern(word: str, identifier: bool) -> re.Pattern[str]:
    """Where it stands as a word; a phrase's blanks may be line breaks with the marks of comments after them."""
    if identifier:
        return re.compile(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9_])")
    return re.compile(r"\b" + r"[\s#/*]+".join(map(re.escape, word.split())) + r"\b", re.IGNORECASE)


PATTERNS = [(word, new, pattern(word, False)) for word, new in PHRASES.items()]
PATTERNS += [(word, new, pattern(word, True)) for word, new in NAMES.items()]


def complaints(text: str, name: str) -> list[str]:
    return [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: «{word}» is now «{new}»"
        for word, new, expression in PATTERNS
        for match in expression.finditer(text)
    ]


def test_replaced_words_do_not_come_back() -> None:
    found = [line for path in sources() for line in complaints(path.read_text(), str(path.relative_to(ROOT)))]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Requests that\n# read a\n    # prompt wait.", 2),
        ("x = 1\nmodel.cached_states(tokens)", 2),
        ("The Share accepted was high.", 1),
        ("_NarrowCopy", 1),
    ],
)
def test_a_word_is_found_across_line_breaks_and_named_with_its_line(text: str, line: int) -> None:
    [complaint] = complaints(text, "file.py")
    assert complaint.startswith(f"file.py:{line}: ")


def test_longer_words_are_other_words() -> None:
    assert complaints("uncached_states2, overloads_LEN", "file.py") == []


def test_every_exempt_file_exists() -> None:
    assert [name for name in EXEMPT if not (ROOT / name).exists()] == []
