"""The requests of an engine that are not finished, all of one thread."""

import threading
from collections.abc import Iterator

from fathom.engine.outputs import Generation
from fathom.engine.request import RequestState
from fathom.engine.scheduler import Scheduler, SequenceState


class LiveRequests:
    """Found by their sequence or their handle. While there are any, other threads are refused."""

    def __init__(self) -> None:
        self._by_sequence: dict[SequenceState, RequestState] = {}
        self._by_generation: dict[Generation, RequestState] = {}
        self._thread, self._adding = threading.get_ident(), threading.Lock()

    def __len__(self) -> int:
        return len(self._by_sequence)

    def __iter__(self) -> Iterator[RequestState]:
        return iter(self._by_sequence.values())

    def __getitem__(self, sequence: SequenceState) -> RequestState:
        return self._by_sequence[sequence]

    def of(self, handle: Generation) -> RequestState | None:
        """The request of this handle; None once it has finished."""
        return self._by_generation.get(handle)

    def add(self, request: RequestState, scheduler: Scheduler) -> None:
        """Queue a request. Raises what `Scheduler.add` and `check_thread` raise."""
        with self._adding:
            self.check_thread()
            scheduler.add(request.sequence)
            self._by_sequence[request.sequence] = self._by_generation[request.generation] = request

    def remove(self, request: RequestState) -> None:
        """It has finished."""
        del self._by_sequence[request.sequence], self._by_generation[request.generation]

    def check_thread(self) -> None:
        """Raises RuntimeError in another thread than that of the requests; without any, the caller's may have some."""
        caller = threading.get_ident()
        if not self._by_sequence:
            self._thread = caller
        elif self._thread != caller:
            raise RuntimeError(
                f"the engine has {len(self)} unfinished requests of another thread, which alone may submit, step and "
                "cancel until they are finished; give every thread an engine, or submit all from one"
            )
