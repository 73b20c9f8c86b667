"""Supervised fine-tuning: what a step trains, that a killed run ends with the same weights, and what is refused."""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

pytest.importorskip("jinja2", reason="templates need jinja2")

from fathom import load_model, load_tokenizer
from fathom.checkpoint.training_state import checkpoints, load_state
from fathom.cli import main
from fathom.config import ConfigError, load_json
from fathom.data.tokenizer import Tokenizer, save_tokenizer
from fathom.distributed.ranks import SINGLE_PROCESS
from fathom.metrics import read_metrics
from fathom.model.transformer import Model
from fathom.posttrain.conversations import read_conversations
from fathom.posttrain.loss import PosttrainLoss
from fathom.posttrain.pack import Sample, pack
from fathom.posttrain.sft import mean_loss, sft
from fathom.posttrain.sft_config import SftData, SftLoopConfig, SftRun
from fathom.posttrain.sft_data import read_samples, shuffled, trained_tokens
from tests.posttrain.chats import save_small_model, write_chats


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("sft") / "model")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("sft") / "chats.jsonl")


@pytest.fixture
def run(model: Path, chats: Path) -> SftRun:
    loop = SftLoopConfig(
        batch_samples=8, micro_batch_tokens=256, max_length=128, compute_dtype="float32", eval_every=0, save_every=0
    )
    return SftRun(init=str(model), train=loop, data=SftData(chats=str(chats), heldout=0.1))


def fine_tuned(run: SftRun, out: Path) -> str:
    """Trains; returns what was printed."""
    printed = StringIO()
    assert sft(run, out, SINGLE_PROCESS, console=Console(file=printed, width=200))
    return printed.getvalue()


def test_packed_samples_have_the_loss_and_gradients_of_single_ones(model: Path, chats: Path) -> None:
    """In float64, MTP modules included: samples do not see each other, and positions restart."""
    samples = read_conversations(chats, load_tokenizer(model), 128).samples[:9]
    total = trained_tokens(samples)
    weights_H = pack(samples, 1).batch.target_weights()
    results = []
    for parts in ([samples], [samples[:4], samples[4:]], [[sample] for sample in samples]):
        trained = load_model(model).double().train()
        results.append(_loss_and_gradients(trained, parts, total, weights_H))
    alone_loss, alone = results[-1]
    for loss, gradients in results[:-1]:
        assert loss == pytest.approx(alone_loss, rel=1e-9)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, alone[name], rtol=1e-6, atol=1e-9, msg=name)
    assert any("mtp" in name or "layers.3" in name for name in alone)
    # By the formula: the mean of −log p over trained tokens, each sample by itself.
    plain = load_model(model).double()
    expected = -sum(float(_logprobs(plain, sample).sum()) for sample in samples) / total
    assert results[0][0][0] == pytest.approx(expected, rel=1e-6)


def _loss_and_gradients(
    model: Model, parts: list[list[Sample]], total: float, weights_H: torch.Tensor
) -> tuple[list[float], dict[str, torch.Tensor]]:
    loss = PosttrainLoss(model, torch.float64)
    sums_H = torch.zeros(len(weights_H), dtype=torch.float64)
    for part in parts:
        output = loss(pack(part, 1), mean_loss(total), weights_H, 0.3, len(part) / sum(map(len, parts)))
        output.total.backward()
        sums_H += output.sums_H
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return (sums_H / weights_H).tolist(), gradients


@torch.no_grad()
def _logprobs(model: Model, sample: Sample) -> torch.Tensor:
    logits_SO = model(sample.tokens_T[None]).logits_BSO[0].double()
    logprobs_S = logits_SO.log_softmax(-1)[:-1].gather(1, sample.tokens_T[1:, None])[:, 0]
    return logprobs_S * sample.weights_T[1:]


