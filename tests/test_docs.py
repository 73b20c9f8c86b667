"""README and docs do what they print: every block runs as printed, every path, link and line count is right.

A page's blocks run in the order of the page, Python in one namespace, in a directory that holds a small trained model
under the names the pages use. `nano` is replaced by a preset that trains in seconds. What is not run stands in
`NOT_RUN`, with the reason.
"""

import builtins
import contextlib
import fcntl
import io
import json
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from fathom import presets
from fathom.checkpoint.hf.model import load_config, save_model
from fathom.cli import main
from fathom.data.tokenizer import train_tokenizer
from fathom.train.run import Run
from tests.model.configs import lively_model, tiny

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
ALL_PAGES = sorted([*PAGES, *(ROOT / "docs" / "log").glob("*.md")])
WRITTEN = [page for page in ALL_PAGES if page not in (ROOT / "docs").glob("ablations*.md")]
"""By hand: the others are the ablations' own output."""
CORE_LINES = 7_500

NOT_RUN = {
    r"make ": "makes an environment, or runs this suite",
    r"(pip install|\. \.venv/bin/activate)\b": "makes an environment",
    r"torchrun ": "several processes: tests/distributed runs them",
    r"fathom demo\b": "six minutes of training: tests/lab/demo has its parts",
    r"fathom (study|ablations)\b": "minutes of training: tests/lab/ablations has its parts",
    r"fathom .*--gpu cuda\b": "needs a GPU",
}

TASK = """
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    where: str
    """Page and line of its first line."""
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    lines, start = page.read_text(encoding="utf-8").splitlines(), None
    for number, line in enumerate(lines):
        if line.startswith("```"):
            if start is None:
                start = number
            else:
                text = "\n".join(lines[start + 1 : number]) + "\n"
                found.append(Block(f"{page.name}:{start + 2}", lines[start][3:], text))
                start = None
    return found


def commands(block: Block) -> list[str]:
    return [line for line in block.text.splitlines() if shlex.split(line, comments=True)]


def reason_not_to_run(command: str) -> str | None:
    return next((reason for pattern, reason in NOT_RUN.items() if re.match(pattern, command)), None)


class Hub:
    """Stands in for the hub."""

    uploaded: list[dict[str, Any]] = []  # noqa: RUF012

    def create_repo(self, repo: str, **_: Any) -> str:
        return f"https://huggingface.co/{repo}"

    def upload_folder(self, **options: Any) -> None:
        self.uploaded.append(options)


class Server:
    """`fathom serve …` in a process of its own, at the port that the pages print: one at a time on this machine."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def __enter__(self) -> None:
        self._lock = (Path(tempfile.gettempdir()) / "fathom-docs-port-8000.lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._process = subprocess.Popen([sys.executable, "-m", "fathom", *self.words])
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen("http://127.0.0.1:8000/health"):
                break
            assert self._process.poll() is None, f"fathom {' '.join(self.words)} ended with {self._process.returncode}"
            time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(60) == 0
        self._lock.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_run_once: Run) -> Path:
    """The directory of a small finished run."""
    out = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.ALL, "nano", lambda: tiny_run_once)
        main(["train", "nano", "--out", str(out)])
    return out


def write_texts() -> None:
    """What the pages' commands read beside models."""
    Path("texts").mkdir()
    for number in range(20):
        Path(f"texts/{number}.txt").write_text(f"def main{number}(x):\n    return x + {number}\n" * 20)
    for name in ("notes.txt", "letter.txt"):
        Path(name).write_text("def main(x):\n" * 40)
    with Path("chats.jsonl").open("w") as file:
        for number in range(64):
            chat = [{"role": "user", "content": f"def {number}"}, {"role": "assistant", "content": f"main{number}"}]
            file.write(json.dumps({"messages": chat}) + "\n")
    Path("tasks").mkdir()
    rows = [{"question": "def", "choices": [" main", " x"], "answer": number % 2} for number in range(4)]
    Path("tasks/choice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("tasks/choice.yaml").write_text(TASK.format(data=Path("tasks/choice.jsonl").absolute()))


def fill_hub_cache(cache: Path) -> None:
    """DeepSeek-V3 as if it had been downloaded, in the sizes of a test."""
    tokenizer = train_tokenizer(["def main(x):\n    return x\n"] * 3, 280)
    model = lively_model(tiny(vocab_size=280, num_nextn_predict_layers=1), dtype=torch.bfloat16)
    snapshot = cache / "models--deepseek-ai--DeepSeek-V3" / "snapshots" / ("0" * 40)
    save_model(model, snapshot, tokenizer, storage="fp8")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Path, tiny_run_once: Run) -> Path:
    """The current directory: runs, texts and tasks under the names that the pages use, and no network."""
    datasets = pytest.importorskip("datasets", reason="lm-eval is not installed")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setitem(presets.ALL, "nano", lambda: tiny_run_once)
    monkeypatch.chdir(tmp_path)
    Hub.uploaded.clear()
    shutil.copytree(trained, "runs/demo", symlinks=True)
    Path("path/to").mkdir(parents=True)
    shutil.copy(trained / "model" / "config.json", "path/to/config.json")
    write_texts()
    fill_hub_cache(tmp_path / "cache")
    return tmp_path


