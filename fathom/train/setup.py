"""From a configuration to a state that can step: corpus tokenised, «auto» resolved, model and optimizers built."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fathom.checkpoint.hf.model import load_config, load_model, model_directory
from fathom.checkpoint.training_state import checkpoint_step, load_ema, load_state
from fathom.config import ConfigError, check
from fathom.data.dataset import TokenRows
from fathom.data.tokenize import TokenizedCorpus, open_tokenized, tokenize_corpus
from fathom.data.tokenizer import load_tokenizer
from fathom.distributed.ranks import Ranks
from fathom.model.config import ModelConfig
from fathom.model.transformer import Model
from fathom.runtime.hardware import faster_dtype
from fathom.train.bf16_weights import Bf16Weights
from fathom.train.loss import PretrainLoss
from fathom.train.optim import EMA, build_optimizers
from fathom.train.resume import check_checkpoint, check_corpus
from fathom.train.run import Run, TrainConfig
from fathom.train.step import TrainState


def tokenize_once(run: Run, directory: Path, ranks: Ranks) -> TokenizedCorpus:
    """Tokenise the corpus, on the main rank alone, and open it."""
    if ranks.is_main:
        tokenize_corpus(run.data, run.model.vocab_size, directory, run.train.seed)
    ranks.barrier()
    return open_tokenized(directory)


def reopen_corpus(run: Run, directory: Path, ranks: Ranks) -> TokenizedCorpus:
    """A resumed run's own tokens, whatever has become of the corpus; made anew only where they are gone."""
    if ranks.is_main and not directory.exists():
        tokenize_corpus(run.data, run.model.vocab_size, directory, run.train.seed)
    ranks.barrier()
    corpus = open_tokenized(directory)
    check_corpus(run, corpus)
    return corpus


def with_initial_model(run: Run) -> Run:
    """A run that starts from a checkpoint takes its architecture and tokenizer from there.

    `run` may have more MTP modules than the checkpoint: those start fresh. Raises ConfigError where it names another
    tokenizer, whose ids would have other meanings.
    """
    if run.init is None:
        return run
    config, directory = load_config(run.init), model_directory(run.init)
    if (other := run.data.tokenizer) is not None:
        same = load_tokenizer(Path(other)).tokenizer_json == load_tokenizer(directory).tokenizer_json
        check(same, "data.tokenizer", other, f"left out, or the tokenizer of the model in init ({run.init})")
    modules = max(config.num_nextn_predict_layers, run.model.num_nextn_predict_layers)
    data = replace(run.data, tokenizer=other or str(directory))
    return replace(run, model=replace(config, num_nextn_predict_layers=modules), data=data)


def resolve(run: Run, corpus: TokenizedCorpus, ranks: Ranks) -> Run:
    """The run to record: every «auto» replaced by what it means here, and token ids by the tokenizer's."""
    tokenizer = corpus.tokenizer
    if tokenizer.vocab_size > run.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {run.model.vocab_size}; the tokenizer needs at least {tokenizer.vocab_size}"
        )
    bos, eos, pad = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    model = replace(run.model, bos_token_id=bos, eos_token_id=eos, pad_token_id=pad)
    return replace(run, model=model, train=resolve_auto(run.train, ranks))


def resolve_auto(train: TrainConfig, ranks: Ranks) -> TrainConfig:
    """Replace every «auto» by what it means on the ranks' devices."""
    # Timings differ from rank to rank; all take the main rank's choice.
    if train.compute_dtype == "auto":
        choice = ranks.broadcast(str(faster_dtype(ranks.device)).removeprefix("torch."))
        train = replace(train, compute_dtype="bfloat16" if choice == "bfloat16" else "float32")
    if train.compile == "auto":
        # On a CPU the kernels of fathom/ops are as fast and need no minute of compiling (docs/log/training.md).
        train = replace(train, compile="on" if ranks.device.type == "cuda" else "off")
    return train


def compute_dtype(run: Run) -> torch.dtype:
    """The activations' type of a resolved run."""
    return torch.bfloat16 if run.train.compute_dtype == "bfloat16" else torch.float32


