"""`fathom chat`: talk to a model in the terminal."""

import contextlib
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Annotated

import tyro
from rich.console import Console

import fathom
from fathom.cli.generation import logprob_lines, note_loop
from fathom.cli.load import Dtype, load
from fathom.data.tokenizer import CHAT_TEMPLATE
from fathom.engine.detokenizer import OutputStream
from fathom.engine.engine import Engine
from fathom.engine.sampling.sampler import SamplingParams
from fathom.quantization.integer import Precision

with contextlib.suppress(ImportError):  # Windows has none
    import readline  # noqa: F401 (importing it gives `input` line editing and a history)

_HELP = """\
/help    these lines
/reset   start a new conversation (the system message stays)
Ctrl-C   stop the answer; before an answer, clear the line
Ctrl-D   leave
Up, Down step through earlier lines"""


@dataclass(frozen=True)
class ChatCommand:
    """Talk to a model. Ctrl-C stops an answer, Ctrl-D leaves; /reset starts a new conversation, /help lists more.

    The model's chat template renders the conversation. Without one, the model continues the text of all lines so far.
    """

    path: tyro.conf.Positional[str]
    """A Hugging Face model directory, or a name on the hub."""
    system: str | None = None
    """The system message."""
    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = field(
        default_factory=lambda: SamplingParams(temperature=0.7, top_p=0.95, max_tokens=1024)
    )
    speculative: bool = True
    """Let the MTP module draft where that is faster."""
    dtype: Dtype = "float32"
    """Data type of the weights."""
    quantize: Precision | None = None
    """Weight-only quantisation to 8 or 4 bits."""


class Conversation:
    """The messages so far, and the token ids that the next answer continues."""

    def __init__(self, engine: Engine, system: str | None) -> None:
        """Raises ImportError or ValueError where the model has a chat template that cannot be used."""
        assert engine.tokenizer is not None
        self._engine = engine
        self._beginning = [] if system is None else [{"role": "system", "content": system}]
        template = engine.tokenizer.config.get("chat_template")
        self.templated = template is not None
        self.template = "none, so the model continues the text of all lines so far"
        if self.templated:
            engine.chat_template  # noqa: B018 (what is wrong with it is reported before the first line)
            default = "that of fathom train, which means nothing to a model that is only pretrained"
            self.template = default if template == CHAT_TEMPLATE else "the model's own"
        self.reset()

    def reset(self) -> None:
        """Begin anew, with the system message alone."""
        self.messages = list(self._beginning)

    def add(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})

    def encode(self) -> list[int]:
        """The token ids of the conversation, up to where the answer begins."""
        if self.templated:
            return self._engine.encode_chat(self.messages)
        # An answer continues its line; any other message ends with its own.
        ends = {"user": "", "assistant": "\n", "system": "\n"}
        return self._engine.encode("".join(each["content"] + ends[each["role"]] for each in self.messages))


def run(words: list[str]) -> None:
    command = tyro.cli(ChatCommand, args=words, prog="fathom chat")
    model, tokenizer = load(command.path, command.dtype, command.quantize)
    engine = Engine(model, tokenizer, speculative=command.speculative, max_batch=1)
    console = Console(highlight=False, soft_wrap=True)
    conversation = Conversation(engine, command.system)
    size = f"{model.config.parameter_counts().total:,} parameters in {command.quantize or command.dtype}"
    for text in (
        f"Fathom {fathom.__version__}: {command.path}, {size}",
        f"chat template: {conversation.template}",
        "/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves",
    ):
        console.print(text, style="dim", markup=False)
    while (line := _read_line()) is not None:
        if line in ("/reset", "/new"):
            conversation.reset()
            console.print("A new conversation.", style="dim")
        elif line == "/help":
            console.out(_HELP, highlight=False)
        elif re.fullmatch(r"/\w*", line):
            console.print(f"There is no command {line}; /help lists them.", markup=False)
        elif line:
            _exchange(engine, conversation, line, command.sampling, console)


def _read_line() -> str | None:
    """The next line, empty after Ctrl-C; None at the end of the input (Ctrl-D)."""
    try:
        return input("> ").strip()
    except KeyboardInterrupt:
        print()
        return ""
    except EOFError:
        print()
        return None


def _exchange(engine: Engine, conversation: Conversation, line: str, params: SamplingParams, console: Console) -> None:
    """Add a message and its answer, unless there is no room for one."""
    conversation.add("user", line)
    ids = conversation.encode()
    if len(ids) < engine.max_length:
        conversation.add("assistant", _answer(engine, ids, params, console))
        return
    conversation.messages.pop()
    console.print(f"The conversation has {len(ids)} tokens, the context {engine.max_length}; /reset starts a new one.")


def _answer(engine: Engine, ids: list[int], params: SamplingParams, console: Console) -> str:
    """Print an answer as it comes, until it ends or is interrupted; returns it."""
    assert engine.tokenizer is not None
    handle = engine.submit(ids, params)
    output, answer, began = OutputStream(handle, engine.tokenizer), "", time.perf_counter()
    with _interrupts() as interrupts:
        while not handle.finished:
            if interrupts:
                engine.cancel(handle)
            else:
                engine.step()
            answer += (text := output.new_text())
            console.out(text, end="", highlight=False)
    if handle.error is not None:
        raise ValueError(handle.error)
    console.out("")
    for line in logprob_lines(handle, engine.tokenizer):
        console.out(line, highlight=False)
    note_loop(handle, console)
    rate = len(handle.token_ids) / (time.perf_counter() - began)
    drafts = f", {handle.acceptance:.0%} of drafts accepted" if handle.drafted else ""
    stopped = ", stopped" if interrupts else ""
    console.print(f"{len(handle.token_ids)} tokens, {rate:.0f} tokens/s{drafts}{stopped}", style="dim")
    return answer


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collects Ctrl-C in a list, so that it ends no step halfway; a second one ends the program."""
    found: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if found:
            signal.default_int_handler(number, frame)
        found.append(number)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, before)
