"""One side of benchmarks/posttrain.py, as a separate process: it takes steps of reinforcement learning on request.

`python benchmarks/posttrain_side.py SPEC`, where SPEC is a `Spec` as JSON. It writes lines of JSON to standard output:
one when it is ready, then one for each line «step TURN» on standard input. Each step samples answers to new problems
and makes one update on all of them. Answers have a fixed length, and rewards alternate, so that every step of every
side has the same number of tokens and no group is dropped.

Shapes: B rows, W = S + 1 + M tokens of a row (M MTP modules).
"""

import json
import random
import string
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

import torch
from rich.console import Console
from side import answer, memory, own_stdout

from fathom.checkpoint.hf.model import load_model
from fathom.config import from_json
from fathom.data.batch import next_token_batch
from fathom.distributed.ranks import data_parallel
from fathom.posttrain.config import LoopConfig
from fathom.posttrain.policy import PolicyObjective, trained_samples
from fathom.posttrain.rl import mtp_acceptance
from fathom.posttrain.rl_config import RlConfig, RlRun
from fathom.posttrain.rollout import rollouts
from fathom.posttrain.sampler import Sampler
from fathom.posttrain.session import Session, open_session, posttrain_step
from fathom.posttrain.tasks.protocol import Problem, Task
from fathom.runtime.hardware import install_allocator
from fathom.train.loss import PretrainLoss
from fathom.train.optim import build_optimizers


@dataclass(frozen=True)
class Spec:
    """What a side does."""

    program: Literal["fathom", "trl", "pretraining"]
    model: str
    """A model's directory, with tokenizer and chat template."""
    problems: int
    """Per step."""
    group_size: int
    """Answers per problem."""
    letters: int
    """Letters of a problem, each a token or more; the template's tokens come in addition."""
    max_tokens: int
    """Tokens of every answer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """float32, or bfloat16 as each program does it: weights of the optimizer stay float32."""
    row_tokens: int = 0
    """Of pretraining: tokens of a row."""


class Step(NamedTuple):
    """What a side answers to a request."""

    rollout: float
    """Seconds of sampling; 0 in pretraining."""
    whole: float
    """Seconds of the step, sampling included."""
    sampled: int
    """Tokens that were sampled."""
    tokens: int
    """Tokens that were trained on, the prompts included."""
    peak: int
    """Bytes of the process at its peak so far; 0 where the system does not report it."""
    imported: int
    """Bytes of the process before there was a model."""


class Letters(Task):
    """Problems of a fixed number of random letters. Rewards alternate, whatever the answers are."""

    name = "letters"

    def __init__(self, letters: int) -> None:
        self._letters = letters
        self._asked = count()

    def problem(self, i: int) -> Problem:
        drawn = random.Random(i).choices(string.ascii_lowercase, k=self._letters)
        return Problem(i, ({"role": "user", "content": " ".join(drawn)},), None, ())

    def reward(self, problem: Problem, text: str) -> float:
        return float(next(self._asked) % 2)


def main() -> None:
    answers = own_stdout()
    spec = from_json(Spec, json.loads(sys.argv[1]), where="spec")
    {"fathom": _fathom, "trl": _trl, "pretraining": _pretraining}[spec.program](spec, answers)


def _take_turns(answers: TextIO, step: Callable[[int], Step]) -> None:
    answer(answers, {})
    for line in sys.stdin:
        answer(answers, step(int(line.split()[1]))._asdict())


# ------------------------------------------------------------------------------------------------------------- fathom


def _fathom(spec: Spec, answers: TextIO) -> None:
    imported, task = memory("VmRSS"), Letters(spec.letters)
    config = RlConfig(
        problems=spec.problems,
        group_size=spec.group_size,
        max_tokens=spec.max_tokens,
        overlong="penalise",  # the mask would take out all of them; without a cushion nothing is taken off
        overlong_cushion=0,
    )
    run = RlRun(spec.model, train=LoopConfig(steps=1_000_000, compute_dtype=spec.dtype), rl=config)
    with (
        tempfile.TemporaryDirectory() as directory,
        data_parallel() as ranks,
        open_session(
            run, Path(directory) / "run", ranks, False, Console(quiet=True), detach_mtp=True, temperature=1
        ) as session,
    ):
        sampler = Sampler(session, config.problems * config.group_size, config.speculative)
        _take_turns(answers, lambda turn: _fathom_step(session, sampler, task, turn, imported))


def _fathom_step(session: Session[RlRun], sampler: Sampler, task: Task, turn: int, imported: int) -> Step:
    """A round of `fathom rl`, measurements included."""
    config, began = session.run.rl, time.perf_counter()
    problems = [task.problem(turn * config.problems + number) for number in range(config.problems)]
    params = replace(config.params(), ignore_eos=True)
    groups = rollouts(sampler.engine, task, problems, config.group_size, params, seed=f"0/{turn}", for_training=True)
    sampled = time.perf_counter()
    if session.state.model.mtp:
        mtp_acceptance(sampler.engine.model, groups)
    samples, dropped = trained_samples(groups, config)
    objective = PolicyObjective(config, samples)
    metrics = posttrain_step(session, session.pack(samples), objective)
    session.stepped(metrics, PolicyObjective.metrics([objective], session.ranks))
    sampler.refresh()
    ended = time.perf_counter()
    if dropped or metrics.skipped:
        raise RuntimeError(f"{dropped} groups were dropped, skipped: {metrics.skipped}: such a step measures nothing")
    lengths = [rollout.length for group in groups for rollout in group]
    tokens = sum(map(len, samples))
    return Step(sampled - began, ended - began, sum(lengths), tokens, memory("VmHWM"), imported)


# ---------------------------------------------------------------------------------------------------------------- TRL


def _trl(spec: Spec, answers: TextIO) -> None:
    """`GRPOTrainer`, which calls back before and after each of its steps.

    It takes the model as it is, without the MTP modules, and samples by `generate`, all answers in one batch.
    Continuous batching is not for this model: in transformers 5.23 its cache has room for keys of `qk_rope_head_dim`.
    """
    import transformers  # dependencies of this side alone
    from datasets import Dataset
    from trl import GRPOTrainer

    install_allocator()  # as `fathom rl` does
    imported, task, asked = memory("VmRSS"), Letters(spec.letters), count()

    class Timed(GRPOTrainer):  # type: ignore[misc]
        """Knows how long it sampled, and what."""

        def _generate_single_turn(self, prompt_ids: Sequence[list[int]], *others: Any, **named: Any) -> Any:
            began = time.perf_counter()
            completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *others, **named)
            self.rollout_seconds = time.perf_counter() - began
            self.sampled = sum(map(len, completion_ids))
            self.trained = self.sampled + sum(map(len, prompt_ids))
            return completion_ids, logprobs

    class Turns(transformers.TrainerCallback):
        """Starts a step when a line has come, and answers when it is done."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not sys.stdin.readline():
                raise EOFError
            self._began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            whole, peak = time.perf_counter() - self._began, memory("VmHWM")
            step = Step(trainer.rollout_seconds, whole, trainer.sampled, trainer.trained, peak, imported)
            answer(answers, step._asdict())

    def reward(completions: Sequence[Any], **_: Any) -> list[float]:
        return [float(next(asked) % 2) for _ in completions]

    with tempfile.TemporaryDirectory() as directory:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            spec.model, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="grouped_mm"
        )
        prompts = Dataset.from_list([{"prompt": list(task.problem(i).messages)} for i in range(64 * spec.problems)])
        tokenizer = transformers.AutoTokenizer.from_pretrained(spec.model)
        trainer = Timed(
            model, reward, _grpo_config(spec, directory), prompts, processing_class=tokenizer, callbacks=[Turns()]
        )
        answer(answers, {})
        try:
            trainer.train()
        except EOFError:
            return