def test_a_run_from_conversations_to_a_model_that_says_them(run: SftRun, tmp_path: Path) -> None:
    train = replace(run.train, steps=60, eval_every=20, save_every=30)
    run = replace(run, train=train, optimizer=replace(run.optimizer, learning_rate=1e-2))
    printed = fine_tuned(run, tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    held_out = [row["val_loss"] for row in rows if "val_loss" in row]
    mtp = [row["mtp_loss"] for row in rows if "mtp_loss" in row]
    assert len(losses) == 60 and len(held_out) == 3
    assert losses[-1] < 0.4 * losses[0] and mtp[-1] < 0.7 * mtp[0] and held_out[-1] < 0.6 * losses[0]
    rates = [row["lr"] for row in rows if "lr" in row]
    assert rates[0] == 1e-2 and rates[-1] == pytest.approx(2e-3) and rates == sorted(rates, reverse=True)
    assert "samples held out" in printed and "60 steps of 8 samples" in printed
    assert (tmp_path / "run" / "model").resolve() == checkpoints(tmp_path / "run")[-1].resolve()
    recorded = load_json(SftRun, tmp_path / "run" / "run.json")
    assert recorded == run
    # What is measured is what the saved model has.
    saved, samples = load_model(tmp_path / "run" / "model"), read_samples(run, load_tokenizer(run.init))
    again = -sum(float(_logprobs(saved, sample).sum()) for sample in samples.held_out)
    assert again / trained_tokens(samples.held_out) == pytest.approx(held_out[-1], rel=1e-4)


def test_steps_follow_from_the_data(run: SftRun, tmp_path: Path) -> None:
    samples = read_samples(run, load_tokenizer(run.init))
    count = len(samples.trained)
    assert count + len(samples.held_out) == 40 and 1 <= len(samples.held_out) <= 10
    fine_tuned(replace(run, data=replace(run.data, epochs=1)), tmp_path / "run")
    recorded = load_json(SftRun, tmp_path / "run" / "run.json")
    assert recorded.train.steps == round(count / 8) == len(read_metrics(tmp_path / "run" / "metrics.jsonl")) - 1
    with pytest.raises(ConfigError, match=rf"train.batch_samples is 64; there are {count} samples"):
        sft(replace(run, train=replace(run.train, batch_samples=64)), tmp_path / "other", SINGLE_PROCESS)
    assert not (tmp_path / "other").exists()


def test_the_defaults_are_the_reports() -> None:
    run = SftRun(init="model")
    assert run.data.epochs == 2
    rates = [replace(run, train=replace(run.train, steps=101)).hyperparameters(s).learning_rate for s in (0, 50, 100)]
    assert rates == pytest.approx([5e-6, 3e-6, 1e-6])


def test_every_epoch_has_every_sample_once_in_an_order_of_its_own() -> None:
    order = [index for step in range(10) for index in shuffled(15, range(step * 3, step * 3 + 3), seed=1)]
    epochs = [order[:15], order[15:30]]
    assert all(Counter(epoch) == Counter(range(15)) for epoch in epochs) and epochs[0] != epochs[1]
    assert order[:15] != shuffled(15, range(15), seed=2)
    assert shuffled(15, range(13, 17), seed=1) == order[13:17]  # across the end of an epoch


def test_what_is_held_out_stays_held_out_as_the_file_grows(run: SftRun, tmp_path: Path) -> None:
    lines = Path(run.data.chats).read_text().splitlines()
    texts = []
    for name, part in (("short", lines[:20]), ("long", [*lines, *lines[:5]])):
        (tmp_path / name).with_suffix(".jsonl").write_text("\n".join(part))
        grown = replace(run, data=replace(run.data, chats=str(tmp_path / f"{name}.jsonl"), heldout=0.3))
        samples = read_samples(grown, load_tokenizer(run.init))
        texts.append({tuple(sample.tokens_T.tolist()) for sample in samples.held_out})
        assert not texts[-1] & {tuple(sample.tokens_T.tolist()) for sample in samples.trained}
    assert texts[0] and texts[0] < texts[1]
    with pytest.raises(ConfigError, match=r"data.heldout is 0.999999; it holds out all 20 samples"):
        data = replace(run.data, chats=str(tmp_path / "short.jsonl"), heldout=0.999999)
        read_samples(replace(run, data=data), load_tokenizer(run.init))


def test_text_is_mixed_in(run: SftRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of the trained tokens, whatever the conversations' lengths, by the model's own tokenizer."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(30):
        (texts / f"{number}.txt").write_text(f"The cat says {number}. " * 40)
    data = replace(run.data, pretrain_share=0.2, corpus=str(texts))
    fine_tuned(replace(run, data=data, train=replace(run.train, steps=3)), tmp_path / "run")
    fine_tuned(replace(run, train=replace(run.train, steps=3)), tmp_path / "without")
    mixed, plain = (
        [row["trained_tokens"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if "trained_tokens" in row]
        for name in ("run", "without")
    )
    assert mixed == [pytest.approx(tokens / 0.8, abs=1) for tokens in plain] and len(plain) == 3
    assert load_tokenizer(tmp_path / "run" / "data").tokenizer_json == load_tokenizer(run.init).tokenizer_json
    for share, corpus in ((0.2, None), (0.0, "texts")):
        with pytest.raises(ConfigError, match=r"data.corpus is .*; it must be set where data.pretrain_share is not 0"):
            SftData(pretrain_share=share, corpus=corpus)


def test_bad_input_is_refused_before_anything_is_written(run: SftRun, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    for data, reason in ((str(bad), r"bad.jsonl:1: there is no message of the assistant"), ("", "--data FILE.jsonl")):
        with pytest.raises(ValueError, match=reason):
            sft(replace(run, data=replace(run.data, chats=data)), tmp_path / "run", SINGLE_PROCESS)
    with pytest.raises(FileNotFoundError):
        sft(replace(run, data=replace(run.data, chats="no.jsonl")), tmp_path / "run", SINGLE_PROCESS)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"train.steps is -1; it must be 0 or more"):
        SftLoopConfig(steps=-1)
    with pytest.raises(ConfigError, match=r"train.micro_batch_tokens is 8; it must be at least max_length"):
        SftLoopConfig(micro_batch_tokens=8)


def test_a_tokenizer_whose_padding_is_its_end_is_refused(run: SftRun, tmp_path: Path) -> None:
    source = save_small_model(tmp_path / "model")
    tokenizer = load_tokenizer(source)
    config = tokenizer.config | {"pad_token": tokenizer.config["eos_token"]}
    save_tokenizer(Tokenizer(tokenizer.tokenizer_json, config), source)
    with pytest.raises(ConfigError, match="as end of text and as padding"):
        sft(replace(run, init=str(source)), tmp_path / "run", SINGLE_PROCESS)


def flags(run: SftRun, out: Path) -> list[str]:
    given = {
        **{f"train.{name}": getattr(run.train, name) for name in ("batch_samples", "max_length", "compute_dtype")},
        "train.micro-batch-tokens": run.train.micro_batch_tokens,
        "data": run.data.chats,
        "out": out,
    }
    return ["sft", run.init, *(str(word) for name, value in given.items() for word in (f"--{name}", value))]


def test_the_command(run: SftRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*flags(run, tmp_path / "run"), "--train.steps", "2", "--data.heldout", "0.1"])
    assert "2 steps of 8 samples" in capsys.readouterr().out
    main(["sft", "--resume", "--out", str(tmp_path / "run"), "--train.steps", "3"])
    assert "resuming after step 2" in capsys.readouterr().out
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-000002", "step-000003"]
    with pytest.raises(SystemExit):
        main(flags(run, tmp_path / "run"))
    assert "already holds a run" in capsys.readouterr().err


def test_other_conversations_are_not_gone_on_with(run: SftRun, tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl")
    run = replace(run, data=replace(run.data, chats=str(chats)), train=replace(run.train, steps=1))
    fine_tuned(run, tmp_path / "run")
    write_chats(chats, 41)
    with pytest.raises(ConfigError, match=r"chats.jsonl has changed since"):
        sft(replace(run, train=replace(run.train, steps=2)), tmp_path / "run", SINGLE_PROCESS, resume=True)


@pytest.mark.nightly
@pytest.mark.slow
def test_sigkill_at_random_moments(run: SftRun, tmp_path: Path) -> None:
    """With text mixed in: the weights, moments and losses of a run that was never interrupted, to the last bit."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number}.txt").write_text(f"The dog says {number}. " * 40)
    settings = [
        *("--train.steps", "40", "--train.save-every", "4", "--train.eval-every", "6", "--data.heldout", "0.1"),
        *("--data.pretrain-share", "0.3", "--data.corpus", str(texts), "--optimizer.learning-rate", "1e-3"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start = [sys.executable, "-m", "fathom"]
    subprocess.run([*start, *flags(run, whole), *settings], check=True, env=environment, capture_output=True)
    draw, kills = random.Random(), 0
    command = [*start, *flags(run, killed), *settings]
    while True:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if kills < 2 and not _finished_after(process, killed, draw.uniform(0.0, 0.5)):
            process.kill()
            process.communicate()
            kills += 1
        else:
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors.decode()
            break
        if (killed / "run.json").exists():
            command = [*start, "sft", "--resume", "--out", str(killed)]
    assert kills >= 1
    ends = [checkpoints(out)[-1] for out in (whole, killed)]
    weights = [load_file(end / "model.safetensors") for end in ends]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    states = [load_state(end)["optimizers"] for end in ends]
    for one, other in zip(*states, strict=True):
        for key, moments in one["state"].items():
            assert all(torch.equal(value, other["state"][key][name]) for name, value in moments.items())
    rows = [[_without_speed(row) for row in read_metrics(out / "metrics.jsonl")] for out in (whole, killed)]
    assert rows[0] == rows[1]


def _without_speed(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name not in ("tokens_per_second", "time")}


def _finished_after(process: subprocess.Popen[bytes], out: Path, seconds: float) -> bool:
    """Wait until there are new metrics, then that long; whether the process was done by then."""
    path = out / "metrics.jsonl"
    seen = path.stat().st_size if path.exists() else 0
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.stat().st_size != seen:
            break
        time.sleep(0.01)
    time.sleep(seconds)
    return process.poll() is not None


@pytest.mark.oracle
@pytest.mark.slow
def test_the_result_opens_in_transformers(run: SftRun, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the judge is transformers")
    fine_tuned(replace(run, train=replace(run.train, steps=5)), tmp_path / "run")
    directory = tmp_path / "run" / "model"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    messages = json.loads(Path(run.data.chats).read_text().splitlines()[0])["messages"]
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.no_grad():
        expected, found = theirs(ids).logits, load_model(directory)(ids).logits_BSO
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
