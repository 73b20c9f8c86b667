"""`fathom chat`: what it says first, its commands, how an answer is stopped and how one leaves."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fathom.cli import main
from fathom.cli.chat import Conversation
from fathom.data.tokenizer import load_tokenizer, save_tokenizer
from fathom.engine.engine import Engine
from tests.serve.random_model import save_random_model

pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("chat") / "model", spare_ids=False)


@pytest.fixture(scope="module")
def untemplated(model: Path) -> Path:
    """The same model, whose tokenizer has no chat template."""
    directory = shutil.copytree(model, model.with_name("untemplated"))
    tokenizer = load_tokenizer(model)
    del tokenizer.config["chat_template"]
    save_tokenizer(tokenizer, directory)
    return directory


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command over lines, or exceptions that the terminal raises; returns what it printed."""

    def run(model: Path, *typed: str | type[BaseException], flags: tuple[str, ...] = ()) -> str:
        lines = iter([*typed, EOFError])

        def read(prompt: str) -> str:
            line = next(lines)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        main(["chat", str(model), "--ignore-eos", "--max-tokens", "12", *flags])
        assert next(lines, None) is None  # Ctrl-D alone has ended it
        return capsys.readouterr().out

    return run


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The messages that each answer continued."""
    found: list[list[str]] = []
    encode = Conversation.encode

    def recorded(self: Conversation) -> list[int]:
        found.append([message["content"] for message in self.messages])
        return encode(self)

    monkeypatch.setattr(Conversation, "encode", recorded)
    return found


def test_the_banner_has_model_template_and_the_way_out(
    chat: Callable[..., str], model: Path, untemplated: Path
) -> None:
    banner = chat(model)
    for words in (str(model), "parameters in float32", "chat template: that of fathom train", "/help", "Ctrl-D leaves"):
        assert words in banner
    assert "chat template: none" in chat(untemplated)


def test_commands_are_no_messages(chat: Callable[..., str], model: Path, prompts: list[list[str]]) -> None:
    printed = chat(model, "/help", "/dance", "", "7", "/reset", "8", "/8 is no command", flags=("--system", "S"))
    assert "start a new conversation" in printed and "There is no command /dance" in printed
    assert [[each for each in messages if len(each) == 1] for messages in prompts] == [
        ["S", "7"],
        ["S", "8"],
        ["S", "8"],
    ]
    assert [messages[-1] for messages in prompts] == ["7", "8", "/8 is no command"]
    assert printed.count("12 tokens") == 3


def test_ctrl_c_stops_the_answer_and_not_the_program(
    chat: Callable[..., str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = Engine.step, 0

    def interrupted(self: Engine) -> object:
        nonlocal steps
        steps += 1
        if steps == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    printed = chat(model, KeyboardInterrupt, "first", "second", flags=("--no-speculative",))
    assert "3 tokens" in printed and ", stopped" in printed
    assert printed.count("stopped") == 1 and "12 tokens" in printed
    assert signal.getsignal(signal.SIGINT) is handler


def test_without_a_template_the_text_is_continued(
    chat: Callable[..., str], untemplated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, texts = Engine.submit, []

    def recorded(self: Engine, ids: list[int], *rest: object) -> object:
        assert self.tokenizer is not None
        texts.append(self.tokenizer.decode(ids))
        return submit(self, ids, *rest)

    monkeypatch.setattr(Engine, "submit", recorded)
    chat(untemplated, "The number is", "def f", flags=("--temperature", "0"))
    assert texts[0] == "The number is"
    assert texts[1].startswith("The number is") and texts[1].endswith("\ndef f")


def test_a_conversation_beyond_the_context_is_refused(chat: Callable[..., str], model: Path) -> None:
    printed = chat(model, "12 " * 600, "7")
    assert "the context 512; /reset starts a new one" in printed and "12 tokens" in printed


def test_log_probabilities_follow_the_answer(chat: Callable[..., str], model: Path) -> None:
    assert chat(model, "7", flags=("--logprobs", "1")).count("likeliest:") == 12


@pytest.mark.slow
def test_in_a_terminal_lines_are_edited_and_ctrl_c_and_ctrl_d_are_keys(model: Path, tmp_path: Path) -> None:
    # A context that leaves half a minute in which to stop the answer.
    long = shutil.copytree(model, tmp_path / "long")
    config = json.loads((long / "config.json").read_text()) | {"max_position_embeddings": 65536}
    (long / "config.json").write_text(json.dumps(config))
    ours, theirs = pty.openpty()
    words = ["chat", str(long), "--ignore-eos", "--max-tokens", "60000"]
    program = subprocess.Popen(
        [sys.executable, "-m", "fathom", *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=_take_terminal,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(theirs)
    try:
        _read_until(ours, "> ")
        os.write(ours, b"/rexet\x1b[D\x1b[D\x7fs\r")  # two to the left, delete the x, s
        _read_until(ours, "A new conversation.")
        _read_until(ours, "> ")  # which comes once the terminal is set for reading
        os.write(ours, b"\x1b[A\r")  # the line before
        _read_until(ours, "A new conversation.")
        _read_until(ours, "> ")
        os.write(ours, b"The number\r")
        _read_until(ours, "The number\r\n")
        os.read(ours, 1)
        os.write(ours, b"\x03")
        _read_until(ours, "stopped")
        _read_until(ours, "> ")
        time.sleep(0.5)
        os.write(ours, b"\x04")
        assert program.wait(30) == 0
    finally:
        program.kill()
        os.close(ours)


def _take_terminal() -> None:
    """Make standard input the terminal that controls this process, so that its keys send signals."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _read_until(terminal: int, words: str) -> None:
    """Read what the program prints until it has printed this; fails where nothing comes for a while."""
    printed = ""
    while words not in printed:
        ready, _, _ = select.select([terminal], [], [], 30)
        assert ready, printed
        printed += os.read(terminal, 1).decode(errors="replace")  # and nothing beyond
