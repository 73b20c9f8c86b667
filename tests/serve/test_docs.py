"""docs/serving.md names every flag and every metric; invalid flags give clear errors."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the server needs starlette")
pytest.importorskip("llguidance", reason="the server needs llguidance")
from prometheus_client.parser import text_string_to_metric_families

from fathom.checkpoint.hf.model import load_model
from fathom.cli.serve import ServeCommand
from fathom.config import ConfigError
from fathom.engine.engine import Engine
from fathom.serve.engine_thread import EngineThread
from fathom.serve.metrics import Metrics
from tests.serve.random_model import save_random_model

DOCS = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


@pytest.mark.parametrize("field", [field.name for field in fields(ServeCommand) if field.name != "path"])
def test_every_flag_is_described(field: str) -> None:
    name = "no-speculative" if field == "speculative" else field.replace("_", "-")
    assert f"`--{name}`" in DOCS


def test_every_metric_is_named(tmp_path: Path) -> None:
    engine = Engine(load_model(save_random_model(tmp_path / "model")), None, max_batch=1)
    text = Metrics(EngineThread(engine)).text().decode()
    names = {
        family.name + ("_total" if family.type == "counter" else "") for family in text_string_to_metric_families(text)
    }
    assert len(names) > 15
    # Of every histogram the library also says when it was made.
    assert {name for name in names if f"`{name}" not in DOCS and not name.endswith("_created")} == set()


@pytest.mark.parametrize(("flags", "named"), [({"drafts": 0}, "--drafts is 0"), ({"drafts": 17}, "--drafts is 17")])
def test_wrong_flags_are_named(flags: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ServeCommand("nowhere", **flags)


def test_drafts_exclude_no_speculative() -> None:
    with pytest.raises(ConfigError, match="--no-speculative"):
        ServeCommand("nowhere", speculative=False, drafts=2)
