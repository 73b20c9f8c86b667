"""Names of the engine's methods that still work for one release."""

import warnings
from collections.abc import Iterator
from typing import Protocol, Self

from fathom.engine.outputs import Update


class _Engine(Protocol):
    def step_phases(self) -> Iterator[list[Update]]: ...

    def warm_up(self) -> None: ...


class OldNames:
    """What scripts written before `Engine` and its core became one class may call."""

    @property
    def core(self) -> Self:
        """Deprecated: the engine itself."""
        warnings.warn("Engine.core is the engine itself; use its own methods", DeprecationWarning, stacklevel=2)
        return self

    def prepare(self: _Engine) -> None:
        """Deprecated: `warm_up`."""
        warnings.warn("Engine.prepare is now Engine.warm_up", DeprecationWarning, stacklevel=2)
        self.warm_up()

    def parts(self: _Engine) -> Iterator[list[Update]]:
        """Deprecated: `step_phases`."""
        warnings.warn("Engine.parts is now Engine.step_phases", DeprecationWarning, stacklevel=2)
        return self.step_phases()
