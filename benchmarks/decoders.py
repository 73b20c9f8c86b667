"""The programs that benchmarks/decode.py compares, each as one class with the same methods, on the same weights.

`steps` decodes a number of sequences side by side and yields the seconds of each step; `prefill` reads one prompt;
`serve` answers ragged requests as fast as the program can. Token ids are random; sequences go on greedily.
"""

import ctypes
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from fathom.engine.engine import Engine
from fathom.engine.sampling.sampler import SamplingParams
from fathom.model.transformer import Model

try:
    import llama_cpp
except ImportError:
    llama_cpp = None

Steps = Iterator[float]
"""Seconds of one step after another."""

_ENDLESS = 100_000


class Asked(NamedTuple):
    """A request: its prompt, and how many tokens to generate."""

    prompt: list[int]
    tokens: int


def random_prompts(vocabulary: int, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocabulary, (length,), generator=generator).tolist() for length in lengths]


@cache
def start_llama() -> Any:
    """llama.cpp without its log; keep what is returned alive, since the library holds a bare pointer."""
    llama_cpp.llama_backend_init()
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p())
    return silent


class Fathom:
    """This package's engine."""

    name = "fathom"

    def __init__(self, model: Model, temperature: float = 0.0) -> None:
        self._model, self._temperature = model, temperature

    def steps(self, prompts: Sequence[list[int]], drafts: int = 0) -> Steps:
        room = sum(len(prompt) + 1024 for prompt in prompts)
        engine = Engine(self._model, speculative=drafts, max_batch=len(prompts), cache_tokens=room, prefill_budget=2048)
        params = SamplingParams(max_tokens=_ENDLESS, ignore_eos=True, temperature=self._temperature, seed=0)
        handles = [engine.submit(prompt, params) for prompt in prompts]
        while not all(handle.token_ids for handle in handles):
            engine.step()
        while True:
            began = time.perf_counter()
            engine.step()
            yield time.perf_counter() - began

    def prefill(self, prompt: list[int]) -> float:
        engine = Engine(self._model, speculative=False, max_batch=1)
        handle = engine.submit(prompt, SamplingParams(max_tokens=2, ignore_eos=True))
        began = time.perf_counter()
        while not handle.token_ids:
            engine.step()
        return time.perf_counter() - began

    def serve(self, requests: Sequence[Asked], speculative: bool | int = False) -> float:
        engine = Engine(self._model, speculative=speculative, max_batch=len(requests))
        began = time.perf_counter()
        for prompt, tokens in requests:
            engine.submit(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True))
        while engine.has_work:
            engine.step()
        return time.perf_counter() - began


