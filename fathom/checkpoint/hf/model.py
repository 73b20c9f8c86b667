"""Hugging Face model directories: config.json, sharded safetensors, tokenizer.

What is written loads unchanged in `transformers`, vLLM, SGLang and llama.cpp's converter; what they and DeepSeek
publish is read, a few rows at a time. Only safetensors are ever opened and nothing from a checkpoint is executed.
"""

from pathlib import Path

import torch
from torch import Tensor

from fathom.checkpoint.hf.directory import WEIGHT_FILES, load_config, model_directory
from fathom.checkpoint.hf.keep_fp8 import insert_fp8_layers, load_fp8_weight
from fathom.checkpoint.hf.name_mapping import layer_of, locate, parameters_and_buffers
from fathom.checkpoint.hf.safetensors_io import CheckpointError
from fathom.checkpoint.hf.save import SHARD_BYTES, Storage, plan_save, write_json, write_tensors
from fathom.checkpoint.hf.weights import CheckpointWeights, ModelWeights, Weights, meta_model
from fathom.data.tokenizer import Tokenizer, save_tokenizer
from fathom.files import atomic_directory
from fathom.model.config import ModelConfig
from fathom.model.memory import check_bytes_fit
from fathom.model.transformer import Model
from fathom.quantization import fp8

_FP8_QUANTIZATION_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [fp8.BLOCK, fp8.BLOCK],
}
"""config.json's quantization_config, by which other programs recognise the format."""

__all__ = ["CheckpointError", "load_config", "load_model", "load_part", "model_directory", "save_model"]


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    keep_fp8: bool = False,
) -> Model:
    """Load any DeepSeek-V3-architecture model: a Hugging Face directory, or a name on the hub.

    Weights are converted to `dtype` as they are read; correction biases stay float32. FP8 weights are dequantised, or
    with `keep_fp8` stay FP8 in memory, for inference only. A directory whose MTP weights are absent loads without MTP
    modules, with a warning. Raises CheckpointError for missing, unexpected or misshapen tensors, ConfigError for a
    model that is larger than the device's memory.
    """
    weights = CheckpointWeights(model_directory(path))
    model = meta_model(weights.config)
    with torch.device("meta"):
        kept = insert_fp8_layers(model, weights) if keep_fp8 else frozenset()
    model.to(dtype)
    check_bytes_fit(sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())), device)
    model.to_empty(device=device)
    model.tie_head()
    _load_weights(model, weights, kept)
    return model.eval()


@torch.no_grad()
def _load_weights(model: Model, weights: CheckpointWeights, kept: frozenset[str]) -> None:
    """Copy every tensor into the model; those named in `kept` into its FP8 layers."""
    targets = parameters_and_buffers(model)
    for name, shape, _ in weights.specs():
        target = locate(name, model.config)
        if target is None:  # an MTP layer's copy of embedding or head
            continue
        if name in kept:
            load_fp8_weight(model, name, *weights.fp8_blocks(name))
        else:
            _copy(weights, name, shape, target.of(targets[target.parameter]))


def _copy(weights: Weights, name: str, shape: tuple[int, ...], target: Tensor) -> None:
    for first, last in fp8.row_chunks(shape):
        target[first:last].copy_(weights.rows(name, first, last).view_as(target[first:last]))


@torch.no_grad()
def load_part(
    path: str | Path,
    layers: range | None = None,
    experts: range | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """Some of a model's tensors, by the names of `Model`'s parameters and buffers; nothing else is read.

    `layers` are numbered as in the files, MTP module k being layer num_hidden_layers + k; None means all tensors, and
    only then are embedding, final norm and head among them. Of the routed experts only `experts` are loaded, stacked
    in that order. Raises CheckpointError as `load_model` does, ValueError for a range that reaches beyond the model.
    """
    weights = CheckpointWeights(model_directory(path))
    config, model = weights.config, parameters_and_buffers(meta_model(weights.config))
    _check_range("layers", layers, config.num_hidden_layers + config.num_nextn_predict_layers)
    _check_range("experts", experts, config.n_routed_experts)
    part: dict[str, Tensor] = {}
    for name, shape, _ in weights.specs():
        target = locate(name, config)
        if target is None or (layers is not None and layer_of(name) not in layers):
            continue
        if target.expert is not None and experts is not None:
            if target.expert not in experts:
                continue
            target = target._replace(expert=experts.index(target.expert))
        if target.parameter not in part:
            full = model[target.parameter]
            stacked = full.shape if target.expert is None or experts is None else (len(experts), *full.shape[1:])
            kept = full.dtype if target.parameter.endswith("e_score_correction_bias") else dtype
            part[target.parameter] = torch.empty(stacked, dtype=kept, device=device)
        _copy(weights, name, shape, target.of(part[target.parameter]))
    return part


def _check_range(name: str, numbers: range | None, count: int) -> None:
    if numbers is not None and any(number not in range(count) for number in numbers):
        raise ValueError(f"{name} is {numbers}; this model has {count}, counted from 0")


def save_model(
    model: Model,
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    max_shard_size: int = SHARD_BYTES,
    storage: Storage | None = None,
) -> None:
    """Write the model as a Hugging Face directory, in shards of at most `max_shard_size` bytes.

    Weights keep their type, or take that of `storage`: `f32`, `bf16`, or `fp8`, the blocks of DeepSeek-V3's release.
    An existing model at `path` is replaced only when the new one is complete; its files that are not weights are kept.
    """
    weights = ModelWeights(model)
    items = plan_save(weights.specs(), storage)
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    with atomic_directory(Path(path), replaced=WEIGHT_FILES) as staging:
        write_config(model.config, staging, storage, dtype)
        if tokenizer is not None:
            save_tokenizer(tokenizer, staging)
        write_tensors(weights, items, staging, max_shard_size)


def write_config(config: ModelConfig, directory: Path, storage: Storage | None, dtype: str = "float32") -> None:
    """Write config.json, and generation_config.json with the ids of the control tokens.

    `dtype` is the weights' type where `storage` is None, which keeps it.
    """
    raw = config.to_dict(dtype if storage is None else "float32" if storage == "f32" else "bfloat16")
    if storage == "fp8":
        raw["quantization_config"] = _FP8_QUANTIZATION_CONFIG
    write_json(directory / "config.json", raw)
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": raw["eos_token_id"]}
    ids["pad_token_id"] = config.pad_token_id
    write_json(directory / "generation_config.json", {k: v for k, v in ids.items() if v is not None})
