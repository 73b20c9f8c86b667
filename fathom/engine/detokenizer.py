"""Text from tokens that come one after another."""

import codecs
from collections.abc import Sequence

from fathom.data.tokenizer import Tokenizer


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
