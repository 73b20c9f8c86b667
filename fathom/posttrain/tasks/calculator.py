"""A task with a tool: a nested expression of small numbers, and a calculator that takes one operation at a time.

The model calls it in plain text, `calc(3 8 * 4 7)` on the last line of a turn, and the result comes back as a user's
message: that works with every tokenizer and chat template. A call is parsed here, and nothing is executed.
"""

import re

from fathom.posttrain.tasks.protocol import Draws, Problem, Task, answer_line, final_answer
from fathom.posttrain.tasks.worked import same_symbols, spaced

_DIGITS = 12
"""Longest number in a call."""
_CALL = re.compile(rf"calc\((-?[0-9]{{1,{_DIGITS}}})([+*-])(-?[0-9]{{1,{_DIGITS}}})\)")
_LONGEST = 100
"""Characters of a call."""


class Calculator(Task):
    """1 to 3 operations on numbers of 1 to 3 digits."""

    name = "calculator"
    tool_calls = 4
    """One more than a solution needs: a call that fails can be repeated."""

    def problem(self, i: int) -> Problem:
        """The i-th problem; no intermediate result is negative."""
        draws = Draws(self.name, i)
        value = draws.below(10 ** draws.between(1, 3))
        question, turns = spaced(value), []
        for step in range(draws.between(1, 3)):
            operand, operator = draws.below(10 ** draws.between(1, 3)), "+-*"[draws.below(3)]
            if operator == "-" and operand > value:
                operator = "+"
            left = f"( {question} )" if step else question
            question = f"{left} {operator} {spaced(operand)}"
            turns.append(f"calc({spaced(value)} {operator} {spaced(operand)})")
            value = compute(value, operator, operand)
        content = f"Compute with one call a message, such as calc(1 + 2), then {answer_line('the result')}\n{question}"
        answer = spaced(value)
        return Problem(i, ({"role": "user", "content": content},), answer, (*turns, answer_line(answer)))

    def reward(self, problem: Problem, text: str) -> float:
        """1 for the right number, digits set apart or not; otherwise 0."""
        return float(same_symbols(final_answer(text), problem.answer))

    def tool_result(self, problem: Problem, text: str) -> str | None:
        """The result of the call on the last line, or what is wrong with it."""
        call = text.rstrip().rpartition("\n")[2]
        if not call.startswith("calc("):
            return None
        parsed = _CALL.fullmatch(call.replace(" ", "")) if len(call) <= _LONGEST else None
        if parsed is None:
            return f"error: calc takes two integers of at most {spaced(_DIGITS)} digits and one of + - *"
        return f"result: {spaced(compute(int(parsed[1]), parsed[2], int(parsed[3])))}"


def compute(left: int, operator: str, right: int) -> int:
    """left operator right, for + - *."""
    if operator == "+":
        return left + right
    return left - right if operator == "-" else left * right
