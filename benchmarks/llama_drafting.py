"""llama.cpp drafting one token a step with a GGUF's MTP module, as its own `draft-mtp` does; greedy, one sequence.

llama-cpp-python's `Llama` cannot be told to draft so: the loop here calls the C functions through its bindings.
"""

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from decoders import llama_cpp, start_llama

if llama_cpp is not None:
    from llama_cpp import llama_cpp_ext


class Went(NamedTuple):
    """A prompt's continuation; the first token and its seconds are not counted."""

    tokens: list[int]
    seconds: float
    forwards: int


class LlamaDrafting:
    """A context of the main model and one of its module."""

    def __init__(self, path: Path, hidden: int, words: int, room: int) -> None:
        start_llama()
        options = llama_cpp.llama_model_default_params()
        options.load_mtp = True
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self._model or llama_cpp.llama_model_n_layer_nextn(self._model) != 1:
            raise RuntimeError(f"llama.cpp finds no drafting module in {path}")
        self._hidden, self._words = hidden, words
        self._main = self._context(llama_cpp.LLAMA_CONTEXT_TYPE_DEFAULT, room)
        self._draft = self._context(llama_cpp.LLAMA_CONTEXT_TYPE_MTP, room)

    def go_on(self, prompt: Sequence[int], count: int) -> Went:
        """`count` tokens after the first."""
        for context in (self._main, self._draft):
            llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(context), 0, -1, -1)
        best, states = self._run(self._main, prompt, 0)
        following, at = int(best[-1]), len(prompt)
        # Pairs not given to the module yet: (hidden state, the token after it), the first at position `pair_at`.
        pairs = [*prompt[1:], following]
        pair_states, pair_at = states, 1
        made: list[int] = []
        forwards = 0
        began = time.perf_counter()
        while len(made) < count:
            guesses, _ = self._run(self._draft, pairs, pair_at, pair_states)
            draft = int(guesses[-1])
            best, states = self._run(self._main, [following, draft], at)
            forwards += 1
            kept = [int(best[0])]
            if kept[0] == draft:
                kept.append(int(best[1]))
            else:
                llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._main), 0, at + 1, -1)
            pairs, pair_states, pair_at = kept, states[: len(kept)], at + 1
            made += kept
            following, at = kept[-1], at + len(kept)
        return Went(made[:count], time.perf_counter() - began, forwards)

    def _context(self, kind: Any, room: int) -> Any:
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = room
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        options.ctx_type = kind
        context = llama_cpp.llama_init_from_model(self._model, options)
        if not context:
            raise RuntimeError(f"llama.cpp makes no context of {room} tokens to draft with")
        llama_cpp_ext.llama_set_embeddings_nextn(context, True, kind == llama_cpp.LLAMA_CONTEXT_TYPE_MTP)
        return context

    def _run(
        self, context: Any, tokens: Sequence[int], position: int, states_SD: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The likeliest token after each (S), and their hidden states (S, D), float32."""
        batch = llama_cpp.llama_batch_ext_init(context)
        for number, token in enumerate(tokens):
            index = llama_cpp.llama_batch_ext_add_token(batch, 0, token)
            llama_cpp.llama_batch_ext_set_pos(batch, index, (ctypes.c_int32 * 1)(position + number))
            if states_SD is not None:
                row = states_SD[number].ctypes.data_as(ctypes.POINTER(ctypes.c_float))
                llama_cpp.llama_batch_ext_set_embd_token(batch, index, llama_cpp.llama_embd(row, 1, self._hidden))
            llama_cpp.llama_batch_ext_set_output_logits(batch, index, True)
        status = llama_cpp.llama_process(context, llama_cpp.LLAMA_PROCESS_TYPE_DECODE, batch)
        llama_cpp.llama_batch_ext_free(batch)
        if status:
            raise RuntimeError(f"llama.cpp's pass over {len(tokens)} tokens failed with status {status}")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(tokens), self._words))
        states = llama_cpp_ext.llama_get_embeddings_nextn(context)
        return logits.argmax(-1), np.ctypeslib.as_array(states, (len(tokens), self._hidden)).copy()
