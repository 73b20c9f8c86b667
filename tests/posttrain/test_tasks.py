"""Tasks: pure problems, splits that do not meet, worked solutions that are right, and rewards for nothing else."""

import ast
import math
import random
import re
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.config import ConfigError
from fathom.data.tokenizer import SMALLEST_VOCABULARY, train_tokenizer
from fathom.posttrain.tasks import NAMES, task
from fathom.posttrain.tasks.gym import _FORMS
from fathom.posttrain.tasks.protocol import (
    Problem,
    Task,
    TaskError,
    answer_line,
    checked_reward,
    final_answer,
    problems,
    worked_conversation,
)

names = pytest.mark.parametrize("name", NAMES)


@names
def test_a_problem_is_a_pure_function_of_its_number(name: str) -> None:
    random.seed(1)
    first = [task(name).problem(i) for i in range(30)]
    random.seed(2)
    again = task(name)
    assert [again.problem(i) for i in reversed(range(30))] == first[::-1]
    assert len({problem.key for problem in first}) > 25


@names
def test_no_problem_is_in_both_splits(name: str) -> None:
    found = task(name)
    train, test = ({each.key for each in problems(found, split, count=400)} for split in ("train", "test"))
    assert not train & test
    share = sum(found.problem(i).split == "test" for i in range(2000)) / 2000
    assert share == pytest.approx(1 / 8, abs=0.04)


def test_a_later_start_continues_the_split() -> None:
    found = task("addition")
    whole = list(problems(found, "train", count=50))
    assert list(problems(found, "train", start=20, count=30)) == whole[20:]
    assert [problem.index for problem in whole] == sorted(problem.index for problem in whole)
    assert next(problems(found, "test", start=3)) == list(problems(found, "test", count=4))[3]


@names
def test_the_worked_solution_is_right_and_short(name: str) -> None:
    """In the vocabulary of bytes alone, the longest that there is, each fits a context of 1024."""
    found, tokenizer = task(name), train_tokenizer(["a"], SMALLEST_VOCABULARY)
    for i in range(300):
        problem = found.problem(i)
        conversation = worked_conversation(found, problem)
        assert checked_reward(found, problem, problem.example[-1]) == 1
        assert conversation[-1] == {"role": "assistant", "content": problem.example[-1]}
        assert [message["role"] for message in conversation] == ["user", "assistant"] * (len(conversation) // 2)
        assert len(problem.example) <= found.tool_calls + 1
        text = "".join(message["content"] for message in conversation)
        assert len(tokenizer.encode(text)) < 500


@names
def test_digits_and_letters_stand_apart(name: str) -> None:
    """So that each is a token of its own; the instruction is prose, and its only sum an example."""
    found = task(name)
    for i in range(100):
        question, *rest = worked_conversation(found, found.problem(i))
        text = "\n".join([question["content"].split("\n", 1)[1], *(message["content"] for message in rest)])
        assert not re.search(r"[0-9]{2}|[0-9][a-z]|[a-z][0-9]", text), text


def numbers(text: str) -> list[int]:
    return [int(part.replace(" ", "")) for part in re.findall(r"\d(?: \d)*", text)]


def test_the_answers_are_those_of_python() -> None:
    """By other means than the tasks' own: through the question alone."""
    difficulty = set()
    for i in range(300):
        question = {name: task(name).problem(i).messages[0]["content"].split("\n")[1] for name in NAMES}
        answer = {name: (task(name).problem(i).answer or "").replace(" ", "") for name in NAMES}
        assert int(answer["addition"]) == sum(numbers(question["addition"]))
        difficulty.add(max(len(str(number)) for number in numbers(question["addition"])))
        assert answer["sort_digits"] == "".join(sorted(question["sort_digits"].split()))
        assert answer["reverse_letters"] == "".join(reversed(question["reverse_letters"].split()))
        letter, _, letters = question["count_letters"].partition(" in ")
        assert int(answer["count_letters"]) == letters.split().count(letter)
        assert int(answer["calculator"]) == evaluated(question["calculator"])
    assert difficulty == {1, 2, 3, 4, 5}


def evaluated(expression: str) -> int:
    tree = ast.parse(re.sub(r"\b0+(?=\d)", "", re.sub(r"(?<=\d) (?=\d)", "", expression)), mode="eval")
    assert all(isinstance(node, ast.Expression | ast.BinOp | ast.Constant | ast.operator) for node in ast.walk(tree))
    return int(eval(compile(tree, "question", "eval")))


def test_the_steps_of_an_addition_carry() -> None:
    for i in range(100):
        problem = task("addition").problem(i)
        *steps, last = problem.example[0].split("\n")
        carry, sum_digits = 0, ""
        for step in steps:
            left, right, before, after, digit = map(int, re.findall(r"\d", step))
            assert before == carry and left + right + carry == 10 * after + digit
            carry, sum_digits = after, f"{digit}{sum_digits}"
        assert int(f"{carry}{sum_digits}") == int(last.removeprefix("answer:").replace(" ", ""))


def test_the_steps_of_a_count_count() -> None:
    problem = next(each for each in problems(task("count_letters"), "train") if len(each.example[0]) > 60)
    wanted, *letters = re.findall(r"\b[a-z]\b", problem.messages[0]["content"].split("\n")[1])
    count = 0
    for letter, step in zip(letters, problem.example[0].split("\n"), strict=False):
        count += letter == wanted
        assert step.replace(" ", "") == f"{letter}{count}"


# ------------------------------------------------------------------------------------------------------- rewards

FORMS = [
    "{0} or {1}",
    "{1} or {0}",
    "{0}, {1}",
    "{0} {1}",
    "{0}\n{1}",
    "{0}\nanswer: {1}",
    "{0} answer: {1}",
    "{1}\nAnswer: {0}",
]


@names
@given(number=st.integers(0, 500), data=st.data())
@settings(max_examples=120, deadline=None)
def test_a_mutation_that_changes_the_value_earns_nothing(name: str, number: int, data: st.DataObject) -> None:
    found = task(name)
    problem = found.problem(number)
    text, alphabet = problem.example[-1], "0123456789abcxyz +-.,:;=()\n\tanswer"
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(text.rfind("answer:") if "answer:" in text else 0, len(text)))
        kind = data.draw(st.sampled_from(["insert", "delete", "replace", "swap"]))
        new = data.draw(st.sampled_from(alphabet))
        head, tail = text[:place], text[place:]
        text = {
            "insert": head + new + tail,
            "delete": head + tail[1:],
            "replace": head + new + tail[1:],
            "swap": head + tail[1:2] + tail[:1] + tail[2:],
        }[kind]
    expected = value(text) == value(problem.example[-1])
    assert checked_reward(found, problem, text) == float(expected), repr(text)


