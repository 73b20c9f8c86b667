"""What a task is: numbered problems, a reward for the text that ends an answer, and perhaps a tool.

A problem is a pure function of its number, so that a resumed run meets the same ones. Whether it is a training or a
test problem is decided by a hash of its content: the same question cannot be in both, whatever its numbers.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count as count_from
from itertools import islice
from typing import Literal, Protocol

import xxhash

Message = dict[str, str]
"""One message of a conversation: role and content."""

Split = Literal["train", "test"]

_TEST_SHARE = 8
"""One problem in so many is a test problem."""

_MARK = "answer:"


class TaskError(ValueError):
    """A task's reward cannot be used; the message names task and problem."""


@dataclass(frozen=True)
class Problem:
    """One problem of a task."""

    index: int
    """Its number; numbers far apart may have the same content."""
    messages: tuple[Message, ...]
    """The conversation that is put to the model."""
    answer: str | None
    """The right answer, for the record; None where several are right and none is recorded."""
    example: tuple[str, ...]
    """A worked solution: the assistant's turns, the tool's results between them left out. Empty where there is none."""

    @property
    def key(self) -> int:
        """A hash of the content, equal for equal problems (64 bits)."""
        return xxhash.xxh3_64_intdigest(json.dumps(self.messages, sort_keys=True).encode())

    @property
    def split(self) -> Split:
        """Which split it belongs to."""
        return "test" if self.key % _TEST_SHARE == 0 else "train"


class Task(Protocol):
    """Problems with a verifiable answer."""

    name: str
    """What `task` finds it by."""
    tool_calls: int = 0
    """How many tool calls an answer may make; 0 where there is no tool."""

    def problem(self, i: int) -> Problem:
        """The problem of that number, from 0 up: a pure function."""
        ...

    def reward(self, problem: Problem, text: str) -> float:
        """From 0 (wrong) to 1 (right), for the model's last turn."""
        ...

    def tool_result(self, problem: Problem, text: str) -> str | None:
        """What the tool answers to a turn of the model, as a user's message; None where the turn calls no tool."""
        return None


def problems(task: Task, split: Split, start: int = 0, count: int | None = None) -> Iterator[Problem]:
    """The problems of a split in the order of their numbers, from its `start`-th on; endless without `count`.

    Earlier problems are computed to be skipped, so keep an iterator rather than starting anew.
    """
    of_split = (problem for problem in map(task.problem, count_from()) if problem.split == split)
    return islice(of_split, start, None if count is None else start + count)


def checked_reward(task: Task, problem: Problem, text: str) -> float:
    """The reward, a number from 0 to 1. Raises TaskError where the task raises or returns something else."""
    where = f"task {task.name}, problem {problem.index}"
    try:
        reward = float(task.reward(problem, text))
    except Exception as error:  # a task may be anybody's code
        raise TaskError(f"{where}: the reward raises {type(error).__name__}: {error}") from error
    if not (math.isfinite(reward) and 0 <= reward <= 1):
        raise TaskError(f"{where}: the reward is {reward}; it must be a number from 0 to 1")
    return reward


def worked_conversation(task: Task, problem: Problem) -> list[Message]:
    """The problem with its worked solution, the tool's results included: a sample for supervised fine-tuning.

    Raises ValueError where the task has no worked solution, or calls its tool otherwise than it should.
    """
    if not problem.example:
        raise ValueError(f"task {task.name}, problem {problem.index} has no worked solution")
    messages = [*problem.messages]
    for turn in problem.example[:-1]:
        result = task.tool_result(problem, turn)
        if result is None:
            raise ValueError(f"task {task.name}, problem {problem.index}: {turn!r} calls no tool")
        messages += [{"role": "assistant", "content": turn}, {"role": "user", "content": result}]
    return [*messages, {"role": "assistant", "content": problem.example[-1]}]


def answer_line(answer: str) -> str:
    """How a solution ends."""
    return f"{_MARK} {answer}"


def final_answer(text: str) -> str | None:
    """What stands behind `answer:`, which must begin a line and occur once; None where it does not.

    All of the rest belongs to the answer, so a remark behind it makes it another one.
    """
    before, mark, answer = text.rpartition(_MARK)
    if not mark or _MARK in before.lower() or _MARK in answer.lower() or (before and not before.endswith("\n")):
        return None
    return answer.strip()


class Draws:
    """Random integers that are a pure function of a task's name and a problem's number."""

    def __init__(self, name: str, index: int) -> None:
        self._stream, self._drawn = f"{name}/{index}", 0

    def below(self, end: int) -> int:
        """One of 0 … end − 1."""
        self._drawn += 1
        return xxhash.xxh3_64_intdigest(f"{self._stream}/{self._drawn}".encode()) % end

    def between(self, low: int, high: int) -> int:
        """One of low … high."""
        return low + self.below(high - low + 1)
