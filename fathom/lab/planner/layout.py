"""How a training step is spread over GPUs: data, pipeline, tensor and expert parallelism, ZeRO, micro-batches."""

from dataclasses import dataclass
from typing import Literal

from fathom.lab.planner.hardware import Cluster, check
from fathom.model.config import ModelConfig

Schedule = Literal["1f1b", "interleaved", "zb1p", "dualpipe"]
Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Layout:
    """The parallelism; the remaining dimension of the GPUs is data parallel."""

    pipeline: int = 1
    """Pipeline stages."""
    tensor: int = 1
    """GPUs that every layer's matrices are sharded over."""
    expert: int = 1
    """GPUs that the routed experts of a layer are sharded over, out of the data and tensor parallel ones."""
    schedule: Schedule = "1f1b"
    """Order of the pipeline's chunks; zb1p and dualpipe postpone weight gradients to fill the bubble."""
    chunks: int = 1
    """Virtual stages per GPU under the interleaved schedule."""
    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO: what data parallel ranks shard. 1: moments and master weights; 2: gradients too; 3: weights too."""
    micro_batch: int = 1
    """Sequences that pass through the pipeline together."""
    global_batch: int = 1024
    """Sequences of one optimizer step, over all ranks."""
    length: int = 4096
    """Tokens of a sequence."""
    recompute: Recompute = "selective"
    """What the backward pass recomputes. selective: norms, MLA's up-projections, SwiGLU (the report). full: layers."""
    precision: Literal["bf16", "fp8"] = "bf16"
    """Of the layers' matmuls; attention, router, embedding and head are bfloat16 or float32 either way."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Type of AdamW's two moments (the report: bf16); master weights and gradients are float32."""

    def __post_init__(self) -> None:
        for name in ("pipeline", "tensor", "expert", "chunks", "micro_batch", "global_batch", "length"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        if self.schedule == "interleaved":
            check(self.chunks > 1, "chunks", self.chunks, "2 or more under the interleaved schedule")
        else:
            check(self.chunks == 1, "chunks", self.chunks, "1 unless the schedule is interleaved")
        if self.schedule == "dualpipe":
            check(self.pipeline % 2 == 0, "pipeline", self.pipeline, "even under the dualpipe schedule")

    def data(self, cluster: Cluster) -> int:
        """Data parallel replicas of the pipeline."""
        return cluster.gpus // (self.pipeline * self.tensor)

    def micro_batches(self, cluster: Cluster) -> int:
        """Micro-batches of each pipeline in a step."""
        return self.global_batch // (self.data(cluster) * self.micro_batch)

    def check(self, config: ModelConfig, cluster: Cluster) -> None:
        """Raise ConfigError for a layout that is impossible with this model and cluster."""
        ways = self.pipeline * self.tensor
        check(cluster.gpus % ways == 0, "gpus", cluster.gpus, f"a multiple of pipeline x tensor ({ways})")
        check(
            cluster.per_node % self.tensor == 0,
            "tensor",
            self.tensor,
            f"a divisor of gpus_per_node ({cluster.per_node})",
        )
        heads = config.num_attention_heads
        check(heads % self.tensor == 0, "tensor", self.tensor, f"a divisor of num_attention_heads ({heads})")
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        most = layers // self.chunks
        check(
            self.pipeline <= most,
            "pipeline",
            self.pipeline,
            f"at most {most}: {layers} layers, {self.chunks} or more in a stage",
        )
        ranks, experts = self.data(cluster) * self.tensor, config.n_routed_experts
        check(ranks % self.expert == 0, "expert", self.expert, f"a divisor of data x tensor ({ranks})")
        check(experts % self.expert == 0, "expert", self.expert, f"a divisor of n_routed_experts ({experts})")
        share = self.data(cluster) * self.micro_batch
        check(
            self.global_batch % share == 0,
            "global_batch",
            self.global_batch,
            f"a multiple of data x micro_batch ({share})",
        )
        count = self.micro_batches(cluster)
        if self.schedule == "dualpipe":
            least = 2 * self.pipeline
            right = count >= least and count % 2 == 0
            check(
                right,
                "global_batch",
                self.global_batch,
                f"{least} or more micro-batches a pipeline, an even number; it gives {count}",
            )
        elif self.schedule == "interleaved":
            check(
                count % self.pipeline == 0,
                "global_batch",
                self.global_batch,
                f"a multiple of {share * self.pipeline} under the interleaved schedule",
            )
        if self.precision == "fp8":
            check(cluster.gpu.fp8 is not None, "precision", "fp8", "bf16: this GPU has no FP8 matmuls")