def value(text: str) -> str | None:
    """By the format's definition, one line after the other."""
    lines = text.strip().split("\n")
    marks = [place for place, line in enumerate(lines) if "answer:" in line.lower()]
    if len(marks) != 1 or not lines[marks[0]].startswith("answer:") or text.lower().count("answer:") != 1:
        return None
    return "\n".join([lines[marks[0]].removeprefix("answer:"), *lines[marks[0] + 1 :]]).strip().replace(" ", "")


@names
def test_hedged_repeated_and_hidden_answers_earn_nothing(name: str) -> None:
    found = task(name)
    for i in range(100):
        problem, other = found.problem(i), found.problem(i + 1)
        right, wrong = problem.answer, other.answer if other.answer != problem.answer else "9 9 9 9 9 9 9"
        assert right is not None and wrong is not None
        texts = [answer_line(form.format(right, wrong)) for form in FORMS]
        texts += [answer_line(f"{right}\n{right}"), answer_line(f"{right} {right}"), f"{answer_line(right)}\n" * 2]
        texts += [right, f"it is {right}", f"The answer: {right}", f"Answer: {right}", f"x {answer_line(right)}"]
        texts += [answer_line(f"{right}."), answer_line(f"{right} of course"), answer_line(f"maybe {right}")]
        texts += [f"{answer_line(wrong)}\n{answer_line(right)}", problem.messages[0]["content"]]
        texts += [problem.example[-1] + "\nor not", f"{problem.example[-1]}\n{problem.example[-1]}"]
        texts += ["".join(turn for turn in problem.example[:-1])]
        accepted = [text for text in texts if checked_reward(found, problem, text)]
        assert accepted == []


@names
def test_garbage_earns_nothing(name: str) -> None:
    found, draw = task(name), random.Random(0)
    problem = found.problem(7)
    pieces = [
        "answer:",
        "answer",
        ":",
        " ",
        "\n",
        "calc(",
        ")",
        "or",
        "０",
        "٣",
        "\x00",
        "\u200b",
        "½",
        "-",
        "+",
        "*",
        "=",
    ]
    pieces += [*"0123456789abcxyz", "", "￼", "é"]
    for _ in range(3000):
        text = "".join(draw.choices(pieces, k=draw.randrange(30)))
        if value(text) != value(problem.example[-1]):
            assert checked_reward(found, problem, text) == 0, repr(text)
    assert checked_reward(found, problem, "") == 0
    assert checked_reward(found, problem, "answer: " * 10_000) == 0
    assert checked_reward(found, problem, "answer:" + "\n" * 10_000) == 0


def test_where_an_answer_stands() -> None:
    assert final_answer("2\n1 2\nanswer: 1 2") == "1 2"
    assert final_answer("answer: 1 2\n") == "1 2"
    assert final_answer("answer:\n1 0\n0 1") == "1 0\n0 1"
    for text in (
        "",
        "answer",
        "1 2",
        "so answer: 1",
        "answer: 1\nanswer: 1",
        "ANSWER: 1\nanswer: 1",
        "answer: answer: 1",
    ):
        assert final_answer(text) is None


