"""How often a model solves a task: greedy and sampled answers to its test problems, with intervals.

Problems are distinct, so that their answers are independent of each other; a sample is a function of the seed, the
problem and its number alone.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from fathom.config import ConfigError, check
from fathom.engine.engine import Engine
from fathom.engine.sampling.sampler import SamplingParams
from fathom.eval.pass_rate import Interval, bootstrap, maj_at_k, paired_bootstrap, pass_at_k, wilson
from fathom.posttrain.rollout import Rollout, rollouts
from fathom.posttrain.tasks.protocol import Problem, Task, final_answer, problems

_REPEATS = 20
"""Test problems that are looked at for each distinct one that is wanted."""

GREEDY = "greedy_pass@1"


@dataclass(frozen=True)
class TaskEvalConfig:
    """How a model is evaluated on a task."""

    problems: int = 500
    """Distinct test problems."""
    samples: int = 4
    """Samples per problem beside the greedy answer, for pass@k and maj@k; 0: none."""
    temperature: float = 1.0
    """Of the samples."""
    max_tokens: int = 256
    """Limit of an answer, all of its turns together."""
    seed: int = 0
    """Of the samples and of the intervals' resamples."""

    def __post_init__(self) -> None:
        check(self.problems >= 1, "problems", self.problems, "1 or more")
        check(self.samples >= 0, "samples", self.samples, "1 or more, or 0 for the greedy answer alone")
        check(self.temperature > 0, "temperature", self.temperature, "above 0; the greedy answer is given anyway")
        check(self.max_tokens >= 1, "max_tokens", self.max_tokens, "1 or more")
        check(self.seed >= 0, "seed", self.seed, "0 or more")


@dataclass(frozen=True)
class TaskEval:
    """A model's answers to a task's problems."""

    greedy: list[Rollout]
    """One for each problem."""
    sampled: list[list[Rollout]]
    """The samples of each problem; the lists are empty where none were drawn."""

    def per_problem(self) -> dict[str, list[float]]:
        """Of each metric, the value of every problem. Stop rate and length are of all answers."""
        samples = len(self.sampled[0])
        values = {GREEDY: [float(answer.passed) for answer in self.greedy]}
        for k in _ks(samples):
            rights = [sum(answer.passed for answer in answers) for answers in self.sampled]
            values[f"pass@{k}"] = [pass_at_k(samples, right, k) for right in rights]
        if samples > 1:
            values[f"maj@{samples}"] = [_majority(answers) for answers in self.sampled]
        every = [[greedy, *answers] for greedy, answers in zip(self.greedy, self.sampled, strict=True)]
        values["stop_rate"] = [
            statistics.fmean(answer.finish_reason == "stop" for answer in answers) for answers in every
        ]
        values["length"] = [statistics.fmean(answer.length for answer in answers) for answers in every]
        return values

    def metrics(self, seed: int = 0) -> dict[str, Interval]:
        """Each metric with its 95 % interval: Wilson's for the greedy answers, else the bootstrap over problems."""
        values = self.per_problem()
        intervals = {name: bootstrap(each, seed) for name, each in values.items()}
        return intervals | {GREEDY: wilson(int(sum(values[GREEDY])), len(self.greedy))}


def as_json(metrics: dict[str, Interval]) -> dict[str, dict[str, float]]:
    """Intervals as plain objects."""
    return {name: asdict(interval) for name, interval in metrics.items()}


def differences(own: TaskEval, baseline: TaskEval, seed: int = 0) -> dict[str, Interval]:
    """Each metric's difference, `own` minus `baseline`, paired by problem. Raises ValueError for other problems."""
    others = baseline.per_problem()
    return {name: paired_bootstrap(values, others[name], seed) for name, values in own.per_problem().items()}


def evaluate_task(
    engine: Engine, task: Task, config: TaskEvalConfig, finished: Callable[[], None] = lambda: None
) -> TaskEval:
    """Put test problems to the model, once greedily and `config.samples` times at random.

    `finished` is called after each answer. Raises ConfigError where the task has too few problems; ValueError where one
    does not fit the model, and where the model has no chat template or its logits are not finite.
    """
    chosen = distinct_problems(task, config.problems)
    params = SamplingParams(temperature=config.temperature, max_tokens=config.max_tokens)
    draw = partial(rollouts, engine, task, chosen, seed=f"eval/{config.seed}", finished=finished)
    greedy = draw(samples=1, params=replace(params, temperature=0.0))
    return TaskEval([answers[0] for answers in greedy], draw(samples=config.samples, params=params))


def distinct_problems(task: Task, count: int) -> list[Problem]:
    """The first `count` test problems of different content. Raises ConfigError where there are not so many."""
    found: dict[int, Problem] = {}
    for problem in problems(task, "test", count=_REPEATS * count):
        found.setdefault(problem.key, problem)
        if len(found) == count:
            return list(found.values())
    raise ConfigError(f"problems is {count}; among {_REPEATS * count} test problems of {task.name} {len(found)} differ")


def _ks(samples: int) -> list[int]:
    """1, 2, 4 … and the number of samples itself."""
    return sorted({2**power for power in range(samples.bit_length())} | ({samples} if samples else set()))


def _majority(answers: Sequence[Rollout]) -> float:
    return maj_at_k([final_answer(each.turns[-1]) for each in answers], [each.passed for each in answers], len(answers))
