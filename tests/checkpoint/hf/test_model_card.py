"""The model card shows what was measured on this very checkpoint, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from fathom.checkpoint.hf.model import CheckpointError
from fathom.checkpoint.hf.model_card import model_card, write_model_card
from tests.model.configs import tiny

FIGURES = {
    "step": 200, "bits_per_byte": 1.23456, "loss": 2.0, "tokens": 54321, "mtp_agreement": [0.61], "loads": [[1, 2]],
    "max_vio_global": [0.2, 0.75, 0.1], "max_vio_batch": [1.0], "mtp_acceptance": 0.823, "tokens_per_forward": 1.82,
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's directory: a checkpoint, and the link to it."""
    (tmp_path / "code" / "checkpoints" / "step-000200").mkdir(parents=True)
    (tmp_path / "code" / "model").symlink_to(Path("checkpoints") / "step-000200")
    return tmp_path / "code"


def card(directory: Path, figures: Any = None) -> str:
    if figures is not None:
        (directory / "evaluation.json").write_text(json.dumps(figures))
    return model_card(tiny(), directory, "bf16")


def test_the_figures_of_the_directory_itself(tmp_path: Path) -> None:
    text = card(tmp_path, FIGURES)
    assert text.startswith("---\nlibrary_name: transformers\n")
    counts = tiny().parameter_counts()
    assert f"{counts.total:,}, of which {counts.active:,} are active per token" in text
    for words in ("bits per byte | 1.2346", "| 54,321", "| 0.750", "| 82.3%", "| 61.0%", "| 1.82", "step | 200"):
        assert words in text


def test_a_runs_figures_belong_to_its_newest_checkpoint_alone(run: Path) -> None:
    (run / "evaluation.json").write_text(json.dumps(FIGURES))
    assert "# code" in card(run / "model") and "1.2346" in card(run / "model")
    (run / "evaluation.json").write_text(json.dumps({**FIGURES, "step": 300}))
    assert "Measured" not in card(run / "model")


def test_what_was_not_measured_is_not_shown(tmp_path: Path) -> None:
    assert "Measured" not in card(tmp_path)
    text = card(
        tmp_path, {"bits_per_byte": 1.5, "mtp_acceptance": None, "mtp_agreement": [float("nan")], "tokens": "9"}
    )
    assert "1.5000" in text
    assert "accepted" not in text and "nan" not in text and "held-out tokens" not in text


@pytest.mark.parametrize("content", ["{", "[]", "3"])
def test_a_file_of_another_kind_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"evaluation\.json"):
        card(tmp_path)


def test_figures_travel_along(run: Path, tmp_path: Path) -> None:
    (run / "evaluation.json").write_text(json.dumps(FIGURES))
    (tmp_path / "out").mkdir()
    write_model_card(tiny(), run / "model", tmp_path / "out", "fp8")
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == FIGURES
    assert "1.2346" in (tmp_path / "out" / "README.md").read_text()
    assert "FP8" in (tmp_path / "out" / "README.md").read_text()
