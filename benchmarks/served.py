"""`fathom serve` whose engine also takes requests without HTTP: benchmarks/serve.py measures the cost of HTTP with it.

    python benchmarks/served.py MODEL [flags of fathom serve]

Each line of standard input is a JSON list of [prompt, tokens]; the output is the tokens per second at which the
server's own engine, in the server's own thread, generates them. Two processes differ by several percent only because
of where their memory lies, which is more than HTTP costs.
"""

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import load

from fathom import SamplingParams
from fathom.cli import main
from fathom.engine.engine import Engine
from fathom.engine.request import Request
from fathom.serve import engine_thread
from fathom.serve.engine_thread import EngineThread

AT_A_TIME = 32


class BenchmarkedThread(EngineThread):
    """An engine thread that also takes requests from standard input."""

    def start(self) -> None:
        super().start()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in sys.stdin:
            self._commands.put(self._measuring(json.loads(line)))

    def _measuring(self, waiting: list[tuple[str, int]]) -> Callable[[], Any]:
        return lambda: print(by_itself(self._engine, waiting), flush=True)


def by_itself(engine: Engine, waiting: list[tuple[str, int]]) -> float:
    """Tokens per second of the engine, with requests arriving as from clients."""
    queue, running, times = deque(waiting), set(), load.arrivals(AT_A_TIME)
    began, tokens = time.perf_counter(), 0
    arrival = began + next(times)
    while True:
        while len(running) < AT_A_TIME and queue and arrival <= time.perf_counter():
            prompt, length = queue.popleft()
            running.add(engine.submit(Request(prompt, SamplingParams(max_tokens=length, ignore_eos=True))))
            arrival = began + next(times)
        if not running and not queue:
            return tokens / (time.perf_counter() - began)
        for update in engine.step():
            tokens += len(update.tokens)
        running = {handle for handle in running if not handle.finished}


if __name__ == "__main__":
    engine_thread.EngineThread = BenchmarkedThread  # type: ignore[misc]
    main(["serve", *sys.argv[1:]])
