"""`fathom info`: the size and cost of a model, without loading it."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from fathom.checkpoint.digests import verify_digests
from fathom.checkpoint.info import Info, model_info

_NO_INT4 = "not possible: a matrix has a number of columns that is not a multiple of 32"


@dataclass(frozen=True)
class InfoCommand:
    """Show a model's architecture, parameters, KV cache and memory, from config.json and the files' headers alone."""

    path: tyro.conf.Positional[str]
    """A Hugging Face model directory, or a name on the hub (offline: an earlier download)."""
    verify: bool = False
    """Also compare every file of a run's checkpoint with its digest; this reads them all."""


def run(words: list[str]) -> None:
    command = tyro.cli(InfoCommand, args=words, prog="fathom info")
    rows = _rows(model_info(command.path))
    width = max(len(name) for name, _ in rows)
    print(command.path)
    for name, value in rows:
        print(f"  {name:{width}}  {value}")
    if command.verify:
        print(f"  all {verify_digests(Path(command.path))} files are as they were written")


def _rows(info: Info) -> list[tuple[str, str]]:
    counts = info.parameters
    rows = [
        *_architecture(info),
        ("parameters", f"{_count(counts.total)} ({counts.total:,})"),
        ("active per token", f"{_count(counts.active)} ({counts.active:,})"),
    ]
    cache = f"{info.cache_bytes:,} bytes per token in bf16"
    if counts.mtp:
        rows.append(("MTP modules", f"{_count(counts.mtp)} ({counts.mtp:,}) in addition"))
        cache += f"; {info.cache_bytes_mtp:,} with the MTP modules"
    rows.append(("KV cache", cache))
    for precision, size in info.memory.items():
        rows.append((f"weights in {precision}", _NO_INT4 if size is None else _size(size)))
    rows.append(("stored", _stored(info)))
    return rows


def _architecture(info: Info) -> list[tuple[str, str]]:
    config = info.config
    query = "none" if config.q_lora_rank is None else f"rank {config.q_lora_rank}"
    groups = f" in {config.topk_group} of {config.n_group} groups" if config.n_group > 1 else ""
    return [
        (
            "layers",
            f"{config.num_hidden_layers} ({config.first_k_dense_replace} dense, then {config.num_moe_layers} MoE), "
            f"width {config.hidden_size}, {config.num_nextn_predict_layers} MTP modules",
        ),
        (
            "attention",
            f"{config.num_attention_heads} heads; latent {config.kv_lora_rank} + {config.qk_rope_head_dim}, query "
            f"compression {query}",
        ),
        (
            "experts",
            f"{config.num_experts_per_tok} of {config.n_routed_experts}{groups} and {config.n_shared_experts} shared, "
            f"width {config.moe_intermediate_size}",
        ),
        ("vocabulary", f"{config.vocab_size:,}; context {config.max_position_embeddings:,}"),
    ]


def _stored(info: Info) -> str:
    if info.stored is None:
        return "no weights found"
    total = sum(info.stored.elements.values())
    types = ", ".join(f"{dtype} {count / total:.2%}" for dtype, count in info.stored.elements.items())
    files = "1 file" if info.stored.files == 1 else f"{info.stored.files} files"
    return f"{_size(info.stored.bytes)} in {files}: {types}"


def _count(number: int) -> str:
    return _scaled(number, ("B", "M", "K", ""))


def _size(bytes_: int) -> str:
    return _scaled(bytes_, (" GB", " MB", " KB", " bytes"))


def _scaled(number: int, units: tuple[str, str, str, str]) -> str:
    for unit, factor in zip(units, (10**9, 10**6, 10**3), strict=False):
        if number >= factor:
            return f"{number / factor:.2f}{unit}"
    return f"{number}{units[-1]}"
