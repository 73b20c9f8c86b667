"""What a run with adapters writes beside its merged weights: a record of the merge, and the adapters as PEFT has them.

    step-000200/                config.json, model.safetensors: the merged model, as every checkpoint
    step-000200/lora.json       whose adapters are merged in it, and into what
    step-000200/adapter/        adapter_config.json, adapter_model.safetensors: what `peft` loads on top of the base

`transformers` has no MTP modules, so their adapters are in the merged weights alone.

Shapes: E experts, O outputs, I inputs, R rank.
"""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fathom.checkpoint.hf.save import write_json
from fathom.config import ConfigError
from fathom.model.transformer import Model
from fathom.posttrain.config import LoraConfig
from fathom.posttrain.lora import LoraWeight, adapters

RECORD = "lora.json"
_EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")


def write_lora_files(model: Model, config: LoraConfig, base: str, directory: Path) -> None:
    """Write lora.json and adapter/ of a model with adapters; `base` is the model that they were added to."""
    write_json(directory / RECORD, {"merged": True, "base": base, "lora": asdict(config)})
    write_peft(model, config, base, directory / "adapter")


def refuse_merged(directory: Path) -> None:
    """Raise ConfigError for a model that adapters are merged in already.

    Adapters trained on top of it would fit no base that anybody else has, and two scales would lie over each other.
    """
    record = directory / RECORD
    if record.exists():
        base = json.loads(record.read_text()).get("base")
        raise ConfigError(
            f"lora.rank is given, but {directory} has adapters of {base} merged in already ({record}): continue that "
            f"run with --resume, start from {base}, or train all weights (--lora.rank 0)"
        )


def write_peft(model: Model, config: LoraConfig, base: str, directory: Path) -> None:
    """Write the adapters of the main model in PEFT's format.

    All but attention's are `target_parameters`: as `target_modules` PEFT takes gate_proj, up_proj and down_proj for the
    routed experts alone, whatever layer they are in. Of a stack it stores A as (E·R, I), expert after expert, and B as
    (O, R·E), the experts of one rank after another (peft 0.21: `_convert_peft_config_moe`, `ParamWrapper`).
    """
    tensors, modules, parameters = {}, set[str](), dict[str, None]()
    for name, adapter in adapters(model).items():
        if name.startswith("mtp."):
            continue
        path, _, last = name.rpartition(".")
        if last in _EXPERT_WEIGHTS:
            # PEFT wraps a module once for each of its parameters, the first in the middle.
            path += ".base_layer" * (len(_EXPERT_WEIGHTS) - 1 - _EXPERT_WEIGHTS.index(last))
        if ".self_attn." in name:
            modules.add(path.rpartition(".")[2])
        else:
            parameters[_after_layer(name)] = None
        for part, tensor in _peft_tensors(adapter).items():
            tensors[f"base_model.model.model.{path}.lora_{part}.weight"] = tensor
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    write_json(
        directory / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": config.rank,
            "lora_alpha": config.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted(modules),
            "target_parameters": list(parameters),
            "inference_mode": True,
        },
    )


def _after_layer(name: str) -> str:
    """layers.0.mlp.up_proj.weight → mlp.up_proj.weight"""
    return name.split(".", 2)[2]


def _peft_tensors(adapter: LoraWeight) -> dict[str, Tensor]:
    a, b = adapter.A.detach().cpu(), adapter.B.detach().cpu()
    if a.dim() == 3:
        a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
    return {"A": a.contiguous(), "B": b.contiguous()}