def build_state(run: Run, ranks: Ranks) -> TrainState:
    """Fresh weights (or those of `run.init`), fresh optimizers."""
    torch.manual_seed(run.train.seed)
    model = (Model(run.model) if run.init is None else _initial_model(run.init, run.model)).to(ranks.device)
    return init_train_state(model.train(), run, ranks)


def restore_state(run: Run, corpus: TokenizedCorpus, checkpoint: Path, ranks: Ranks) -> TrainState:
    """The state exactly as `checkpoint` holds it."""
    saved = load_state(checkpoint)
    check_checkpoint(run, corpus, checkpoint, saved.get("corpus_hash"))
    state = init_train_state(load_model(checkpoint, device=ranks.device).train(), run, ranks)
    if state.ema is not None:
        state.ema.weights = load_ema(checkpoint, ranks.device)
    restore_optimizers(state, saved, checkpoint, run.train.steps)
    return state


def restore_optimizers(state: TrainState, saved: dict[str, Any], checkpoint: Path, steps: int) -> None:
    """Put the moments and counts of a training state into `state`. Raises ConfigError where it has over `steps`."""
    for optimizer in state.optimizers:
        optimizer.state.clear()  # else fresh and loaded moments exist at the same time
    for optimizer, content in zip(state.optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(content)
    state.step = checkpoint_step(checkpoint) or 0
    state.skipped, state.skipped_in_a_row = saved["skipped"], saved["skipped_in_a_row"]
    # A checkpoint of the version before does not have these.
    state.first_loss, state.high_in_a_row = saved.get("first_loss"), saved.get("high_in_a_row", 0)
    if state.step > steps:
        raise ConfigError(f"train.steps is {steps}; {checkpoint} has {state.step} steps already")


def saved_optimizers(state: TrainState) -> dict[str, Any]:
    """What `restore_optimizers` reads."""
    return {
        "optimizers": [optimizer.state_dict() for optimizer in state.optimizers],
        "skipped": state.skipped,
        "skipped_in_a_row": state.skipped_in_a_row,
        "first_loss": state.first_loss,
        "high_in_a_row": state.high_in_a_row,
    }


def open_rows(corpus: TokenizedCorpus, run: Run, split: str) -> TokenRows:
    """The rows of the `train` or `valid` split."""
    path = corpus.train_path if split == "train" else corpus.valid_path
    modules = run.model.num_nextn_predict_layers
    eos = corpus.tokenizer.eos_id
    return TokenRows(path, corpus.token_dtype, run.train.sequence_length, modules, eos, run.train.seed)


def init_train_state(model: Model, run: Run, ranks: Ranks) -> TrainState:
    """`model`, on its device, with the loss and fresh optimizers of `run`."""
    bf16_weights = bf16_copies(model, compute_dtype(run), ranks)
    compute_model = model if bf16_weights is None else bf16_weights.model
    if run.train.compile == "on":
        # Layers of one kind share one compilation; the whole model would be compiled layer by layer.
        for block in (*compute_model.layers, *compute_model.mtp):
            # By default a shape that changes becomes a symbol: slower kernels, which torch 2.11 has failed to trace.
            block.compile(dynamic=False)
    loss = PretrainLoss(
        compute_model, run.train.seq_balance_loss_weight, compute_dtype(run), run.train.activation_checkpointing
    )
    decay = run.optimizer.ema_decay
    ema = EMA(model, decay) if decay else None
    return TrainState(model, ranks.replicate(loss), build_optimizers(model, run.optimizer), ema, bf16_weights)


def bf16_copies(model: Model, dtype: torch.dtype, ranks: Ranks) -> Bf16Weights | None:
    """Bfloat16 copies to compute with, on a GPU; None elsewhere.

    DDP reduces the gradients of the parameters it computes with, so several ranks keep one set of weights.
    """
    copies = ranks.device.type == "cuda" and dtype == torch.bfloat16 and ranks.world == 1
    return Bf16Weights(model) if copies else None


def _initial_model(path: str, config: ModelConfig) -> Model:
    loaded = load_model(path)
    if loaded.config.num_nextn_predict_layers == config.num_nextn_predict_layers:
        return loaded
    model = Model(config)
    model.load_state_dict(loaded.state_dict(), strict=False)
    return model
