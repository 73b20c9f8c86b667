"""The commands export, import and push."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from fathom.checkpoint.hf.model import load_model, save_model
from fathom.cli import main
from fathom.data.tokenizer import load_tokenizer, train_tokenizer
from tests.model.configs import lively_model, tiny


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    tokenizer = train_tokenizer(["def main(x):\n    return x\n"] * 3, 280)
    save_model(lively_model(tiny(vocab_size=280, num_nextn_predict_layers=1)), tmp_path / "model", tokenizer)
    return tmp_path / "model"


def fails(*words: object) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 2


def test_export_and_import(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["export", str(directory), "--to", "hf", "--out", str(tmp_path / "f32"), "--dtype", "f32", "--verify"])
    assert "relative error 0.00e+00" in capsys.readouterr().out
    main(["export", str(directory), "--to", "fp8", "--out", str(tmp_path / "fp8"), "--verify"])
    assert "e-02" in capsys.readouterr().out
    main(["import", str(tmp_path / "fp8"), "--out", str(tmp_path / "back"), "--verify"])
    tokens_BS = torch.arange(9)[None]
    ours, exact = load_model(directory), load_model(tmp_path / "f32")
    assert torch.equal(ours(tokens_BS).logits_BSO, exact(tokens_BS).logits_BSO)
    again = load_model(tmp_path / "back", torch.bfloat16)
    assert again.config == ours.config and again.embed_tokens.weight.dtype == torch.bfloat16
    assert load_tokenizer(tmp_path / "back").vocab_size == load_tokenizer(directory).vocab_size


def test_export_to_gguf_writes_what_save_gguf_writes(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    from fathom.checkpoint.gguf.writer import save_gguf

    main(["export", str(directory), "--to", "gguf", "--dtype", "q8_0", "--out", str(tmp_path / "gguf")])
    file = tmp_path / "gguf" / "model-q8_0.gguf"
    assert str(file) in capsys.readouterr().out.replace("\n", "")
    save_gguf(load_model(directory), load_tokenizer(directory), tmp_path / "model-q8_0.gguf", "q8_0")
    found, expected = gguf.GGUFReader(file), gguf.GGUFReader(tmp_path / "model-q8_0.gguf")
    tensors = {t.name: t for t in found.tensors}
    assert tensors.keys() == {t.name for t in expected.tensors}
    for tensor in expected.tensors:
        assert tensor.tensor_type == tensors[tensor.name].tensor_type
        assert bytes(tensor.data) == bytes(tensors[tensor.name].data), tensor.name
    keys = {name: f.contents() for name, f in found.fields.items() if not name.startswith("GGUF.")}
    assert keys == {name: f.contents() for name, f in expected.fields.items() if not name.startswith("GGUF.")}
    assert (tmp_path / "gguf" / "README.md").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "hf", "--dtype", "q8_0"], "needs --to gguf"),
        (["--to", "fp8", "--dtype", "f32"], "determines the types"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    directory: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fails("export", directory, "--out", tmp_path / "out", *words)
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------- push


class Hub:
    """A fake of the hub that records its requests."""

    def __init__(self, requests: list[tuple[str, dict[str, Any]]]) -> None:
        self._requests = requests

    def create_repo(self, repo: str, **options: Any) -> str:
        self._requests.append(("create", {"repo": repo, **options}))
        return f"https://huggingface.co/{repo}"

    def upload_folder(self, **options: Any) -> None:
        self._requests.append(("upload", options))


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    recorded: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(recorded))
    yield recorded


def test_push_uploads_the_model_and_nothing_private(
    directory: Path, requests: list[tuple[str, dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / "training_state").mkdir()
    (directory / "training_state" / "state.json").write_text("{}")
    (directory / "training_state" / "state.pt").write_text("")
    (directory / ".secret").write_text("")
    main(["push", str(directory), "me/model", "--private"])
    assert "https://huggingface.co/me/model" in capsys.readouterr().out
    (_, created), (_, uploaded) = requests
    assert created == {"repo": "me/model", "private": True, "exist_ok": True}
    assert uploaded["repo_id"] == "me/model" and uploaded["folder_path"] == directory
    paths = [str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()]
    patterns = {"allow_patterns": uploaded["allow_patterns"], "ignore_patterns": uploaded["ignore_patterns"]}
    assert set(huggingface_hub.utils.filter_repo_objects(paths, **patterns)) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_push_refuses_before_any_request(
    directory: Path, tmp_path: Path, requests: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    fails("push", directory, "just-a-name")
    assert "it must be owner/name" in " ".join(capsys.readouterr().err.split())
    fails("push", tmp_path / "nowhere", "me/model")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    fails("push", directory, "me/model")
    assert "model.safetensors" in capsys.readouterr().err
    assert not requests
