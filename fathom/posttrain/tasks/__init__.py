"""Tasks with verifiable answers, by name: five of our own, and those of the package reasoning-gym."""

from fathom.config import ConfigError
from fathom.posttrain.tasks.calculator import Calculator
from fathom.posttrain.tasks.gym import GymTask
from fathom.posttrain.tasks.protocol import Task
from fathom.posttrain.tasks.worked import WORKED, WorkedTask

NAMES = (*WORKED, Calculator.name)
"""Those of our own."""

_GYM = "reasoning_gym:"


def task(name: str) -> Task:
    """The task of that name, of our own or `reasoning_gym:NAME`.

    Raises ConfigError where there is none; ImportError for one of reasoning-gym where the package is missing.
    """
    if name in WORKED:
        return WorkedTask(name, *WORKED[name])
    if name == Calculator.name:
        return Calculator()
    if name.startswith(_GYM):
        return GymTask(name.removeprefix(_GYM), name)
    raise ConfigError(f"there is no task {name!r}; there are {', '.join(NAMES)} and {_GYM}NAME")
