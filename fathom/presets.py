"""Complete runs, from a laptop to the 671B model: functions that return a `Run`, whose `.model` is the architecture.

Variants are made with `dataclasses.replace`, or with flags: `fathom train nano --optimizer.learning-rate 1e-3`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from fathom.data.corpus import DataConfig
from fathom.model.config import ModelConfig
from fathom.model.rope_scaling import YarnScaling
from fathom.train.run import OptimizerConfig, Run, ScheduleConfig, TrainConfig

_small_model = partial(ModelConfig, first_k_dense_replace=1, routed_scaling_factor=1.0, initializer_range=0.02)
"""What the presets below 2B parameters have in common; the rest of each is spelled out, or as in the 671B model."""


def nano() -> Run:
    """5M parameters, 3M active: minutes on a laptop's CPU. The demo's model; How it was found: docs/log/demo.md."""
    return Run(
        model=_small_model(
            vocab_size=4096,
            hidden_size=192,
            intermediate_size=512,
            moe_intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            q_lora_rank=None,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_group=1,
            topk_group=1,
            max_position_embeddings=1024,
        ),
        train=TrainConfig(steps=600, batch_size=8, micro_batch_size=8, sequence_length=512),
        optimizer=OptimizerConfig(name="muon", learning_rate=0.02),
        schedule=ScheduleConfig(warmup_steps=10, decay_fraction=0.6, bias_update_speed=0.01),
    )


def bench_small() -> Run:
    """80M parameters, 22M active, expert groups as in the large ones: the shape benchmarks/train.py measures."""
    return Run(
        model=_small_model(
            vocab_size=8192,
            hidden_size=384,
            intermediate_size=1024,
            moe_intermediate_size=256,
            num_hidden_layers=8,
            num_attention_heads=6,
            q_lora_rank=192,
            kv_lora_rank=128,
            qk_nope_head_dim=64,
            qk_rope_head_dim=32,
            v_head_dim=64,
            n_routed_experts=32,
            num_experts_per_tok=4,
            n_group=4,
            topk_group=2,
            max_position_embeddings=4096,
        ),
        train=TrainConfig(steps=1000, batch_size=8, micro_batch_size=8, sequence_length=512),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        schedule=ScheduleConfig(warmup_steps=100, bias_update_speed=0.003),
    )


def small() -> Run:
    """The shape of bench-small with a recipe to train it: hours on a CPU, minutes on a GPU."""
    return replace(
        bench_small(),
        train=TrainConfig(steps=4000, batch_size=16, micro_batch_size=8, sequence_length=512),
        optimizer=OptimizerConfig(name="muon", learning_rate=2e-3),
    )


def bench_medium() -> Run:
    """1.7B parameters, 0.26B active: the shape benchmarks/decode.py measures, too large for any CPU's cache."""
    return Run(
        model=_small_model(
            vocab_size=32768,
            hidden_size=1024,
            intermediate_size=2816,
            moe_intermediate_size=512,
            num_hidden_layers=16,
            num_attention_heads=16,
            q_lora_rank=512,
            kv_lora_rank=256,
            qk_nope_head_dim=64,
            qk_rope_head_dim=32,
            v_head_dim=64,
            n_routed_experts=64,
            num_experts_per_tok=6,
            n_group=8,
            topk_group=4,
            max_position_embeddings=32768,
        ),
        train=TrainConfig(steps=20_000, batch_size=64, micro_batch_size=4, sequence_length=1024),
        optimizer=OptimizerConfig(name="muon", learning_rate=2e-3),
    )


def moe_16b_a3b() -> Run:
    """16B parameters, 2.8B active: the shape of DeepSeek-V2-Lite and Moonlight, the report's small ablation model."""
    return Run(
        model=ModelConfig(
            vocab_size=129280,
            hidden_size=2048,
            intermediate_size=11264,
            moe_intermediate_size=1408,
            num_hidden_layers=27,
            first_k_dense_replace=1,
            num_attention_heads=16,
            q_lora_rank=None,
            kv_lora_rank=512,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=2.446,
        ),
        data=DataConfig(corpus="hf:HuggingFaceFW/fineweb-edu", fim_rate=0.1),
        train=TrainConfig(steps=160_000, batch_size=2048, micro_batch_size=1, sequence_length=4096, save_every=1000),
        optimizer=OptimizerConfig(learning_rate=4.2e-4),
        schedule=ScheduleConfig(lr_schedule="report", warmup_steps=2000),
    )


def deepseek_v3_671b() -> Run:
    """DeepSeek-V3 itself, with the report's pre-training recipe: 14.8T tokens."""
    yarn = YarnScaling(factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)
    return Run(
        model=replace(ModelConfig(), max_position_embeddings=163840, rope_scaling=yarn),
        data=DataConfig(corpus="hf:HuggingFaceFW/fineweb", fim_rate=0.1),
        train=TrainConfig(
            steps=242_500,
            batch_size=15360,
            micro_batch_size=1,
            sequence_length=4096,
            batch_ramp_start=3072,
            batch_ramp_steps=12_500,
            save_every=500,
        ),
        optimizer=OptimizerConfig(ema_decay=0.999),
        schedule=ScheduleConfig(lr_schedule="report", warmup_steps=2000),
    )


ALL: dict[str, Callable[[], Run]] = {
    "nano": nano,
    "small": small,
    "bench-small": bench_small,
    "bench-medium": bench_medium,
    "16b-a3b": moe_16b_a3b,
    "deepseek-v3-671b": deepseek_v3_671b,
}
"""The presets by their names on the command line."""
