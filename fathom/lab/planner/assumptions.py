"""Everything that the plan of a cluster assumes beyond arithmetic: each has a name and a flag and is printed.

"The trace" is DeepSeek's public profile of one forward and one backward chunk of DeepSeek-V3 (github.com/deepseek-ai/
profile-data, train.json): four MoE layers, 4096 tokens, EP64, on an H800 of whose 132 multiprocessors 112 compute.
docs/planning.md shows how each share follows from it.
"""

from dataclasses import dataclass, fields

from fathom.lab.planner.hardware import check


@dataclass(frozen=True)
class Assumptions:
    """Fractions of data sheet figures, and properties of a framework."""

    gemm_fp8: float = 0.47
    """Share of the FP8 peak that matmuls reach. The trace: 59.1 TFLOP in 74.5 ms on 112 of 132 multiprocessors. (Later
    kernels are faster: DeepGEMM's tables of 2025 show 0.50 to 0.69 at these shapes.)"""
    gemm_bf16: float = 0.75
    """Share of the bfloat16 peak that large matmuls reach: that of cuBLAS on Hopper before throttling."""
    attention_forward: float = 0.66
    """Share of the bfloat16 peak of causal attention, forward. The trace: 2.75 TFLOP in 4.95 ms."""
    attention_backward: float = 0.50
    """The same for backward, including the recomputed scores. The trace: 7.15 TFLOP in 17.0 ms."""
    memory: float = 0.55
    """Share of memory bandwidth that everything between the matmuls reaches: norms, casts to FP8, SwiGLU,
    permutations. The trace: 32.5 ms for 3.6 MB (as work.py counts them) per token and layer."""
    communication_multiprocessors: int = 20
    """Not available for computing while experts are spread over several nodes (report, section 3.2.2)."""
    network: float = 0.88
    """Share of the network's bandwidth. DeepEP on H800: 50 to 51 GB/s at EP64, of which 7/8 leave the node."""
    link: float = 0.78
    """Share of NVLink's bandwidth. DeepEP on H800: 153 to 158 of 200 GB/s; the report assumes 160."""
    overlap: float = 1.0
    """Share of the experts' all-to-all that DualPipe overlaps with its pairs of chunks, as long as computing takes
    longer (the report: fully hidden)."""
    overlap_alone: float = 0.0
    """The same where a chunk runs alone: under the other schedules, and while DualPipe fills and drains."""
    gradient_overlap: float = 0.0
    """Share of the exchange of gradients and weights that overlaps with the backward pass."""
    imbalance: float = 1.04
    """Rows of the busiest rank's experts over the mean. Loss-Free Balancing (arXiv 2408.15664) reports a global MaxVio
    of 0.04; single micro-batches are less even, ranks with several experts more."""
    lost: float = 0.0
    """Share of wall-clock time outside of steps: restarts, evaluation, checkpoints (the report mentions none)."""
    reserved: float = 4e9
    """Bytes on each GPU for CUDA's context, communication buffers and fragmentation."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("communication_multiprocessors", "reserved"):
                check(value >= 0, field.name, value, "0 or more")
            elif field.name == "imbalance":
                check(value >= 1, field.name, value, "1 or more")
            elif field.name in ("overlap", "overlap_alone", "gradient_overlap"):
                check(0 <= value <= 1, field.name, value, "a share from 0 to 1")
            elif field.name == "lost":
                check(0 <= value < 1, field.name, value, "a share from 0 to below 1")
            else:
                check(0 < value <= 1, field.name, value, "a share above 0 and at most 1")
