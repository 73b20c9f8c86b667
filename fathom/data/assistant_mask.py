"""Which part of a rendered conversation is the assistant's own output: what a model is trained to say.

A turn begins where the template would have the model go on, and ends with what the template would then put behind it,
its end-of-turn token. Both are found in renderings of the same template: of the messages before the turn as a prompt,
and of those up to it. What later messages change of earlier ones, such as reasoning that is dropped, makes whole
renderings differ; so they are compared behind marks that stand where a message's strings begin and end
(`chat_strings.py`), and what comes before is left out of it. So no template needs `{% generation %}`, and tool calls
are output in whatever syntax.

Nothing is guessed: where the renderings do not show where a turn begins or ends, the template is refused.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Unit = str | tuple[str]
"""A character of a text, or a control token."""

Mark = tuple[int, int, int]
"""Position in units, the number of a message, and that of the field whose string begins or ends there."""

Prefix = tuple[int, bool]
"""How many of the first messages, and whether the generation prompt is put behind them."""


class TurnError(ValueError):
    """The renderings do not show which part is the assistant's."""


def units(pieces: Sequence[str]) -> list[Unit]:
    """Texts and, between any two of them, a control token, as characters and control tokens."""
    found: list[Unit] = []
    for index, piece in enumerate(pieces):
        found += [(piece,)] if index % 2 else piece
    return found


@dataclass(frozen=True)
class Rendering:
    """All messages as the template renders them."""

    units: list[Unit]
    marks: list[Mark]

    def last_mark(self, message: int) -> Mark:
        """The last mark of the messages up to this one; the beginning, as if of message −1, where there is none."""
        return max((mark for mark in self.marks if mark[1] <= message), default=(0, -1, -1))

    def behind(self, message: int) -> list[Unit]:
        """What follows the last mark of the messages up to this one, up to the first of later ones."""
        start = self.last_mark(message)[0]
        end = min((mark[0] for mark in self.marks if mark[1] > message), default=len(self.units))
        return self.units[start:end]


@dataclass(frozen=True)
class Tail:
    """What the rendering of the first messages has behind its last mark."""

    mark: tuple[int, int]
    """The numbers of the message and the field; −1 where there is no mark, and the tail is everything."""
    units: list[Unit]


def prefixes(turns: Iterable[int]) -> list[Prefix]:
    """What has to be rendered to find the assistant's turns that have these numbers among the messages."""
    return sorted({each for turn in turns for each in ((turn, False), (turn, True), (turn + 1, False))})


def assistant_spans(
    turns: Iterable[int],
    roles: Sequence[str],
    whole: Rendering,
    parts: dict[Prefix, Tail],
    eos_token: str,
    has_prompt: bool,
) -> list[tuple[int, int]]:
    """Where in `whole`, in units, these turns of the assistant are, end of turn included: (start, end), in order.

    `roles`: of all messages. `parts`: the tails of `prefixes(turns)`. `has_prompt`: whether the template leaves a
    generation prompt out where none is wanted. Raises TurnError where the renderings do not show where a turn is.
    """
    numbers = [message for _, message, _ in whole.marks]
    if numbers != sorted(numbers):
        raise TurnError("it puts the messages in another order")
    spans = []
    for turn in turns:
        start = _start(turn, roles, whole, parts)
        end = _end(turn, start, whole, parts[turn + 1, False], eos_token, has_prompt)
        if end > start:
            spans.append((start, end))
    return spans


def _start(turn: int, roles: Sequence[str], whole: Rendering, parts: dict[Prefix, Tail]) -> int:
    """Behind the generation prompt, as far as `whole` has it there."""
    ended, prompted = parts[turn, False], parts[turn, True]
    mark = whole.last_mark(turn - 1)
    common = _common(whole.behind(turn - 1), prompted.units)
    # Turns of the assistant may follow one another, and some templates join them: all behind the first is its own.
    own = turn > 0 and roles[turn - 1] == "assistant" and mark[1] == turn - 1
    same = ended.mark == prompted.mark == mark[1:]
    if not same or (common < len(ended.units) and not own):
        raise TurnError(f"it renders what comes before message {turn} in another way once there is an answer")
    return mark[0] + common


def _end(turn: int, start: int, whole: Rendering, ended: Tail, eos_token: str, has_prompt: bool) -> int:
    """Behind the end-of-turn token."""
    mark, behind = whole.last_mark(turn), whole.behind(turn)
    if ended.mark != mark[1:]:
        raise TurnError(f"it renders other parts of message {turn} once there are later ones")
    if mark[1] == turn and not any(isinstance(unit, tuple) for unit in ended.units):
        raise TurnError(f"it ends message {turn} without a control token, which would teach no model to stop")
    shared = behind[: _common(behind, ended.units)]
    controls = [at for at, unit in enumerate(shared) if isinstance(unit, tuple) and mark[0] + at >= start]
    if len(controls) > 1 and not has_prompt and (eos_token,) not in shared:
        raise TurnError(
            f"it ends message {turn} with several control tokens, of which the last may be a prompt that it always adds"
        )
    # Line ends that a template puts behind the token are not generated; nothing is behind EOS.
    eos = [at for at in controls if shared[at] == (eos_token,)]
    last = eos[0] if eos else controls[-1] if controls else len(shared) - 1
    return mark[0] + last + 1


def _common(first: Sequence[Unit], second: Sequence[Unit]) -> int:
    """The length of the common beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(first), len(second)))


def spans_of_texts(pieces: Sequence[str], spans: Iterable[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """For each piece the parts of it, in its own characters, that lie in the spans; a control token counts as one."""
    found: list[list[tuple[int, int]]] = []
    begin = 0
    spans = list(spans)
    for index, piece in enumerate(pieces):
        length = 1 if index % 2 else len(piece)
        inside = [(max(start, begin) - begin, min(end, begin + length) - begin) for start, end in spans]
        found.append([(start, end) for start, end in inside if end > start])
        begin += length
    return found
