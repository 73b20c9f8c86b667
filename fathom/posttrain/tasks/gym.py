"""The tasks of the package reasoning-gym, by the name of their data set, with rewards that are strict.

The package's verifiers are generous: one takes any text for a yes, others find the answer anywhere in a text, or
evaluate it as Python. So an answer is right when it is the recorded one; and a verifier decides only where several
answers are right, and only on an answer of the form that the task prescribes. Problems and verifiers run in a process
of their own (`gym_worker.py`).
"""

import contextlib
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import weakref
from decimal import Decimal
from pathlib import Path
from typing import Any

from fathom.config import ConfigError
from fathom.posttrain.tasks.protocol import Problem, Task, answer_line, final_answer

_ENOUGH = 0.99
"""The verifier's score from which an answer is right; less is partial credit."""
_LONGEST = 20_000
"""Characters of an answer; the longest recorded ones are far below."""

_NUMBER = r"-?(?:0|[1-9][0-9]{0,40})(?:\.[0-9]{1,40})?(?:e[+-]?[0-9]{1,3})?"
_ARITHMETIC = r"(?!.*(?:\*\*|//))[0-9+*/() -]+"
# No other name, and no tower of powers: sympy evaluates what it parses.
_NAMES = r"\b(?:sin|cos|tan|asin|acos|atan|exp|log|sqrt|[A-Za-z])\b"
_FORMULA = rf"(?!.*\*\* ?[0-9]+ ?\*\*)(?:{_NAMES}|[0-9+*/() -])+"


def _list(item: str, between: str) -> str:
    return f"{item}(?:{between}{item})*"


_FORMS = {
    "boxnet": r"\{.*\}",
    "complex_arithmetic": rf"{_NUMBER} ?[+-] ?{_NUMBER}i",
    "countdown": _ARITHMETIC,
    "cryptarithm": _list(r"[A-Z]=[0-9]", ", ?"),
    "graph_color": r"\{" + _list(r'"[0-9]+": ?[0-9]+', r",\s*") + r"\}",
    "intermediate_integration": _FORMULA,
    "jugs": r"\[" + _list(r'"(?:(?:fill|empty) [A-Z]|pour [A-Z]->[A-Z])"', ", ?") + r"\]",
    "kakurasu": _list("[01](?: [01])*", r"\n"),
    "knight_swap": r"\[" + _list(r'"[wB],[A-Z][0-9],[A-Z][0-9]"', ", ?") + r"\]",
    "n_queens": r"[Q_ \n]+",
    "palindrome_generation": r"[a-z]+",
    "polynomial_multiplication": _FORMULA,
    "power_function": _NUMBER,
    "propositional_logic": r"[A-Z¬∧∨→↔() ]+",
    "puzzle24": _ARITHMETIC,
    "quantum_lock": _list("[A-Z]", " → "),
    "rubiks_cube": _list(r"[A-Z]'?", " "),
    "rush_hour": _list(r"[A-Z][+-][0-9]+", " "),
    "shortest_path": _list("(?:up|down|left|right)", " "),
    "simple_integration": _FORMULA,
    "sokoban": r"[LRUD]+",
    "tower_of_hanoi": _list(r"Move disk [0-9]+ from Peg [0-9]+ to Peg [0-9]+", r"\n"),
    "word_ladder": _list(r"[A-Z]+", ", ?"),
}
"""The data sets whose problems have several right answers, and the form of one."""

_REORDERED = ("group_anagrams", "palindrome_partitioning")
"""Here the right answers are those of the same characters that the verifier takes: lists in another order."""


class GymTask(Task):
    """The problems of one data set."""

    def __init__(self, dataset: str, name: str) -> None:
        """Raises ConfigError for a data set that does not exist, ImportError without the package."""
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ImportError(f"task {name} needs the package reasoning-gym: pip install 'fathom-lm[posttrain]'")
        self.name, self._dataset = name, dataset
        names = _worker().exchange({"names": True})
        if names is None:
            raise ImportError(f"task {name}: the package reasoning-gym is there, but cannot be imported")
        if dataset not in names:
            raise ConfigError(f"reasoning-gym has no data set {dataset!r}; there are {', '.join(names)}")

    def problem(self, i: int) -> Problem:
        """The i-th problem. Raises ValueError where the package cannot make it."""
        entry = _worker().exchange({"dataset": self._dataset, "problem": i})
        if entry is None:
            raise ValueError(f"task {self.name}, problem {i}: reasoning-gym cannot make it")
        content = f"{entry['question']}\n\nEnd with {answer_line('and the answer, with nothing behind it')}"
        answer = entry["answer"]
        example = () if answer is None else (answer_line(answer),)
        return Problem(i, ({"role": "user", "content": content},), answer, example)

    def reward(self, problem: Problem, text: str) -> float:
        """1 for the recorded answer, and where several are right for one that the verifier takes; otherwise 0."""
        answer = final_answer(text)
        if answer is None or len(answer) > _LONGEST:
            return 0.0
        if problem.answer is not None and _same(answer, problem.answer):
            return 1.0
        return float(self._may_be_right(answer, problem.answer) and self._score(problem.index, answer) >= _ENOUGH)

    def _may_be_right(self, answer: str, recorded: str | None) -> bool:
        """Whether it is of the form of an answer, where the recorded one is not the only one."""
        if self._dataset in _REORDERED and recorded is not None:
            return sorted("".join(answer.split())) == sorted("".join(recorded.split()))
        form = _FORMS.get(self._dataset)
        return form is not None and re.fullmatch(form, answer, re.DOTALL) is not None

    def _score(self, index: int, answer: str) -> float:
        score = _worker().exchange({"dataset": self._dataset, "score": index, "answer": answer})
        return 0.0 if score is None else float(score)


class _Worker:
    """The process of the package, which all tasks share; it is started anew when it has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def exchange(self, request: dict[str, Any]) -> Any:
        """What the process answers; None where the package raises, or takes too much time or memory."""
        if self._process is None:
            self._process = _start()
            weakref.finalize(self, _stop, self._process)
        assert self._process.stdin is not None and self._process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            _stop(self._process)
            self._process = None
        return json.loads(line) if line else None


@functools.cache
def _worker() -> _Worker:
    return _Worker()


def _start() -> "subprocess.Popen[str]":
    return subprocess.Popen(
        # -P: beside the worker are modules named like some of the standard library.
        [sys.executable, "-P", str(Path(__file__).with_name("gym_worker.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        # Some data sets draw from sets of strings, whose order would change from process to process.
        env=os.environ | {"PYTHONHASHSEED": "0"},
        process_group=0,  # Ctrl-C in a terminal is not for it
    )


def _stop(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()  # which ends it
    process.wait()
    process.stdout.close()


def _same(answer: str, recorded: str) -> bool:
    """Whether two answers are the same text but for blanks, or the same number."""
    if all(re.fullmatch(_NUMBER, each) for each in (answer, recorded)):
        return Decimal(answer) == Decimal(recorded)
    return _lines(answer) == _lines(recorded)


def _lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.strip().split("\n")]
