"""Rollouts: conversations that the engine samples for a task's problems, with what training needs of each token.

All of a call's conversations are in the engine at once. A turn that calls the task's tool is answered and goes on from
the sampled ids themselves: rendering its text again could cut it into other tokens. What is drawn is a function of the
seed, the problem and the number of the sample, whatever else is in the batch.

Shapes: L MoE layers, T tokens, K experts per token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
import xxhash
from torch import Tensor

from fathom.engine.engine import Engine
from fathom.engine.outputs import FinishReason, Generation
from fathom.engine.request import Request
from fathom.engine.sampling.sampler import SamplingParams
from fathom.posttrain.tasks.protocol import Problem, Task, checked_reward

_FULL_REWARD = 0.99


@dataclass(eq=False)
class Rollout:
    """One conversation."""

    problem: Problem
    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    """What follows the prompt, the tool's answers included."""
    sampled: list[bool] = field(default_factory=list)
    """Which of `token_ids` the model sampled."""
    logprobs: list[float] = field(default_factory=list)
    """The engine's, of what it sampled; 0 for the others."""
    kept_ids: list[Tensor | None] = field(default_factory=list)
    """The ids each token was sampled from; None where all were kept."""
    turns: list[str] = field(default_factory=list)
    """The model's texts."""
    routing: list[Tensor] = field(default_factory=list)
    """Of every turn, the experts (L, T, K) of the tokens that were fed for it first."""
    finish_reason: FinishReason = "stop"
    reward: float = 0.0

    @property
    def tokens(self) -> list[int]:
        return self.prompt_ids + self.token_ids

    @property
    def length(self) -> int:
        """Tokens that the model sampled."""
        return sum(self.sampled)

    @property
    def passed(self) -> bool:
        """Whether the reward is full."""
        return self.reward >= _FULL_REWARD

    @property
    def topk_ids_LTK(self) -> Tensor | None:  # noqa: N802 (a tensor's shape)
        """The experts of every token but the last, int16; None in a model without MoE layers."""
        return torch.cat(self.routing, dim=1) if self.routing else None


_Running = dict[Generation, tuple[Rollout, SamplingParams, int]]
"""Of the requests in the engine, each conversation, its parameters and its number among the problem's samples."""


def rollouts(
    engine: Engine,
    task: Task,
    problems: Sequence[Problem],
    samples: int,
    params: SamplingParams,
    *,
    seed: str = "0",
    for_training: bool = False,
    finished: Callable[[], None] = lambda: None,
) -> list[list[Rollout]]:
    """`samples` conversations for each problem, with their rewards, in the problems' order.

    `params.max_tokens` is for all turns of a conversation together. `for_training` records log-probabilities, kept ids
    and routing, and needs a temperature above 0. `finished` is called after each conversation. Raises TaskError where a
    reward cannot be used, ValueError for a problem that does not fit the model and where no token could be sampled;
    none of the conversations goes on then.
    """
    groups: list[list[Rollout]] = []
    running: _Running = {}
    try:
        for problem in problems:
            prompt = engine.encode_chat(problem.messages)
            own = replace(params, seed=xxhash.xxh3_64_intdigest(f"{seed}/{problem.index}".encode()))
            group = [Rollout(problem, prompt) for _ in range(samples)]
            for number, rollout in enumerate(group):
                running[_submit(engine, rollout, own, number, for_training)] = rollout, own, number
            groups.append(group)
        _finish(engine, task, running, for_training, finished)
    except BaseException:
        for generation in running:
            engine.cancel(generation)
        raise
    for rollout in chain.from_iterable(groups):
        rollout.reward = checked_reward(task, rollout.problem, rollout.turns[-1])
    return groups


def _finish(engine: Engine, task: Task, running: _Running, for_training: bool, finished: Callable[[], None]) -> None:
    """Step until all conversations have ended, turn by turn."""
    while running:
        for update in engine.step():
            if update.generation.finished and update.generation in running:
                rollout, own, number = running.pop(update.generation)
                if (answer := _take(engine, task, rollout, update.generation, own)) is not None:
                    _add(rollout, answer)
                    running[_submit(engine, rollout, own, number, for_training)] = rollout, own, number
                else:
                    finished()


def _submit(engine: Engine, rollout: Rollout, params: SamplingParams, number: int, for_training: bool) -> Generation:
    left = params.max_tokens - rollout.length
    request = Request(
        rollout.tokens,
        replace(params, max_tokens=left),
        stream=number,
        return_routed_experts=for_training and engine.model.config.num_moe_layers > 0,
        return_distributions=for_training,
    )
    return engine.submit(request)


def _take(
    engine: Engine, task: Task, rollout: Rollout, generation: Generation, params: SamplingParams
) -> list[int] | None:
    """Add a turn to its conversation; returns the tokens of the tool's answer where the conversation goes on."""
    if generation.finish_reason == "error":
        raise ValueError(f"task {task.name}, problem {rollout.problem.index}: {generation.error}")
    if generation.routed_experts is not None:
        known = sum(each_LTK.shape[1] for each_LTK in rollout.routing)
        rollout.routing.append(generation.routed_experts[:, known:].clone())
    own = generation.sampled_from or []
    rollout.token_ids += generation.token_ids
    rollout.sampled += [True] * len(generation.token_ids)
    rollout.logprobs += [each.logprob for each in own]
    rollout.kept_ids += [each.kept_ids for each in own]
    rollout.turns.append(engine.completion(generation).text or "")
    assert generation.finish_reason is not None
    rollout.finish_reason = generation.finish_reason
    if generation.finish_reason != "stop" or len(rollout.turns) > task.tool_calls:
        return None
    result = task.tool_result(rollout.problem, rollout.turns[-1])
    if result is None:
        return None
    answer = _tool_turn(engine, rollout.problem, result, generation.token_ids[-1])
    room = min(params.max_tokens - rollout.length, engine.max_length - len(rollout.tokens) - len(answer))
    if room < 1:
        rollout.finish_reason = "length"
        return None
    return answer


def _add(rollout: Rollout, answer: list[int]) -> None:
    """The tool's answer, which the model did not sample."""
    rollout.token_ids += answer
    rollout.sampled += [False] * len(answer)
    rollout.logprobs += [0.0] * len(answer)
    rollout.kept_ids += [None] * len(answer)


def _tool_turn(engine: Engine, problem: Problem, result: str, last: int) -> list[int]:
    """The ids of a user's message and of what invites the next turn, after a turn that ended with the token `last`.

    Found by rendering a conversation with a turn that is known. Raises ValueError for a template that does not keep it
    as it was.
    """
    before = [*problem.messages, {"role": "assistant", "content": "x"}]
    turn = engine.chat_template.encode(before, continue_final=True)
    whole = engine.encode_chat([*before, {"role": "user", "content": result}])
    if whole[: len(turn)] != turn:
        raise ValueError(
            "the model's chat template changes earlier turns, so no conversation with a tool can be sampled"
        )
    rest = whole[len(turn) :]
    return rest[1:] if rest[0] == last else rest
