"""What a step of each model costs on this machine: forward passes, and what the ways of decoding add to them."""

from collections.abc import Mapping, Sequence
from statistics import median
from time import perf_counter

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation import BaseStreamer

from hf_draftkd.acceptance import DRAFT_LENGTHS
from hf_draftkd.decoding.drafting import with_sliced_head
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.decoding.speculative import SpeculativeDecoding, listening
from hf_draftkd.evaluation.assisted import AssistedStep, fixed_draft_length, observe_steps, synchronize_accelerator
from hf_draftkd.evaluation.parallel import lengths_of
from hf_draftkd.evaluation.recommendation import ASSISTANT_MODEL, PARALLEL, SPECULATIVE
from hf_draftkd.evaluation.report import GenerateOverhead, LatencyResult
from hf_draftkd.evaluation.timing import generate_text, single_text_config
from hf_draftkd.models.context import shared_context
from hf_draftkd.models.forward import unwrapped
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
    draft_lengths: Sequence[int] = DRAFT_LENGTHS,
    suppress_tokens: list[int] | None = None,
    num_repeats: int = 7,
    seed: int = 0,
) -> LatencyResult:
    """What one step of each model costs here: forward passes with a filled cache, and what each way adds to them.

    Args:
        target_model: The target.
        draft_model: The draft.
        prompts: Token ids of prompts like those the pair will answer; their median length fills the cache.
        max_new_tokens: Longest completion; the cache holds half of it besides the prompt, as far as the models read.
        ways: Ways of decoding whose overhead is measured.
        draft_lengths: γ whose verification (γ + 1 tokens at once) is timed.
        suppress_tokens: Ids never to write.
        num_repeats: Times each number is taken, in turns; see `LatencyResult` for what is made of them.
        seed: Of the sampled continuations that are used to time `generate`.
    """
    sizes = [1, *(length + 1 for length in draft_lengths)]
    length = int(median(len(prompt) for prompt in prompts)) + max_new_tokens // 2
    # Behind the cache there must be room for the longest pass: learned positions end where the context does.
    length = max(1, min(length, shared_context(target_model, draft_model) - max(sizes)))
    # Which tokens stand in the cache does not matter to its speed.
    tokens = [token for prompt in prompts for token in prompt]
    context = (tokens * (1 + length // len(tokens)))[:length]
    target, draft = _StepClock(target_model, context), _StepClock(draft_model, context)
    verify: dict[int, list[float]] = {size: [] for size in sizes}
    draft_step: list[float] = []
    parallel = parallel_draft(draft_model.config) if PARALLEL in ways else None
    drafting: dict[int, list[float]] = {each: [] for each in lengths_of(parallel.num_tokens if parallel else 0)}
    for size in sizes:  # the first pass of each size pays for compilation and memory
        target.seconds(size)
    for size in (1, *(each + 1 for each in drafting)):
        draft.seconds(size)
    for _ in range(num_repeats):
        draft_step += [draft.seconds(1), draft.seconds(1)]
        for size in sizes:
            verify[size].append(target.seconds(size))
        for each, times in drafting.items():
            times.append(draft.seconds(each + 1))
    costs = {size: _cost(times) for size, times in verify.items()}
    target_step = costs.pop(1)
    found = LatencyResult(
        context_length=len(context),
        target_step_seconds=target_step,
        draft_step_seconds=_cost(draft_step),
        verify_seconds=costs,
        relative_cost=_cost(draft_step) / target_step,
    )
    config = single_text_config(
        target_model, DecodingSetting(temperature=1.0), min(max_new_tokens, 48), suppress_tokens=suppress_tokens
    )
    given = target_model, draft_model, prompts[:8], found, config, seed
    found.generate_overhead = _generate_overhead(*given)
    if SPECULATIVE in ways:
        found.speculative_overhead = _speculative_overhead(*given)
    if parallel is not None:
        found.parallel_draft_seconds = {each: _cost(times) for each, times in drafting.items()}
        found.parallel_overhead = _speculative_overhead(*given, parallel=True)
    return found


@torch.inference_mode()
def draft_step_seconds(
    draft: PreTrainedModel, lists: Sequence[Sequence[int]], context_length: int, num_repeats: int = 15
) -> list[float]:
    """Seconds of one token through a draft behind so much context, with its whole head and with its head cut to each
    list of ids, taken in turns.
    """
    twins = [draft, *(with_sliced_head(draft, list(ids)) for ids in lists)]
    clocks = [_StepClock(twin, [0] * context_length) for twin in twins]
    times: list[list[float]] = [[] for _ in clocks]
    for repeat in range(num_repeats + 1):
        for clock, found in zip(clocks, times, strict=True):
            seconds = clock.seconds(1)
            if repeat:  # the first pass pays for compilation and memory
                found.append(seconds)
    return [_cost(found) for found in times]


def _generate_overhead(
    target_model: PreTrainedModel,
    draft_model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    latency: LatencyResult,
    config: GenerationConfig,
    seed: int,
) -> GenerateOverhead | None:
    """Time of real `generate` calls beyond their forward passes; None where texts are too short to say."""
    ticks = _TickStreamer()
    steps: list[AssistedStep] = []
    for number, prompt in enumerate(prompts, start=seed):
        generate_text(target_model, prompt, config, seed=number, streamer=ticks)
        for length in _CALIBRATION_LENGTHS:
            with (
                fixed_draft_length(draft_model, length),
                observe_steps(target_model, steps.append, synchronize=True),
            ):
                generate_text(target_model, prompt, config, seed=number, assistant_model=draft_model)
    drafting: dict[int, list[float]] = {}
    checking = []
    for step in steps:
        passes = latency.verify_seconds.get(step.num_draft_tokens + 1)
        if passes is not None and not step.is_first:
            drafting.setdefault(step.num_draft_tokens, []).append(step.draft_seconds)
            checking.append(step.seconds - step.draft_seconds - passes)
    if len(drafting) < 2 or not ticks.intervals:
        return None
    per_token, per_call = _fit(drafting)
    return GenerateOverhead(
        plain_step_seconds=max(0.0, _cost(ticks.intervals) - latency.target_step_seconds),
        draft_step_seconds=max(0.0, per_token - latency.draft_step_seconds),
        block_seconds=max(0.0, per_call + _cost(checking)),
    )


def _speculative_overhead(
    target_model: PreTrainedModel,
    draft_model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    latency: LatencyResult,
    config: GenerationConfig,
    seed: int,
    *,
    parallel: bool = False,
) -> GenerateOverhead | None:
    """Time of SpeculativeDecoding's rounds beyond their forward passes; None where texts are too short to say."""
    rounds: dict[int, list[float]] = {}
    last: float | None = None

    def note(num_drafted: int, num_accepted: int, num_new: int) -> None:
        # A round ends with the host reading its tokens, so the accelerator has nothing left to do. The first round of
        # a text also reads the prompt.
        nonlocal last
        now = perf_counter()
        if last is not None and num_drafted + 1 in latency.verify_seconds:
            drafting = passes[num_drafted] if parallel else num_drafted * latency.draft_step_seconds
            beyond = now - last - drafting - latency.verify_seconds[num_drafted + 1]
            rounds.setdefault(num_drafted, []).append(beyond)
        last = now

    passes = (latency.parallel_draft_seconds or {}) if parallel else {}
    for number, prompt in enumerate(prompts, start=seed):
        for length in {min(each, max(passes)) if passes else each for each in _CALIBRATION_LENGTHS}:
            last = None
            with listening(unwrapped(target_model), note):
                decoding = SpeculativeDecoding(draft_model, length, parallel=parallel)
                generate_text(target_model, prompt, config, seed=number, custom_generate=decoding)
    if len(rounds) < 2 or latency.generate_overhead is None:
        return None
    per_token, per_round = _fit(rounds)
    return GenerateOverhead(
        plain_step_seconds=latency.generate_overhead.plain_step_seconds,
        draft_step_seconds=per_token,
        block_seconds=per_round,
    )


def _fit(seconds: Mapping[int, Sequence[float]]) -> tuple[float, float]:
    """Times by draft length as so much a token and so much a call, neither below 0."""
    costs, weights = map(_cost, seconds.values()), [len(times) ** 0.5 for times in seconds.values()]
    per_token, per_call = np.polyfit(list(seconds), list(costs), deg=1, w=weights)
    return max(0.0, float(per_token)), max(0.0, float(per_call))


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
        self._forward(context)

    def seconds(self, num_tokens: int) -> float:
        tokens = (list(self.context) * (1 + num_tokens // len(self.context)))[:num_tokens]
        synchronize_accelerator()
        started = perf_counter()
        self._forward(tokens)
        synchronize_accelerator()
        elapsed = perf_counter() - started
        self.cache.crop(-num_tokens)
        return elapsed

    def _forward(self, tokens: Sequence[int]) -> None:
        ids = torch.tensor([list(tokens)], device=self.model.device)
        self.model(input_ids=ids, past_key_values=self.cache, use_cache=True)


class _TickStreamer(BaseStreamer):
    """Notes the time between tokens; the prompt and the first token, which reads it, are left out."""

    def __init__(self) -> None:
        self.intervals: list[float] = []
        self._puts = 0
        self._last = 0.0

    def put(self, value: torch.Tensor) -> None:
        now = perf_counter()
        self._puts += 1
        if self._puts > 2:
            self.intervals.append(now - self._last)
        self._last = now

    def end(self) -> None:
        self._puts = 0
