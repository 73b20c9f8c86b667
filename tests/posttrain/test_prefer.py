"""DPO: its gradient through whole logits in float64, its reference, its data, and runs that are interrupted."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.checkpoint.hf.model import load_model
from fathom.config import ConfigError
from fathom.distributed.ranks import Ranks
from fathom.metrics import read_metrics
from fathom.model.transformer import Model
from fathom.posttrain.config import LoraConfig
from fathom.posttrain.loss import PosttrainLoss, TargetFacts
from fathom.posttrain.pack import Sample, Targets, pack
from fathom.posttrain.prefer import DpoObjective, prefer
from fathom.posttrain.prefer_data import PreferData, PreferRun, read_pairs
from fathom.posttrain.sft_config import SftLoopConfig
from fathom.train.run import OptimizerConfig
from tests.model.configs import lively_model, relative_error, tiny
from tests.posttrain.models import save_tiny, tiny_tokenizer
from tests.posttrain.runs import assert_resumes_exactly


def _pairs_file(path: Path, count: int = 12) -> Path:
    """The better answer counts upwards, the worse one does not."""
    rows = []
    for number in range(count):
        question = {"role": "user", "content": f"from {number}"}
        rows.append({"prompt": [question], "chosen": f"{number} {number + 1}", "rejected": f"{number} no"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _run(tmp_path: Path, **changes: Any) -> PreferRun:
    return PreferRun(
        str(save_tiny(tmp_path / "model")),
        train=SftLoopConfig(
            steps=4, batch_samples=4, max_length=64, micro_batch_tokens=128, compute_dtype="float32", save_every=2
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=0.0),
        data=PreferData(str(_pairs_file(tmp_path / "pairs.jsonl")), heldout=0.2),
        **changes,
    )


# --- the objective


def _random_pair(model: Model, seed: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    prompt_T = torch.randint(model.config.vocab_size, (3,), generator=generator)
    samples = []
    for length in (4, 7):
        answer_T = torch.randint(model.config.vocab_size, (length,), generator=generator)
        reference_T = torch.cat((torch.zeros(3), -3 * torch.rand(length, generator=generator)))
        weights_T = torch.cat((torch.zeros(3), torch.ones(length)))
        samples.append(Sample(torch.cat((prompt_T, answer_T)), weights_T, {"reference": reference_T.double()}))
    return samples


def test_the_gradient_is_that_of_dpos_loss_through_whole_logits() -> None:
    """−log σ(β·((log π − log π_ref)(chosen) − (log π − log π_ref)(rejected))), mean over pairs, in float64."""
    beta, pairs = 0.3, 3
    model = lively_model(tiny()).double()
    samples = [sample for seed in range(pairs) for sample in _random_pair(model, seed)]

    def rise(sample: Sample) -> Tensor:
        log_p_TO = model(sample.tokens_T[None]).logits_BSO[0].log_softmax(-1)
        picked_T = log_p_TO[:-1].gather(1, sample.tokens_T[1:, None])[:, 0]
        return ((picked_T - sample.values["reference"][1:]) * sample.weights_T[1:]).sum()

    losses = [-F.logsigmoid(beta * (rise(a) - rise(b))) for a, b in zip(samples[::2], samples[1::2], strict=True)]
    (torch.stack(losses).sum() / pairs).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    objective = DpoObjective(beta, pairs)
    loss = PosttrainLoss(model, torch.float64)
    for part in (samples[:2], samples[2:]):  # two micro-batches
        loss(pack(part, modules=0), objective, torch.ones(1), 0.0, 0.5).total.backward()
    for name, gradient in expected.items():
        assert relative_error(model.get_parameter(name).grad, gradient) < 1e-9, name
    metrics = objective.metrics(Ranks(0, 1, torch.device("cpu")))
    assert metrics["dpo_loss"] == pytest.approx(float(torch.stack(losses).mean().detach()), rel=1e-6)
    assert metrics["accuracy"] == sum(float(loss.detach()) < torch.tensor(2.0).log() for loss in losses) / pairs
    assert metrics["margin"] * beta == pytest.approx(metrics["chosen_reward"] - metrics["rejected_reward"])


def test_weights_have_both_signs_and_shrink_with_the_margin() -> None:
    def weights(rise: float) -> Tensor:
        sample_X = torch.tensor([0, 0, 1])
        targets = Targets(torch.ones(3), sample_X, {"reference": torch.zeros(3)}, samples=2)
        facts = TargetFacts(torch.tensor([rise / 2, rise / 2, 0.0]), torch.zeros(3), None)
        return DpoObjective(0.5, pairs=2)(targets, facts)

    assert weights(0.0).tolist() == [0.125, 0.125, -0.125]
    assert weights(4.0)[0] == pytest.approx(0.25 / (1 + torch.tensor(2.0).exp()))


# --- the data


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "'prompt', 'chosen'; it must have"),
        ({"prompt": "a", "messages": [], "chosen": "b", "rejected": "c"}, "it must have 'prompt'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the same tokens"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "rejected: 'completion' is empty"),
        ({"prompt": "a", "chosen": ["b"], "rejected": "c"}, "chosen: 'prompt' and 'completion' must both be texts"),
        ({"prompt": [{"role": "judge", "content": "a"}], "chosen": "b", "rejected": "c"}, "its role is 'judge'"),
        ({"prompt": [{"role": "user", "content": "a"}], "chosen": 5, "rejected": "c"}, "chosen: "),
    ],
)
def test_what_is_wrong_with_a_line_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"pairs\.jsonl:2: ") as error:
        read_pairs(path, tiny_tokenizer(), 64)
    assert message in str(error.value)


def test_answers_in_every_form_are_the_same_tokens(tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    other = {"role": "assistant", "content": "c"}
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": [user], "chosen": "b", "rejected": "c"},
        {"messages": [user], "chosen": answer, "rejected": other},
        {"prompt": [user], "chosen": [answer], "rejected": [other]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tiny_tokenizer()
    pairs = read_pairs(path, tokenizer, 64).pairs
    assert len({pair.digest for pair in pairs}) == 1
    chosen = pairs[0].chosen
    assert tokenizer.decode(chosen.tokens_T[chosen.weights_T > 0].tolist()).startswith("b")
    assert chosen.tokens_T[-1] == tokenizer.eos_id and chosen.weights_T[-1] == 1


def test_pairs_that_are_too_long_are_counted_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    long = {"prompt": "a", "chosen": "b" * 70, "rejected": "c"}
    path.write_text(json.dumps(long) + "\n" + json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    file = read_pairs(path, tiny_tokenizer(), 64)
    assert (len(file.pairs), file.too_long) == (1, 1)
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1: an answer and its prompt have 7\d tokens"):
        read_pairs(path, tiny_tokenizer(), 64, strict=True)
    with pytest.raises(ValueError, match="no pair to train on; 2 have more"):
        read_pairs(path, tiny_tokenizer(), 2)


# --- the run


def test_a_run_learns_to_prefer(tmp_path: Path, one_rank: Ranks) -> None:
    run = _run(tmp_path)
    run = replace(run, train=replace(run.train, steps=12))
    assert prefer(run, tmp_path / "out", one_rank)
    steps = [record for record in read_metrics(tmp_path / "out" / "metrics.jsonl") if "dpo_loss" in record]
    first, last = steps[0], steps[-1]
    # Before the first step the model is its reference.
    assert first["margin"] == pytest.approx(0, abs=1e-4) and first["dpo_loss"] == pytest.approx(0.6931, abs=1e-4)
    assert last["dpo_loss"] < 0.6 and last["accuracy"] == 1
    held_out = [record for record in read_metrics(tmp_path / "out" / "metrics.jsonl") if "val_accuracy" in record]
    assert held_out[-1]["val_accuracy"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(4, experts=True)], ids=["all weights", "adapters"])
def test_a_killed_run_ends_with_the_same_weights(tmp_path: Path, one_rank: Ranks, lora: LoraConfig) -> None:
    run = _run(tmp_path, lora=lora)
    assert_resumes_exactly(prefer, run, tmp_path / "out", one_rank, lost="step-000004")
    record = tmp_path / "out" / "model" / "lora.json"
    assert record.exists() == (lora.rank > 0)
    start, end = load_model(tmp_path / "model"), load_model(tmp_path / "out" / "model")
    assert torch.equal(start.embed_tokens.weight, end.embed_tokens.weight) == (lora.rank > 0)
    assert not torch.equal(start.layers[0].self_attn.o_proj.weight, end.layers[0].self_attn.o_proj.weight)


def test_the_reference_is_computed_again_where_it_is_lost(tmp_path: Path, one_rank: Ranks) -> None:
    run, out = _run(tmp_path), tmp_path / "out"
    assert prefer(run, out, one_rank)
    before = (out / "reference.safetensors").read_bytes()
    (out / "reference.safetensors").unlink()
    longer = replace(run, train=replace(run.train, steps=6))
    assert prefer(longer, out, one_rank, resume=True)
    assert (out / "reference.safetensors").read_bytes() == before


def test_changed_pairs_or_models_are_refused(tmp_path: Path, one_rank: Ranks) -> None:
    run, out = _run(tmp_path), tmp_path / "out"
    prefer(run, out, one_rank)
    longer = replace(run, train=replace(run.train, steps=6))
    pairs = (tmp_path / "pairs.jsonl").read_text()
    (tmp_path / "pairs.jsonl").write_text(pairs.replace(" no", " nein"))
    with pytest.raises(ConfigError, match=r"pairs\.jsonl or .* has changed"):
        prefer(longer, out, one_rank, resume=True)
    (tmp_path / "pairs.jsonl").write_text(pairs)
    save_tiny(tmp_path / "model", seed=1)
    with pytest.raises(ConfigError, match=r"pairs\.jsonl or .* has changed"):
        prefer(longer, out, one_rank, resume=True)


def test_settings_that_cannot_be_are_refused(tmp_path: Path, one_rank: Ranks) -> None:
    run = _run(tmp_path)
    with pytest.raises(ConfigError, match="beta"):
        replace(run, beta=0.0)
    with pytest.raises(ConfigError, match="name the pairs"):
        prefer(replace(run, data=PreferData()), tmp_path / "out", one_rank)
    with pytest.raises(ConfigError, match="batch_samples is 99; it must be from 1, a pair a rank, to"):
        prefer(replace(run, train=replace(run.train, batch_samples=99)), tmp_path / "out", one_rank)


def test_adapters_on_merged_weights_are_refused(tmp_path: Path, one_rank: Ranks) -> None:
    run = _run(tmp_path, lora=LoraConfig(4))
    prefer(run, tmp_path / "out", one_rank)
    again = replace(run, init=str(tmp_path / "out" / "model"))
    with pytest.raises(ConfigError, match=r"merged in already .*continue that run with --resume"):
        prefer(again, tmp_path / "again", one_rank)
    assert prefer(replace(again, lora=LoraConfig()), tmp_path / "all", one_rank)


def test_a_run_with_adapters_resumes_on_its_own_base_alone(tmp_path: Path, one_rank: Ranks) -> None:
    run, out = _run(tmp_path, lora=LoraConfig(4)), tmp_path / "out"
    prefer(run, out, one_rank)
    (out / "reference.safetensors").unlink()
    save_tiny(tmp_path / "model", seed=1)
    with pytest.raises(ConfigError, match="is not the model that it was when the run started"):
        prefer(replace(run, train=replace(run.train, steps=6)), out, one_rank, resume=True)
