"""The model card: the README.md of an exported directory, with the figures that were measured and no others."""

import math
from pathlib import Path
from typing import Any

from fathom.checkpoint.hf.directory import read_json_object
from fathom.checkpoint.hf.save import write_json
from fathom.checkpoint.training_state import checkpoint_step
from fathom.model.config import ModelConfig

EVALUATION = "evaluation.json"
"""What training writes about a run's newest checkpoint (fathom/train/evaluation.py)."""

_STORED_AS = {"f32": "float32", "bf16": "bfloat16", "fp8": "FP8 blocks of 128x128, as DeepSeek-V3 is released"}
_FRONT_MATTER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- deepseek_v3
- mixture-of-experts
- multi-token-prediction
---
"""


def write_model_card(config: ModelConfig, source: Path, target: Path, storage: str) -> None:
    """Write README.md into the directory `target`, and the figures it shows beside it, for the next export."""
    (target / "README.md").write_text(model_card(config, source, storage), encoding="utf-8")
    if (found := evaluation(source)) is not None:
        write_json(target / EVALUATION, found)


def model_card(config: ModelConfig, directory: Path, storage: str) -> str:
    """The text of README.md for the model in `directory`, exported as `storage` (`Storage`, or a GGUF type)."""
    counts = config.parameter_counts()
    rows = [
        ("parameters", f"{counts.total:,}, of which {counts.active:,} are active per token"),
        ("layers", f"{config.num_hidden_layers}, the first {config.first_k_dense_replace} dense"),
        ("experts", f"{config.num_experts_per_tok} of {config.n_routed_experts}, and {config.n_shared_experts} shared"),
        ("multi-token prediction", f"{config.num_nextn_predict_layers} modules, {counts.mtp:,} parameters"),
        ("context", f"{config.max_position_embeddings:,} tokens"),
        ("stored as", _STORED_AS.get(storage, storage)),
    ]
    parts = [
        _FRONT_MATTER,
        f"# {display_name(directory)}\n",
        "A language model of the DeepSeek-V3 architecture, exported by Fathom.\n",
        _table(rows),
    ]
    found = evaluation(directory)
    if found is not None:
        parts += ["## Measured\n", "On held-out text of the training corpus.\n", _table(_measured(found))]
    return "\n".join(parts)


def display_name(directory: Path) -> str:
    """The model's name: of a checkpoint the run's, of a hub snapshot the repository's, else the directory's."""
    real = directory.resolve()
    if checkpoint_step(real) is not None and real.parent.name == "checkpoints":
        return real.parent.parent.name
    if real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--"):
        return real.parent.parent.name.split("--")[-1]
    return real.name


def evaluation(directory: Path) -> dict[str, Any] | None:
    """The figures of the model in `directory`: its own evaluation.json, or its run's if that is of the same step.

    Raises CheckpointError for a file that training cannot have written.
    """
    file = directory / EVALUATION
    if file.is_file():
        return read_json_object(file)
    checkpoint = directory.resolve()
    step = checkpoint_step(checkpoint)
    file = checkpoint.parent.parent / EVALUATION
    if step is None or not file.is_file():
        return None
    found = read_json_object(file)
    return found if found.get("step") == step else None


def _measured(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures to show; those that are absent, or NaN because nothing was measured, are left out."""
    max_vio = max(_finite(found.get("max_vio_global")), default=None)
    agreement = next(iter(_finite(found.get("mtp_agreement"))), None)
    rows = [
        ("training step", found.get("step"), "{:,}"),
        ("bits per byte", found.get("bits_per_byte"), "{:.4f}"),
        ("held-out tokens", found.get("tokens"), "{:,}"),
        ("imbalance of the experts, MaxVio of the worst layer", max_vio, "{:.3f}"),
        ("MTP drafts accepted in greedy continuations", found.get("mtp_acceptance"), "{:.1%}"),
        ("MTP first choices that are the model's own", agreement, "{:.1%}"),
        ("tokens per forward pass with drafts", found.get("tokens_per_forward"), "{:.2f}"),
    ]
    return [(name, form.format(value)) for name, value, form in rows if _finite([value])]


def _finite(values: Any) -> list[float]:
    """Those of the values that are finite numbers."""
    if not isinstance(values, list):
        return []
    return [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows), ""])
