"""The engine in a thread of its own, and its interface to the coroutines of one event loop.

Only that thread touches the engine. Other threads prepare requests and put commands into a queue. After its steps the
thread schedules one callback in the event loop for the events of all requests, and no more often than the loop can
afford. A client that reads slowly gets the events of the meantime as one.
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
from typing import Any, NamedTuple

from fathom.engine.engine import Engine
from fathom.engine.outputs import Generation, Stats, Update
from fathom.engine.request import Request

_IDLE_SECONDS = 0.5
"""Longest sleep of the idle thread."""

_RATE_SECONDS = 5.0
"""Window of the throughput in tokens per second."""

_SNAPSHOT_SECONDS = 0.1
"""Age of the statistics at most, while the engine works."""

_EVENTS_PER_SECOND = 200.0
"""Rate limit of events, all requests together; a request's first and last event never wait. A small model generates
more tokens than that, and an event for each of them would take the processor from it."""

_SHORT_BYTES, _SHORT_THREADS = 1 << 16, 8
"""Bodies up to this size are prepared by so many threads, longer ones by one more: the short do not wait for the long,
and the event loop competes for the interpreter's lock with one long body at most."""


class EngineDeadError(RuntimeError):
    """The engine's thread has ended; no request will be completed any more."""


class Event(NamedTuple):
    """Progress of one choice: how many tokens it has now, and whether it is finished."""

    choice: int
    tokens: int
    finished: bool


@dataclass(eq=False)
class Job:
    """The choices of one HTTP request, on their way to the engine and through it."""

    generations: list[Generation] = field(default_factory=list)
    """The engine's; none before it has accepted the request."""
    submitted: float = 0.0
    """When it did, by time.monotonic, as the other times."""
    first_token: float | None = None
    finished: float | None = None
    closed: bool = False
    """The client waits no longer."""
    _events: dict[int, Event] = field(default_factory=dict)
    _failure: Exception | None = None
    _waiter: "asyncio.Future[None] | None" = None

    def notify(self, event: Event | Exception) -> None:
        """Hand over an event, or the failure that ends the job. In the event loop, as `next_events`."""
        if isinstance(event, Exception):
            self._failure = event
        else:
            self._events[event.choice] = event
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next_events(self) -> list[Event]:
        """Wait for new events: the latest of each choice, which includes those before it.

        Raises the exception passed to `notify`.
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


class EngineThread:
    """Runs an engine. Call `start` inside the event loop, `stop` when it ends."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.on_failure: Callable[[BaseException], None] = lambda error: None
        """Called, in the event loop, if the engine raises."""
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._short, self._long = ThreadPoolExecutor(_SHORT_THREADS, "short"), ThreadPoolExecutor(1, "long")
        self._open_jobs: set[Job] = set()
        self._jobs: dict[Generation, tuple[Job, int]] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopping = False
        self._snapshot_at = 0.0
        self._history: deque[tuple[float, int]] = deque(maxlen=512)
        """At a moment, how many tokens had been generated."""
        self._held: dict[tuple[Job, int], Event] = {}
        self._handed_on = 0.0
        self.stats: Stats = engine.stats()
        """The engine's statistics; at most a tenth of a second old while it works."""
        self.failure: BaseException | None = None
        """Why the engine's thread ended."""
        self.started = time.monotonic()

    def start(self) -> None:
        """Start the thread; call it inside the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End after the current step; unfinished requests stay unfinished."""
        self._stopping = True
        self._commands.put(lambda: None)
        self._thread.join()
        self._short.shutdown(cancel_futures=True)
        self._long.shutdown(cancel_futures=True)

    @property
    def alive(self) -> bool:
        """Whether requests can be served."""
        return self._thread.is_alive() and self.failure is None and not self._stopping

    def preparation(self, size: int) -> ThreadPoolExecutor:
        """The threads for what a body of `size` bytes requires."""
        return self._short if size <= _SHORT_BYTES else self._long

    def open(self, prepare: Callable[[], Sequence[Request]], size: int = 0) -> Job:
        """Run `prepare` in another thread and submit its requests, all or none. Call it in the event loop.

        `size`: of the body in bytes.

        The job's `next_events` raises what goes wrong: what `prepare` raises, ValueError for what the engine cannot
        serve, scheduler.QueueFull, EngineDeadError.
        """
        job = Job()
        if self.alive:
            self._open_jobs.add(job)
            self.preparation(size).submit(self._prepare, job, prepare)
        else:
            job.notify(EngineDeadError("the engine has stopped"))
        return job

    def close(self, job: Job) -> None:
        """Cancel what is left of it before the engine's next step. Call it in the event loop."""
        self._open_jobs.discard(job)
        job.closed = True
        if not job.generations or not all(generation.finished for generation in job.generations):
            self._commands.put(lambda: self._cancel(job))

    def tokens_per_second(self) -> float:
        """Generation throughput over the last seconds."""
        now = time.monotonic()
        recent = [each for each in list(self._history) if each[0] > now - _RATE_SECONDS]
        return (recent[-1][1] - recent[0][1]) / (now - recent[0][0]) if recent else 0.0

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
            self._call_soon(self._notify_death, error)

    def _run_commands(self) -> None:
        """Run the queued commands; an idle engine waits for one."""
        with contextlib.suppress(queue.Empty):
            if not self._engine.has_work:
                self._commands.get(timeout=_IDLE_SECONDS)()
            while not self._stopping:
                self._commands.get_nowait()()

    def _report(self, updates: Iterable[Update]) -> None:
        """Schedule the events of one phase of a step in the event loop."""
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
        if self._held and now - self._handed_on >= len(self._held) / _EVENTS_PER_SECOND:
            self._handed_on = now
            events += [(job, event) for (job, _), event in self._held.items()]
            self._held.clear()
        if events:
            self._call_soon(_notify, events)

    def _update_stats(self, force: bool) -> None:
        now = time.monotonic()
        if force or now - self._snapshot_at >= _SNAPSHOT_SECONDS:
            self._snapshot_at = now
            self.stats = self._engine.stats()
            self._history.append((now, self.stats.generated_tokens))

    def _prepare(self, job: Job, prepare: Callable[[], Sequence[Request]]) -> None:
        if job.closed:
            return
        try:
            requests = prepare()
        except Exception as error:
            self._call_soon(job.notify, error)
        else:
            self._commands.put(lambda: self._submit(requests, job))

    def _submit(self, requests: Sequence[Request], job: Job) -> None:
        if job.closed:
            return
        generations: list[Generation] = []
        try:
            for request in requests:
                generations.append(self._engine.submit(request))
        except Exception as error:  # this request's own fault, or a full queue
            for generation in generations:
                self._engine.cancel(generation)
            self._call_soon(job.notify, error)
            return
        job.generations, job.submitted = generations, time.monotonic()
        self._jobs.update({generation: (job, choice) for choice, generation in enumerate(generations)})

    def _cancel(self, job: Job) -> None:
        for choice, generation in enumerate(job.generations):
            self._engine.cancel(generation)
            self._jobs.pop(generation, None)
            self._held.pop((job, choice), None)

    def _call_soon(self, callback: Callable[[Any], None], argument: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop may have ended
            self._loop.call_soon_threadsafe(callback, argument)

    def _notify_death(self, error: BaseException) -> None:
        for job in self._open_jobs:
            job.notify(EngineDeadError("the engine has stopped"))
        self.on_failure(error)


def _notify(events: Iterable[tuple[Job, Event]]) -> None:
    for job, event in events:
        job.notify(event)