def _grpo_config(spec: Spec, directory: str) -> Any:
    """TRL's settings for the step that `fathom rl` takes."""
    from trl import GRPOConfig  # a dependency of this side alone

    optimizer = RlRun(spec.model).optimizer
    return GRPOConfig(
        directory,
        use_cpu=True,
        bf16=spec.dtype == "bfloat16",
        gradient_checkpointing=False,  # nothing is computed twice: memory suffices
        per_device_train_batch_size=spec.problems * spec.group_size,
        shuffle_dataset=False,  # every side meets the same problems at the same step
        num_generations=spec.group_size,
        max_completion_length=spec.max_tokens,
        generation_kwargs={"min_new_tokens": spec.max_tokens},
        beta=0.0,
        loss_type="cispo",
        epsilon_high=RlConfig().cap,
        scale_rewards="none",
        optim="adamw_torch_fused",
        learning_rate=optimizer.learning_rate,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        lr_scheduler_type="constant",
        max_steps=1_000_000,
        save_strategy="no",
        report_to="none",
        logging_steps=1_000_000,
        disable_tqdm=True,
    )


# -------------------------------------------------------------------------------------------------------- pretraining


def _pretraining(spec: Spec, answers: TextIO) -> None:
    """Fathom's pretraining on as many tokens as a step of reinforcement learning trains on, in equal micro-batches."""
    install_allocator()
    imported = memory("VmRSS")
    model = load_model(spec.model).train()
    run = RlRun(spec.model)
    loss, optimizers = PretrainLoss(model, 1e-4, torch.float32), build_optimizers(model, run.optimizer)
    length, rows = spec.row_tokens, spec.problems * spec.group_size
    at_once = run.train.micro_batch_tokens // length

    def step(turn: int) -> Step:
        began, draw = time.perf_counter(), torch.Generator().manual_seed(turn)
        tokens_BW = torch.randint(model.config.vocab_size, (rows, length + 1 + len(model.mtp)), generator=draw)
        batches = [next_token_batch(part_BW, len(model.mtp)) for part_BW in tokens_BW.split(at_once)]
        weights_H = torch.stack([batch.target_weights() for batch in batches]).sum(0)
        for batch in batches:
            loss(batch, weights_H, 0.1, fraction=len(batch.inputs) / rows).total.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return Step(0.0, time.perf_counter() - began, 0, rows * length, memory("VmHWM"), imported)

    _take_turns(answers, step)


if __name__ == "__main__":
    main()
