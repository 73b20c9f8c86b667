"""A model's tensors under the released names, a few rows at a time, from memory or from a directory alike.

Everything that writes a model (`huggingface.py`, `gguf.py`, `convert.py`) and everything that reads one goes through
here, so whatever can be loaded can be converted, without ever being in memory as a whole.
"""

import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fathom.checkpoint.hf.directory import load_config, stored_tensors
from fathom.checkpoint.hf.name_mapping import SCALE_SUFFIX, Location, locate, released_tensors
from fathom.checkpoint.hf.safetensors_io import DTYPES, CheckpointError, StoredTensor
from fathom.model.config import ModelConfig
from fathom.model.transformer import Model
from fathom.quantization import fp8

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Entry(NamedTuple):
    """One tensor under its released name."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """The type its values come in."""


class Weights(Protocol):
    """A model whose tensors are read when they are asked for."""

    config: ModelConfig

    def entries(self) -> list[Entry]:
        """Every released tensor, in the order in which reading is fastest."""
        ...

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows `first` to `last` (not included) of a tensor, (rows, columns); a vector has one column."""
        ...


def whole(weights: Weights, name: str, shape: tuple[int, ...]) -> Tensor:
    """The whole tensor."""
    return weights.rows(name, 0, shape[0]).view(shape)


class ModelWeights:
    """The tensors of a model in memory; CheckpointError for one whose matrices are packed."""

    def __init__(self, model: Model) -> None:
        self.config = model.config
        if not all(tensor.is_floating_point() for tensor in parameters_and_buffers(model).values()):
            raise CheckpointError(
                "the model's matrices are packed (int8, int4, or kept in FP8), which is for running it; save the model "
                "that it was made of"
            )
        self._tensors = {name: tensor.detach() for name, tensor in released_tensors(model, model.config)}

    def entries(self) -> list[Entry]:
        return [Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()]

    def rows(self, name: str, first: int, last: int) -> Tensor:
        part = self._tensors[name][first:last].cpu()
        return part if part.dim() == 2 else part[:, None]


class _Source(NamedTuple):
    """Where a released tensor is found: in a stored one, from some row on."""

    stored: StoredTensor
    first: int = 0

    @property
    def position(self) -> tuple[Path, int, int]:
        """The order in which sources lie on the disk."""
        return self.stored.file, self.stored.begin, self.first


