"""The command from a model's directory to its figures: they add up, are documented, and fit any model and text."""

import json
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints, is_typeddict

import pytest
import torch

from fathom.checkpoint.hf.model import load_model, save_model
from fathom.cli import main
from fathom.data.tokenizer import load_tokenizer, save_tokenizer
from fathom.lab.inspector.facts import Facts
from fathom.model.config import ModelConfig
from fathom.model.transformer import Model
from tests.serve.random_model import CONFIG, save_random_model

ROOT = Path(__file__).parents[3]
CODE = "def f(x):\n    return [x, 12]  # größer 😀\n" * 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model"))


def inspected(model: Path, folder: Path, *flags: str) -> dict[str, Any]:
    main(["inspect", str(model), "--out", str(folder / "page.html"), "--json", str(folder / "facts.json"), *flags])
    return json.loads((folder / "facts.json").read_text())


@torch.no_grad()
def test_the_figures_add_up(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = inspected(model, tmp_path, "--text", CODE, "--window", "100", "--shown", "60")
    text, tokenizer = facts["text"], load_tokenizer(model)
    ids = tokenizer.encode(CODE, bos=False)
    assert (text["tokens"], text["bytes"], text["rule"], text["cut"]) == (len(ids), len(CODE.encode()), "python", False)
    assert text["bits_per_token"] * text["tokens"] == pytest.approx(text["bits_per_byte"] * text["bytes"], rel=1e-3)
    assert f"{text['bits_per_byte']:.3f} bits per byte" in capsys.readouterr().out

    classes = {one["name"]: one["tokens"] for one in facts["classes"]}
    assert sum(classes.values()) == len(ids)
    assert classes["keywords"] > 0 and classes["comments"] > 0
    for router in facts["routers"][:-1]:
        assert sum(router["load"]) == CONFIG.num_experts_per_tok * len(ids)
        assert router["max_violation"] == pytest.approx(8 * max(router["load"]) / sum(router["load"]) - 1, abs=1e-4)
        assert [len(row) for row in router["co_firing"]] == list(range(8))
    assert [router["name"] for router in facts["routers"]] == ["layer 1", "layer 2", "MTP module 1"]

    # The excerpt, against the model itself.
    [excerpt] = facts["excerpts"]
    first = excerpt["start"]
    out = load_model(model)(torch.tensor([[tokenizer.bos_id, *ids[first : first + 60]]]))
    for place in (1, 30, 60):
        token = excerpt["tokens"][place]
        assert token["text"].encode() == tokenizer.token_bytes(ids[first + place - 1]) or "\\x" in token["text"]
        logp_O = out.logits_BSO[0, place - 1].log_softmax(-1) / torch.log(torch.tensor(2.0))
        assert token["bits"] == pytest.approx(-float(logp_O[ids[first + place - 1]]), abs=2e-3)
        assert token["choice"]["agrees"] == (int(logp_O.argmax()) == ids[first + place - 1])
        for layer, ids_BSK in enumerate(out.router.topk_ids_LBSK):
            assert sorted(token["experts"][layer]) == sorted(ids_BSK[0, place].tolist())
            assert token["weights"][layer] == sorted(token["weights"][layer], reverse=True)
        assert all(sum(head[1::2]) <= 1004 for layer in token["attention"] for head in layer)
        assert all(max(head[::2]) <= place for layer in token["attention"] for head in layer)
    bos = excerpt["tokens"][0]
    assert bos["kind"] is None and bos["bits"] is None and bos["experts"][-1] is None


def test_agreement_is_counted_by_class(model: Path, tmp_path: Path) -> None:
    [draft] = inspected(model, tmp_path, "--text", CODE)["drafts"]
    agreed = sum(one["drafts"] * (one["agree"] or 0) for one in draft["classes"])
    assert agreed == pytest.approx(draft["agree"] * draft["drafts"], abs=0.05)
    assert sum(one["drafts"] for one in draft["classes"]) == draft["drafts"]
    costs = [one["choice_p"] * one["missed_bits"] for one in draft["failed"]]
    assert costs == pytest.approx(sorted(costs, reverse=True), abs=0.02) and len(costs) == 20
    assert all(one["draft"] != one["choice"] for one in draft["failed"])


def test_a_long_text_is_cut_between_characters_and_says_so(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("😀" * 5000)
    facts = inspected(model, tmp_path, "--file", str(file), "--tokens", "101")
    tokens = load_tokenizer(model).encode("😀" * 200, bos=False)[:101]
    assert facts["text"]["cut"] and facts["text"]["rule"] == "plain"
    assert 101 - 4 < facts["text"]["tokens"] <= len(tokens) and facts["text"]["bytes"] % 4 == 0


def other(folder: Path, model: Path, config: ModelConfig) -> Path:
    save_model(Model(config), folder / "model")
    save_tokenizer(load_tokenizer(model), folder / "model")
    return folder / "model"


def variant(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**vars(CONFIG), **changes})


@pytest.mark.parametrize(
    "config",
    [
        variant(num_nextn_predict_layers=0, q_lora_rank=8),
        variant(first_k_dense_replace=3, num_nextn_predict_layers=0),
        variant(num_experts_per_tok=1, n_group=2, num_nextn_predict_layers=2),
        variant(scoring_func="softmax", topk_method="greedy", norm_topk_prob=False, num_nextn_predict_layers=0),
    ],
    ids=["no MTP", "dense", "one expert", "V2"],
)
@pytest.mark.parametrize("text", ["x", CODE])
def test_any_model_and_any_text(model: Path, tmp_path: Path, config: ModelConfig, text: str) -> None:
    facts = inspected(other(tmp_path, model, config), tmp_path, "--text", text)
    page = (tmp_path / "page.html").read_text()
    assert len(facts["drafts"]) == config.num_nextn_predict_layers
    assert ("no multi-token-prediction module" in page) == (config.num_nextn_predict_layers == 0)
    assert ("no MoE layers" in page) == (config.num_moe_layers == 0)
    assert ("so there are no pairs" in page) == (config.num_experts_per_tok == 1)
    assert all(router["bias"] is None for router in facts["routers"]) == (config.is_v2 or not facts["routers"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text", ""], "--text holds no text"),
        (["--text", "a", "--file", "b"], "--text and --file are both given"),
        (["--tokens", "0"], "--tokens is 0; it must be at least 1"),
        (["--file", "/nonexistent"], "/nonexistent"),
        (["--text", "a", "--out", "/nonexistent/page.html"], "there is no directory /nonexistent"),
    ],
)
def test_wrong_input_is_one_clear_line(
    model: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(model), *flags])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_file_that_is_no_text_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "binary").write_bytes(b"abc\xff\xfe" * 50)
    with pytest.raises(SystemExit):
        main(["inspect", str(model), "--file", str(tmp_path / "binary")])
    assert "is not UTF-8 text: byte 3 is 0xff" in " ".join(capsys.readouterr().err.split())


def keys_of(kind: Any) -> set[str]:
    """Every key of a TypedDict and of those within it."""
    if is_typeddict(kind):
        hints = get_type_hints(kind)
        return set(hints).union(*(keys_of(hint) for hint in hints.values()))
    return set().union(*(keys_of(part) for part in get_args(kind))) if get_origin(kind) or get_args(kind) else set()


def test_every_key_is_documented() -> None:
    page = (ROOT / "docs" / "inspector.md").read_text()
    assert [key for key in sorted(keys_of(Facts)) if f"`{key}`" not in page] == []
