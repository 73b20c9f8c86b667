"""The engine in a thread of its own, and how coroutines of one event loop speak with it.

Only that thread touches the engine. Other threads make requests ready for it and leave commands in a queue. After its
steps the thread leaves what is new with the event loop, all requests together and not more often than the loop can
afford, and those who wait for it take it. A reader that is slow finds all that came meanwhile as one.
"""

import asyncio
import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from fathom.engine.engine import Engine
from fathom.engine.outputs import Generation, Stats, Update
from fathom.engine.request import Request

_IDLE_SECONDS = 0.5
"""How long the thread sleeps at most when there is nothing to do."""

_RATE_SECONDS = 5.0
"""Tokens per second are taken over such a time."""

_SNAPSHOT_SECONDS = 0.1
"""How old the engine's counts may be that others see."""

_PIECES_PER_SECOND = 200.0
"""How many pieces of answers are handed on at most, all requests together; first and last ones never wait. A
small model writes more tokens than that, and sending each of them by itself would take the processor from it."""

_PREPARING_THREADS = 8
"""How many requests are made ready at one time. Each takes a processor from the engine; a long one must not hold up
the short ones behind it."""


class EngineDiedError(RuntimeError):
    """The engine's thread has ended; nothing will be answered any more."""


class Event(NamedTuple):
    """What came of one choice: how many tokens and readings of tokens there are now, and whether it is over."""

    choice: int
    tokens: int
    finished: bool


@dataclass(eq=False)
class Job:
    """The choices of one HTTP request, on their way to the engine and through it."""

    handles: list[Generation] = field(default_factory=list)
    """The engine's; none before it has taken the request."""
    submitted: float = 0.0
    """When it did, by time.monotonic."""
    first_token: float | None = None
    finished: float | None = None
    closed: bool = False
    """Nobody waits for it any more."""
    _events: dict[int, Event] = field(default_factory=dict)
    _failure: Exception | None = None
    _waiter: "asyncio.Future[None] | None" = None

    def notify(self, event: Event | Exception) -> None:
        """What came of it, or why nothing will come any more. In the event loop, as `next_events`."""
        if isinstance(event, Exception):
            self._failure = event
        else:
            self._events[event.choice] = event
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next_events(self) -> list[Event]:
        """Wait for what is new: of each choice the last event, which tells all that those before it told.

        Raises the exception that was told.
        """
        if not self._events and self._failure is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._events:
            events = list(self._events.values())
            self._events.clear()
            return events
        assert self._failure is not None
        raise self._failure


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
        self._preparing = ThreadPoolExecutor(_PREPARING_THREADS, "preparing")
        self._open: set[Job] = set()
        self._jobs: dict[Generation, tuple[Job, int]] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopping = False
        self._snapshot_at = 0.0
        self._history: deque[Rate] = deque(maxlen=512)
        self._held: dict[tuple[Job, int], Event] = {}
        self._handed_on = 0.0
        self.stats: Stats = engine.stats()
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
        self._preparing.shutdown(cancel_futures=True)

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and self.failure is None and not self._stopping

    def open(self, prepare: Callable[[], Sequence[Request]]) -> Job:
        """Have another thread make requests and the engine take all of them, or none. Call it in the event loop.

        The job is told what goes wrong: what `prepare` raises, ValueError for what the engine cannot serve,
        scheduler.QueueFull, EngineDiedError.
        """
        job = Job()
        if self.alive:
            self._open.add(job)
            self._preparing.submit(self._prepare, job, prepare)
        else:
            job.notify(EngineDiedError("the engine has stopped"))
        return job

    def close(self, job: Job) -> None:
        """Nobody waits for it any more: what is left of it ends at the engine's next step. For the event loop."""
        self._open.discard(job)
        job.closed = True
        if not job.handles or not all(handle.finished for handle in job.handles):
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
                self._run_commands()
                if self._engine.has_work:
                    for updates in self._engine.step_phases():
                        self._report(updates)
                self._update_stats(force=not self._engine.has_work)
        except BaseException as error:
            self.failure = error
            with contextlib.suppress(RuntimeError):  # the event loop may have ended
                self._loop.call_soon_threadsafe(self._notify_death, error)

    def _run_commands(self) -> None:
        """Do what others asked for; with nothing else to do, wait for it."""
        with contextlib.suppress(queue.Empty):
            if not self._engine.has_work:
                self._commands.get(timeout=_IDLE_SECONDS)()
            while not self._stopping:
                self._commands.get_nowait()()

    def _report(self, updates: Iterable[Update]) -> None:
        """Leave with the event loop what a part of a step brought."""
        events: list[tuple[Job, Event]] = []
        now = time.monotonic()
        for update in updates:
            generation = update.generation
            if generation not in self._jobs:
                continue
            job, choice = self._jobs[generation]
            if job.first_token is None and update.tokens:
                job.first_token = now
            if generation.finished:
                del self._jobs[generation]
                job.finished = now
            made = len(generation.token_ids)
            event = Event(choice, made, generation.finished)
            if generation.finished or made == len(update.tokens):
                self._held.pop((job, choice), None)
                events.append((job, event))
            else:
                self._held[job, choice] = event
        if self._held and now - self._handed_on >= len(self._held) / _PIECES_PER_SECOND:
            self._handed_on = now
            events += [(job, event) for (job, _), event in self._held.items()]
            self._held.clear()
        if events:
            self._loop.call_soon_threadsafe(_notify, events)

    def _update_stats(self, force: bool) -> None:
        now = time.monotonic()
        if force or now - self._snapshot_at >= _SNAPSHOT_SECONDS:
            self._snapshot_at = now
            self.stats = self._engine.stats()
            self._history.append(Rate(now, self.stats.generated_tokens))

    def _prepare(self, job: Job, prepare: Callable[[], Sequence[Request]]) -> None:
        if job.closed:
            return
        try:
            requests = prepare()
        except Exception as error:
            self._fail(job, error)
        else:
            self._commands.put(lambda: self._submit(requests, job))

    def _submit(self, requests: Sequence[Request], job: Job) -> None:
        if job.closed:
            return
        handles: list[Generation] = []
        try:
            for request in requests:
                handles.append(self._engine.submit(request))
        except Exception as error:  # this request's own fault, or a full queue
            for handle in handles:
                self._engine.cancel(handle)
            self._fail(job, error)
            return
        job.handles, job.submitted = handles, time.monotonic()
        self._jobs.update({handle: (job, choice) for choice, handle in enumerate(handles)})

    def _cancel(self, job: Job) -> None:
        for choice, handle in enumerate(job.handles):
            self._engine.cancel(handle)
            self._jobs.pop(handle, None)
            self._held.pop((job, choice), None)

    def _fail(self, job: Job, error: Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop may have ended
            self._loop.call_soon_threadsafe(job.notify, error)

    def _notify_death(self, error: BaseException) -> None:
        for job in self._open:
            job.notify(EngineDiedError("the engine has stopped"))
        self._died(error)


def _notify(events: Iterable[tuple[Job, Event]]) -> None:
    for job, event in events:
        job.notify(event)