class StoredWeights:
    """The tensors of a model directory, wherever and in whatever spelling they lie; FP8 blocks come dequantised.

    All of them are there, each once and in its shape, or the constructor raises CheckpointError. A directory whose MTP
    weights are absent is a model without MTP modules, with a warning. MTP layers' copies of embedding and head are
    left alone; that they are copies is checked where they begin and end.
    """

    def __init__(self, directory: Path) -> None:
        config = load_config(directory)
        self._stored = stored_tensors(directory)
        self.config = _without_absent_mtp(config, self._stored, directory)
        self._model = blank_model(self.config)
        self._sources = self._find_all(directory)
        self._check_tied()
        self._check_copies()

    def entries(self) -> list[Entry]:
        shapes = {name: tuple(tensor.shape) for name, tensor in released_tensors(self._model, self.config)}
        ordered = sorted(self._sources.items(), key=lambda item: item[1].position)
        return [Entry(name, shapes[name], _values(source.stored)) for name, source in ordered]

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """As in `Weights`; of an FP8 tensor, `first` must be a multiple of 128."""
        stored, start = self._sources[name]
        return self._values_of(stored, start, first, last)

    def _values_of(self, stored: StoredTensor, start: int, first: int, last: int) -> Tensor:
        rows = stored.rows(start + first, start + last)
        if rows.dtype != torch.float8_e4m3fn:
            return rows
        scales = self._stored[stored.name + SCALE_SUFFIX].rows(first // fp8.BLOCK, -(-last // fp8.BLOCK))
        return fp8.dequantize(rows, scales.float())

    @property
    def holds_fp8(self) -> bool:
        """Whether any tensor lies in FP8."""
        return any(self.is_fp8(name) for name in self._sources)

    def is_fp8(self, name: str) -> bool:
        """Whether a tensor lies in FP8."""
        return self._sources[name].stored.dtype == "F8_E4M3"

    def blocks(self, name: str) -> tuple[Tensor, Tensor]:
        """An FP8 tensor as it lies: numbers (R, I) in E4M3, scales (r, i) in float32."""
        stored = self._sources[name].stored
        scales = self._stored[stored.name + SCALE_SUFFIX]
        return stored.rows(0, stored.shape[0]), scales.rows(0, scales.shape[0]).float()

    # ------------------------------------------------------------------------------------------- finding

    def _find_all(self, directory: Path) -> dict[str, _Source]:
        """A source for every released name; raises CheckpointError for what is missing, unknown, misshapen, twice."""
        homes = self._homes()
        sources, missing = {}, []
        for name, _ in released_tensors(self._model, self.config):
            original = _original(name, self.config)
            source = self._find(original, homes)
            if source is None:
                missing.append(original)
            else:
                sources[name] = source
        if missing:
            missing = list(dict.fromkeys(missing))
            listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise CheckpointError(f"{directory}: no weights for {listed}")
        return sources

    def _homes(self) -> dict[tuple[str, int | None, int], StoredTensor]:
        """Every stored tensor by the place it has in our model."""
        targets = parameters_and_buffers(self._model)
        homes: dict[tuple[str, int | None, int], StoredTensor] = {}
        for name, stored in self._stored.items():
            where = None if name.endswith(SCALE_SUFFIX) else locate(name, self.config)
            if where is None:
                continue
            if where.parameter not in targets:
                raise CheckpointError(
                    f"{stored.file}: tensor {name} is no part of the model that config.json describes"
                )
            expected = tuple(where.of(targets[where.parameter]).shape)
            if stored.shape != expected:
                raise CheckpointError(
                    f"{stored.file}: tensor {name} has shape {stored.shape}, config.json asks for {expected}"
                )
            self._check_values(stored)
            if _key(where) in homes:
                raise _twice(stored)
            homes[_key(where)] = stored
        for (parameter, expert, _), stored in homes.items():
            if expert is not None and (parameter, None, 0) in homes:
                raise _twice(stored)
        return homes

    def _find(self, name: str, homes: dict[tuple[str, int | None, int], StoredTensor]) -> _Source | None:
        where = locate(name, self.config)
        assert where is not None
        if (stored := homes.get(_key(where))) is not None:
            return _Source(stored)
        if where.expert is not None and (stored := homes.get((where.parameter, None, 0))) is not None:
            return _Source(stored, where.expert * stored.shape[1] + (where.rows.start or 0))
        if name == _HEAD and self.config.tie_word_embeddings:
            return self._find(_EMBEDDING, homes)
        return None

    # ------------------------------------------------------------------------------------------ checking

    def _check_values(self, stored: StoredTensor) -> None:
        """The type must be one of weights; FP8 needs its scales, one per block."""
        name, file = stored.name, stored.file
        if stored.dtype not in DTYPES:
            raise CheckpointError(f"{file}: tensor {name} has type {stored.dtype}; weights must be {', '.join(DTYPES)}")
        if stored.dtype != "F8_E4M3":
            return
        if len(stored.shape) != 2:
            raise CheckpointError(
                f"{file}: FP8 tensor {name} has shape {stored.shape}; only matrices have blocks of 128x128"
            )
        scales = self._stored.get(name + SCALE_SUFFIX)
        if scales is None:
            raise CheckpointError(f"{file}: FP8 tensor {name} has no {name}{SCALE_SUFFIX} beside it")
        rows, columns = stored.shape
        if scales.shape != fp8.scale_shape(rows, columns) or scales.dtype not in ("F32", "BF16"):
            raise CheckpointError(
                f"{scales.file}: {scales.name} is {scales.dtype} of shape {scales.shape}, a weight of {rows}x{columns} "
                f"needs F32 of shape {fp8.scale_shape(rows, columns)}"
            )

    def _check_tied(self) -> None:
        """Two different tensors for one parameter: `transformers` would untie them, others take one of the two."""
        head, embedding = self._sources[_HEAD], self._sources[_EMBEDDING]
        if not self.config.tie_word_embeddings or head == embedding:
            return
        for first, last in fp8.row_chunks(embedding.stored.shape):
            if not torch.equal(self.rows(_HEAD, first, last), self.rows(_EMBEDDING, first, last)):
                raise CheckpointError(
                    f"{head.stored.file}: tensor {_HEAD} differs from {_EMBEDDING}, but config.json ties them"
                )

    def _check_copies(self) -> None:
        """An MTP layer's own embedding or head would be another model than the one that is loaded."""
        for name, stored in self._stored.items():
            if name.endswith(SCALE_SUFFIX) or locate(name, self.config) is not None:
                continue
            original = _original(name, self.config)
            expected = self._sources[original].stored
            self._check_values(stored)
            pieces = list(fp8.row_chunks(expected.shape))
            if stored.shape != expected.shape or not all(
                torch.equal(self._values_of(stored, 0, *piece).float(), self.rows(original, *piece).float())
                for piece in (pieces[0], pieces[-1])
            ):
                raise CheckpointError(
                    f"{stored.file}: tensor {name} differs from {original}: MTP layers share embedding and head here"
                )


def blank_model(config: ModelConfig) -> Model:
    """A model without memory for its weights."""
    with torch.device("meta"):
        return Model(config)


def parameters_and_buffers(model: Model) -> dict[str, Tensor]:
    """All tensors of our model by our names; tied ones under both."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def _values(stored: StoredTensor) -> torch.dtype:
    """The type that values of the stored tensor are read in."""
    dtype = DTYPES[stored.dtype]
    return torch.float32 if dtype == torch.float8_e4m3fn else dtype


def _original(name: str, config: ModelConfig) -> str:
    """The tensor that an MTP layer's copy of embedding or head is a copy of; any other name itself."""
    if locate(name, config) is not None:
        return name
    return _EMBEDDING if name.endswith("embed_tokens.weight") else _HEAD


def _key(where: Location) -> tuple[str, int | None, int]:
    return where.parameter, where.expert, where.rows.start or 0


def _twice(stored: StoredTensor) -> CheckpointError:
    return CheckpointError(f"{stored.file}: tensor {stored.name} is there twice, under another name or stacked as well")


def _without_absent_mtp(config: ModelConfig, names: Iterable[str], directory: Path) -> ModelConfig:
    """`transformers` drops MTP weights when it saves but keeps their number in config.json."""
    if not config.num_nextn_predict_layers:
        return config
    prefix = f"model.layers.{config.num_hidden_layers}."
    if any(name.startswith(prefix) for name in names):
        return config
    warnings.warn(
        f"{directory}: config.json promises {config.num_nextn_predict_layers} MTP module(s) but no tensor begins "
        f"with {prefix}; loading without them",
        stacklevel=4,
    )
    return replace(config, num_nextn_predict_layers=0)
