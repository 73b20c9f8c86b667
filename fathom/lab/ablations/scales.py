"""The sizes of an ablation: the shape of its models, how much text they are trained on, and how many seeds.

`minutes` runs every ablation in under twenty minutes on two cores: 144 runs took 23 minutes of processor time on an AMD
EPYC (Zen 5), measurements included. `hours` has models of twice the parameters trained on three times the tokens, a run
taking about four times as long: its 110 runs trained for 62 minutes there. `gpu` is about the shape of the bench-small
preset, for one accelerator, and needs more text than the standard library (--corpus); it has not been run yet.
"""

from dataclasses import dataclass, replace
from typing import Literal

from fathom.data.corpus import DataConfig
from fathom.lab.ablations.variants import Variant
from fathom.model.config import ModelConfig
from fathom.train.run import OptimizerConfig, Run, ScheduleConfig, TrainConfig


@dataclass(frozen=True)
class Scale:
    """Sizes that all ablations share."""

    name: str
    hidden: int
    layers: int
    """The first is dense."""
    heads: int
    head_width: int
    rope_width: int
    latent: int
    query_rank: int
    experts: int
    """Fine-grained experts, the shared one among them."""
    experts_per_token: int
    """Experts per token, the shared one among them."""
    expert_width: int
    vocabulary: int
    length: int
    batch: int
    micro_batch: int
    steps: int
    seeds: int
    held_out_rows: int
    learning_rate: float
    """Of all variants, but for ablation 6."""
    learning_rates: tuple[float, ...]
    """Those that both sides of ablation 6 are tuned over."""
    compute_dtype: Literal["float32", "bfloat16"]
    compile: bool


MINUTES = Scale(
    name="minutes",
    hidden=64,
    layers=3,
    heads=8,
    head_width=16,
    rope_width=8,
    latent=32,
    query_rank=32,
    experts=32,
    experts_per_token=8,
    expert_width=24,
    vocabulary=1024,
    length=128,
    batch=8,
    micro_batch=8,
    steps=120,
    seeds=4,
    held_out_rows=384,
    learning_rate=0.02,
    learning_rates=(0.005, 0.01, 0.02, 0.04),
    compute_dtype="float32",
    compile=False,
)

HOURS = replace(
    MINUTES,
    name="hours",
    hidden=96,
    layers=4,
    latent=48,
    query_rank=48,
    expert_width=32,
    batch=16,
    micro_batch=16,
    steps=192,
    seeds=3,
    held_out_rows=512,
)

GPU = replace(
    HOURS,
    name="gpu",
    hidden=384,
    layers=8,
    head_width=64,
    rope_width=32,
    latent=128,
    query_rank=192,
    expert_width=128,
    vocabulary=8192,
    length=512,
    batch=64,
    micro_batch=64,
    steps=3000,
    seeds=3,
    held_out_rows=1024,
    learning_rate=0.01,
    learning_rates=(0.0025, 0.005, 0.01, 0.02),
    compute_dtype="bfloat16",
    compile=True,
)

ALL = {scale.name: scale for scale in (MINUTES, HOURS, GPU)}


def base(scale: Scale, data: DataConfig) -> Variant:
    """The recipe that ablations vary: MLA, fine-grained experts with one shared, biases, Muon; no MTP module."""
    model = ModelConfig(
        vocab_size=scale.vocabulary,
        hidden_size=scale.hidden,
        intermediate_size=scale.experts_per_token * scale.expert_width,
        moe_intermediate_size=scale.expert_width,
        num_hidden_layers=scale.layers,
        first_k_dense_replace=1,
        num_attention_heads=scale.heads,
        q_lora_rank=None,
        kv_lora_rank=scale.latent,
        qk_nope_head_dim=scale.head_width,
        qk_rope_head_dim=scale.rope_width,
        v_head_dim=scale.head_width,
        n_routed_experts=scale.experts - 1,
        n_shared_experts=1,
        num_experts_per_tok=scale.experts_per_token - 1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        num_nextn_predict_layers=0,
        max_position_embeddings=16384,
        initializer_range=0.02,
    )
    train = TrainConfig(
        steps=scale.steps,
        batch_size=scale.batch,
        micro_batch_size=scale.micro_batch,
        sequence_length=scale.length,
        compute_dtype=scale.compute_dtype,
        compile="on" if scale.compile else "off",
        eval_sequences=scale.held_out_rows,
    )
    optimizer = OptimizerConfig(name="muon", learning_rate=scale.learning_rate)
    schedule = ScheduleConfig(warmup_steps=max(5, scale.steps // 50), decay_fraction=0.6, bias_update_speed=0.01)
    return Variant(Run(model, data, train, optimizer, schedule))