class Transformers:
    """`transformers`, with its cache and grouped matmuls."""

    name = "transformers"

    def __init__(self, directory: Path, device: torch.device) -> None:
        self._device = device
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, experts_implementation="grouped_mm"
        )
        self._model.eval().to(device)

    def steps(self, prompts: Sequence[list[int]]) -> Steps:
        read = self._read(prompts)
        while True:
            began = time.perf_counter()
            read = self._next(read)
            self._wait()
            yield time.perf_counter() - began

    def prefill(self, prompt: list[int]) -> float:
        began = time.perf_counter()
        self._read([prompt])
        self._wait()
        return time.perf_counter() - began

    def serve(self, requests: Sequence[Asked], batch: int) -> float:
        """In static batches of requests of about the same length, which run until the last is finished."""
        began = time.perf_counter()
        order = sorted(requests, key=lambda asked: asked.tokens)
        for first in range(0, len(order), batch):
            together = order[first : first + batch]
            read = self._read([asked.prompt for asked in together])
            for _ in range(max(asked.tokens for asked in together) - 1):
                read = self._next(read)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        """Wait for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @torch.no_grad()
    def _read(self, prompts: Sequence[list[int]]) -> dict[str, Any]:
        """The prompts, padded on the left."""
        longest = max(map(len, prompts))
        ids_BS = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=self._device)
        padding = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        mask_BS = torch.tensor(padding, device=self._device)
        positions_BS = (mask_BS.cumsum(-1) - 1).clamp_min(0)
        output = self._model(
            ids_BS, attention_mask=mask_BS, position_ids=positions_BS, use_cache=True, logits_to_keep=1
        )
        return self._after(output, mask_BS, positions_BS)

    @torch.no_grad()
    def _next(self, read: dict[str, Any]) -> dict[str, Any]:
        return self._after(
            self._model(**read, use_cache=True, logits_to_keep=1), read["attention_mask"], read["position_ids"]
        )

    @staticmethod
    def _after(output: Any, mask_BS: torch.Tensor, positions_BS: torch.Tensor) -> dict[str, Any]:
        return {
            "input_ids": output.logits[:, -1:].argmax(-1),
            "past_key_values": output.past_key_values,
            "attention_mask": torch.cat((mask_BS, mask_BS.new_ones(len(mask_BS), 1)), dim=1),
            "position_ids": positions_BS[:, -1:] + 1,
        }


class LlamaCpp:
    """llama.cpp through llama-cpp-python's bindings: its own batches, several sequences in one cache."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        start_llama()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self._words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def steps(self, prompts: Sequence[list[int]]) -> Steps:
        context = self._context(len(prompts), sum(len(prompt) + 1024 for prompt in prompts))
        try:
            rows = self._read(context, prompts)
            lengths = [len(prompt) for prompt in prompts]
            while True:
                began = time.perf_counter()
                self._run(context, [(row, number, lengths[number], True) for number, row in enumerate(rows)])
                rows = [self._best(context, number) for number in range(len(rows))]
                lengths = [length + 1 for length in lengths]
                yield time.perf_counter() - began
        finally:
            llama_cpp.llama_free(context)

    def prefill(self, prompt: list[int]) -> float:
        context = self._context(1, len(prompt) + 64)
        began = time.perf_counter()
        self._read(context, [prompt])
        seconds = time.perf_counter() - began
        llama_cpp.llama_free(context)
        return seconds

    def serve(self, requests: Sequence[Asked]) -> float:
        """All at once: prefill in full batches, then one token a step for every unfinished request."""
        context = self._context(len(requests), sum(len(asked.prompt) + asked.tokens for asked in requests))
        began = time.perf_counter()
        last = self._read(context, [asked.prompt for asked in requests])
        for made in range(1, max(asked.tokens for asked in requests)):
            running = [number for number, asked in enumerate(requests) if asked.tokens > made]
            at = [len(requests[number].prompt) + made - 1 for number in running]
            self._run(context, [(last[n], n, place, True) for n, place in zip(running, at, strict=True)])
            for row, number in enumerate(running):
                last[number] = self._best(context, row)
        seconds = time.perf_counter() - began
        llama_cpp.llama_free(context)
        return seconds

    def _context(self, sequences: int, room: int) -> Any:
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max, options.kv_unified = room + 256, sequences, True
        options.n_batch, options.n_ubatch = 2048, 512
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        context = llama_cpp.llama_init_from_model(self._model, options)
        if not context:
            raise RuntimeError(f"llama.cpp makes no context for {sequences} sequences of {room} tokens together")
        return context

    def _read(self, context: Any, prompts: Sequence[list[int]]) -> list[int]:
        """Prefill prompt after prompt, as many tokens at once as a batch takes; the token that follows each."""
        entries = [
            (token, number, place, place == len(prompt) - 1)
            for number, prompt in enumerate(prompts)
            for place, token in enumerate(prompt)
        ]
        following: list[int] = []
        for first in range(0, len(entries), 2048):
            part = entries[first : first + 2048]
            self._run(context, part)
            following += [self._best(context, row) for row, entry in enumerate(part) if entry[3]]
        return following

    @staticmethod
    def _run(context: Any, entries: Sequence[tuple[int, int, int, bool]]) -> None:
        """One pass over (token, sequence, position, whether its logits are needed)."""
        batch = llama_cpp.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        for row, (token, sequence, position, wanted) in enumerate(entries):
            batch.token[row], batch.pos[row], batch.logits[row] = token, position, wanted
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
        status = llama_cpp.llama_decode(context, batch)
        llama_cpp.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama.cpp's pass over {len(entries)} tokens failed with status {status}")

    def _best(self, context: Any, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(context, row)
        return int(
            torch.frombuffer(
                (ctypes.c_float * self._words).from_address(ctypes.addressof(logits.contents)), dtype=torch.float32
            ).argmax()
        )
