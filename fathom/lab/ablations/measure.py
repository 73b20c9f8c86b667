"""Measurements on a trained model: quality, balance, cache, routing, speculative decoding.

Results are functions of the weights; timings are kept apart from them. On a CPU a run has one thread and is timed in
processor time, which other programs on the machine affect little; on a GPU in wall-clock time.

Shapes: B sequences, S tokens of each, T tokens of context, N new tokens, K experts per token, G groups, L layers,
M cache slots, W cached elements per slot.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor

from fathom.data.dataset import TokenRows
from fathom.data.tokenize import TokenizedCorpus
from fathom.engine.engine import Engine
from fathom.engine.outputs import Generation
from fathom.engine.sampling.sampler import SamplingParams
from fathom.eval.bits import Evaluation, evaluate
from fathom.lab.ablations.experts import without_best_experts
from fathom.lab.ablations.variants import Variant, costs
from fathom.model.cached_batch import CachedBatch, DecodeBatch
from fathom.model.transformer import Model
from fathom.train.run import TrainConfig

Metrics = dict[str, float]

_CONTEXTS = (1024, 4096, 16384)
_SEQUENCES, _DECODED = 4, 5
"""Batch size, and timed steps, whose median is reported."""

_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 64, 64, 48
_TIMED_PROMPTS = 8
"""Number of prompts that are decoded at batch size 1 for timing."""


class HeldOut:
    """Evenly spaced held-out rows, and the number of bytes they decode to."""

    def __init__(self, rows: TokenRows, prepared: TokenizedCorpus, train: TrainConfig, dtype: torch.dtype) -> None:
        self.dtype = dtype
        # Not len(rows), which may be one less with MTP modules: every variant is evaluated on the same text.
        available = (prepared.valid_tokens - 1) // train.sequence_length - 1
        size = min(train.batch_size, available)
        blocks = max(1, min(train.eval_sequences or available, available) // size)
        firsts = [block * (available - size) // max(1, blocks - 1) for block in range(blocks)]
        self.batches = [rows.sequential(first, size) for first in firsts]
        # Bytes are proportional to tokens.
        scored = blocks * size * train.sequence_length
        self.bytes = round(prepared.valid_bytes * scored / prepared.valid_tokens)

    def evaluate(self, model: Model) -> Evaluation:
        return evaluate(model, self.batches, self.bytes, self.dtype)

    def prompts(self) -> list[list[int]]:
        rows_BW = torch.cat([batch.tokens_BT for batch in self.batches])
        chosen = torch.linspace(0, len(rows_BW) - 1, min(_PROMPTS, len(rows_BW))).long()
        prompts: list[list[int]] = rows_BW[chosen, :_PROMPT_TOKENS].tolist()
        return prompts


def quality(model: Model, held_out: HeldOut) -> Metrics:
    """Bits per byte of the main head, balance of its routers, agreement of the MTP modules with the main head."""
    found = held_out.evaluate(model)
    routers = model.config.num_moe_layers
    metrics = {"bits_per_byte": found.bits_per_byte}
    if routers:
        metrics["max_vio_global"] = max(found.max_vio_global[:routers])
        metrics["max_vio_batch"] = max(found.max_vio_batch[:routers])
    agreement = {f"mtp_agreement_{k}": share for k, share in enumerate(found.mtp_agreement, start=1)}
    return {**metrics, **agreement}


def denial(model: Model, held_out: HeldOut, plain: float) -> Metrics:
    """Increase in bits per byte when the top 1/8 and 1/4 of the routed experts are masked for every token."""
    metrics = {}
    for parts in (8, 4):
        with without_best_experts(model, -(-model.config.n_routed_experts // parts)):
            denied = held_out.evaluate(model).bits_per_byte
        metrics[f"denied_{parts}"] = denied - plain
    return metrics


@torch.no_grad()
def groups(model: Model, held_out: HeldOut) -> Metrics:
    """Number of expert groups that a token's experts lie in, averaged over tokens and layers."""
    config = model.config
    size = config.n_routed_experts // config.n_group
    means = []
    for batch in held_out.batches:
        tokens_BS = batch.tokens_BT.to(model.embed_tokens.weight.device)
        for topk_ids_BSK in model.forward_hidden(tokens_BS).router.topk_ids_LBSK:
            touched_BSG = torch.zeros(*topk_ids_BSK.shape[:2], config.n_group, device=topk_ids_BSK.device)
            means.append(touched_BSG.scatter(2, topk_ids_BSK // size, 1.0).sum(-1).mean().item())
    return {"groups_touched": sum(means) / len(means)}


def drafting(model: Model, held_out: HeldOut, clock: Callable[[], float]) -> tuple[Metrics, Metrics]:
    """Greedy decoding with one and with two drafts: acceptance rates, and speed."""
    prompts = held_out.prompts()
    metrics = {"tokens_per_forward": 1.0}
    if model.mtp:
        one, two = (_continue(_engine(model, drafts, len(prompts)), prompts) for drafts in (1, 2))
        metrics["tokens_per_forward"] = (_tokens(one) - len(one)) / sum(g.forwards for g in one)
        for place in range(2):
            offered = sum(g.offered_at[place] for g in two if len(g.offered_at) > place)
            accepted = sum(g.accepted_at[place] for g in two if len(g.accepted_at) > place)
            metrics[f"accepted_{place + 1}"] = accepted / offered if offered else 0.0
    return metrics, _drafting_speed(model, prompts[:_TIMED_PROMPTS], clock)


def _drafting_speed(model: Model, prompts: Sequence[Sequence[int]], clock: Callable[[], float]) -> Metrics:
    """Speed at batch size 1, alternating between no draft and one, so that drift of the machine affects both."""
    engines = [_engine(model, drafts, 1) for drafts in ((0, 1) if model.mtp else (0,))]
    seconds = [0.0] * len(engines)
    for prompt in prompts:
        for place, engine in enumerate(engines):
            began = clock()
            _continue(engine, [prompt])
            seconds[place] += clock() - began
    return {
        "plain_tokens_per_second": _NEW_TOKENS * len(prompts) / seconds[0],
        "speedup": seconds[0] / seconds[-1],
    }


def _engine(model: Model, drafts: int, together: int) -> Engine:
    room = together * (_PROMPT_TOKENS + _NEW_TOKENS + 64)
    return Engine(model, speculative=drafts, max_batch=together, cache_tokens=room)


def _continue(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[Generation]:
    """Decode all prompts greedily."""
    params = SamplingParams(max_tokens=_NEW_TOKENS, ignore_eos=True)
    found = [engine.submit(prompt, params) for prompt in prompts]
    while engine.has_work:
        engine.step()
    return found


def _tokens(generations: Sequence[Generation]) -> int:
    return sum(len(generation.token_ids) for generation in generations)


@torch.no_grad()
def cache(model: Model, variant: Variant, clock: Callable[[], float]) -> tuple[Metrics, Metrics]:
    """Bytes of cache per token as allocated, and decoded tokens per second by context length."""
    layers = len(model.layers)
    width = costs(variant).cache_elements // layers
    timing = {}
    bytes_per_token = 0.0
    for context in _CONTEXTS:
        weight = model.embed_tokens.weight
        cache_LMW = torch.zeros(layers, _SEQUENCES * context, width, device=weight.device, dtype=weight.dtype)
        bytes_per_token = cache_LMW.nbytes / (_SEQUENCES * context)
        seconds = _decode(model, cache_LMW, context, clock)
        timing[f"decode_{context}"] = _SEQUENCES / seconds
    return {"cache_bytes_per_token": bytes_per_token}, timing


def _decode(model: Model, cache_LMW: Tensor, context: int, clock: Callable[[], float]) -> float:
    """Seconds of one decoding step at the end of full contexts, with absorbed attention."""
    device = cache_LMW.device
    slots_BT = torch.arange(_SEQUENCES * context, device=device).view(_SEQUENCES, context)
    positions_BS = torch.full((_SEQUENCES, 1), context - 1, device=device)
    batch = CachedBatch((DecodeBatch(positions_BS, slots_BT),), slots_BT[:, -1], cache_LMW)
    tokens_N = torch.ones(_SEQUENCES, dtype=torch.int64, device=device)
    times = []
    for _ in range(_DECODED):
        began = clock()
        model.logits(model.forward_with_cache(tokens_N, batch)[0])
        times.append(clock() - began)
    return median(times[1:])


def clock_of(device: torch.device) -> Callable[[], float]:
    """Processor time of this process on a CPU; on a GPU the wall clock after synchronising."""
    if device.type == "cpu":
        return time.process_time

    def wall() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return wall
