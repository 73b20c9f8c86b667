"""What the terminal shows of a generation beside its text: log-probabilities, and that it ended in a loop."""

from collections.abc import Iterator, Sequence

from rich.console import Console

from fathom.data.tokenizer import Tokenizer
from fathom.engine.outputs import Generation
from fathom.engine.sampling.verify import TokenLogprob

_LOOP_TOKENS, _LOOP_TIMES = 8, 3
"""An output that ends with so many repetitions of so many tokens is reported as a loop."""


def logprob_lines(handle: Generation, tokenizer: Tokenizer) -> Iterator[str]:
    """A table of the log-probabilities that were requested, the prompt's first, each with the likeliest tokens'."""
    rows: list[tuple[int, TokenLogprob]] = []
    if handle.prompt_logprobs is not None:
        # A request that was cancelled during prefill has some of them.
        rows += zip(handle.prompt_ids[1:], handle.prompt_logprobs, strict=False)
    if handle.logprobs is not None:
        rows += zip(handle.token_ids, handle.logprobs, strict=True)

    def spelled(token: int) -> str:
        return repr(tokenizer.token_bytes(token).decode(errors="replace"))

    if rows:
        yield "logprob  rank  token"
    for token, found in rows:
        top = "".join(f"  {logprob:.3f} {spelled(other)}" for other, logprob in found.top)
        likeliest = f"   likeliest:{top}" if top else ""
        yield f"{found.logprob:7.3f}  {found.rank:4}  {spelled(token)}{likeliest}"


def note_loop(handle: Generation, console: Console) -> None:
    """Print one line where the output ends in a loop."""
    if (loop := loop_at_end(handle.token_ids)) is not None:
        length, times = loop
        unit = "token" if length == 1 else f"{length} tokens"
        cure = "a higher --temperature or --repetition-penalty avoids it"
        text = f"The output ends in a loop, the same {unit} {times} times in a row; {cure}."
        console.print(text, style="yellow", soft_wrap=True)


def loop_at_end(ids: Sequence[int]) -> tuple[int, int] | None:
    """(length, repetitions) of the shortest sequence of tokens that the output repeats up to its end.

    None where it is no loop: less than 3 repetitions of 8 tokens, which a shorter sequence fills several times.
    """
    for length in range(1, len(ids) // _LOOP_TIMES + 1):
        unit = -(-_LOOP_TOKENS // length) * length
        repeated = length
        while repeated < len(ids) and ids[-1 - repeated] == ids[-1 - repeated + length]:
            repeated += 1
        if repeated >= _LOOP_TIMES * unit:
            return length, repeated // length
    return None
