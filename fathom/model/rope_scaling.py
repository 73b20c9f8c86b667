"""YaRN's settings, and the two spellings that config.json has for the rotary settings as a whole.

`transformers` 4 and the released checkpoints write `rope_theta` and `rope_scaling`, `transformers` 5 writes
`rope_parameters`. Both are read, and both are written.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fathom.config import check, from_json


@dataclass(frozen=True)
class YarnScaling:
    """YaRN context extension, the released models' `rope_scaling` (arXiv 2309.00071; DeepSeek-V3 report, 4.3)."""

    factor: float
    """How many times longer the context becomes (the released models: 40)."""
    original_max_position_embeddings: int
    """Context length before the extension (the released models: 4096)."""
    beta_fast: float = 32.0
    """Dimensions that turn more often than this within the original length keep their frequency."""
    beta_slow: float = 1.0
    """Dimensions that turn less often than this within the original length are slowed by `factor`."""
    mscale: float = 0.0
    """Temperature of cos and sin; 0 means not given."""
    mscale_all_dim: float = 0.0
    """Temperature of the attention scale; 0 means not given."""

    def __post_init__(self) -> None:
        check(self.factor > 0, "rope_scaling.factor", self.factor, "a positive number")
        length = self.original_max_position_embeddings
        check(length > 0, "rope_scaling.original_max_position_embeddings", length, "a positive integer")
        check(
            self.beta_fast >= self.beta_slow > 0,  # equal in Kimi-K2
            "rope_scaling.beta_fast, beta_slow",
            (self.beta_fast, self.beta_slow),
            "two positive numbers, beta_fast the larger (or both equal)",
        )


def read_rope_scaling(raw: dict[str, Any]) -> YarnScaling | None:
    """Take both spellings of the rotary settings out of `raw`; leaves `rope_theta` behind as a plain key."""
    spellings: dict[str, YarnScaling | None] = {}
    for name in ("rope_parameters", "rope_scaling"):
        given = raw.pop(name, None)
        check(given is None or isinstance(given, dict), name, given, "null or an object")
        if not given:
            continue
        rope = dict(given)
        if (theta := rope.pop("rope_theta", None)) is not None:
            plain = raw.setdefault("rope_theta", theta)
            check(plain == theta, "rope_theta", plain, f"the same as {name}.rope_theta ({theta!r})")
        spellings[name] = _read_yarn(rope)
    found = list(spellings.values())
    # Programs differ in which of the two they use.
    check(len(set(found)) < 2, "rope_scaling", found[-1:], f"the same as rope_parameters ({found[:1]})")
    return found[0] if found else None


def _read_yarn(rope: dict[str, Any]) -> YarnScaling | None:
    """The content of rope_scaling or rope_parameters; None when its type is default."""
    kinds = {str(rope.pop(key)) for key in ("type", "rope_type") if rope.get(key) is not None} or {"default"}
    check(kinds in ({"yarn"}, {"default"}), "rope_scaling.type", sorted(kinds), "'yarn' or 'default'")
    for key, only in (("truncate", True), ("partial_rotary_factor", 1.0), ("attention_factor", None)):
        value = rope.pop(key, None)
        check(value in (only, None), f"rope_scaling.{key}", value, f"{only!r}: nothing else is implemented")
    rope = {key: value for key, value in rope.items() if value is not None}
    if kinds == {"default"}:
        check(not rope, "rope_parameters", rope, "only rope_type and rope_theta when the type is default")
        return None
    return from_json(YarnScaling, rope, where="rope_scaling")


def write_rope_scaling(yarn: YarnScaling | None, theta: float) -> dict[str, Any]:
    """config.json's rotary settings but for `rope_theta`, in both spellings."""
    if yarn is None:
        return {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    # 0 is this dataclass's «not given»; other programs expect the key to be absent.
    given = {k: v for k, v in dataclasses.asdict(yarn).items() if v or not k.startswith("mscale")}
    return {
        "rope_scaling": {"type": "yarn", **given},
        "rope_parameters": {"rope_type": "yarn", "rope_theta": theta, **given},
    }
