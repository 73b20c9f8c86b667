"""What the planner says autograd keeps, against what autograd keeps; and the peak and time made from such counts."""

from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from fathom import presets
from fathom.data.batch import next_token_batch
from fathom.lab.planner.local.peak import expert_heights, peak
from fathom.lab.planner.local.rates import Machine, Overhead
from fathom.lab.planner.local.report import shape_of
from fathom.lab.planner.local.saved import Shape, saved_bytes, stages
from fathom.lab.planner.local.step import muon_batches, step_time
from fathom.model.config import ModelConfig
from fathom.model.transformer import Model
from fathom.ops import cpu
from fathom.ops.moe.experts import _padded as padded_loads
from fathom.train.loss import PretrainLoss
from fathom.train.optim import build_optimizers
from fathom.train.run import Run
from tests.model.configs import tiny

SMALL = tiny(vocab_size=512, hidden_size=64, moe_intermediate_size=32, num_nextn_predict_layers=1)
kernels = pytest.mark.skipif(cpu.missing() is not None, reason="the counts follow the CPU's kernels")


def counted(config: ModelConfig, shape: Shape) -> int:
    """Bytes of every storage that a forward pass saves, each once, without the model's own."""
    model = Model(config).train()
    dtype = torch.bfloat16 if shape.itemsize == 2 else torch.float32
    pretrain_loss = PretrainLoss(model, 1e-4, dtype, shape.recompute)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    width = shape.length + 1 + config.num_nextn_predict_layers
    tokens_BW = torch.randint(config.vocab_size, (shape.batch, width))
    batch = next_token_batch(tokens_BW, config.num_nextn_predict_layers)
    held: dict[int, Tensor] = {}  # keeps storages alive, so that no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            held.setdefault(address, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pretrain_loss(batch, batch.target_weights(), 0.3, 1.0)
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


@kernels
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None},
        {"num_nextn_predict_layers": 0},
        {"num_nextn_predict_layers": 2},
        {"first_k_dense_replace": 3},
        {"norm_topk_prob": False},
        {"n_shared_experts": 2, "n_routed_experts": 32},
    ],
)
@pytest.mark.parametrize(("batch", "length"), [(3, 96), (1, 300)])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("recompute", [False, True])
def test_saved_bytes_are_those_autograd_saves(
    changes: dict[str, Any], batch: int, length: int, itemsize: int, recompute: bool
) -> None:
    config = replace(SMALL, max_position_embeddings=2048, **changes)
    shape = Shape(config, batch, length, itemsize, recompute)
    assert saved_bytes(shape) == pytest.approx(counted(config, shape), rel=0.01)


@kernels
def test_long_sequences_keep_no_probabilities() -> None:
    config = replace(SMALL, max_position_embeddings=2048)
    shape = Shape(config, 1, 1100, 2)
    assert saved_bytes(shape) == pytest.approx(counted(config, shape), rel=0.01)


def test_gradients_are_made_for_every_parameter() -> None:
    for config in (SMALL, replace(SMALL, tie_word_embeddings=True), replace(SMALL, q_lora_rank=None)):
        model = Model(config)
        walk = stages(Shape(config, 2, 16, 2))
        assert sum(stage.weights for stage in walk) == sum(p.numel() for p in model.parameters())


def test_heights_are_those_the_experts_pad_to() -> None:
    shape = Shape(presets.nano().model, 8, 512, 2)  # a mean load of 1024
    loads = torch.arange(1, 4096 + 1)
    assert expert_heights(shape) == set(padded_loads(loads).tolist())


def test_the_peak_holds_weights_moments_and_what_is_kept() -> None:
    run = presets.nano()
    run = replace(run, train=replace(run.train, compute_dtype="float32"))
    adamw = replace(run, optimizer=replace(run.optimizer, name="adamw"))
    parameters = sum(p.numel() for p in Model(run.model).parameters())
    found = peak(adamw, shape_of(adamw))
    assert (found.weights, found.moments) == (4 * parameters, 8 * parameters)
    assert peak(run, shape_of(run)).moments == 4 * parameters
    assert found.total == sum(vars(found).values())
    assert 0.95 * saved_bytes(shape_of(run)) < found.kept <= saved_bytes(shape_of(run))


def test_accumulating_adds_the_gradients() -> None:
    run = presets.nano()
    run = replace(run, train=replace(run.train, compute_dtype="float32", batch_size=16))
    parameters = sum(p.numel() for p in Model(run.model).parameters())
    assert peak(run, shape_of(run)).gradients == 4 * parameters


