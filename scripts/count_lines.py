"""Writes the line counts in README.md and docs/reading.md anew: `python scripts/count_lines.py`.

A row that counts begins with files or folders in backticks and has their number of lines in its second column.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/reading.md")
SUFFIXES = {".py", ".cpp", ".h", ".js", ".css", ".html"}
ROW = re.compile(r"^\| (?P<names>\[?`(?:fathom|tests|benchmarks)\b[^|]*) \| (?P<lines>[\d,]+) \|", re.MULTILINE)
CORE = re.compile(r"(?<=The core is )[\d,]+(?= lines)")


def lines_of(path: Path) -> int:
    """Lines of a file, or of the code in a folder."""
    if not path.exists():
        raise FileNotFoundError(f"{path.relative_to(ROOT)} is named in a table of line counts, and does not exist")
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.suffix in SUFFIXES]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def names_in(row: str) -> list[str]:
    return re.findall(r"`([^`]+)`", row)


def counted(names: str) -> int:
    return sum(lines_of(ROOT / name) for name in names_in(names))


def refreshed(text: str) -> str:
    """The page with every count as it is now; the core is the sum of the page's rows."""
    total = sum(counted(row["names"]) for row in ROW.finditer(text))
    text = ROW.sub(lambda row: f"| {row['names']} | {counted(row['names']):,} |", text)
    return CORE.sub(f"{total:,}", text)


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(refreshed(path.read_text(encoding="utf-8")), encoding="utf-8")
