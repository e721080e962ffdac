"""What a step of each model costs on this machine: forward passes, and what the ways of decoding add to them."""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation import BaseStreamer
from transformers.utils import logging

from hf_draftkd.acceptance import DRAFT_LENGTHS
from hf_draftkd.decoding.drafting import with_sliced_head
from hf_draftkd.decoding.setting import UNFILTERED
from hf_draftkd.evaluation.assisted import fixed_draft_length, observe_rounds, synchronize_accelerator
from hf_draftkd.evaluation.recommendation import ASSISTANT_MODEL, OVERHEADS, PARALLEL, SPECULATIVE, forward_latency
from hf_draftkd.evaluation.report import GenerateOverhead, LatencyResult
from hf_draftkd.evaluation.scoring import lengths_of
from hf_draftkd.evaluation.timing import generate_text, single_text_config, way_options
from hf_draftkd.models.forward import CACHE
from hf_draftkd.models.pairing import shared_context
from hf_draftkd.models.parallel import parallel_draft

# Draft lengths at which `generate` itself is timed: far enough apart to tell the cost of a token from that of a call.
_CALIBRATION_LENGTHS = (1, 8)


@torch.inference_mode()
def measure_latency(
    target_model: PreTrainedModel,
    draft_model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    ways: Sequence[str] = (ASSISTANT_MODEL, SPECULATIVE),
    lists: Sequence[Sequence[int]] = (),
    draft_lengths: Sequence[int] = DRAFT_LENGTHS,
    num_repeats: int = 7,
    seed: int = 0,
    **overrides: Any,
) -> LatencyResult:
    """What one step of each model costs here: forward passes with a filled cache, and what each way adds to them.

    The cache holds as many tokens as the median prompt and half of `max_new_tokens`, or fewer where a model reads
    fewer. Passes of the target over γ + 1 tokens, for every γ in `draft_lengths`, take turns with those of the draft;
    each is timed `num_repeats` times. `lists` are beginnings of the draft's recorded list of ids, the whole list last:
    the draft is also timed with its head cut to each. `seed` and `overrides`, as in `single_text_config`, serve the
    sampled texts by which `generate` itself is timed.
    """
    sizes = [1, *(length + 1 for length in draft_lengths)]
    length = int(median(len(prompt) for prompt in prompts)) + max_new_tokens // 2
    # Behind the cache there must be room for the longest pass: learned positions end where the context does.
    length = min(length, shared_context(target_model, draft_model) - max(sizes))
    # Which tokens stand in the cache does not matter to its speed.
    tokens = [token for prompt in prompts for token in prompt]
    context = (tokens * (1 + length // len(tokens)))[:length]
    target, draft = _StepClock(target_model, context), _StepClock(draft_model, context)
    parallel = parallel_draft(draft_model.config) if PARALLEL in ways else None
    drafting = lengths_of(parallel.num_tokens if parallel else 0)
    listed = {len(ids): _StepClock(with_sliced_head(draft_model, list(ids)), context) for ids in lists}
    steps: list[tuple[Hashable, Callable[[], float]]] = [("draft", partial(draft.seconds, 1))]
    steps += [(("listed", size), partial(clock.seconds, 1)) for size, clock in listed.items()]
    verifying = [(size, partial(target.seconds, size)) for size in sizes]
    proposing = listed[max(listed)] if listed else draft
    in_one_pass = [(("draft", each), partial(proposing.seconds, each + 1)) for each in drafting]
    # Twice those of the draft, which are the shortest and decide most: every round has up to sixteen of them.
    costs = _costs([*steps, *steps, *verifying, *in_one_pass], num_repeats)
    found = LatencyResult(
        context_length=len(context),
        target_step_seconds=costs[1],
        draft_step_seconds=costs["draft"],
        verify_seconds={size: costs[size] for size in sizes if size > 1},
        relative_cost=costs["draft"] / costs[1],
        listed_draft_seconds={size: costs["listed", size] for size in listed} or None,
        parallel_draft_seconds={each: costs["draft", each] for each in drafting} or None,
    )
    config = single_text_config(target_model, UNFILTERED, min(max_new_tokens, 48), **overrides)
    texts = prompts[:8]
    intervals: list[float] = []
    total = len(texts) * (1 + len(_CALIBRATION_LENGTHS) * len(ways))
    with logging.tqdm(total=total, desc="Timing single rounds", unit="text") as bar:
        for number, prompt in enumerate(texts, start=seed):
            clock = _TokenClock()
            generate_text(target_model, prompt, config, seed=number, streamer=clock)
            # The prompt comes first, and the first token with it.
            intervals += np.diff(clock.times[1:]).tolist()
            bar.update()
        if intervals:
            plain = max(0.0, _cost(intervals) - found.target_step_seconds)
            for way in ways:
                added = _overhead(way, target_model, draft_model, texts, found, config, seed, plain, bar.update)
                setattr(found, OVERHEADS[way], added)
    return found


def _overhead(
    way: str,
    target_model: PreTrainedModel,
    draft_model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    latency: LatencyResult,
    config: GenerationConfig,
    seed: int,
    plain_step_seconds: float,
    advance: Callable[[], object],
) -> GenerateOverhead | None:
    """Time of rounds of real decoding in one way beyond their forward passes; None where texts are too short to say."""
    passes = forward_latency(latency, way)
    beyond: dict[int, list[float]] = {}
    last: float | None = None

    def note(num_drafted: int, num_accepted: int, num_new: int) -> None:
        # A round ends with the host reading its tokens, so the accelerator has nothing left to do. The first round of
        # a text also reads the prompt.
        nonlocal last
        now = perf_counter()
        if last is not None and num_drafted and num_drafted + 1 in latency.verify_seconds:
            beyond.setdefault(num_drafted, []).append(now - last - passes.block_seconds(num_drafted))
        last = now

    longest = max(passes.draft_pass_seconds or DRAFT_LENGTHS)
    for number, prompt in enumerate(prompts, start=seed):
        for length in {min(each, longest) for each in _CALIBRATION_LENGTHS}:
            last = None
            options = way_options(way, draft_model, length)
            with fixed_draft_length(draft_model, length), observe_rounds(target_model, note):
                generate_text(target_model, prompt, config, seed=number, **options)
            advance()
    if len(beyond) < 2:
        return None
    # So much a drafted token and so much a call.
    costs, weights = map(_cost, beyond.values()), [len(times) ** 0.5 for times in beyond.values()]
    per_token, per_call = np.polyfit(list(beyond), list(costs), deg=1, w=weights)
    return GenerateOverhead(
        plain_step_seconds=plain_step_seconds,
        draft_step_seconds=max(0.0, float(per_token)),
        block_seconds=max(0.0, float(per_call)),
    )


def _costs(passes: Sequence[tuple[Hashable, Callable[[], float]]], num_repeats: int) -> dict[Hashable, float]:
    """What each pass costs by its name, taken in turns; the first round pays for compilation and memory."""
    times: dict[Hashable, list[float]] = {name: [] for name, _ in passes}
    for repeat in range(num_repeats + 1):
        for name, seconds in passes:
            taken = seconds()
            if repeat:
                times[name].append(taken)
    return {name: _cost(taken) for name, taken in times.items()}


def _cost(seconds: Sequence[float]) -> float:
    """What something costs when nothing else wants the machine: the 20th percentile of its times.

    Other programs can only add time. On an idle machine this is the median but for a hair; on a busy one the median
    would be a number about the other programs.
    """
    return float(np.quantile(seconds, 0.2))


class _StepClock:
    """Times forward passes behind a filled cache, which is put back after every pass."""

    def __init__(self, model: PreTrainedModel, context: Sequence[int]) -> None:
        self.model, self.context = model, context
        self.cache = DynamicCache(config=model.config)
        self.cache.activate_past_recording()  # sliding windows can then be rolled back
        # Logits of a whole long context may need more memory than the model.
        self._forward(context, **({"logits_to_keep": 1} if model._supports_logits_to_keep() else {}))

    def seconds(self, num_tokens: int) -> float:
        tokens = (list(self.context) * (1 + num_tokens // len(self.context)))[:num_tokens]
        synchronize_accelerator()
        started = perf_counter()
        self._forward(tokens)
        synchronize_accelerator()
        elapsed = perf_counter() - started
        self.cache.crop(-num_tokens)
        return elapsed

    def _forward(self, tokens: Sequence[int], **options: Any) -> None:
        ids = torch.tensor([list(tokens)], device=self.model.device)
        self.model(input_ids=ids, **{CACHE: self.cache}, use_cache=True, **options)


class _TokenClock(BaseStreamer):
    """Notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(perf_counter())

    def end(self) -> None:
        pass
