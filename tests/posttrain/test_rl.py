"""Reinforcement learning on a small random model: engine and trainer agree, and every way through a run ends alike."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fathom.checkpoint.hf.model import load_model
from fathom.config import ConfigError
from fathom.data.tokenizer import load_tokenizer
from fathom.distributed.ranks import SINGLE_PROCESS
from fathom.engine.engine import Engine
from fathom.engine.sampling.sampler import SamplingParams
from fathom.metrics import read_metrics
from fathom.posttrain import rl as rl_module
from fathom.posttrain.config import LoopConfig
from fathom.posttrain.loss import PosttrainLoss
from fathom.posttrain.pack import pack
from fathom.posttrain.policy import trained_samples
from fathom.posttrain.rl import rl
from fathom.posttrain.rl_config import RlConfig, RlRun
from fathom.posttrain.rollout import rollouts
from fathom.posttrain.tasks.protocol import Problem, Task, TaskError
from fathom.train.errors import TrainingError
from fathom.train.run import OptimizerConfig
from tests.posttrain.talking_model import save_talking_model


class Vowels(Task):
    """Eight vowels are best, which a random model can learn to write; every turn calls the tool."""

    name = "vowels"
    tool_calls = 0

    def problem(self, i: int) -> Problem:
        return Problem(i, ({"role": "user", "content": f"The number is {i % 97}"},), None, ())

    def reward(self, problem: Problem, text: str) -> float:
        return min(1.0, sum(letter in "aeiou" for letter in text) / 8)

    def tool_result(self, problem: Problem, text: str) -> str | None:
        return f"letters: {sum(map(str.isalpha, text))}"


class Tool(Vowels):
    tool_calls = 2


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_talking_model(tmp_path_factory.mktemp("model"))


CONFIG = RlConfig(
    task="vowels", problems=3, group_size=4, max_tokens=12, eval_problems=2, overlong="penalise", overlong_cushion=4
)


def run_of(directory: Path, **changes: object) -> RlRun:
    train = LoopConfig(steps=4, max_length=128, save_every=1, eval_every=2, compute_dtype="float32")
    optimizer = OptimizerConfig(learning_rate=3e-3, weight_decay=0.0)
    return RlRun(str(directory), rl=replace(CONFIG, **changes), train=train, optimizer=optimizer)  # type: ignore[arg-type]


def weights(run: Path) -> dict[str, Tensor]:
    return load_model(run / "model").state_dict()


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 20}], ids=["all", "top_p", "top_k"])
@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("task", [Vowels(), Tool()], ids=["one turn", "tool"])
def test_the_trainer_gives_what_the_engine_sampled_from(
    directory: Path, filters: dict[str, float], drafts: int, task: Task
) -> None:
    """Siblings share cached pages, requests wait for room, the vocabulary has ids without a token."""
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    engine = Engine(model, tokenizer, speculative=drafts, max_batch=5, page_size=4, cache_tokens=512)
    params = SamplingParams(temperature=0.8, max_tokens=40, **filters)  # type: ignore[arg-type]
    config = replace(CONFIG, temperature=0.8, max_tokens=40, overlong="penalise", overlong_cushion=40)
    problems = [task.problem(i) for i in range(3)]
    groups = rollouts(engine, task, problems, 4, params, for_training=True)
    assert any(len(rollout.turns) > 1 for group in groups for rollout in group) == (task.tool_calls > 0)
    samples, _ = trained_samples(groups, config)
    absent_X = torch.tensor(tokenizer.absent_ids(model.config.vocab_size))
    packed = pack(samples, 1, absent_X)
    facts = PosttrainLoss(model, torch.float32, temperature=0.8).facts(packed)
    assert facts.rerouted_X is not None and not facts.rerouted_X.any()
    assert float((facts.logprobs_X - packed.targets.values["engine"]).abs().max()) < 1e-4
    # Without the mask, or with live temperature, the difference would be far larger: the test can fail.
    if filters:
        unmasked = PosttrainLoss(model, torch.float32, temperature=0.8).facts(replace(packed, mask=None))
        assert float((unmasked.logprobs_X - packed.targets.values["engine"]).abs().max()) > 1e-3


def test_a_conversation_with_a_tool_goes_on_from_the_sampled_ids(directory: Path) -> None:
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    engine = Engine(model, tokenizer)
    params = SamplingParams(temperature=1.0, max_tokens=40)
    groups = rollouts(engine, Tool(), [Tool().problem(1)], 16, params, for_training=True)
    talks = [rollout for rollout in groups[0] if len(rollout.turns) > 1]
    assert talks
    for rollout in talks:
        text = b"".join(map(tokenizer.token_bytes, rollout.token_ids)).decode(errors="replace")
        result = Tool().tool_result(rollout.problem, rollout.turns[0])
        assert f"<｜User｜>{result}<｜Assistant｜>" in text
        assert rollout.length <= 40 and len(rollout.sampled) == len(rollout.logprobs) == len(rollout.token_ids)
        assert rollout.topk_ids_LTK is not None and rollout.topk_ids_LTK.shape[1] == len(rollout.tokens) - 1


def test_an_error_leaves_nothing_in_the_engine(directory: Path) -> None:
    class Long(Vowels):
        def problem(self, i: int) -> Problem:
            return Problem(i, ({"role": "user", "content": "x" * 600 * i},), None, ())

    engine = Engine(load_model(directory), load_tokenizer(directory))
    with pytest.raises(ValueError, match="with one more it must fit the model's length"):
        rollouts(engine, Long(), [Long().problem(i) for i in range(2)], 4, SamplingParams(max_tokens=4))
    assert not engine.has_work and engine.stats().pages_used == 0


@pytest.fixture
def vowels(monkeypatch: pytest.MonkeyPatch) -> Callable[[Task], None]:
    monkeypatch.setattr(rl_module, "task", lambda name: Vowels())
    return lambda task: monkeypatch.setattr(rl_module, "task", lambda name: task)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("variant", ["cispo", "grpo", "gspo"])
def test_rewards_rise(directory: Path, tmp_path: Path, vowels: object, variant: str) -> None:
    bounds = {"clip_low": 0.05, "clip_high": 0.05} if variant == "gspo" else {}
    run = run_of(directory, variant=variant, problems=8, group_size=8, max_tokens=16, updates=2, **bounds)
    run = replace(run, train=replace(run.train, steps=60, save_every=0, eval_every=0))
    assert rl(run, tmp_path / "run", SINGLE_PROCESS)
    rewards = [row["reward"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "reward" in row]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:2]) / 2 + 0.1


def test_metrics_are_all_there(directory: Path, tmp_path: Path, vowels: object) -> None:
    assert rl(run_of(directory), tmp_path / "run", SINGLE_PROCESS)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    trained = [row for row in rows if "loss" in row]
    expected = {"reward", "pass_rate", "length", "stop_rate", "entropy", "kl_k3", "max_abs_dlogp", "route_mismatch"}
    expected |= {"clip_share", "dropped_groups", "mtp_acceptance", "max_vio", "rollout_tokens_per_second"}
    assert trained and all(expected <= row.keys() for row in trained)
    assert all(row["route_mismatch"] == 0 and row["max_abs_dlogp"] < 1e-4 and row["kl_k3"] < 1e-8 for row in trained)
    evaluated = [row for row in rows if "test_pass_rate" in row]
    assert [row["step"] for row in evaluated] == [2, 4] and all(row["kl_start"] > 0 for row in evaluated)


def test_drafts_change_no_bit_of_the_weights(directory: Path, tmp_path: Path, vowels: object) -> None:
    for name, speculative in (("with", True), ("without", False)):
        rl(run_of(directory, speculative=speculative), tmp_path / name, SINGLE_PROCESS)
    assert_equal(weights(tmp_path / "with"), weights(tmp_path / "without"))


@pytest.mark.parametrize("changes", [{}, {"updates": 2, "kl_weight": 0.1}], ids=["one update", "two updates and KL"])
def test_a_resumed_run_ends_with_the_same_bits(
    directory: Path, tmp_path: Path, vowels: object, changes: dict[str, object]
) -> None:
    run = run_of(directory, **changes)
    rl(run, tmp_path / "whole", SINGLE_PROCESS)
    half = replace(run, train=replace(run.train, steps=2))
    rl(half, tmp_path / "parts", SINGLE_PROCESS)
    rl(run, tmp_path / "parts", SINGLE_PROCESS, resume=True)
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    steps = [row["step"] for row in read_metrics(tmp_path / "parts" / "metrics.jsonl")]
    assert steps == sorted(steps) and steps[-1] == 4


def test_what_would_change_the_past_is_refused(directory: Path, tmp_path: Path, vowels: object) -> None:
    run = run_of(directory)
    rl(replace(run, train=replace(run.train, steps=1)), tmp_path / "run", SINGLE_PROCESS)
    with pytest.raises(ConfigError, match=r"rl.temperature 1.0, this run 0.5"):
        rl(replace(run, rl=replace(run.rl, temperature=0.5)), tmp_path / "run", SINGLE_PROCESS, resume=True)
    with pytest.raises(ConfigError, match="already holds a run"):
        rl(run, tmp_path / "run", SINGLE_PROCESS)


def test_a_broken_parity_ends_the_run(directory: Path, tmp_path: Path, vowels: object) -> None:
    run = run_of(directory, temperature=0.9, top_p=0.7, keep_sampling_mask=False)
    with pytest.raises(TrainingError, match=r"differ by a KL of .* the bound of the KL is 1e-07"):
        rl(run, tmp_path / "run", SINGLE_PROCESS)


def test_groups_of_equal_rewards_take_no_step(
    directory: Path, tmp_path: Path, vowels: Callable[[Task], None], capsys: pytest.CaptureFixture[str]
) -> None:
    class Never(Vowels):
        def reward(self, problem: Problem, text: str) -> float:
            return 0.0

    vowels(Never())
    run = run_of(directory, overlong="mask")
    assert rl(run, tmp_path / "run", SINGLE_PROCESS)
    assert "too few groups with different rewards" in capsys.readouterr().out
    assert_equal(weights(tmp_path / "run"), load_model(directory).state_dict())


def test_a_reward_that_cannot_be_used_names_the_problem(
    directory: Path, tmp_path: Path, vowels: Callable[[Task], None]
) -> None:
    class Broken(Vowels):
        def reward(self, problem: Problem, text: str) -> float:
            return float("nan")

    vowels(Broken())
    with pytest.raises(TaskError, match=r"task vowels, problem \d+: the reward is nan"):
        rl(run_of(directory), tmp_path / "run", SINGLE_PROCESS)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"group_size": 1}, "group_size is 1; it must be 2 or more"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"updates": 4}, r"updates is 4; it must be from 1 to problems \(3\)"),
        ({"updates": 3}, r"train.steps is 4; it must be a multiple of updates \(3\)"),
        (
            {"overlong": "penalise", "overlong_cushion": 13},
            r"overlong_cushion is 13; it must be at most max_tokens \(12\)",
        ),
    ],
)
def test_senseless_settings_are_refused(directory: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run_of(directory, **changes)


def test_a_moving_average_which_would_be_ignored_is_refused(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.ema_decay is 0\.9; it must be 0"):
        replace(run_of(directory), optimizer=OptimizerConfig(ema_decay=0.9))


def test_an_unknown_task_is_refused_by_name(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no task 'vowels'; there are addition"):
        rl(run_of(directory), tmp_path / "run", SINGLE_PROCESS)
    assert not (tmp_path / "run").exists()


@pytest.mark.nightly
@pytest.mark.slow
def test_runs_that_are_killed_end_with_the_same_bits(directory: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments: while sampling, updating, evaluating and saving."""

    def command(out: Path) -> list[str]:
        flags = "--task count_letters --problems 2 --group-size 4 --max-tokens 10 --eval-problems 1"
        flags += " --overlong penalise --overlong-cushion 4 --train.steps 6 --train.max-length 256"
        flags += " --train.save-every 1 --train.compute-dtype float32 --resume"
        return f"{sys.executable} -m fathom rl {directory} {flags} --out {out}".split()

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path / "whole"), check=True, env=environment, capture_output=True)
    generator = torch.Generator().manual_seed(0)
    for wait in (1.5 + 4 * torch.rand(2, generator=generator)).tolist():
        process = subprocess.Popen(command(tmp_path / "killed"), env=environment, stdout=subprocess.DEVNULL)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command(tmp_path / "killed"), check=True, env=environment, capture_output=True)
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
