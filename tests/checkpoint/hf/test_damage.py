"""Damaged model directories: the error names the file, and the tensor or the key."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fathom.checkpoint.hf.model import CheckpointError, load_config, load_model, save_model
from fathom.checkpoint.info import model_info
from tests.checkpoint.directories import (
    EMBEDDING,
    INDEX,
    SINGLE,
    assert_refused,
    assert_same_model,
    edit,
    edit_json,
)
from tests.model.configs import lively_model, tiny

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A good model in one file."""
    save_model(lively_model(tiny(num_nextn_predict_layers=1)), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A good model in many."""
    save_model(lively_model(tiny()), tmp_path / "model", max_shard_size=6000)
    return tmp_path / "model"


@pytest.mark.parametrize(
    "missing",
    [
        "model.norm.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.experts.5.up_proj.weight",
        "model.layers.2.mlp.experts.0.down_proj.weight",
        "model.layers.3.eh_proj.weight",
    ],
)
def test_a_missing_tensor_is_named(directory: Path, missing: str) -> None:
    edit(directory, lambda tensors: tensors.pop(missing))
    assert_refused(directory, str(directory), missing)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.1.mlp.experts.8.up_proj.weight",
        "model.layers.1.mlp.experts.07.up_proj.weight",
        "model.layers.4.eh_proj.weight",
        "model.layers.01.input_layernorm.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.1.rotary_emb.weight",
        "visual.patch_embed.weight",
    ],
)
def test_an_unexpected_tensor_is_named(directory: Path, name: str) -> None:
    edit(directory, lambda tensors: tensors.update({name: torch.ones(2)}))
    assert_refused(directory, SINGLE, name, "no part of the model")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_nextn_predict_layers": 10**9},
        {"n_routed_experts": 4 * 10**9},
        {"hidden_size": 10**18},
        {"vocab_size": 10**30},
    ],
)
def test_what_config_json_claims_is_bounded_by_what_the_files_hold(directory: Path, changes: dict[str, int]) -> None:
    edit_json(directory / "config.json", **changes)
    began = time.perf_counter()
    assert_refused(directory, "config.json")
    with pytest.raises(CheckpointError):
        model_info(directory)
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps", "num_hidden_layers", "eos_token_id"])
@pytest.mark.parametrize("value", ["1e400", "-Infinity", "NaN"])
def test_numbers_beyond_float64_are_named(directory: Path, key: str, value: str) -> None:
    edit_json(directory / "config.json", rope_parameters=None, **{key: "marker"})
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text.replace('"marker"', value))
    assert_refused(directory, "config.json", key)


def test_rotary_tables_that_others_store_are_passed_over(directory: Path) -> None:
    before = load_model(directory)
    names = ["model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq", "rotary_emb.cos_cached"]
    edit(directory, lambda tensors: tensors.update({name: torch.ones(2) for name in names}))
    assert_same_model(load_model(directory), before)


def test_the_same_tensor_under_two_names_is_refused(directory: Path) -> None:
    """`norm.weight` and `model.norm.weight` are one parameter: the second would silently overwrite the first."""
    edit(directory, lambda tensors: tensors.update({"norm.weight": torch.ones(24)}))
    assert_refused(directory, SINGLE, "norm.weight")


def test_a_duplicate_expert_does_not_hide_a_missing_one(directory: Path) -> None:
    """Stacked and single tensors together have the right number of elements, but do not fill every parameter."""

    def confuse(tensors: dict[str, Tensor]) -> None:
        prefix = "model.layers.1.mlp.experts."
        tensors[prefix + "down_proj"] = torch.stack([tensors[f"{prefix}{j}.down_proj.weight"] for j in range(8)])

    edit(directory, confuse)
    assert_refused(directory, SINGLE, "model.layers.1.mlp.experts.")


@pytest.mark.parametrize(
    "name",
    [
        EMBEDDING,
        "model.layers.1.mlp.experts.5.up_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "lm_head.weight",
    ],
)
def test_a_wrong_shape_is_named(directory: Path, name: str) -> None:
    edit(directory, lambda tensors: tensors.update({name: torch.ones(2, 3)}))
    assert_refused(directory, SINGLE, name, "(2, 3)", "config.json implies")


@pytest.mark.parametrize("left", [0, 5, 8, 100, -1])
def test_a_truncated_file_is_named(directory: Path, left: int) -> None:
    size = (directory / SINGLE).stat().st_size
    os.truncate(directory / SINGLE, left if left >= 0 else size + left)
    assert_refused(directory, SINGLE)


@pytest.mark.parametrize("left", [0, 100, -1])
def test_a_truncated_shard_is_named(sharded: Path, left: int) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[2]
    os.truncate(shard, left if left >= 0 else shard.stat().st_size + left)
    assert_refused(sharded, shard.name)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[2]
    shard.unlink()
    assert_refused(sharded, shard.name, INDEX)


def test_a_tensor_that_is_not_where_the_index_says_is_named(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    wrong = sorted(set(index["weight_map"].values()) - {index["weight_map"][EMBEDDING]})[0]
    edit_json(sharded / INDEX, weight_map={**index["weight_map"], EMBEDDING: wrong})
    assert_refused(sharded, wrong, EMBEDDING)


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", 7, None])
def test_an_index_that_leads_elsewhere_is_refused(sharded: Path, shard: object) -> None:
    index = json.loads((sharded / INDEX).read_text())
    edit_json(sharded / INDEX, weight_map={**index["weight_map"], EMBEDDING: shard})
    assert_refused(sharded, INDEX)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"3",
        b"{}",
        b'{"weight_map": 3}',
        b'{"weight_map": null}',
        b'{"weight_map": {}}',
        b"\xff\xfe",
    ],
)
def test_an_unreadable_index_is_named(sharded: Path, content: bytes) -> None:
    (sharded / INDEX).write_bytes(content)
    assert_refused(sharded, INDEX)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"{}", b"\xff\xfe", b'{"model_type": "llama"}'])
def test_an_unreadable_config_is_named(directory: Path, content: bytes) -> None:
    (directory / "config.json").write_bytes(content)
    assert_refused(directory, "config.json")
    with pytest.raises(CheckpointError):
        load_config(directory)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "24"},
        {"n_group": 3},
        {"sliding_window": 5},
        {"rope_scaling": [1]},
        {"rope_scaling": {"type": ["yarn"]}},
        {"eos_token_id": ["x"]},
        {"scoring_func": "softmax"},
    ],
)
def test_a_config_that_is_not_ours_is_refused_with_its_file(directory: Path, changes: dict[str, Any]) -> None:
    edit_json(directory / "config.json", **changes)
    assert_refused(directory, "config.json", next(iter(changes)))


def test_absent_files_are_named(directory: Path) -> None:
    (directory / SINGLE).unlink()
    assert_refused(directory, SINGLE, INDEX)
    (directory / "config.json").unlink()
    assert_refused(directory, "config.json")


def test_a_file_that_is_no_safetensors_is_named(directory: Path) -> None:
    (directory / SINGLE).write_bytes(b"\x80\x04 not a pickle to be run" * 9)
    assert_refused(directory, SINGLE)
