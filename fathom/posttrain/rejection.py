"""Rejection sampling: of several answers to each problem, those that are right become conversations to fine-tune on.

It is how DeepSeek-R1's reasoning was turned into data for fine-tuning (arXiv 2501.12948, section 2.3.3).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fathom.engine.engine import Engine
from fathom.engine.sampling.sampler import SamplingParams
from fathom.posttrain.rollout import Rollout, rollouts
from fathom.posttrain.tasks.protocol import Problem, Task

_AT_ONCE = 256
"""Conversations in the engine at one time."""


@dataclass
class SampledProblem:
    """What came of one problem."""

    answers: int
    right: int
    kept: list[dict[str, Any]]
    """Lines for `fathom sft`."""


def rejection_sample(
    engine: Engine, task: Task, problems: Sequence[Problem], samples: int, keep: int, params: SamplingParams
) -> Iterator[SampledProblem]:
    """Answer each problem `samples` times and keep the first `keep` right answers that differ, problem by problem.

    Right is a full reward of an answer that ended by itself. What is drawn is a function of `params.seed`, the problem
    and the number of the answer. Raises TaskError where a reward cannot be used.
    """
    at_once = max(1, _AT_ONCE // samples)
    for start in range(0, len(problems), at_once):
        for group in rollouts(
            engine, task, problems[start : start + at_once], samples, params, seed=str(params.seed or 0)
        ):
            right = [rollout for rollout in group if rollout.passed and rollout.finish_reason == "stop"]
            distinct = {tuple(rollout.turns): rollout for rollout in reversed(right)}
            first = sorted(distinct.values(), key=right.index)[:keep]
            yield SampledProblem(len(group), len(right), [row(task, rollout) for rollout in first])


def row(task: Task, rollout: Rollout) -> dict[str, Any]:
    """A conversation as a line of the data, tool's answers included."""
    messages: list[dict[str, str]] = [*rollout.problem.messages]
    for number, turn in enumerate(rollout.turns):
        if number:
            result = task.tool_result(rollout.problem, rollout.turns[number - 1])
            assert result is not None  # else there would be no further turn
            messages.append({"role": "user", "content": result})
        messages.append({"role": "assistant", "content": turn})
    return {"messages": messages, "task": task.name, "problem": rollout.problem.index}
