"""A model's tensors under the released names, read a few rows at a time, from memory or from a directory.

Everything that writes a model (hf/model.py, gguf/, convert.py) and everything that loads one reads it through here, so
whatever can be loaded can be converted, without ever being in memory as a whole.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fathom.checkpoint.hf.directory import load_config, stored_tensors
from fathom.checkpoint.hf.name_mapping import (
    SCALE_SUFFIX,
    ParameterSlice,
    is_derived,
    layer_of,
    locate,
    parameters_and_buffers,
    released_tensors,
)
from fathom.checkpoint.hf.safetensors_io import DTYPES, CheckpointError, StoredTensor
from fathom.model.config import ModelConfig
from fathom.model.transformer import Model
from fathom.quantization import fp8

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_FP8 = "F8_E4M3"


class TensorSpec(NamedTuple):
    """One tensor under its released name."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """The type in which its values are read."""


class Weights(Protocol):
    """A model's weights, each tensor read on demand."""

    config: ModelConfig

    def specs(self) -> list[TensorSpec]:
        """Every released tensor, in the order in which reading is fastest."""
        ...

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows `first` to `last` (not included) of a tensor, (rows, columns); a vector has one column."""
        ...


def read_tensor(weights: Weights, name: str, shape: tuple[int, ...]) -> Tensor:
    """The whole tensor, of the shape that its spec says."""
    return weights.rows(name, 0, shape[0]).view(shape)


class ModelWeights:
    """The weights of a model in memory; raises CheckpointError for a model with quantised weights."""

    def __init__(self, model: Model) -> None:
        self.config = model.config
        if not all(tensor.is_floating_point() for tensor in parameters_and_buffers(model).values()):
            raise CheckpointError(
                "the model's weights are quantised (int8, int4, or kept in FP8), which is for inference; save the "
                "model that it was made from"
            )
        self._tensors = {name: tensor.detach() for name, tensor in released_tensors(model, model.config)}

    def specs(self) -> list[TensorSpec]:
        return [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()]

    def rows(self, name: str, first: int, last: int) -> Tensor:
        part = self._tensors[name][first:last].cpu()
        return part if part.dim() == 2 else part[:, None]


class _Source(NamedTuple):
    """The stored tensor that holds a released one, and the row of its first row there."""

    stored: StoredTensor
    first: int = 0

    @property
    def position(self) -> tuple[Path, int, int]:
        """The order of sources on the disk."""
        return self.stored.file, self.stored.begin, self.first


class CheckpointWeights:
    """The weights of a model directory, in whatever layout they are stored; FP8 weights are dequantised.

    The constructor raises CheckpointError unless every tensor is there exactly once and in its shape. A directory whose
    MTP weights are absent is a model without MTP modules, with a warning. MTP layers' copies of embedding and head are
    not read, only compared with their originals in the first and the last chunk.
    """

    def __init__(self, directory: Path) -> None:
        config = load_config(directory)
        self._stored = {name: stored for name, stored in stored_tensors(directory).items() if not is_derived(name)}
        check_size(config, self._stored, directory)
        self.config = _without_absent_mtp(config, self._stored, directory)
        self._model = meta_model(self.config)
        self._sources = self._find_all(directory)
        self._check_tied()
        self._check_copies()

    def specs(self) -> list[TensorSpec]:
        shapes = {name: tuple(tensor.shape) for name, tensor in released_tensors(self._model, self.config)}
        ordered = sorted(self._sources.items(), key=lambda item: item[1].position)
        return [TensorSpec(name, shapes[name], _read_dtype(source.stored)) for name, source in ordered]

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """As in `Weights`; of an FP8 tensor, `first` must be a multiple of 128."""
        stored, start = self._sources[name]
        return self._read(stored, start, first, last)

    def _read(self, stored: StoredTensor, start: int, first: int, last: int) -> Tensor:
        rows = stored.rows(start + first, start + last)
        if rows.dtype != torch.float8_e4m3fn:
            return rows
        scales = self._stored[stored.name + SCALE_SUFFIX].rows(first // fp8.BLOCK, -(-last // fp8.BLOCK))
        return fp8.dequantize(rows, scales.float())

    @property
    def has_fp8(self) -> bool:
        """Whether any tensor is stored in FP8."""
        return any(self.is_fp8(name) for name in self._sources)

    def is_fp8(self, name: str) -> bool:
        """Whether a tensor is stored in FP8."""
        return self._sources[name].stored.dtype == _FP8

    def fp8_blocks(self, name: str) -> tuple[Tensor, Tensor]:
        """An FP8 tensor as it is stored: values (R, I) in E4M3, scales (r, i) in float32."""
        stored = self._sources[name].stored
        scales = self._stored[stored.name + SCALE_SUFFIX]
        return stored.rows(0, stored.shape[0]), scales.rows(0, scales.shape[0]).float()

    # ------------------------------------------------------------------------------------------- finding

    def _find_all(self, directory: Path) -> dict[str, _Source]:
        """A source for every released name; raises CheckpointError for missing, unknown, misshapen, duplicate ones."""
        stored = self._by_slice()
        sources, missing = {}, []
        for name, _ in released_tensors(self._model, self.config):
            original = _original(name, self.config)
            source = self._find(original, stored)
            if source is None:
                missing.append(original)
            else:
                sources[name] = source
        if missing:
            missing = list(dict.fromkeys(missing))
            listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise CheckpointError(f"{directory}: no weights for {listed}")
        return sources

    def _by_slice(self) -> dict[ParameterSlice, StoredTensor]:
        """Every stored tensor by what it fills of our model."""
        parameters = parameters_and_buffers(self._model)
        found: dict[ParameterSlice, StoredTensor] = {}
        for name, stored in self._stored.items():
            target = None if name.endswith(SCALE_SUFFIX) else locate(name, self.config)
            if target is None:
                continue
            if target.parameter not in parameters:
                raise CheckpointError(
                    f"{stored.file}: tensor {name} is no part of the model that config.json describes"
                )
            expected = tuple(target.of(parameters[target.parameter]).shape)
            if stored.shape != expected:
                raise CheckpointError(
                    f"{stored.file}: tensor {name} has shape {stored.shape}, config.json implies {expected}"
                )
            self._check_type(stored)
            if target in found:
                raise _duplicate(stored)
            found[target] = stored
        for target, stored in found.items():
            if target.expert is not None and ParameterSlice(target.parameter) in found:
                raise _duplicate(stored)
        return found

    def _find(self, name: str, stored: dict[ParameterSlice, StoredTensor]) -> _Source | None:
        target = locate(name, self.config)
        assert target is not None
        if (own := stored.get(target)) is not None:
            return _Source(own)
        if target.expert is not None and (stack := stored.get(ParameterSlice(target.parameter))) is not None:
            return _Source(stack, target.expert * stack.shape[1] + target.first)
        if name == _HEAD and self.config.tie_word_embeddings:
            return self._find(_EMBEDDING, stored)
        return None

    # ------------------------------------------------------------------------------------------ checking

    def _check_type(self, stored: StoredTensor) -> None:
        """The type must be one that weights may have; FP8 needs scales, one per block."""
        name, file = stored.name, stored.file
        if stored.dtype not in DTYPES:
            raise CheckpointError(f"{file}: tensor {name} has type {stored.dtype}; weights must be {', '.join(DTYPES)}")
        if stored.dtype != _FP8:
            return
        if len(stored.shape) != 2:
            raise CheckpointError(
                f"{file}: FP8 tensor {name} has shape {stored.shape}; only matrices have blocks of 128x128"
            )
        scales = self._stored.get(name + SCALE_SUFFIX)
        if scales is None:
            raise CheckpointError(f"{file}: FP8 tensor {name} has no scales: {name}{SCALE_SUFFIX} is missing")
        rows, columns = stored.shape
        if scales.shape != fp8.scale_shape(rows, columns) or scales.dtype not in ("F32", "BF16"):
            raise CheckpointError(
                f"{scales.file}: {scales.name} is {scales.dtype} of shape {scales.shape}, a weight of {rows}x{columns} "
                f"needs F32 of shape {fp8.scale_shape(rows, columns)}"
            )

    def _check_tied(self) -> None:
        """Two different tensors for one parameter: `transformers` would untie them, others use one of the two."""
        head, embedding = self._sources[_HEAD], self._sources[_EMBEDDING]
        if not self.config.tie_word_embeddings or head == embedding:
            return
        for first, last in fp8.row_chunks(embedding.stored.shape):
            if not torch.equal(self.rows(_HEAD, first, last), self.rows(_EMBEDDING, first, last)):
                raise CheckpointError(
                    f"{head.stored.file}: tensor {_HEAD} differs from {_EMBEDDING}, but config.json ties them"
                )

    def _check_copies(self) -> None:
        """An MTP layer with an embedding or head of its own is a different model from the one that would be loaded."""
        for name, stored in self._stored.items():
            if name.endswith(SCALE_SUFFIX) or locate(name, self.config) is not None:
                continue
            original = _original(name, self.config)
            expected = self._sources[original].stored
            self._check_type(stored)
            chunks = list(fp8.row_chunks(expected.shape))
            if stored.shape != expected.shape or not all(
                torch.equal(self._read(stored, 0, *chunk).float(), self.rows(original, *chunk).float())
                for chunk in (chunks[0], chunks[-1])
            ):
                raise CheckpointError(
                    f"{stored.file}: tensor {name} differs from {original}; MTP layers must share embedding and head"
                )


def check_size(config: ModelConfig, stored: Mapping[str, StoredTensor], directory: Path) -> None:
    """Raise CheckpointError where config.json has more layers or experts than the files, before a model is built."""
    layers, modules, experts = config.num_hidden_layers, config.num_nextn_predict_layers, config.n_routed_experts
    found = {layer_of(name) for name in stored}
    missing = next((layer for layer in range(layers) if layer not in found), None)
    if missing is not None or modules > len(found):
        raise CheckpointError(
            f"{directory}: no weights for model.layers.{layers if missing is None else missing}; config.json has "
            f"num_hidden_layers {layers} and num_nextn_predict_layers {modules}"
        )
    routers = [each.shape for name, each in stored.items() if name.endswith("mlp.gate.weight")]
    rows = max((shape[0] for shape in routers if shape), default=0)
    if experts > rows and (layers > config.first_k_dense_replace or layers in found):
        raise CheckpointError(
            f"{directory}: config.json has n_routed_experts {experts}; the routers (mlp.gate.weight) have {rows} rows"
        )


def meta_model(config: ModelConfig) -> Model:
    """A model on the meta device: shapes and types, without memory for its weights."""
    try:
        with torch.device("meta"):
            return Model(config)
    except RuntimeError as error:
        raise CheckpointError(f"config.json describes a model beyond any memory: {error}") from error


def _read_dtype(stored: StoredTensor) -> torch.dtype:
    """The type in which values of the stored tensor are read."""
    dtype = DTYPES[stored.dtype]
    return torch.float32 if dtype == torch.float8_e4m3fn else dtype


def _original(name: str, config: ModelConfig) -> str:
    """The tensor that an MTP layer's copy of embedding or head is a copy of; any other name itself."""
    if locate(name, config) is not None:
        return name
    return _EMBEDDING if name.endswith("embed_tokens.weight") else _HEAD


def _duplicate(stored: StoredTensor) -> CheckpointError:
    return CheckpointError(f"{stored.file}: tensor {stored.name} is there twice, under another name or stacked as well")


def _without_absent_mtp(config: ModelConfig, names: Iterable[str], directory: Path) -> ModelConfig:
    """`transformers` drops MTP weights when it saves but keeps their number in config.json."""
    if not config.num_nextn_predict_layers:
        return config
    prefix = f"model.layers.{config.num_hidden_layers}."
    if any(name.startswith(prefix) for name in names):
        return config
    warnings.warn(
        f"{directory}: config.json has num_nextn_predict_layers {config.num_nextn_predict_layers}, but no tensor's "
        f"name begins with {prefix}; loading without MTP modules",
        stacklevel=4,
    )
    return replace(config, num_nextn_predict_layers=0)
