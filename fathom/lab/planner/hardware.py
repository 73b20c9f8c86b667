"""Accelerators by their data sheets, and clusters of them."""

from dataclasses import dataclass

from fathom.config import ConfigError


@dataclass(frozen=True)
class Gpu:
    """One accelerator by its data sheet, dense (no structured sparsity)."""

    bf16: float
    """FLOP/s of bfloat16 matmuls."""
    fp8: float | None
    """FLOP/s of FP8 matmuls; None without FP8."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Memory bandwidth, bytes per second."""
    link: float
    """Bytes per second to other GPUs of the node, in one direction: NVLink, or PCIe where there is none."""
    network: float
    """Bytes per second to other nodes, in one direction, as such nodes are commonly built."""
    multiprocessors: int
    """SMs, which compute and communication kernels share."""


GPUS = {
    "h800": Gpu(989e12, 1979e12, 80e9, 3.35e12, 200e9, 50e9, 132),  # NVLink cut to 400 GB/s both ways; 400 Gb/s a GPU
    "h100": Gpu(989e12, 1979e12, 80e9, 3.35e12, 450e9, 50e9, 132),
    "h200": Gpu(989e12, 1979e12, 141e9, 4.8e12, 450e9, 50e9, 132),
    "b200": Gpu(2250e12, 4500e12, 180e9, 8e12, 900e9, 50e9, 148),
    "a100": Gpu(312e12, None, 80e9, 2.039e12, 300e9, 25e9, 108),
    "l40s": Gpu(362e12, 733e12, 48e9, 0.864e12, 32e9, 25e9, 142),  # PCIe 4.0 x16
}
"""By their names on the command line: SXM modules but for the L40S."""


@dataclass(frozen=True)
class Cluster:
    """Identical nodes of identical GPUs."""

    gpu: Gpu
    gpus: int
    per_node: int

    def __post_init__(self) -> None:
        check(self.gpus >= 1, "gpus", self.gpus, "1 or more")
        check(self.per_node >= 1, "gpus_per_node", self.per_node, "1 or more")
        whole = self.gpus <= self.per_node or self.gpus % self.per_node == 0
        check(whole, "gpus", self.gpus, f"at most one node, or a multiple of gpus_per_node ({self.per_node})")


def check(right: bool, name: str, value: object, expected: str) -> None:
    """Raise ConfigError naming the field, its value and what would be right."""
    if not right:
        raise ConfigError(f"{name} is {value!r}; it must be {expected}")
