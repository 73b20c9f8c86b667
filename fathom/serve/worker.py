"""The engine in a thread of its own, and how coroutines of one event loop speak with it.

Only that thread touches the engine. Coroutines leave commands in a queue; after every step the thread leaves what is
new with the event loop, all requests together, and the loop hands it on to those who wait for it, not more often than
it can afford. A reader that is slow only lets its own events pile up, which are no more than its answer is long.
"""

import asyncio
import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fathom.infer.engine import Engine, Request
from fathom.infer.reports import Generation, Stats

_IDLE_SECONDS = 0.5
"""How long the thread sleeps at most when there is nothing to do."""

_RATE_SECONDS = 5.0
"""Tokens per second are taken over such a time."""

_SNAPSHOT_SECONDS = 0.1
"""How old the engine's counts may be that others see."""

_PIECES_PER_SECOND = 300.0
"""How many pieces of answers are handed on at most, all requests together. A small model writes more tokens than that,
and sending each of them by itself would take the processor from it. First pieces and last ones never wait."""


class EngineDiedError(RuntimeError):
    """The engine's thread has ended; nothing will be answered any more."""


class Event(NamedTuple):
    """What came of one choice: how many tokens and readings of tokens there are now, and whether it is over."""

    choice: int
    tokens: int
    finished: bool


@dataclass(eq=False)
class Job:
    """The choices of one HTTP request on their way through the engine."""

    handles: list[Generation]
    submitted: float
    """When, by time.monotonic."""
    events: "asyncio.Queue[Event | Exception]" = field(default_factory=asyncio.Queue)
    """What the engine brings, or why it will bring no more."""
    first_token: float | None = None
    finished: float | None = None


class Rate(NamedTuple):
    """Counts at a moment."""

    at: float
    generated: int


class Worker:
    """Runs an engine. `start` within the event loop that asks; `stop` when it ends."""

    def __init__(self, engine: Engine, died: Callable[[BaseException], None] = lambda error: None) -> None:
        """`died` is called, in the event loop, if the engine raises."""
        self._engine = engine
        self._died = died
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._jobs: dict[Generation, tuple[Job, int]] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopping = False
        self._snapshot_at = 0.0
        self._history: deque[Rate] = deque(maxlen=512)
        self._held: dict[tuple[Job, int], Event] = {}
        self._handed_on = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.stats: Stats = engine.core.stats()
        """What the engine does; at most a tenth of a second old while it works."""
        self.failure: BaseException | None = None
        """Why the engine's thread ended."""
        self.started = time.monotonic()

    def start(self) -> None:
        """Begin; call it inside the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End after the step that is running; what is not finished stays so."""
        self._stopping = True
        self._commands.put(lambda: None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and self.failure is None and not self._stopping

    async def submit(self, requests: Sequence[Request]) -> Job:
        """Queue all of `requests`, or none.

        Raises ValueError for what the engine cannot serve, scheduler.QueueFull, EngineDiedError.
        """
        answer: asyncio.Future[Job] = self._loop.create_future()
        if not self.alive:
            raise EngineDiedError("the engine has stopped")
        self._commands.put(lambda: self._submit(requests, answer))
        try:
            return await answer
        except asyncio.CancelledError:
            # It may have been queued all the same.
            answer.cancel()
            raise

    def cancel(self, job: Job) -> None:
        """End what is left of it at the engine's next step."""
        if not all(handle.finished for handle in job.handles):
            self._commands.put(lambda: self._cancel(job))

    def tokens_per_second(self) -> float:
        """Generated, over the last seconds."""
        now = time.monotonic()
        recent = [each for each in list(self._history) if each.at > now - _RATE_SECONDS]
        if len(recent) < 2:
            return 0.0
        return (recent[-1].generated - recent[0].generated) / (now - recent[0].at)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._obey()
                if self._engine.has_work:
                    self._report()
                self._look(force=not self._engine.has_work)
        except BaseException as error:
            self.failure = error
            with contextlib.suppress(RuntimeError):  # the event loop may have ended
                self._loop.call_soon_threadsafe(self._tell_death, error)

    def _obey(self) -> None:
        """Do what coroutines asked for; with nothing else to do, wait for it."""
        with contextlib.suppress(queue.Empty):
            if not self._engine.has_work:
                self._commands.get(timeout=_IDLE_SECONDS)()
            while not self._stopping:
                self._commands.get_nowait()()

    def _report(self) -> None:
        """One step, and what it brought to the event loop."""
        news: list[tuple[Job, Event, bool]] = []
        now = 0.0
        for update in self._engine.step():
            generation = update.generation
            if generation not in self._jobs:
                continue
            now = now or time.monotonic()
            job, choice = self._jobs[generation]
            if job.first_token is None and update.tokens:
                job.first_token = now
            if generation.finished:
                del self._jobs[generation]
                job.finished = now
            made = len(generation.token_ids)
            urgent = generation.finished or made == len(update.tokens)
            news.append((job, Event(choice, made, generation.finished), urgent))
        if news:
            self._loop.call_soon_threadsafe(self._arrived, news)

    def _arrived(self, news: list[tuple[Job, Event, bool]]) -> None:
        """Hand on what is urgent, and the rest when its turn comes: of each choice the last event tells all."""
        for job, event, urgent in news:
            if urgent:
                self._held.pop((job, event.choice), None)
                job.events.put_nowait(event)
            else:
                self._held[job, event.choice] = event
        if self._held and self._timer is None:
            due = self._handed_on + len(self._held) / _PIECES_PER_SECOND
            self._timer = self._loop.call_at(due, self._hand_on)

    def _hand_on(self) -> None:
        self._timer = None
        self._handed_on = self._loop.time()
        for (job, _), event in self._held.items():
            job.events.put_nowait(event)
        self._held.clear()

    def _look(self, force: bool) -> None:
        now = time.monotonic()
        if force or now - self._snapshot_at >= _SNAPSHOT_SECONDS:
            self._snapshot_at = now
            self.stats = self._engine.core.stats()
            self._history.append(Rate(now, self.stats.generated_tokens))

    def _submit(self, requests: Sequence[Request], answer: "asyncio.Future[Job]") -> None:
        handles: list[Generation] = []
        try:
            for request in requests:
                handles.append(self._engine.submit(request))
        except Exception as error:  # this request's own fault, or a full queue
            for handle in handles:
                self._engine.cancel(handle)
            self._loop.call_soon_threadsafe(_fail, answer, error)
            return
        job = Job(handles, time.monotonic())
        self._jobs.update({handle: (job, choice) for choice, handle in enumerate(handles)})
        self._loop.call_soon_threadsafe(self._accept, answer, job)

    def _accept(self, answer: "asyncio.Future[Job]", job: Job) -> None:
        if answer.cancelled():
            self.cancel(job)
        else:
            answer.set_result(job)

    def _cancel(self, job: Job) -> None:
        for handle in job.handles:
            self._engine.cancel(handle)
            self._jobs.pop(handle, None)

    def _tell_death(self, error: BaseException) -> None:
        for job in {job for job, _ in self._jobs.values()}:
            job.events.put_nowait(EngineDiedError("the engine has stopped"))
        self._died(error)


def _fail(answer: "asyncio.Future[Job]", error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