@dataclass
class Paper(Machine):
    """A machine of one FLOP a second that does nothing else in any time at all."""

    dtype: torch.dtype = torch.bfloat16
    threads: int = 1
    bandwidth: float = float("inf")
    norm = activation = copy = cross_entropy = 0.0  # type: ignore[assignment]

    def overhead(self, kind: str) -> Overhead:
        return Overhead(0.0, 0.0, 0.0, 0.0)

    def product(self, rows: int, inner: int, columns: int, **kind: bool) -> float:
        return 2.0 * rows * inner * columns

    def attention(self, length: int, nope: int, rope: int, value: int) -> float:
        return 3.0 * length * length * (nope + rope + value)

    def orthogonalized(self, count: int, short: int, long: int) -> float:
        return 5 * 2.0 * count * short * short * (2 * long + short)


def paper(run: Run) -> Any:
    return step_time(run, shape_of(run), Paper())


def test_products_are_the_models_flops() -> None:
    model = replace(presets.nano().model, n_routed_experts=128)  # so many that no rows are padded
    train = replace(
        presets.nano().train, batch_size=1, micro_batch_size=1, sequence_length=256, compute_dtype="bfloat16"
    )
    run = Run(model=model, train=train)
    time = paper(run)
    counts = model.parameter_counts()
    weights = counts.active_matrices + counts.active_mtp_matrices
    assert time.projections + time.experts + time.head == 256 * 6 * weights
    layers = model.num_hidden_layers + 1
    widths = model.num_attention_heads * (model.qk_head_dim + model.v_head_dim)
    assert time.attention == 256 * 6 * layers * widths * 256 / 2  # half of the keys are in the future
    assert time.total == sum(vars(time).values())


def test_a_step_is_its_micro_batches_and_one_update() -> None:
    run = presets.nano()
    once = replace(run, train=replace(run.train, compute_dtype="bfloat16"))
    twice = replace(once, train=replace(once.train, batch_size=2 * once.train.batch_size))
    assert paper(twice).projections == 2 * paper(once).projections
    assert paper(twice).optimizer == paper(once).optimizer > 0  # Muon's products
    adamw = replace(once, optimizer=replace(once.optimizer, name="adamw"))
    assert paper(adamw).optimizer == 0


def test_muon_takes_matrices_of_one_shape_together() -> None:
    """The batches are those in which the optimizer calls for them."""
    run = presets.nano()
    config = replace(run.model, hidden_size=512, moe_intermediate_size=512)  # large enough for several batches
    model, seen = Model(config), list[tuple[int, ...]]()
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    _, muon = build_optimizers(model, run.optimizer)
    with patch("fathom.train.optim.orthogonalize", lambda x: (seen.append(tuple(x.shape)), x)[1]):
        muon.step()
    planned = muon_batches(shape_of(replace(run, model=config)))
    assert sum(map(len, planned.values())) > len(planned)
    for sides, counts in planned.items():
        found = [count for count, *shape in seen if tuple(shape) == sides]
        assert sum(found) == sum(counts)
        assert abs(max(found) - max(counts)) < config.n_routed_experts * 2  # a stack of experts is never divided


def test_rates_are_kept_to_be_printed() -> None:
    machine = Machine(torch.float32)
    seconds, muons = machine.product(64, 32, 16), machine.orthogonalized(2, 8, 16)
    assert seconds == machine.product(64, 32, 16) > 0
    assert muons == machine.orthogonalized(2, 8, 16) > 0
    assert machine.products == {
        "64 x 32 x 16": pytest.approx(2 * 64 * 32 * 16 / seconds),
        "2 of 8 x 16, orthogonalised": pytest.approx(5 * 2 * 2 * 8 * 8 * (2 * 16 + 8) / muons),
    }


def test_the_optimizers_matrices_may_be_what_is_most() -> None:
    """Muon's directions and iterates beside all gradients."""
    run = presets.nano()
    run = replace(
        run, train=replace(run.train, compute_dtype="bfloat16", batch_size=2, micro_batch_size=2, sequence_length=256)
    )
    adamw = replace(run, optimizer=replace(run.optimizer, name="adamw"))
    muon, other = peak(run, shape_of(run)), peak(adamw, shape_of(adamw))
    assert (muon.gradients, muon.kept) == (muon.weights, 0) and muon.passing > 0
    assert muon.prepared > other.prepared and muon.passing > other.passing
