"""Starting from a checkpoint: same weights and tokenizer, MTP modules added where it has none."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fathom import Model, load_model, save_model
from fathom.checkpoint.training_state import checkpoints
from fathom.data.tokenize import open_tokenized
from fathom.distributed.ranks import Ranks
from fathom.train.pretrain import train
from fathom.train.run import Run
from fathom.train.setup import build_state, with_initial_model


def _plain_checkpoint(run: Run, ranks: Ranks, directory: Path) -> Path:
    """A trained model without MTP modules, as somebody else would hand it over."""
    plain = replace(run, model=replace(run.model, num_nextn_predict_layers=0), train=replace(run.train, steps=2))
    train(plain, directory / "first", ranks)
    return checkpoints(directory / "first")[-1]


def test_modules_are_added_and_the_rest_is_kept(tiny_run: Run, one_rank: Ranks, tmp_path: Path) -> None:
    source = _plain_checkpoint(tiny_run, one_rank, tmp_path)
    run = with_initial_model(replace(tiny_run, init=str(source)))
    assert run.model.num_nextn_predict_layers == 1
    model = build_state(run, one_rank).model
    old = load_model(source)
    for name, tensor in old.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert model.mtp[0].eh_proj.weight.std() > 0


@pytest.mark.slow
def test_training_goes_on_with_its_tokenizer(tiny_run: Run, one_rank: Ranks, tmp_path: Path) -> None:
    source = _plain_checkpoint(tiny_run, one_rank, tmp_path)
    run = replace(tiny_run, init=str(source), train=replace(tiny_run.train, steps=2))
    train(run, tmp_path / "second", one_rank)
    assert load_model(tmp_path / "second" / "model").config.num_nextn_predict_layers == 1
    tokenizers = [open_tokenized(tmp_path / name / "data").tokenizer.tokenizer_json for name in ("first", "second")]
    assert tokenizers[0] == tokenizers[1]


def test_a_models_own_modules_are_kept(tiny_run: Run, tmp_path: Path) -> None:
    save_model(Model(replace(tiny_run.model, num_nextn_predict_layers=2)), tmp_path / "two")
    run = with_initial_model(replace(tiny_run, init=str(tmp_path / "two")))
    assert run.model.num_nextn_predict_layers == 2


def test_what_is_odd_about_the_text_is_said_before_the_first_step(
    tiny_run: Run, one_rank: Ranks, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(corpus, tmp_path / "texts")
    image = tmp_path / "texts" / "[" / "b].png"  # in rich's markup a closing tag
    image.parent.mkdir()
    image.write_bytes(b"\x89PNG\0")
    run = replace(
        tiny_run,
        model=replace(tiny_run.model, vocab_size=4096),
        train=replace(tiny_run.train, steps=1),
        data=replace(tiny_run.data, corpus=str(tmp_path / "texts")),
    )
    train(run, tmp_path / "run", one_rank)
    said, found = capsys.readouterr().out, open_tokenized(tmp_path / "run" / "data").vocab_size
    assert "1 files or rows cannot be read and are left out" in said
    assert f"{image} is a binary file" in said
    assert found < 4096
    assert f"the tokenizer has {found} tokens, model.vocab_size is 4,096" in said