# ---------------------------------------------------------------------------------------------------- calculator


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("calc(3 8 * 4 7)", "result: 1 7 8 6"),
        ("calc(38*47)", "result: 1 7 8 6"),
        ("First the product.\ncalc(2 - 1 2)\n", "result: - 1 0"),
        ("calc(- 5 * - 3)", "result: 1 5"),
        ("calc(9 9 9 9 9 9 9 9 9 9 9 9 * 1)", "result: 9 9 9 9 9 9 9 9 9 9 9 9"),
        ("answer: 3", None),
        ("calc", None),
        ("", None),
        ("calc(1 + 2)\nanswer: 3", None),
        ("so calc(1 + 2)", None),
    ],
)
def test_the_calculator_computes_what_the_last_line_calls(text: str, result: str | None) -> None:
    found = task("calculator")
    assert found.tool_result(found.problem(0), text) == result


@pytest.mark.parametrize(
    "call",
    [
        *(
            "calc()",
            "calc(1)",
            "calc(1 + )",
            "calc(1 / 2)",
            "calc(1 + 2 + 3)",
            "calc(1 ** 2)",
            "calc(1 + 2",
            "calc(1.5 + 2)",
        ),
        *(
            "calc(__import__('os'))",
            "calc(1 + 2) or 4",
            "calc(1_0 + 2)",
            "calc(٣ + 2)",
            "calc(1e5 + 1)",
            "calc((1 + 2))",
        ),
        *(f"calc({'9 ' * 13}+ 1)", f"calc(1{' ' * 5000}+ 1)", f"calc({'9' * 100_000} * 9)"),
    ],
)
def test_what_is_no_operation_is_answered_with_an_error(call: str) -> None:
    found = task("calculator")
    assert (found.tool_result(found.problem(0), call) or "").startswith("error: calc takes two integers")


@given(st.integers(-(10**12) + 1, 10**12 - 1), st.sampled_from("+-*"), st.integers(-(10**12) + 1, 10**12 - 1))
def test_calls_of_any_size_are_computed_exactly(left: int, operator: str, right: int) -> None:
    found = task("calculator")
    expected = {"+": left + right, "-": left - right, "*": left * right}[operator]
    result = found.tool_result(found.problem(0), f"calc({' '.join(str(left))} {operator} {' '.join(str(right))})")
    assert result is not None and int(result.removeprefix("result:").replace(" ", "")) == expected


def test_other_tasks_have_no_tool() -> None:
    for name in NAMES:
        found = task(name)
        result = found.tool_result(found.problem(0), "calc(1 + 2)")
        assert (result is None, found.tool_calls == 0) == ((name != "calculator"),) * 2


def test_no_answer_takes_long_to_compare_with_a_form() -> None:
    """Patterns that can match a text in many ways take exponential time where they fail at its end."""
    for name, form in _FORMS.items():
        for unit in ("0", "1 ", "x", "x ", "(", "A", "A=1,", "L", "**0 ", "Q_\n", "A, ", "0.", "up ", "a" * 30 + "-"):
            text, began = (unit * 20_000)[:20_000] + "!", time.process_time()
            assert re.fullmatch(form, text, re.DOTALL) is None
            assert time.process_time() - began < 0.5, (name, unit)


# -------------------------------------------------------------------------------------------------------- errors


class Broken(Task):
    """Whatever it is given as its reward."""

    name = "broken"

    def __init__(self, reward: object) -> None:
        self._reward = reward

    def problem(self, i: int) -> Problem:
        return Problem(i, ({"role": "user", "content": str(i)},), None, ())

    def reward(self, problem: Problem, text: str) -> float:
        if isinstance(self._reward, Exception):
            raise self._reward
        return self._reward  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (math.nan, "the reward is nan"),
        (math.inf, "the reward is inf"),
        (-0.5, "the reward is -0.5"),
        (1.01, "the reward is 1.01; it must be a number from 0 to 1"),
        (KeyError("x"), "the reward raises KeyError: 'x'"),
        (None, "the reward raises TypeError"),
        ("high", "the reward raises ValueError"),
    ],
)
def test_a_reward_that_cannot_be_used_names_task_and_problem(reward: object, message: str) -> None:
    found = Broken(reward)
    with pytest.raises(TaskError, match=f"task broken, problem 17: {re.escape(message)}"):
        checked_reward(found, found.problem(17), "text")


def test_partial_rewards_are_passed_on() -> None:
    assert checked_reward(Broken(0.25), Broken(0).problem(0), "") == 0.25
    assert checked_reward(Broken(True), Broken(0).problem(0), "") == 1.0


def test_a_sample_needs_a_worked_solution_whose_calls_are_calls() -> None:
    with pytest.raises(ValueError, match="task broken, problem 3 has no worked solution"):
        worked_conversation(Broken(0), Broken(0).problem(3))
    found = task("calculator")
    with pytest.raises(ValueError, match="'calc' calls no tool"):
        worked_conversation(found, replace(found.problem(0), example=("calc", "answer: 1")))


@pytest.mark.parametrize("name", ["", "adition", "Addition", "reasoning_gym", "calculator "])
def test_a_task_that_does_not_exist_is_named_with_those_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match=f"no task '{name}'; there are addition, .*calculator and reasoning_gym:NAME"):
        task(name)


def test_without_the_package_its_tasks_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"reasoning_gym:ab needs .* 'fathom-lm\[posttrain\]'"):
        task("reasoning_gym:ab")
