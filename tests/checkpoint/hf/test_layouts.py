"""What others have written: stacked experts, tied heads, MTP layers, FP8 blocks."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fathom.checkpoint.hf.model import CheckpointError, load_model, save_model
from tests.checkpoint.directories import (
    EMBEDDING,
    SINGLE,
    assert_refused,
    assert_same_model,
    edit,
    save_fp8,
    stored,
)
from tests.checkpoint.fp8_definition import MODEL
from tests.model.configs import lively_model, tiny

pytestmark = pytest.mark.filterwarnings("error")


def test_stacked_experts_of_transformers_are_read(tmp_path: Path) -> None:
    model = lively_model(tiny())
    save_model(model, tmp_path / "model")

    def stack(tensors: dict[str, Tensor]) -> None:
        for i in (1, 2):
            prefix = f"model.layers.{i}.mlp.experts."
            experts = model.layers[i].mlp.experts
            for name in [name for name in tensors if name.startswith(prefix)]:
                del tensors[name]
            tensors[prefix + "gate_up_proj"] = experts.gate_up_proj.detach().clone()
            tensors[prefix + "down_proj"] = experts.down_proj.detach().clone()

    edit(tmp_path / "model", stack)
    assert_same_model(load_model(tmp_path / "model"), model)


@pytest.mark.parametrize("tied", [True, False])
def test_only_a_tied_head_may_be_absent(tmp_path: Path, tied: bool) -> None:
    model = lively_model(tiny(tie_word_embeddings=tied))
    save_model(model, tmp_path / "model")
    edit(tmp_path / "model", lambda tensors: tensors.pop("lm_head.weight"))
    if tied:
        assert_same_model(load_model(tmp_path / "model"), model)
    else:
        with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
            load_model(tmp_path / "model")


@pytest.mark.parametrize("name", [EMBEDDING, "lm_head.weight"])
def test_a_tied_head_that_differs_is_refused(tmp_path: Path, name: str) -> None:
    """`transformers` would untie the two, other programs use one of them."""
    save_model(lively_model(tiny(tie_word_embeddings=True)), tmp_path / "model")
    edit(tmp_path / "model", lambda tensors: tensors.update({name: tensors[name] + 1}))
    assert_refused(tmp_path / "model", SINGLE, EMBEDDING.removeprefix("model."), "lm_head.weight", "ties them")


@pytest.mark.parametrize("name", ["embed_tokens.weight", "shared_head.head.weight"])
def test_an_mtp_layer_with_an_embedding_or_head_of_its_own_is_refused(tmp_path: Path, name: str) -> None:
    model = lively_model(tiny(num_nextn_predict_layers=1))
    save_model(model, tmp_path / "model")
    name = f"model.layers.3.{name}"
    original = EMBEDDING if "embed" in name else "lm_head.weight"
    edit(tmp_path / "model", lambda tensors: tensors.update({name: tensors[name] + 1}))
    assert_refused(tmp_path / "model", SINGLE, name, original, "differs")
    edit(tmp_path / "model", lambda tensors: tensors.update({name: tensors[name][1:]}))
    assert_refused(tmp_path / "model", SINGLE, name, original, "differs")
    edit(tmp_path / "model", lambda tensors: tensors.pop(name))  # `transformers` writes none
    assert_same_model(load_model(tmp_path / "model"), model)


def test_absent_mtp_weights_cause_a_warning(tmp_path: Path) -> None:
    model = lively_model(tiny(num_nextn_predict_layers=1))
    save_model(model, tmp_path / "model")

    def drop_module(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.3.")]:
            del tensors[name]

    edit(tmp_path / "model", drop_module)
    with pytest.warns(UserWarning, match="num_nextn_predict_layers 1"):
        found = load_model(tmp_path / "model")
    assert found.config.num_nextn_predict_layers == 0
    tokens_BS = torch.tensor([[1, 2, 3]])
    assert torch.equal(found(tokens_BS).logits_BSO, model(tokens_BS).logits_BSO)


@pytest.mark.parametrize("scales_apart", [False, True], ids=["one file", "scales in another shard"])
def test_fp8_weights_are_read_by_the_definition_of_the_format(tmp_path: Path, scales_apart: bool) -> None:
    """Widths above 128 that are not multiples of it: several blocks, the last ones partial."""
    model = lively_model(MODEL)
    values = save_fp8(model, tmp_path / "model", scales_apart)
    save_model(load_model(tmp_path / "model"), tmp_path / "again")
    again, original = stored(tmp_path / "again"), stored(tmp_path / "model")
    assert any(v.shape[0] % 128 and v.shape[0] > 128 and v.shape[1] % 128 for v in values.values())
    assert any(name.startswith("model.layers.2.mlp.experts.3.") for name in values), "MTP's are quantised too"
    for name, tensor in again.items():
        expected = values[name] if name in values else original[name].double()
        assert torch.equal(tensor, expected.float()), name


def test_fp8_weights_without_scales_are_refused(tmp_path: Path) -> None:
    save_fp8(lively_model(MODEL), tmp_path / "model")
    name = "model.layers.0.self_attn.o_proj.weight"
    edit(tmp_path / "model", lambda tensors: tensors.pop(f"{name}_scale_inv"))
    assert_refused(tmp_path / "model", SINGLE, name, f"{name}_scale_inv")


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (6,), ()])
def test_fp8_scales_of_the_wrong_shape_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save_fp8(lively_model(MODEL), tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    edit(tmp_path / "model", lambda tensors: tensors.update({name: torch.ones(shape)}))
    if shape == (3, 2):
        load_model(tmp_path / "model")
    else:
        assert_refused(tmp_path / "model", SINGLE, name, str(shape), "(3, 2)")


def test_fp8_vectors_are_refused(tmp_path: Path) -> None:
    """Only matrices have blocks; a quantised norm is no part of the format."""
    save_model(lively_model(tiny()), tmp_path / "model")
    name = "model.norm.weight"
    fp8 = {name: torch.ones(24).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1)}
    edit(tmp_path / "model", lambda tensors: tensors.update(fp8))
    assert_refused(tmp_path / "model", SINGLE, name)
