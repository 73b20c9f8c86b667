"""A run of preference training, and its pairs: two answers to one prompt, of which one is better.

A line of the file is an object {"prompt": …, "chosen": …, "rejected": …}. The prompt is a text, and so are both
answers; or it is a list of messages (also under the name "messages"), and each answer a text, a message or a list of
messages of the assistant and its tools. What is trained of an answer is what fine-tuning would train.

Shapes: T tokens of an answer behind its prompt, X trained tokens of all answers.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fathom.checkpoint.digests import digest_of
from fathom.config import ConfigError, check
from fathom.data.readers import read_objects
from fathom.data.tokenizer import Tokenizer
from fathom.files import atomic_file
from fathom.posttrain.config import LearningRateConfig, PosttrainRun
from fathom.posttrain.conversations import SampleEncoder
from fathom.posttrain.pack import Sample
from fathom.posttrain.sft_config import SftLoopConfig
from fathom.train.run import OptimizerConfig


@dataclass(frozen=True)
class PreferData:
    """What to train on."""

    pairs: Annotated[str, tyro.conf.arg(aliases=["--data"])] = ""
    """JSON Lines, plain or compressed, with `prompt` (or `messages`), `chosen` and `rejected` a line."""
    epochs: float = 1
    """How often every pair is trained, unless train.steps says how long the run is."""
    heldout: float = 0.02
    """Fraction of the pairs that is never trained and measured instead; 0: none."""
    strict: bool = False
    """Refuse answers of more than train.max_length tokens; otherwise their pairs are left out, and counted."""

    def __post_init__(self) -> None:
        check(self.epochs > 0, "data.epochs", self.epochs, "a positive number")
        check(0 <= self.heldout < 1, "data.heldout", self.heldout, "a fraction from 0 to below 1")


@dataclass(frozen=True)
class PreferRun(PosttrainRun):
    """Everything that determines a run. A sample is a pair."""

    train: SftLoopConfig = field(default_factory=SftLoopConfig)
    """Length, memory, evaluation and checkpoints."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-6, weight_decay=0.0))
    """AdamW or Muon, and their settings."""
    schedule: LearningRateConfig = field(default_factory=lambda: LearningRateConfig(lr_schedule="cosine"))
    """The learning rate during the run."""
    data: PreferData = field(default_factory=PreferData)
    """Pairs."""
    beta: float = 0.1
    """How strongly the model is held to its start: the larger, the closer it stays."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.beta > 0, "beta", self.beta, "a positive number")


@dataclass(frozen=True, eq=False)
class Pair:
    """Both answers, each behind the prompt."""

    chosen: Sample
    rejected: Sample

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)

    def __iter__(self) -> Iterator[Sample]:
        return iter((self.chosen, self.rejected))

    @property
    def digest(self) -> bytes:
        """Of the tokens and of what is trained."""
        content = [tensor.numpy().tobytes() for each in self for tensor in (each.tokens_T, each.weights_T)]
        return hashlib.sha256(b"/".join(content)).digest()


@dataclass(frozen=True)
class PairFile:
    """The pairs of a file, in its order."""

    pairs: list[Pair]
    too_long: int
    """Pairs left out because an answer has more tokens than the limit."""


def read_pairs(path: Path, tokenizer: Tokenizer, max_length: int, strict: bool = False) -> PairFile:
    """All pairs of a JSON Lines file (plain or gz, bz2, xz or zst).

    Raises ValueError, which names the line, for one that cannot be trained on, with `strict` also for one of more than
    `max_length` tokens; and for a file of which nothing is left.
    """
    encoder, pairs, too_long = SampleEncoder(tokenizer), [], 0
    for number, row in read_objects(path):
        try:
            pair = _pair(encoder, row)
            longest = max(map(len, pair))
            if longest <= max_length:
                pairs.append(pair)
            elif strict:
                raise ValueError(f"an answer and its prompt have {longest} tokens; train.max_length is {max_length}")
            else:
                too_long += 1
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    if not pairs:
        longer = f"; {too_long} have more than train.max_length ({max_length}) tokens"
        raise ValueError(f"{path} has no pair to train on{longer if too_long else ''}")
    return PairFile(pairs, too_long)


def _pair(encoder: SampleEncoder, row: Mapping[str, Any]) -> Pair:
    prompts = [name for name in ("prompt", "messages") if name in row]
    if len(prompts) != 1 or not {"chosen", "rejected"} <= row.keys():
        keys = ", ".join(map(repr, row)) or "nothing"
        raise ValueError(f"the object has {keys}; it must have 'prompt' (or 'messages'), 'chosen' and 'rejected'")
    prompt, answers = row[prompts[0]], []
    for name in ("chosen", "rejected"):
        try:
            completion = row[name] if isinstance(prompt, str) else _messages(row[name])
            encoded = {"prompt": prompt, "completion": completion, "tools": row.get("tools")}
            ids, trained = encoder.encode(encoded)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        weights_T = torch.tensor(trained, dtype=torch.float32)
        weights_T[0] = 0  # nothing predicts it
        answers.append(Sample(torch.tensor(ids), weights_T))
    if torch.equal(answers[0].tokens_T, answers[1].tokens_T):
        raise ValueError("'chosen' and 'rejected' are the same tokens, so neither is better")
    return Pair(*answers)


def _messages(answer: Any) -> Any:
    """An answer to messages, as messages."""
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    return [answer] if isinstance(answer, dict) else answer


def held_out(pair: Pair, fraction: float) -> bool:
    """Decided by the pair's tokens, so that equal pairs stay on one side."""
    return int.from_bytes(pair.digest[:8], "big") < round(fraction * 2**64)


def pairs_digest(pairs: Sequence[Pair], model: Path, compute_dtype: torch.dtype) -> str:
    """What reference log-probabilities depend on: the pairs' tokens, the model's weights and the activations' type."""
    weights = digest_of(model / "config.json", *sorted(model.glob("*.safetensors")))
    content = b"".join(pair.digest for pair in pairs) + f"{weights} {compute_dtype}".encode()
    return hashlib.sha256(content).hexdigest()


def save_reference(path: Path, logprobs: Sequence[Tensor], digest: str) -> None:
    """Write every pair's reference log-probabilities, float32, one after another; the digest goes into the header."""
    with atomic_file(path) as aside:
        save_file({"logprobs_X": torch.cat(list(logprobs))}, aside, {"digest": digest})


def load_reference(path: Path, pairs: Sequence[Pair], digest: str) -> list[Tensor]:
    """What `save_reference` wrote, by pair. Raises ConfigError where it was computed from anything else."""
    with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
        found, logprobs_X = (file.metadata() or {}).get("digest"), file.get_tensor("logprobs_X")
    if found != digest:
        raise ConfigError(
            f"{path} holds the reference's log-probabilities of other pairs or another model: the data or the model "
            "has changed since the run started; put it back, or start a run in another --out"
        )
    return list(logprobs_X.split([trained_tokens(pair) for pair in pairs]))


def trained_tokens(pair: Pair) -> int:
    """Of both answers."""
    return sum(int((sample.weights_T != 0).sum()) for sample in pair)
