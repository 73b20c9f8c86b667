"""One choice of an answer as it grows: its tokens with their texts, cut at stop strings, with what is known of each.

Text goes out in whole tokens. Tokens whose text may be the beginning of a stop string wait until that is decided, and
a character that takes several tokens belongs to the last of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fathom.data.tokenizer import Tokenizer
from fathom.engine.detokenizer import IncrementalDetokenizer
from fathom.engine.outputs import Generation
from fathom.engine.sampling.verify import TokenLogprob


@dataclass(slots=True)
class Piece:
    """A token that goes out, or several that nobody asked for one by one, named by the last."""

    index: int
    """Its place among the generated tokens."""
    token: int
    text: str
    """What it adds to the text; empty where it only begins a character."""


class Choice:
    """Follows a generation."""

    def __init__(self, generation: Generation, tokenizer: Tokenizer, stops: Sequence[str], each: bool) -> None:
        """`each`: whether somebody asks for the tokens one by one."""
        self.generation = generation
        self.finish_reason: str | None = None
        """stop or length once it is over; cancelled or error where it failed."""
        self.sent = 0
        """How many tokens have gone out."""
        self.made = 0
        """How many tokens the answer took, those included that end it without being shown; not what a step brought
        beyond a stop string."""
        self._tokenizer = tokenizer
        self._stops = stops
        self._together = not each and not stops
        self._text = IncrementalDetokenizer(tokenizer)
        self._seen = 0
        self._held: list[Piece] = []
        self._routed = 0

    def take(self, tokens: int, finished: bool) -> list[Piece]:
        """Read on until there are so many tokens; returns what can go out. Afterwards `finish_reason` may be set."""
        if self.finish_reason is not None:
            return []
        ids = self.generation.token_ids[self._seen : tokens]
        ended = self.generation.finish_reason if finished else None
        self.made = self._seen + len(ids)
        if ended == "stop":
            ids = ids[:-1]  # the token that says so is no part of the answer
        if self._together:
            self.finish_reason = ended
            self._seen += len(ids)
            text = self._text.add(ids) if ended is None else self._text.add(ids) + self._text.rest()
            return [Piece(self._seen - 1, self.generation.token_ids[self._seen - 1], text)] if text else []
        for token in ids:
            self._held.append(Piece(self._seen, token, self._text.add([token])))
            self._seen += 1
        if ended is not None and (rest := self._text.rest()):
            self._held[-1].text += rest
        text = "".join([piece.text for piece in self._held])
        # The one that was complete first, so that it does not matter how many tokens came at once.
        found = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            end, cut = min(found)
            self.finish_reason = "stop"
            self.made = self._held[self._piece_at(end)].index + 1
            return self._release(cut, whole=False)
        self.finish_reason = ended
        waiting = 0 if ended is not None else self._undecided(text)
        if ended is None and self._text.within and self._held:
            # It may begin with whole characters; if the answer ends here, the rest of the last one is its own.
            waiting = max(waiting, len(self._held[-1].text))
        return self._release(len(text) - waiting, whole=ended is not None)

    def routing(self) -> list[dict[str, Any]]:
        """The routing of tokens that have gone out, so far as the model has read them and they were not given yet."""
        prompt, known = len(self.generation.prompt_ids), self.generation.routing or []
        given = []
        while self._routed < min(self.sent, len(known) - prompt):
            routing = known[prompt + self._routed]
            if routing is not None:
                weights = [[round(weight, 4) for weight in layer] for layer in routing.weights]
                given.append({"index": self._routed, "experts": routing.experts, "weights": weights})
            self._routed += 1
        return given

    def drafted(self, piece: Piece) -> bool:
        """Whether the token was an accepted draft."""
        mask = self.generation.accepted_mask
        return piece.index < len(mask) and mask[piece.index]

    def logprob(self, piece: Piece) -> TokenLogprob:
        """Of a token, where they were asked for."""
        assert self.generation.logprobs is not None
        return self.generation.logprobs[piece.index]

    def _release(self, length: int, whole: bool) -> list[Piece]:
        """Take the pieces out of what is held that lie in the first `length` characters.

        `whole`: with those that follow without text of their own, which otherwise may begin a character.
        """
        out: list[Piece] = []
        while self._held:
            piece = self._held[0]
            if len(piece.text) > length:
                if self.finish_reason is not None and length > 0:
                    out.append(Piece(piece.index, piece.token, piece.text[:length]))
                break
            if length == 0 and not whole:
                break
            length -= len(piece.text)
            out.append(self._held.pop(0))
        self.sent += len(out)
        return out

    def _piece_at(self, length: int) -> int:
        """Which of the held pieces completes the first `length` characters."""
        read = 0
        for place, piece in enumerate(self._held):
            read += len(piece.text)
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


class Spelling(NamedTuple):
    """How a token is shown by itself."""

    text: str
    raw: list[int]


def spelling(tokenizer: Tokenizer, token: int) -> Spelling:
    """As OpenAI shows tokens: bytes that are no text by their values."""
    raw = tokenizer.token_bytes(token)
    try:
        return Spelling(raw.decode(), list(raw))
    except UnicodeDecodeError:
        return Spelling("bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), list(raw))


def chat_logprobs(tokenizer: Tokenizer, choice: Choice, pieces: Sequence[Piece]) -> dict[str, Any]:
    """The logprobs of a chat's choice."""

    def shown(token: int, logprob: float) -> dict[str, Any]:
        text, raw = spelling(tokenizer, token)
        return {"token": text, "logprob": _finite(logprob), "bytes": raw}

    content = []
    for piece in pieces:
        fact = choice.logprob(piece)
        top = [shown(token, logprob) for token, logprob in fact.top]
        content.append(shown(piece.token, fact.logprob) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[int], facts: Sequence[TokenLogprob | None], offset: int
) -> dict[str, Any]:
    """The logprobs of a completion's choice: `facts` is None for a first token that nothing predicts."""
    shown: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, fact in zip(tokens, facts, strict=True):
        text = spelling(tokenizer, token).text
        shown["tokens"].append(text)
        shown["token_logprobs"].append(None if fact is None else _finite(fact.logprob))
        shown["text_offset"].append(offset)
        offset += len(text)
        if fact is None:
            shown["top_logprobs"].append(None)
            continue
        likeliest: dict[str, float] = {}
        for other, logprob in [*fact.top, (token, fact.logprob)]:
            name = spelling(tokenizer, other).text
            likeliest[name] = max(likeliest.get(name, -9999.0), _finite(logprob))
        shown["top_logprobs"].append(likeliest)
    return shown


def _finite(logprob: float) -> float:
    # JSON knows no infinity; OpenAI writes this number for what cannot be.
    return max(logprob, -9999.0)
