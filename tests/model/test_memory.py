"""A model beyond the machine's memory is refused in one sentence, before anything is allocated."""

from pathlib import Path

import pytest
import torch

import fathom
from fathom.cli import main
from fathom.config import ConfigError
from fathom.model import memory
from tests.serve.random_model import CONFIG, save_random_model

SENTENCE = r"the model's weights take [\d,.]+ GiB and cpu has [\d,.]+ GiB of memory: take a smaller model"


def test_a_model_beyond_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match=SENTENCE):
        fathom.Model(fathom.ModelConfig())


def test_on_the_meta_device_any_model_is_built() -> None:
    with torch.device("meta"):
        model = fathom.Model(fathom.ModelConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) > 671e9


def test_the_limit_is_the_bytes_of_all_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = sum(tensor.nbytes for tensor in fathom.Model(CONFIG).state_dict().values())
    monkeypatch.setattr(memory, "total_memory", lambda device: weights)
    fathom.Model(CONFIG)
    monkeypatch.setattr(memory, "total_memory", lambda device: weights - 1)
    with pytest.raises(ConfigError, match=SENTENCE):
        fathom.Model(CONFIG)


def test_a_directory_is_refused_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_random_model(tmp_path / "model")
    weights = sum(tensor.nbytes for tensor in fathom.load_model(tmp_path / "model").state_dict().values())
    monkeypatch.setattr(memory, "total_memory", lambda device: weights - 1)
    with pytest.raises(ConfigError, match=SENTENCE):
        fathom.load_model(tmp_path / "model")
    fathom.load_model(tmp_path / "model", dtype=torch.bfloat16)
    with pytest.raises(SystemExit) as stop:
        main(["generate", str(tmp_path / "model"), "--prompt", "a"])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
