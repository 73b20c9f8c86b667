"""How often a model solves a task: greedy and sampled answers to its test problems, with intervals.

Problems are distinct, so that their answers are independent of each other; a sample is a function of the seed, the
problem and its number alone.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from fathom.config import ConfigError, check
from fathom.engine.engine import Engine
from fathom.engine.outputs import Generation
from fathom.engine.request import Request
from fathom.engine.sampling.sampler import SamplingParams
from fathom.eval.pass_rate import Interval, bootstrap, maj_at_k, paired_bootstrap, pass_at_k, wilson
from fathom.posttrain.tasks.protocol import Message, Problem, Task, checked_reward, final_answer, problems

_SAMPLE_BITS = 16
"""A request's stream is the problem's number followed by the sample's, of so many bits."""
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
    """Limit of one turn of the model."""
    seed: int = 0
    """Of the samples and of the intervals' resamples."""

    def __post_init__(self) -> None:
        check(self.problems >= 1, "problems", self.problems, "1 or more")
        limit = 2**_SAMPLE_BITS
        check(0 <= self.samples < limit, "samples", self.samples, f"from 0 (greedy only) to {limit - 1}")
        check(self.temperature > 0, "temperature", self.temperature, "above 0; the greedy answer is given anyway")
        self.sampling()  # which checks the rest

    def sampling(self) -> SamplingParams:
        """How samples are drawn."""
        return SamplingParams(temperature=self.temperature, max_tokens=self.max_tokens, seed=self.seed)


@dataclass(frozen=True)
class Answer:
    """One conversation about a problem, from its first turn to its reward."""

    turns: tuple[str, ...]
    """What the model wrote; the tool's results stand between any two."""
    reward: float
    length: int
    """Tokens of all turns."""
    stopped: bool
    """Whether the last turn ended by itself, not at a limit."""

    @property
    def solved(self) -> bool:
        """Whether it earned the whole reward."""
        return self.reward == 1


@dataclass(frozen=True)
class TaskEval:
    """A model's answers to a task's problems."""

    greedy: list[Answer]
    """One for each problem."""
    sampled: list[list[Answer]]
    """The samples of each problem; the lists are empty where none were drawn."""

    def per_problem(self) -> dict[str, list[float]]:
        """Of each metric, the value of every problem. Stop rate and length are of all answers."""
        samples = len(self.sampled[0])
        values = {GREEDY: [float(answer.solved) for answer in self.greedy]}
        for k in _ks(samples):
            rights = [sum(answer.solved for answer in answers) for answers in self.sampled]
            values[f"pass@{k}"] = [pass_at_k(samples, right, k) for right in rights]
        if samples > 1:
            values[f"maj@{samples}"] = [_majority(answers) for answers in self.sampled]
        every = [[greedy, *answers] for greedy, answers in zip(self.greedy, self.sampled, strict=True)]
        values["stop_rate"] = [statistics.fmean(answer.stopped for answer in answers) for answers in every]
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

    `finished` is called after each answer. Raises ConfigError where the task has too few problems, or one does not fit
    the model's context; ValueError where the model has no chat template, or its logits are not finite.
    """
    chosen = distinct_problems(task, config.problems)
    greedy = converse(engine, task, chosen, replace(config.sampling(), temperature=0.0), 1, finished)
    sampled = converse(engine, task, chosen, config.sampling(), config.samples, finished)
    return TaskEval([answers[0] for answers in greedy], sampled)


def distinct_problems(task: Task, count: int) -> list[Problem]:
    """The first `count` test problems of different content. Raises ConfigError where there are not so many."""
    found: dict[int, Problem] = {}
    for problem in problems(task, "test", count=_REPEATS * count):
        found.setdefault(problem.key, problem)
        if len(found) == count:
            return list(found.values())
    raise ConfigError(f"problems is {count}; among {_REPEATS * count} test problems of {task.name} {len(found)} differ")


@dataclass
class _Conversation:
    problem: Problem
    sample: int
    messages: list[Message]
    turns: list[Generation]
    texts: list[str]


def converse(
    engine: Engine,
    task: Task,
    chosen: Sequence[Problem],
    params: SamplingParams,
    samples: int = 1,
    finished: Callable[[], None] = lambda: None,
) -> list[list[Answer]]:
    """`samples` answers to each problem, with the tool's results between turns. Raises as `evaluate_task` does."""
    waiting: dict[Generation, _Conversation] = {}
    answers: list[dict[int, Answer]] = [{} for _ in chosen]
    places = {problem.index: place for place, problem in enumerate(chosen)}

    def submit(talk: _Conversation, prompt: list[int]) -> None:
        stream = talk.problem.index << _SAMPLE_BITS | talk.sample
        waiting[engine.submit(Request(prompt, params, stream=stream))] = talk

    try:
        for problem in chosen if samples else ():
            prompt = engine.encode_chat(problem.messages)
            if len(prompt) >= engine.max_length:
                raise ConfigError(
                    f"task {task.name}, problem {problem.index} has {len(prompt)} tokens; with an answer it must fit "
                    f"the model's context of {engine.max_length}"
                )
            for sample in range(samples):
                submit(_Conversation(problem, sample, [*problem.messages], [], []), prompt)
        while engine.has_work:
            for handle, _ in engine.step():
                if not handle.finished or handle not in waiting:
                    continue
                talk = waiting.pop(handle)
                result = _take_turn(engine, task, talk, handle)
                prompt = [] if result is None else engine.encode_chat(talk.messages)
                if 0 < len(prompt) < engine.max_length:
                    submit(talk, prompt)
                else:
                    answers[places[talk.problem.index]][talk.sample] = _answer(task, talk, stopped=not prompt)
                    finished()
    finally:  # where something was raised, requests are left
        for handle in waiting:
            engine.cancel(handle)
    return [[by_sample[sample] for sample in range(samples)] for by_sample in answers]


def _take_turn(engine: Engine, task: Task, talk: _Conversation, handle: Generation) -> str | None:
    """Add a finished turn, and the tool's result where it calls one and may; returns that result."""
    if handle.error is not None:
        raise ValueError(f"task {task.name}, problem {talk.problem.index}: the answer ends in an error: {handle.error}")
    text = engine.completion(handle).text or ""
    talk.turns.append(handle)
    talk.texts.append(text)
    may_call = len(talk.turns) <= task.tool_calls and handle.finish_reason == "stop"
    result = task.tool_result(talk.problem, text) if may_call else None
    if result is not None:
        talk.messages += [{"role": "assistant", "content": text}, {"role": "user", "content": result}]
    return result


def _answer(task: Task, talk: _Conversation, stopped: bool) -> Answer:
    stopped = stopped and talk.turns[-1].finish_reason == "stop"
    reward = checked_reward(task, talk.problem, talk.texts[-1])
    return Answer(tuple(talk.texts), reward, sum(len(turn.token_ids) for turn in talk.turns), stopped)


def _ks(samples: int) -> list[int]:
    """1, 2, 4 … and the number of samples itself."""
    return sorted({2**power for power in range(samples.bit_length())} | ({samples} if samples else set()))


def _majority(answers: Sequence[Answer]) -> float:
    return maj_at_k([final_answer(each.turns[-1]) for each in answers], [each.solved for each in answers], len(answers))