def run_page(page: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs the page's blocks in order; returns how many commands and Python blocks ran."""
    found = blocks(page)
    if not any("train nano --out runs/mine" in block.text for block in found):
        shutil.copytree(trained, "runs/mine", symlinks=True)
    namespace: dict[str, Any] = {"__builtins__": builtins}
    ran = 0
    with contextlib.ExitStack() as servers:
        for block in found:
            if block.language == "python":
                exec(compile(block.text, block.where, "exec"), namespace)
                ran += 1
            for command in commands(block) if block.language == "sh" else []:
                if reason_not_to_run(command) is None:
                    run_command(command, block.where, servers, monkeypatch)
                    ran += 1
    return ran


def run_command(command: str, where: str, servers: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = shlex.split(command, comments=True)
    assert program == "fathom", f"{where}: {command!r} is neither Fathom's nor in NOT_RUN"
    if words[0] == "serve":
        servers.enter_context(Server(words))
        return
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    try:
        main(words)
    except SystemExit as exit:
        pytest.fail(f"{where}: {command!r} exits with {exit.code}")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
@pytest.mark.usefixtures("workspace")
def test_every_block_of_the_page_runs_as_printed(
    page: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_page(page, trained, monkeypatch)
    if page.stem == "checkpoints":
        check_conversions(capsys.readouterr().out, trained)


def check_conversions(printed: str, trained: Path) -> None:
    """What docs/checkpoints.md promises of the directories that its commands write."""
    config = load_config(trained / "model")
    assert printed.count("relative error") == 3
    assert f"({config.parameter_counts().total:,})" in printed
    for directory in ("out/bf16", "out/fp8", "in/bf16"):
        assert load_config(Path(directory)) == config
    assert load_config(Path("in/deepseek")).vocab_size == 280
    assert [file.name for file in Path("out/gguf").glob("*.gguf")] == ["mine-bf16.gguf"]
    assert Path("out/fp8/README.md").read_text().count("# mine") == 1
    assert 0 <= json.loads(Path("figures.json").read_text())["choice"]["acc,none"] <= 1
    assert "bits_per_byte" in printed
    assert [options["repo_id"] for options in Hub.uploaded] == ["me/model"]


def test_every_exception_still_occurs() -> None:
    printed = [command for page in PAGES for block in blocks(page) for command in commands_of_shell(block)]
    assert [pattern for pattern in NOT_RUN if not any(re.match(pattern, command) for command in printed)] == []


def commands_of_shell(block: Block) -> list[str]:
    return commands(block) if block.language == "sh" else []


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_and_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    paths = re.findall(r"`((?:fathom|tests|benchmarks|docs|scripts|examples)/[\w./]+)`", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            linked = page.parent / name if name else page
            assert linked.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """GitHub's names of the page's headings."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    named = set(re.findall(r'<a id="([^"]+)">', text))
    return named | {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_fit_in_120_columns(page: Path) -> None:
    fence, long = False, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence ^= line.startswith("```")
        if len(line) > 120 and not fence and not line.startswith(("|", "![")):
            long.append(f"{page.name}:{number}")
    assert long == []


def test_the_glossary_is_short_and_in_order() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    words = re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE)[1:]
    words = [word.casefold() for word in words if not word.startswith("---")]
    assert words == sorted(words)
    assert len(words) <= 25


COUNTS = runpy.run_path(str(ROOT / "scripts" / "count_lines.py"))


def counts(page: str) -> list[tuple[str, int, int]]:
    """Every row that counts lines: what it counts, the printed count and the present one."""
    rows = COUNTS["ROW"].finditer((ROOT / page).read_text(encoding="utf-8"))
    return [(row["names"], int(row["lines"].replace(",", "")), COUNTS["counted"](row["names"])) for row in rows]


@pytest.mark.parametrize("page", COUNTS["PAGES"])
def test_line_counts_are_about_right(page: str) -> None:
    wrong = [row for row in counts(page) if abs(row[1] - row[2]) > max(40, row[2] / 10)]
    assert not wrong, f"python scripts/count_lines.py counts anew: {wrong}"


def test_the_core_is_as_small_as_the_reading_order_says() -> None:
    total = sum(actual for *_, actual in counts("docs/reading.md"))
    [stated] = COUNTS["CORE"].findall((ROOT / "docs" / "reading.md").read_text(encoding="utf-8"))
    assert 3_000 < total <= CORE_LINES
    assert abs(int(stated.replace(",", "")) - total) <= total / 20, "python scripts/count_lines.py counts anew"


def test_the_readme_has_a_row_for_every_folder() -> None:
    folders = {f"fathom/{path.name}" for path in (ROOT / "fathom").iterdir() if (path / "__init__.py").exists()}
    named = {name for names, *_ in counts("README.md") for name in COUNTS["names_in"](names)}
    assert folders <= named


@pytest.fixture(scope="module")
def tiny_run_once(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of a few seconds on words of its own, with one MTP module."""
    texts: Iterator[str] = (f"def main{number}(x):\n    return x + {number}\n" * 20 for number in range(20))
    directory = tmp_path_factory.mktemp("texts")
    for number, text in enumerate(texts):
        (directory / f"{number}.txt").write_text(text)
    nano = presets.nano()
    model = replace(
        nano.model, vocab_size=320, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=3, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=8, num_experts_per_tok=2, max_position_embeddings=256,
    )  # fmt: skip
    train = replace(
        nano.train, steps=12, batch_size=8, micro_batch_size=4, sequence_length=32, compute_dtype="float32",
        compile="off", eval_every=0, save_every=6, eval_sequences=4,
    )  # fmt: skip
    return replace(nano, model=model, train=train, data=replace(nano.data, corpus=str(directory), heldout=0.2))
