"""Evaluation on tasks: a model that has memorised solutions solves them, tool turns included; a random one does not."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from fathom.checkpoint.hf.model import load_model, save_model
from fathom.cli import main
from fathom.config import ConfigError
from fathom.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from fathom.engine.engine import Engine
from fathom.engine.sampling.sampler import SamplingParams
from fathom.eval.likelihood import text_bits
from fathom.eval.pass_rate import maj_at_k, pass_at_k
from fathom.model.transformer import Model
from fathom.ops.loss import IGNORE
from fathom.posttrain.evaluate import (
    GREEDY,
    TaskEval,
    TaskEvalConfig,
    differences,
    distinct_problems,
    evaluate_task,
)
from fathom.posttrain.rollout import Rollout
from fathom.posttrain.tasks import task
from fathom.posttrain.tasks.protocol import Problem, Task, worked_conversation
from tests.serve.random_model import CONFIG, TEXT, save_random_model

pytest.importorskip("jinja2", reason="chat templates need jinja2")

LEARNED = 3


class Parity(Task):
    """A reward for an even number of characters; a turn that ends calls a tool, twice at most."""

    name, tool_calls = "parity", 2

    def problem(self, i: int) -> Problem:
        return Problem(i, ({"role": "user", "content": f"The number is {i % 40}"},), None, ())

    def reward(self, problem: Problem, text: str) -> float:
        return float(len(text) % 2 == 0)

    def tool_result(self, problem: Problem, text: str) -> str | None:
        return f"name {len(text)}"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("random") / "model")


@pytest.fixture
def engine(directory: Path) -> Engine:
    return Engine(load_model(directory), load_tokenizer(directory))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has seen the solutions of the first test problems of the calculator, and nothing else."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([TEXT * 40], CONFIG.vocab_size)
    model = Model(replace(CONFIG, vocab_size=tokenizer.vocab_size, num_nextn_predict_layers=0, initializer_range=0.05))
    found, engine = task("calculator"), Engine(model, tokenizer)
    rows, masks = [], []
    for problem in distinct_problems(found, LEARNED):
        row: list[int] = []
        mask: list[bool] = []
        conversation = worked_conversation(found, problem)
        for place, message in enumerate(conversation):
            if message["role"] == "assistant":
                prompt = engine.encode_chat(conversation[:place])
                answer = [*tokenizer.encode(message["content"], bos=False), tokenizer.eos_id]
                mask = [*mask, *[False] * (len(prompt) - len(row)), *[True] * len(answer)]
                row = [*prompt, *answer]
        rows.append(torch.tensor(row))
        masks.append(torch.tensor(mask))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens_BS = pad_sequence(rows, batch_first=True)
    targets_BS = torch.where(pad_sequence(masks, batch_first=True), tokens_BS, IGNORE)[:, 1:]
    for _ in range(400):
        loss = F.cross_entropy(
            model(tokens_BS[:, :-1]).logits_BSO.flatten(0, 1), targets_BS.flatten(), ignore_index=IGNORE
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 3e-3:
            break
    directory = tmp_path_factory.mktemp("trained") / "model"
    save_model(model, directory)
    save_tokenizer(tokenizer, directory)
    return directory


# --------------------------------------------------------------------------------------------------- conversations


@pytest.mark.slow
def test_a_model_that_knows_the_solutions_solves_them_with_the_tool(trained: Path) -> None:
    engine, found = Engine(load_model(trained), load_tokenizer(trained)), task("calculator")
    chosen = distinct_problems(found, LEARNED)
    config = TaskEvalConfig(problems=LEARNED, samples=3, temperature=0.1, max_tokens=100)
    result = evaluate_task(engine, found, config)
    assert [tuple(answer.turns) for answer in result.greedy] == [problem.example for problem in chosen]
    assert max(len(problem.example) for problem in chosen) > 2, "some need several calls"
    metrics = result.metrics()
    for name in (GREEDY, "pass@1", "pass@3", "maj@3", "stop_rate"):
        assert metrics[name].value == 1.0
    encode = load_tokenizer(trained).encode
    expected = [sum(len(encode(turn, bos=False)) + 1 for turn in problem.example) for problem in chosen]
    assert [answer.length for answer in result.greedy] == expected


@pytest.mark.slow
def test_one_model_against_another(
    trained: Path, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, notes = tmp_path / "out.json", tmp_path / "notes.txt"
    notes.write_text("The number is 7\n")
    flags = ["--task", "calculator", "--problems", str(LEARNED), "--samples", "2", "--temperature", "0.1"]
    flags += ["--max-tokens", "80", "--text", str(notes), "--against", str(directory), "--json", str(out)]
    main(["eval", str(trained), *flags])
    found, printed = json.loads(out.read_text()), capsys.readouterr().out
    calculator = found["calculator"]
    assert calculator[GREEDY]["value"] == 1 and calculator["against"][GREEDY]["value"] == 0
    assert calculator["difference"][GREEDY] == {"value": 1, "low": 1, "high": 1}
    bits = [
        text_bits(load_model(path), load_tokenizer(path), notes.read_text()).bits_per_byte
        for path in (trained, directory)
    ]
    assert found[str(notes)]["bits_per_byte"] == pytest.approx(bits[0])
    assert found[str(notes)]["against"] == pytest.approx(bits[1])
    assert found[str(notes)]["difference"] == pytest.approx(bits[0] - bits[1])
    row = r"greedy pass@1  100.0 \(43.9..100.0\) +0.0 \(0.0..56.1\) +\+100.0 \(100.0..100.0\)"
    assert re.search(row, printed)
    assert max(map(len, printed.splitlines())) <= 80


def test_an_answer_is_a_function_of_seed_problem_and_sample(engine: Engine) -> None:
    finished: list[None] = []
    config = TaskEvalConfig(problems=6, samples=3, max_tokens=12)

    def texts(config: TaskEvalConfig) -> list[list[list[str]]]:
        result = evaluate_task(engine, Parity(), config, lambda: finished.append(None))
        for answer in (*result.greedy, *(answer for answers in result.sampled for answer in answers)):
            assert answer.reward == (len(answer.turns[-1]) + 1) % 2
        return [[answer.turns for answer in answers] for answers in result.sampled]

    whole = texts(config)
    assert len(finished) == 6 * (1 + 3)
    assert len({str(turns) for answers in whole for turns in answers}) == 18, "samples differ"
    fewer = texts(replace(config, problems=4, samples=2))
    assert fewer == [answers[:2] for answers in whole[:4]]
    assert texts(replace(config, seed=1)) != whole


def test_the_greedy_answer_is_that_of_a_chat(engine: Engine) -> None:
    result = evaluate_task(engine, Parity(), TaskEvalConfig(problems=5, samples=0, max_tokens=12))
    for problem, answer in zip(distinct_problems(Parity(), 5), result.greedy, strict=True):
        assert answer.turns[0] == engine.chat(problem.messages, SamplingParams(max_tokens=12)).text
    assert result.sampled == [[]] * 5


def test_what_cannot_be_evaluated_is_named(engine: Engine, directory: Path) -> None:
    with pytest.raises(ConfigError, match="problems is 60; among 1200 test problems of parity"):
        distinct_problems(Parity(), 60)
    broken = load_model(directory)
    with torch.no_grad():
        broken.norm.weight.fill_(torch.nan)
    other = Engine(broken, load_tokenizer(directory))
    with pytest.raises(ValueError, match=r"task addition, problem \d+: .*not finite"):
        evaluate_task(other, task("addition"), TaskEvalConfig(problems=3, max_tokens=4))


# ------------------------------------------------------------------------------------------------------- metrics


def answers(rewards: str) -> list[Rollout]:
    """An answer for each mark: 1 is right, x ends at a limit; they are 10, 11 … tokens long."""
    return [
        Rollout(
            task("addition").problem(0),
            [],
            turns=[f"answer: {mark}"],
            reward=float(mark == "1"),
            sampled=[True] * (10 + place),
            finish_reason="length" if mark == "x" else "stop",
        )
        for place, mark in enumerate(rewards)
    ]


def test_metrics_are_the_means_over_problems() -> None:
    sampled = [answers("1122"), answers("x234"), answers("1111")]
    result = TaskEval(answers("1x1"), sampled)
    metrics = result.metrics()
    assert list(metrics) == [GREEDY, "pass@1", "pass@2", "pass@4", "maj@4", "stop_rate", "length"]
    assert metrics[GREEDY].value == pytest.approx(2 / 3)
    for k in (1, 2, 4):
        assert metrics[f"pass@{k}"].value == pytest.approx((pass_at_k(4, 2, k) + 0 + 1) / 3)
    majority = maj_at_k(["1", "1", "2", "2"], [True, True, False, False], 4)
    assert metrics["maj@4"].value == pytest.approx((majority + 0 + 1) / 3)
    assert metrics["stop_rate"].value == pytest.approx((1 + 3 / 5 + 1) / 3)
    assert metrics["length"].value == pytest.approx((10 + 46 + 11 + 46 + 12 + 46) / 15)
    assert all(each.low <= each.value <= each.high for each in metrics.values())


def test_differences_are_paired_by_problem() -> None:
    own, other = TaskEval(answers("1101"), [[]] * 4), TaskEval(answers("1001"), [[]] * 4)
    found = differences(own, other)
    assert list(found) == [GREEDY, "stop_rate", "length"]
    assert (found[GREEDY].value, found[GREEDY].low) == (0.25, 0.0)
    assert (found["length"].low, found["length"].high) == (0, 0)
    with pytest.raises(ValueError, match="4 and 3 values"):
        differences(own, TaskEval(answers("100"), [[]] * 3))


def test_an_odd_number_of_samples_has_its_own_row() -> None:
    assert list(TaskEval(answers("1"), [answers("123456")]).metrics())[1:6] == [
        "pass@1",
        "pass@2",
        "pass@4",
        "pass@6",
        "maj@6",
    ]
    assert list(TaskEval(answers("1"), [answers("1")]).metrics()) == [GREEDY, "pass@1", "stop_rate", "length"]


# ------------------------------------------------------------------------------------------------------ commands


def test_a_random_model_solves_nothing(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    flags = ["--problems", "5", "--samples", "3", "--max-tokens", "6", "--json", str(out)]
    main(["eval", str(directory), "--task", "addition", "calculator", *flags])
    found, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert list(found) == ["addition", "calculator"]
    assert list(found["addition"]) == [
        *("problems", "samples", GREEDY, "pass@1", "pass@2", "pass@3", "maj@3", "stop_rate", "length")
    ]  # fmt: skip
    assert found["addition"]["pass@3"] == {"value": 0, "low": 0, "high": 0}
    assert found["addition"][GREEDY]["high"] == pytest.approx(0.4345, abs=1e-4), "none of five is no proof of none"
    assert found["addition"]["length"]["value"] <= 6
    assert "addition: 5 test problems, 3 samples each at temperature 1; 95 % intervals" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to measure: give --task (names), --tasks"),
        (["--task", "adition"], "there is no task 'adition'; there are addition, sort_digits"),
        (["--task", "addition", "--problems", "0"], "problems is 0; it must be 1 or more"),
        (["--task", "addition", "--samples", "-1"], "samples is -1"),
        (["--task", "addition", "--temperature", "0"], "temperature is 0.0; it must be above 0"),
        (["--task", "addition", "--max-tokens", "0"], "max_tokens is 0"),
        (["--tasks", "x.yaml", "--against", "other"], "--against compares on --task and --text"),
        (["--task", "addition", "--chat"], "--chat is for lm-eval's tasks"),
    ],
)
def test_bad_flags_are_named_before_a_model_is_loaded(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["eval", "nowhere", *flags])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_model_without_a_chat_template_is_named(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(directory)
    tokenizer.config.pop("chat_template")
    save_model(load_model(directory), tmp_path / "model")
    save_tokenizer(tokenizer, tmp_path / "model")
    with pytest.raises(SystemExit):
        main(["eval", str(tmp_path / "model"), "--task", "addition", "--problems", "2"])
    assert "has no chat template" in capsys.readouterr().err
