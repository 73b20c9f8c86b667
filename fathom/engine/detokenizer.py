"""From tokens to text as they come: complete characters alone, and nothing at or behind a stop string.

Text is released in whole tokens. Tokens whose text may be the beginning of a stop string are held back until that is
decided, and a character that takes several tokens belongs to the last of them.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from fathom.data.tokenizer import Tokenizer
from fathom.engine.outputs import FinishReason, Generation


class IncrementalDetokenizer:
    """Text from tokens that come one after another; a character of several tokens waits for its last one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Tokens are bytes, so complete characters depend on no token before them.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.within = False
        """Whether the last token ended within a character."""

    def add(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete."""
        new = self._tokenizer.text_bytes(tokens)
        if new.isascii() and not self.within:
            return new.decode("ascii")
        text = self._decoder.decode(new)
        self.within = self._decoder.getstate()[0] != b""
        return text

    def rest(self) -> str:
        """What is left of an unfinished character."""
        return self._decoder.decode(b"", final=True)


class StopChecker:
    """Finds the token with which a stop string is complete."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._text = IncrementalDetokenizer(tokenizer)
        self._stops = stops
        self._kept = max(map(len, stops)) - 1
        self._tail = ""

    def completed_by(self, token: int) -> str | None:
        """The stop string that the next token completes, if any; of several, the one that ends first."""
        text = self._tail + self._text.add([token])
        found = first_stop(text, self._stops)
        self._tail = text[len(text) - self._kept :] if self._kept else ""
        return None if found is None else found[1]


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where the stop string begins that is complete first, and which it is."""
    found = [(start + len(stop), start, stop) for stop in stops if (start := text.find(stop)) >= 0]
    return min(found)[1:] if found else None


@dataclass(slots=True)
class OutputToken:
    """A token whose text is final, or several together, named by the last."""

    index: int
    """Its place among the generated tokens."""
    token: int
    text: str
    """What it adds to the text; empty where it only begins a character."""


class OutputStream:
    """Follows a generation and releases its tokens as their text becomes final.

    A token that ended the request by its id, such as EOS, is no part of the text.
    """

    def __init__(self, generation: Generation, tokenizer: Tokenizer, each: bool = False) -> None:
        """`each`: release the tokens one by one, not together."""
        self.generation = generation
        self.finish_reason: FinishReason | None = None
        """The generation's, once all of the text is released."""
        self.num_released = 0
        """How many tokens have been released."""
        self.num_tokens = 0
        """How many tokens the text took, those included that ended it."""
        self._stops = generation.params.stop
        self._together = not each and not self._stops
        self._text = IncrementalDetokenizer(tokenizer)
        self._seen = 0
        self._held: list[OutputToken] = []

    def new_text(self) -> str:
        """The text that has become final since the last call."""
        generation = self.generation
        return "".join([each.text for each in self.take(len(generation.token_ids), generation.finished)])

    def take(self, tokens: int, finished: bool) -> list[OutputToken]:
        """Read on until there are so many tokens; returns those released. Afterwards `finish_reason` may be set."""
        if self.finish_reason is not None:
            return []
        ids = self.generation.token_ids[self._seen : tokens]
        ended = self.generation.finish_reason if finished else None
        self.num_tokens = self._seen + len(ids)
        if ended == "stop" and not isinstance(self.generation.stop_reason, str):
            ids = ids[:-1]
        if self._together:
            self.finish_reason = ended
            self._seen += len(ids)
            text = self._text.add(ids) if ended is None else self._text.add(ids) + self._text.rest()
            return [OutputToken(self._seen - 1, self.generation.token_ids[self._seen - 1], text)] if text else []
        for token in ids:
            self._held.append(OutputToken(self._seen, token, self._text.add([token])))
            self._seen += 1
        if ended is not None and (rest := self._text.rest()):
            self._held[-1].text += rest
        text = "".join([each.text for each in self._held])
        # By the stop string that is complete first, so that it does not matter how many tokens came at once.
        found = first_stop(text, self._stops)
        if found is not None:
            cut, stop = found
            self.finish_reason = "stop"
            self.num_tokens = self._held[self._completing(cut + len(stop))].index + 1
            return self._release(cut, whole=False)
        self.finish_reason = ended
        waiting = 0 if ended is not None else self._undecided(text)
        if ended is None and self._text.within and self._held:
            # It may begin with whole characters; if the text ends here, the rest of the last one is its own.
            waiting = max(waiting, len(self._held[-1].text))
        return self._release(len(text) - waiting, whole=ended is not None)

    def _release(self, length: int, whole: bool) -> list[OutputToken]:
        """Take those out of what is held that lie in the first `length` characters.

        `whole`: with those that follow without text of their own, which otherwise may begin a character.
        """
        out: list[OutputToken] = []
        while self._held:
            held = self._held[0]
            if len(held.text) > length:
                if self.finish_reason is not None and length > 0:
                    out.append(OutputToken(held.index, held.token, held.text[:length]))
                break
            if length == 0 and not whole:
                break
            length -= len(held.text)
            out.append(self._held.pop(0))
        self.num_released += len(out)
        return out

    def _completing(self, length: int) -> int:
        """Which of the held tokens completes the first `length` characters."""
        read = 0
        for place, held in enumerate(self._held):
            read += len(held.text)
            if read >= length:
                return place
        raise AssertionError(f"{length} characters of {read}")

    def _undecided(self, text: str) -> int:
        """The length of the text's longest end that a stop string begins with."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
