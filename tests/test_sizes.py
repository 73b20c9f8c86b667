"""Files and functions stay of a size that is read in one go: 400 lines a file, 60 a function."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "fathom"
SUFFIXES = {".py", ".cpp", ".h", ".js", ".css", ".html"}


def test_no_file_is_longer_than_400_lines() -> None:
    files = [path for path in PACKAGE.rglob("*") if path.suffix in SUFFIXES]
    assert len(files) > 100
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text("utf-8").splitlines()) for path in files}
    assert {path: length for path, length in lengths.items() if length > 400} == {}


def test_no_function_is_longer_than_60_lines() -> None:
    long, seen = {}, 0
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                seen += 1
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > 60:
                    long[f"{path.relative_to(PACKAGE)}:{node.name}"] = length
    assert seen > 1000
    assert long == {}
