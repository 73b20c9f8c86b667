"""The samples of each step of supervised fine-tuning, as functions of (seed, step): conversations, and text mixed in.

What is held out is decided by hashing each sample's tokens, so that equal samples stay on one side and a longer file
holds out the same ones.

Shapes: T tokens of a sample.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fathom.config import ConfigError
from fathom.data.corpus import DataConfig
from fathom.data.dataset import TokenRows
from fathom.data.tokenize import open_tokenized, tokenize_corpus
from fathom.data.tokenizer import Tokenizer
from fathom.distributed.ranks import Ranks
from fathom.posttrain.conversations import ConversationFile, read_conversations
from fathom.posttrain.pack import Sample
from fathom.posttrain.sft_config import SftRun


@dataclass(frozen=True)
class SftSamples:
    """The conversations of a run."""

    file: ConversationFile
    trained: list[Sample]
    held_out: list[Sample]
    digest: str
    """Of all tokens and weights, in order."""

    def steps(self, epochs: float, batch_samples: int) -> int:
        """How many steps come closest to so many epochs. Raises ConfigError for batches larger than an epoch."""
        if batch_samples > len(self.trained):
            raise ConfigError(
                f"train.batch_samples is {batch_samples}; there are {len(self.trained)} samples to train on, and a "
                "step takes at most all of them"
            )
        return max(1, round(epochs * len(self.trained) / batch_samples))

    def batch(self, step: int, batch_samples: int, seed: int) -> list[Sample]:
        """The samples of `step` (from 0)."""
        places = range(step * batch_samples, (step + 1) * batch_samples)
        return [self.trained[index] for index in shuffled(len(self.trained), places, seed)]


def read_samples(run: SftRun, tokenizer: Tokenizer) -> SftSamples:
    """Read the run's conversations. Raises ValueError, with file and line, for what cannot be trained on."""
    if not run.data.chats:
        raise ConfigError("name the conversations to train on: --data FILE.jsonl")
    file = read_conversations(Path(run.data.chats), tokenizer, run.train.max_length, run.data.strict)
    digests = [_digest(sample) for sample in file.samples]
    limit = round(run.data.heldout * 2**64)
    held_out = [int.from_bytes(digest[:8], "big") < limit for digest in digests]
    trained = [sample for sample, out in zip(file.samples, held_out, strict=True) if not out]
    if not trained:
        raise ConfigError(f"data.heldout is {run.data.heldout}; it holds out all {len(file.samples)} samples")
    rest = [sample for sample, out in zip(file.samples, held_out, strict=True) if out]
    return SftSamples(file, trained, rest, hashlib.sha256(b"".join(digests)).hexdigest())


def shuffled(count: int, places: Sequence[int], seed: int) -> list[int]:
    """Which of `count` samples stand at these places of the endless training order, one permutation per epoch."""
    epochs = {place // count for place in places}
    order = {epoch: np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count) for epoch in epochs}
    return [int(order[place // count][place % count]) for place in places]


class PretrainingText:
    """Samples of plain text, in which every token is trained."""

    def __init__(self, rows: TokenRows, share: float, length: int, seed: int) -> None:
        """`share`: the text's part of a step's trained tokens; `length`: the tokens of a row."""
        self._rows, self._share, self._length, self._seed = rows, share, length, seed

    def samples(self, step: int, chat_tokens: float) -> list[Sample]:
        """As many tokens of text as belong to so many trained ones of conversations, drawn for `step`."""
        wanted = max(1, round(chat_tokens * self._share / (1 - self._share)))
        count = math.ceil(wanted / (self._length - 1))
        draw = np.random.Generator(np.random.Philox(key=[self._seed, step]))
        drawn = draw.integers(len(self._rows), size=count).tolist()
        # The first token of a sample is no target.
        targets = [wanted // count + (index < wanted % count) for index in range(count)]
        return [self._sample(row, length + 1) for row, length in zip(drawn, targets, strict=True)]

    def _sample(self, row: int, length: int) -> Sample:
        batch = self._rows.sequential(row, 1)
        tokens_T = torch.cat((batch.tokens_BT[0], batch.targets_HBS[0, 0, -1:]))[:length]
        weights_T = torch.ones(length)
        weights_T[0] = 0
        return Sample(tokens_T, weights_T)


def open_text(run: SftRun, tokenizer_directory: Path, vocab_size: int, out: Path, ranks: Ranks) -> PretrainingText:
    """The run's corpus, tokenised once into `out` with the model's tokenizer. A collective call."""
    assert run.data.corpus is not None
    config = DataConfig(corpus=run.data.corpus, tokenizer=str(tokenizer_directory))
    if ranks.is_main and not out.exists():  # a resumed run has its own, whatever has become of the corpus
        tokenize_corpus(config, vocab_size, out, run.train.seed)
    ranks.barrier()
    corpus = open_tokenized(out)
    length = run.train.max_length
    rows = TokenRows(corpus.train_path, corpus.token_dtype, length - 1, 0, corpus.tokenizer.eos_id)
    return PretrainingText(rows, run.data.pretrain_share, length, run.train.seed)


def trained_tokens(samples: Sequence[Sample]) -> float:
    """The sum of the weights of all targets."""
    return float(sum(float(sample.weights_T[1:].sum()) for sample in samples))


def _digest(sample: Sample) -> bytes:
    content: list[Tensor] = [sample.tokens_T, sample.weights_T]
    arrays: list[np.ndarray[Any, Any]] = [tensor.numpy() for tensor in content]
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).digest()
