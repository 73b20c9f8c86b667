"""docs/checkpoints.md does what it says: its commands are executed, one after the other, on a small model."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from fathom.checkpoint.hf.model import load_config, save_model
from fathom.cli import main
from fathom.data.tokenizer import train_tokenizer
from tests.model.configs import lively_model, tiny

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
PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"


def commands(page: Path) -> list[list[str]]:
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


class Hub:
    """Stands in for the hub."""

    uploaded: list[dict[str, Any]] = []  # noqa: RUF012

    def create_repo(self, repo: str, **_: Any) -> str:
        return f"https://huggingface.co/{repo}"

    def upload_folder(self, **options: Any) -> None:
        self.uploaded.append(options)


def write_task_and_text() -> None:
    """What the page's two evaluations read."""
    Path("notes.txt").write_text("def main(x):\n")
    Path("tasks").mkdir()
    rows = [{"question": "def", "choices": [" main", " x"], "answer": number % 2} for number in range(4)]
    Path("tasks/choice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("tasks/choice.yaml").write_text(TASK.format(data=Path("tasks/choice.jsonl").absolute()))


@pytest.mark.slow
def test_every_command_of_the_page_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf", reason="the gguf package is not installed")
    datasets = pytest.importorskip("datasets", reason="lm-eval is not installed")
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    tokenizer = train_tokenizer(["def main(x):\n    return x\n"] * 3, 280)
    config = tiny(vocab_size=280, num_nextn_predict_layers=1)
    model = lively_model(config, dtype=torch.bfloat16)
    save_model(model, Path("runs/mine/checkpoints/step-000200"), tokenizer)
    Path("runs/mine/model").symlink_to("checkpoints/step-000200")
    snapshot = tmp_path / "cache" / "models--deepseek-ai--DeepSeek-V3" / "snapshots" / ("0" * 40)
    save_model(model, snapshot, tokenizer, storage="fp8")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    write_task_and_text()

    found = commands(PAGE)
    assert len(found) >= 8
    for program, *words in found:
        assert program == "fathom"
        main(words)
    said = capsys.readouterr().out
    assert said.count("relative error") == 3
    assert f"({config.parameter_counts().total:,})" in said
    for directory in ("out/bf16", "out/fp8", "in/bf16", "in/deepseek"):
        assert load_config(Path(directory)) == config
    assert [file.name for file in Path("out/gguf").glob("*.gguf")] == ["mine-bf16.gguf"]
    assert Path("out/fp8/README.md").read_text().count("# mine") == 1
    assert 0 <= json.loads(Path("figures.json").read_text())["choice"]["acc,none"] <= 1
    assert "bits_per_byte" in said
    assert [options["repo_id"] for options in Hub.uploaded] == ["me/model"]


def test_the_page_names_files_that_exist() -> None:
    root = PAGE.parents[1]
    text = PAGE.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:fathom|tests|benchmarks)/[\w./]+)`", text):
        assert (root / path).exists(), path
