"""Continuing a run: what may change, and refusals by name of what may not."""

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fathom.checkpoint.hf.model import load_config
from fathom.config import ConfigError, check
from fathom.data.tokenize import TokenizedCorpus
from fathom.data.tokenizer import load_tokenizer
from fathom.train.run import Run

CHANGEABLE = frozenset(
    [
        *("steps", "eval_every", "eval_sequences", "final_eval_sequences", "save_every", "keep_last"),
        *("max_bad_steps", "tensorboard", "activation_checkpointing"),
    ]
)
"""Fields of `train` that a resumed run may change: its length, and what leaves its steps as they are."""
_RESOLVED = frozenset(["bos_token_id", "eos_token_id", "pad_token_id", "compute_dtype", "compile"])
"""Set when a run starts, so a configuration that has not started yet may have other values."""


def resumed_run(recorded: Run, wanted: Run, record: Path) -> Run:
    """The run of run.json (`record`) with the changeable fields of `wanted`; ConfigError where another one differs."""
    check(wanted.init == recorded.init, "init", wanted.init, f"{recorded.init!r}, as in {record}")
    changes = {}
    # A run that started from a model took its architecture and tokenizer from there.
    for section in ("train", "optimizer", "schedule", *(() if recorded.init else ("model", "data"))):
        for name, old, new in differences(getattr(recorded, section), getattr(wanted, section)):
            if section == "train" and name in CHANGEABLE:
                changes[name] = new
            elif name not in _RESOLVED:
                flag = f"--{section}.{name.replace('_', '-')}"
                raise ConfigError(
                    f"{record} has {section}.{name} {old!r}, this run {new!r}: leave the preset and {flag} out to "
                    "continue the run as it is, or train into another --out"
                )
    return replace(recorded, train=replace(recorded.train, **changes))


def check_corpus(run: Run, corpus: TokenizedCorpus) -> None:
    """Raise ConfigError where the tokens of a run were not made as its run.json says."""
    made_with = {
        **{f"data.{name}": (made, new) for name, made, new in differences(corpus.config, run.data)},
        "model.vocab_size": (corpus.requested_vocab_size, run.model.vocab_size),
        "train.seed": (corpus.seed, run.train.seed),
    }
    for name, (made, new) in made_with.items():
        if made != new:
            raise ConfigError(f"{corpus.directory} was tokenised with {name} {made!r}; run.json has {new!r}")


def check_checkpoint(run: Run, corpus: TokenizedCorpus, checkpoint: Path, corpus_hash: str | None) -> None:
    """Raise ConfigError where a checkpoint is of another model than run.json's, or of another text.

    `corpus_hash` is that of the text which the checkpoint was trained on; None where it was not recorded.
    """
    for name, old, new in differences(load_config(checkpoint), run.model):
        raise ConfigError(f"run.json has model.{name} {new!r}; {checkpoint} was trained with {old!r}")
    if load_tokenizer(checkpoint).tokenizer_json != corpus.tokenizer.tokenizer_json:
        raise ConfigError(f"{checkpoint} was trained with another tokenizer than that of {corpus.directory}")
    if corpus_hash not in (None, corpus.corpus_hash):
        raise ConfigError(
            f"{checkpoint} was trained on another text than that in {corpus.directory}: the corpus "
            f"{run.data.corpus!r} has changed since, and was tokenised anew"
        )


def differences(old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, old and new value of every field that differs between two configurations of one type."""
    for field in fields(old):
        values = getattr(old, field.name), getattr(new, field.name)
        if values[0] != values[1]:
            yield field.name, *values
