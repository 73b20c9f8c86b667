"""What every loop of post-training has around its steps: the run's directory, model, record, progress and checkpoints.

A loop is a script that reads top to bottom; what it calls here is the same for all:

    with open_session(run, directory, ranks, resume, console, detach_mtp=False) as session:
        while session.state.step < session.run.train.steps:
            metrics = posttrain_step(session, samples, objective)
            session.stepped(metrics, {...})
            if session.save_or_stop():
                return False

Shapes: H = 1 + M heads.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from fathom.checkpoint.digests import digest_of
from fathom.checkpoint.hf.model import load_config, load_model, model_directory
from fathom.checkpoint.training_state import load_state, newest_whole_checkpoint, save_checkpoint
from fathom.config import ConfigError, load_json, save_json
from fathom.data.tokenizer import Tokenizer, load_tokenizer
from fathom.distributed.ranks import Ranks
from fathom.metrics import MetricsLog
from fathom.model.config import ModelConfig
from fathom.posttrain.config import CHANGEABLE, PosttrainRun
from fathom.posttrain.lora import adapter_state, add_adapters, check_ranks, float32_head, load_adapters, merged_model
from fathom.posttrain.lora_files import refuse_merged, write_lora_files
from fathom.posttrain.lora_memory import lora_memory, lora_memory_refusal
from fathom.posttrain.loss import PosttrainLoss
from fathom.posttrain.pack import PackedSamples, Sample, micro_batches, pack
from fathom.runtime.hardware import faster_dtype, free_memory, install_allocator
from fathom.train.divergence import check_divergence
from fathom.train.errors import TrainingError
from fathom.train.optim import build_optimizers
from fathom.train.preflight import locked_directory
from fathom.train.progress import Progress
from fathom.train.resume import differences
from fathom.train.setup import bf16_copies, restore_optimizers, saved_optimizers
from fathom.train.signals import stop_signals
from fathom.train.step import LossOutput, StepMetrics, TrainState, optimizer_step

R = TypeVar("R", bound=PosttrainRun)


@dataclass
class Session(Generic[R]):
    """An open run."""

    run: R
    """As run.json has it."""
    directory: Path
    ranks: Ranks
    tokenizer: Tokenizer
    state: TrainState
    progress: Progress
    absent_X: Tensor | None
    """Ids of the model's vocabulary that no token has."""
    stop_requested: Callable[[], bool]
    log: MetricsLog | None
    """On the main rank."""
    loop_state: dict[str, Any] = field(default_factory=dict)
    """Tensors, numbers, strings, lists and dicts that every checkpoint keeps for the loop, and a resumed run finds."""
    base: str = ""
    """With adapters: the digest of the model that they were added to."""
    recorded_step: int = 0
    """The last one in the log."""
    previous_step: int = 0
    """The one recorded before it."""

    @property
    def loss(self) -> PosttrainLoss:
        """The loss without the replication around it."""
        module = self.state.loss
        return module if isinstance(module, PosttrainLoss) else module.module  # type: ignore[return-value]

    @property
    def done(self) -> bool:
        return self.state.step >= self.run.train.steps

    def due(self, every: int) -> bool:
        """Whether the step just done is the last one, or one of every `every`."""
        return self.done or (every > 0 and self.state.step // every > self.previous_step // every)

    def pack(self, samples: Sequence[Sample]) -> list[PackedSamples]:
        """This rank's samples of a step as micro-batches on its device."""
        modules = len(self.state.model.mtp)
        parts = micro_batches(samples, self.run.train.micro_batch_tokens)
        return [pack(part, modules, self.absent_X).to(self.ranks.device) for part in parts]

    def stepped(self, metrics: StepMetrics, values: Mapping[str, float]) -> None:
        """Record the step just done; `values` are the loop's own."""
        mtp = {} if metrics.mtp_loss is None else {"mtp_loss": metrics.mtp_loss}
        common = {
            "loss": metrics.loss,
            **mtp,
            "grad_norm": metrics.grad_norm,
            "max_vio": metrics.max_vio,
            "lr": self.run.hyperparameters(self.state.step - 1).learning_rate,
            "skipped": int(metrics.skipped),
        }
        self._record({**values, **common})
        train, rate = self.run.train, self.run.optimizer.learning_rate
        check_divergence(self.state, train.max_bad_steps, rate, self.directory, self.progress)

    def passed(self, steps: int, values: Mapping[str, float]) -> None:
        """Count steps that had nothing to learn from."""
        self.state.step += steps
        self._record(values)

    def _record(self, everything: Mapping[str, float]) -> None:
        self.previous_step, self.recorded_step = self.recorded_step, self.state.step
        if self.log is not None:
            self.log.write(self.state.step, **everything)
        self.progress.stepped(self.state.step, dict(everything))

    def evaluated(self, values: Mapping[str, float]) -> None:
        """Record an evaluation after the step just done."""
        if self.log is not None:
            self.log.write(self.state.step, **values)
        self.progress.evaluated(self.state.step, dict(values))

    def save_or_stop(self) -> bool:
        """Save where it is due, at the end, or because a signal came: then returns True, and the loop ends."""
        stopping = self.ranks.any(self.stop_requested())
        # A run of bad steps must not push the last good checkpoint out; whatever ends the run is saved.
        due = self.due(self.run.train.save_every) and not self.state.skipped_in_a_row
        if self.done or stopping or due:
            self.save()
        if stopping and not self.done:
            self.progress.print("stopped by a signal; continue with --resume")
        return stopping and not self.done

    def save(self) -> None:
        """Write a checkpoint. A collective call: all ranks hold the same, so the main one writes."""
        if self.ranks.is_main:
            content = {**saved_optimizers(self.state), "loop_state": self.loop_state}
            state, keep = self.state, self.run.train.keep_last
            content |= {"base": self.base, "adapters": adapter_state(state.model)} if self.run.lora.rank else {}
            model, tokenizer = merged_model(state.model), self.tokenizer
            path = save_checkpoint(self.directory, state.step, model, tokenizer, content, None, keep, self._write_lora)
            self.progress.print(f"saved {path}")
        self.ranks.barrier()

    def _write_lora(self, checkpoint: Path) -> None:
        if self.run.lora.rank:
            write_lora_files(self.state.model, self.run.lora, self.run.init, checkpoint)


@contextmanager
def open_session(
    run: R,
    directory: Path,
    ranks: Ranks,
    resume: bool,
    console: Console | None,
    *,
    detach_mtp: bool,
    temperature: float = 1,
    loss_type: type[PosttrainLoss] = PosttrainLoss,
) -> Iterator[Session[R]]:
    """Everything a loop needs, in `directory`, which other processes are kept out of within the block.

    Raises ConfigError for a directory that holds another run, or none to resume; CheckpointError where no checkpoint is
    whole; ValueError where another process is at work in the directory.
    """
    install_allocator()
    with ExitStack() as stack:
        record = stack.enter_context(locked_directory(directory, ranks, resume))
        progress = stack.enter_context(Progress(console or Console(), run.train.steps, visible=ranks.is_main))
        run = _resumed(load_json(type(run), record), run, record) if resume else _resolved(run, ranks)
        found = newest_whole_checkpoint(directory, progress.print) if resume and ranks.is_main else None
        found = ranks.gather(found)[0]
        saved = load_state(found) if found else {}
        # Adapters stay beside the model that they were added to; the checkpoints have them merged.
        source = found if found and not run.lora.rank else model_directory(run.init)
        tokenizer, config = load_tokenizer(source), load_config(source)
        _check_model(config, tokenizer, run)
        base = _check_base(source, config, run, saved, ranks, progress) if run.lora.rank else ""
        state = _train_state(source, run, ranks, loss_type, detach_mtp, temperature)
        if found:
            if run.lora.rank:
                load_adapters(state.model, saved["adapters"])
            restore_optimizers(state, saved, found, run.train.steps)
            progress.print(f"resuming after step {state.step} ({found})")
        log = None
        if ranks.is_main:
            save_json(run, record)
            log = MetricsLog(directory, tensorboard=run.train.tensorboard)
            stack.callback(log.close)
            log.truncate_after(state.step)
        absent = tokenizer.absent_ids(state.model.config.vocab_size)
        absent_X = torch.tensor(absent) if absent else None
        stop_requested = stack.enter_context(stop_signals())
        yield Session(
            run,
            directory,
            ranks,
            tokenizer,
            state,
            progress,
            absent_X,
            stop_requested,
            log,
            dict(saved.get("loop_state", {})),
            base,
            recorded_step=state.step,
        )


def posttrain_step(session: Session[Any], batches: Sequence[PackedSamples], objective: Any) -> StepMetrics:
    """One optimizer step on this rank's micro-batches of a global batch; `objective` is what the loss takes."""
    state, ranks = session.state, session.ranks
    hyper = session.run.hyperparameters(state.step)
    weights_H = ranks.sum(torch.stack([packed.batch.target_weights() for packed in batches]).sum(0))
    samples = sum(ranks.gather(sum(packed.samples for packed in batches)))

    def loss(packed: PackedSamples) -> LossOutput:
        fraction = packed.samples / samples
        output: LossOutput = state.loss(packed, objective, weights_H, hyper.mtp_loss_weight, fraction)
        return output

    return optimizer_step(state, batches, loss, weights_H, hyper, ranks)


def _resumed(recorded: R, wanted: R, record: Path) -> R:
    """The run of run.json with the changeable fields of `wanted`; ConfigError where another one differs."""
    changes = {}
    for section, old, new in differences(recorded, wanted):
        inner = differences(old, new) if hasattr(old, "__dataclass_fields__") else [("", old, new)]
        for name, before, now in inner:
            if section == "train" and name in CHANGEABLE:
                changes[name] = now
                continue
            flag = f"--{section}.{name}".rstrip(".").replace("_", "-")
            raise ConfigError(
                f"{record} has {section}.{name} {before!r}, this run {now!r}: leave {flag} out to continue the run as "
                "it is, or choose another --out"
            )
    return replace(recorded, train=replace(recorded.train, **changes))


def _resolved(run: R, ranks: Ranks) -> R:
    """The run to record: «auto» replaced by what it means here, the model's name by the directory it is in."""
    train = run.train
    if train.compute_dtype == "auto":
        choice = ranks.broadcast(str(faster_dtype(ranks.device)).removeprefix("torch."))
        train = replace(train, compute_dtype="bfloat16" if choice == "bfloat16" else "float32")
    return replace(run, train=train)


def _check_model(config: ModelConfig, tokenizer: Tokenizer, run: PosttrainRun) -> None:
    """Raise ConfigError for a model that cannot be trained on these samples."""
    longest = config.max_position_embeddings
    if run.train.max_length > longest:
        raise ConfigError(
            f"train.max_length is {run.train.max_length}; {run.init} is made for {longest} tokens at most"
        )
    if tokenizer.eos_id is not None and tokenizer.eos_id == tokenizer.pad_id:
        raise ConfigError(
            f"the tokenizer of {run.init} has one token, {tokenizer.eos_id}, as end of text and as padding, so that no "
            "end would be learnt; give it a pad_token of its own"
        )


def _check_base(
    source: Path, config: ModelConfig, run: PosttrainRun, saved: Mapping[str, Any], ranks: Ranks, progress: Progress
) -> str:
    """The digest of the model that adapters are added to. Raises ConfigError where it cannot be their base, or has
    changed since the run started; TrainingError where the GPU is too small."""
    refuse_merged(source)
    check_ranks(config, run.lora)
    digest = digest_of(source / "config.json", *sorted(source.glob("*.safetensors")))
    if saved and saved["base"] != digest:
        raise ConfigError(f"{source} is not the model that it was when the run started: its adapters fit that one")
    if ranks.device.type == "cuda":
        train, itemsize = run.train, compute_dtype(run).itemsize
        needs = lora_memory(config, run.lora, train.micro_batch_tokens, itemsize, train.activation_checkpointing)
        progress.print(
            f"needs about {needs.total / 2**30:.1f} GiB, {needs.weights / 2**30:.1f} of them for the weights"
        )
        if refusal := lora_memory_refusal(needs, free_memory(ranks.device), train.activation_checkpointing):
            raise TrainingError(refusal)
    return digest


def compute_dtype(run: PosttrainRun) -> torch.dtype:
    """The activations' type of a resolved run."""
    return torch.bfloat16 if run.train.compute_dtype == "bfloat16" else torch.float32


def start_loss(session: Session[Any]) -> PosttrainLoss:
    """The model that the run started from, with the run's loss: for log-probabilities without a gradient."""
    loss = session.loss
    model = load_model(session.run.init, device=session.ranks.device)
    return PosttrainLoss(model, loss.compute_dtype, temperature=loss.temperature)


def _train_state(
    source: Path,
    run: PosttrainRun,
    ranks: Ranks,
    loss_type: type[PosttrainLoss],
    detach_mtp: bool,
    temperature: float,
) -> TrainState:
    """The model of `source` with the loss and fresh optimizers of `run`."""
    dtype = compute_dtype(run)
    if run.lora.rank:
        # A GPU multiplies frozen weights as they are; kernels on a CPU round float32 ones as they read them.
        model = load_model(source, dtype if ranks.device.type == "cuda" else torch.float32, ranks.device).train()
        float32_head(model)
        add_adapters(model, run.lora, run.train.seed)
        copies = None
    else:
        model = load_model(source, device=ranks.device).train()
        copies = bf16_copies(model, dtype, ranks)
    loss = loss_type(
        model if copies is None else copies.model,
        dtype,
        seq_balance_loss_weight=run.train.seq_balance_loss_weight,
        detach_mtp=detach_mtp,
        activation_checkpointing=run.train.activation_checkpointing,
        temperature=temperature,
    )
    return TrainState(model, ranks.replicate(loss), build_optimizers(model, run.optimizer), None, copies)
