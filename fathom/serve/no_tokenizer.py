"""Serving a model whose directory has no tokenizer.json: prompts are token ids, and so are answers."""

from collections.abc import Iterable, Sequence

from fathom.data.tokenizer import Tokenizer
from fathom.serve.errors import ApiError


class NoTokenizer(Tokenizer):
    """Stands for the missing one: a text has no ids, which is said to the client, and ids have no text."""

    def __init__(self) -> None:
        self.config = {}
        self.fim_prefix_id = self.fim_suffix_id = self.fim_middle_id = None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Raises ApiError."""
        message = "the model is served without a tokenizer: the prompt must be token ids"
        raise ApiError(400, message, "prompt", "no_tokenizer")

    def text_bytes(self, ids: Iterable[int]) -> bytes:
        """Nothing."""
        return b""

    def token_bytes(self, token: int) -> bytes:
        """Nothing."""
        return b""
