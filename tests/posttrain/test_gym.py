"""Every task of reasoning-gym: problems are pure, the recorded answer is right, and nothing beside an answer is."""

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fathom.config import ConfigError
from fathom.posttrain.tasks import task
from fathom.posttrain.tasks.gym import GymTask, _Worker, _worker
from fathom.posttrain.tasks.protocol import Problem, answer_line

reasoning_gym = pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")

from reasoning_gym.factory import DATASETS  # noqa: E402

DATASET_NAMES = sorted(set(DATASETS) - {"composite"})
IN_MAKE_TEST = DATASET_NAMES[::25]
"""The others are tested in `make nightly`: three minutes."""
PROBLEMS = 6
WITHOUT_RECORD = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}

GARBAGE = [
    *("", " ", "x", "0", "1", "-1", "00", "nan", "inf", "1e400", "٠", "?", "....", "-", "(", "[[", "None", "null"),
    *("True or False", "yes", "no or yes", "[]", "{}", "()", "[[]]", "[0]", "0/0", "a b c", "0 0 0", "1, 2, 3"),
    *("the answer is 42", "impossible", "A or B", "x" * 500, "0" * 500, "[" * 5000, "answer", '{"a": 1}', "x\n" * 50),
    *("__import__('os')", "exit()", "9**9**9**9", "open('x', 'w')", "(lambda: 1)()", "print(1)", "input()"),
]


def gym(name: str) -> GymTask:
    found = task(f"reasoning_gym:{name}")
    assert isinstance(found, GymTask)
    return found


def wrong_answers(answer: str, other: str | None) -> list[str]:
    """What holds the right answer beside something else."""
    others = ["7", "x", "no", "B"] if other is None else [other, "7", "x", "no", "B"]
    both = [
        form.format(answer, each) for each in others for form in ("{0} or {1}", "{1} or {0}", "{0}\n{1}", "{0}; {1}")
    ]
    repeated = [f"{answer} {answer}", f"{answer}\n{answer}", "\n".join([answer] * 20)]
    return [*both, *repeated, f"it is {answer}", f"{answer} I think", f"{answer} {answer_line(answer)}", f"«{answer}»"]


def equal(answer: str, recorded: str) -> bool:
    """As texts but for blanks, or as numbers."""
    with contextlib.suppress(ValueError):
        return float(answer) == float(recorded)
    return answer.split() == recorded.split()


def reward(found: GymTask, problem: Problem, answer: str) -> float:
    return found.reward(problem, f"Let me see.\n{answer_line(answer)}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in IN_MAKE_TEST else pytest.mark.nightly) for name in DATASET_NAMES]
)
def test_the_recorded_answer_is_right_and_what_is_no_answer_is_not(name: str) -> None:
    found = gym(name)
    problems = [found.problem(i) for i in range(PROBLEMS)]
    assert (problems[0].answer is None) == (name in WITHOUT_RECORD)
    for place, problem in enumerate(problems):
        other = problems[place - 1].answer
        if problem.answer is None:
            assert problem.example == ()
            wrong = GARBAGE
        else:
            assert found.reward(problem, problem.example[0]) == 1
            assert reward(found, problem, problem.answer) == 1
            wrong = [each for each in GARBAGE if not equal(each, problem.answer)]
            if problem.answer:  # no solution is one, where an equation has none
                wrong += wrong_answers(problem.answer, other if other != problem.answer else None)
            assert found.reward(problem, problem.answer) == 0, "without the mark it is no answer"
        accepted = [answer for answer in wrong if reward(found, problem, answer) != 0]
        assert accepted == [], f"problem {problem.index}, whose answer is {problem.answer!r}"
    assert [found.reward(problems[0], text) for text in ("", "answer", "garbage " * 500)] == [0, 0, 0]
    assert _worker()._process is not None, "no request ended the process"
    assert [found.problem(i) for i in reversed(range(PROBLEMS))] == problems[::-1]


OTHER_FORMS: dict[str, Callable[[str], str]] = {
    "countdown": lambda answer: f"({answer.replace(' ', '')})",
    "cryptarithm": lambda answer: ", ".join(reversed(answer.split(","))),
    "group_anagrams": lambda answer: json.dumps(json.loads(answer)[::-1]),
    "palindrome_partitioning": lambda answer: json.dumps(json.loads(answer)[::-1]),
    "polynomial_multiplication": lambda answer: f"({answer}) + 0",
    "power_function": lambda answer: f"{float(answer):.3g}",
    "puzzle24": lambda answer: f"({answer})",
    "simple_integration": lambda answer: f"C + {answer.removesuffix(' + C')}",
}
"""Right answers that are not the recorded ones."""


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_FORMS)
def test_other_right_answers_are_right(name: str) -> None:
    found = gym(name)
    for i in range(PROBLEMS):
        problem = found.problem(i)
        assert problem.answer is not None
        other = OTHER_FORMS[name](problem.answer)
        assert reward(found, problem, other) == 1, (other, problem.answer)


@pytest.mark.slow
def test_where_no_answer_is_recorded_the_verifier_decides() -> None:
    for name, key in (("graph_color", "possible_answer"), ("propositional_logic", "example_answer")):
        found, dataset = gym(name), reasoning_gym.create_dataset(name, seed=0, size=500)
        for i in range(PROBLEMS):
            recorded = dataset[i]["metadata"][key]
            answer = recorded if isinstance(recorded, str) else json.dumps(recorded)
            problem = found.problem(i)
            assert dataset[i]["question"] in problem.messages[0]["content"]
            assert reward(found, problem, answer) == 1
            if name == "graph_color":
                wrong = json.dumps(dict.fromkeys(json.loads(answer), 1))
                assert reward(found, problem, wrong) == (json.loads(wrong) == json.loads(answer))


@pytest.mark.slow
def test_no_verifier_runs_what_a_model_writes(tmp_path: Path) -> None:
    """These evaluate an answer as Python."""
    trace = tmp_path / "trace"
    code = f"__import__('pathlib').Path('{trace}').touch()"
    names = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion", "puzzle24", "countdown")
    for name in (*names, "simple_integration", "intermediate_integration", "polynomial_multiplication"):
        found = gym(name)
        assert reward(found, found.problem(0), code) == 0
        assert not trace.exists()


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("name", ["word_ladder", "isomorphic_strings", "list_functions", "pool_matrix"])
def test_problems_are_the_same_in_every_process(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """These draw from global generators or from sets."""
    numbers = (3, 501, 0)
    first = [gym(name).problem(i) for i in numbers]
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    monkeypatch.setattr("fathom.posttrain.tasks.gym._worker", functools.cache(_Worker))
    other = gym(name)
    other.problem(9)
    assert [other.problem(i) for i in numbers] == first
    assert len({problem.key for problem in first}) == 3


@pytest.mark.slow
def test_a_verifier_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gym("simple_integration")
    monkeypatch.setattr("fathom.posttrain.tasks.gym._FORMS", {"simple_integration": ".*"})
    problem = found.problem(0)
    assert reward(found, problem, "9**9**9**9") == 0
    assert problem.answer is not None
    assert reward(found, problem, problem.answer) == 1, "another process judges the next one"
    assert found.problem(0) == problem


def test_a_data_set_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match="no data set 'nothing'; there are ab, acre"):
        gym("nothing")
