"""Rejection sampling: what is kept is right, distinct and trainable, and a function of the seed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fathom.checkpoint.hf.model import load_model, save_model
from fathom.cli import main
from fathom.cli import sample as command
from fathom.data.tokenizer import load_tokenizer
from fathom.engine.engine import Engine
from fathom.engine.sampling.sampler import SamplingParams
from fathom.posttrain.conversations import read_conversations
from fathom.posttrain.rejection import SampledProblem, rejection_sample
from fathom.posttrain.tasks.protocol import Problem, Task
from tests.posttrain.models import save_tiny


class Short(Task):
    """An answer is right if it is short; with `tool_calls`, every first turn calls the tool."""

    name = "short"
    tool_calls = 0

    def problem(self, i: int) -> Problem:
        return Problem(i, ({"role": "user", "content": f"The number is {i}"},), None, ())

    def reward(self, problem: Problem, text: str) -> float:
        return float(len(text) < 6)

    def tool_result(self, problem: Problem, text: str) -> str | None:
        return f"letters: {len(text)}"


class Tool(Short):
    tool_calls = 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that ends a turn now and then."""
    path = save_tiny(tmp_path_factory.mktemp("model") / "model", std=0.15)
    model, tokenizer = load_model(path), load_tokenizer(path)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_id] *= 12
    save_model(model, path, tokenizer)
    return path


def _sample(model: Path, task: Task, samples: int = 8, keep: int = 2, seed: int = 0) -> list[SampledProblem]:
    engine = Engine(load_model(model), load_tokenizer(model), max_batch=16)
    params = SamplingParams(1.0, max_tokens=12, seed=seed)
    problems = [task.problem(number) for number in range(5)]
    return list(rejection_sample(engine, task, problems, samples, keep, params))


def test_right_answers_are_kept_once(model: Path) -> None:
    found = _sample(model, Short())
    assert [each.answers for each in found] == [8] * 5
    assert 0 < sum(each.right for each in found) < 40
    rows = [row for each in found for row in each.kept]
    assert all(len(each.kept) <= min(2, each.right) for each in found)
    texts = [(row["problem"], row["messages"][-1]["content"]) for row in rows]
    assert rows and len(set(texts)) == len(texts) and all(len(text) < 6 for _, text in texts)
    assert all(row["task"] == "short" and row["messages"][0]["role"] == "user" for row in rows)


def test_what_is_kept_is_a_function_of_the_seed_and_the_problem(model: Path) -> None:
    first, again, other = (_sample(model, Short(), seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    engine = Engine(load_model(model), load_tokenizer(model), max_batch=2)
    [alone] = rejection_sample(engine, Short(), [Short().problem(3)], 8, 2, SamplingParams(1.0, max_tokens=12, seed=0))
    assert alone == first[3]


def test_a_conversation_with_a_tool_has_its_answers(model: Path) -> None:
    rows = [row for each in _sample(model, Tool(), samples=32) for row in each.kept]
    assert any(len(row["messages"]) == 4 for row in rows)
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant", "user", "assistant"]
        assert row["messages"][2]["content"] == f"letters: {len(row['messages'][1]['content'])}"


def test_the_command_writes_what_fine_tuning_reads(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "task", lambda name: Short())
    out = tmp_path / "new" / "chats.jsonl"
    words = ["--task", "short", "-n", "8", "--keep", "2", "--problems", "6", "--max-tokens", "12", "--out", str(out)]
    main(["sample", str(model), *words])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert f"{len(rows)} conversations in {out}" in capsys.readouterr().out and rows
    texts = [row for row in rows if row["messages"][-1]["content"]]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    file = read_conversations(tmp_path / "texts.jsonl", load_tokenizer(model), 128)
    assert len(file.samples) == len(texts)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "addition", "--keep", "9"], "keep is 9"),
        (["--task", "chess"], "no task 'chess'"),
        (["--task", "addition", "-n", "0"], "samples is 0"),
    ],
)
def test_bad_input_is_refused(
    model: Path, tmp_path: Path, words: list[Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["sample", str(model), *words, "--out", str(tmp_path / "chats.jsonl")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "chats.jsonl").exists()
