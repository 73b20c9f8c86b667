"""Four tasks on digits and letters whose solutions are short worked steps.

Digits and letters are set apart by blanks, so that each is a token of its own with any tokenizer; how long a problem is
decides how hard it is. The steps show how, and only the answer counts.
"""

from collections.abc import Callable
from typing import NamedTuple

from fathom.posttrain.tasks.protocol import Draws, Problem, Task, answer_line, final_answer

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class _Worked(NamedTuple):
    question: str
    steps: list[str]
    answer: str


def spaced(symbols: object) -> str:
    """Digits or letters, a blank between any two."""
    return " ".join(str(symbols))


class WorkedTask(Task):
    """A task whose problem, steps and answer are drawn at once."""

    def __init__(self, name: str, instruction: str, draw: Callable[[Draws], _Worked]) -> None:
        self.name, self._instruction, self._draw = name, instruction, draw

    def problem(self, i: int) -> Problem:
        """The i-th problem."""
        question, steps, answer = self._draw(Draws(self.name, i))
        content = f"{self._instruction}, then a last line, {answer_line('the result')}\n{question}"
        solution = "\n".join([*steps, answer_line(answer)])
        return Problem(i, ({"role": "user", "content": content},), answer, (solution,))

    def reward(self, problem: Problem, text: str) -> float:
        """1 for the right symbols in the right order, whether set apart or not; otherwise 0."""
        return float(same_symbols(final_answer(text), problem.answer))


def same_symbols(found: str | None, expected: str | None) -> bool:
    """Whether both are given and differ in blanks at most."""
    return found is not None and expected is not None and found.replace(" ", "") == expected.replace(" ", "")


def _addition(draws: Draws) -> _Worked:
    """Two numbers of 1 to 5 digits, from the right: digit + digit + carry = new carry, digit of the sum."""
    numbers = [draws.below(10 ** draws.between(1, 5)) for _ in range(2)]
    a, b = (str(number)[::-1] for number in numbers)
    length, carry, steps = max(len(a), len(b)), 0, []
    for left, right in zip(a.ljust(length, "0"), b.ljust(length, "0"), strict=True):
        total = int(left) + int(right) + carry
        steps.append(f"{left} + {right} + {carry} = {spaced(f'{total:02d}')}")
        carry = total // 10
    return _Worked(" + ".join(map(spaced, numbers)), steps, spaced(sum(numbers)))


def _sort_digits(draws: Draws) -> _Worked:
    """2 to 8 digits by insertion: the sorted digits so far."""
    digits = [str(draws.below(10)) for _ in range(draws.between(2, 8))]
    steps = [" ".join(sorted(digits[:end])) for end in range(1, len(digits))]
    return _Worked(" ".join(digits), steps, " ".join(sorted(digits)))


def _reverse_letters(draws: Draws) -> _Worked:
    """2 to 8 letters: each one put before those behind it."""
    letters = "".join(_LETTERS[draws.below(26)] for _ in range(draws.between(2, 8)))
    steps = [spaced(letters[:end][::-1]) for end in range(1, len(letters))]
    return _Worked(spaced(letters), steps, spaced(letters[::-1]))


def _count_letters(draws: Draws) -> _Worked:
    """How often a letter is among 2 to 16 of three kinds: each letter with the count so far."""
    kinds = [_LETTERS[(draws.below(8) + 8 * place) % 26] for place in range(3)]
    letters, wanted = [kinds[draws.below(3)] for _ in range(draws.between(2, 16))], kinds[draws.below(3)]
    counts = [letters[:end].count(wanted) for end in range(1, len(letters) + 1)]
    steps = [f"{letter} {spaced(count)}" for letter, count in zip(letters, counts, strict=True)]
    return _Worked(f"{wanted} in {' '.join(letters)}", steps, spaced(counts[-1]))


WORKED = {
    "addition": ("Add from the right with carries", _addition),
    "sort_digits": ("Sort the digits one by one", _sort_digits),
    "reverse_letters": ("Reverse the letters one by one", _reverse_letters),
    "count_letters": ("Count the letter step by step", _count_letters),
}
"""Of each task the instruction, and how it is drawn."""
