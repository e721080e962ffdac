"""Wall-clock: plain against assisted decoding in one run, and what a step of each model costs on this machine.

Both ways of decoding take turns prompt by prompt, so that a machine that slows down slows both. Ratios are paired:
their interval comes from resampling prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation import BaseStreamer

from hf_draftkd.acceptance import DRAFT_LENGTHS, AcceptanceCounts
from hf_draftkd.decoding.processors import logits_processors, process_logits
from hf_draftkd.decoding.setting import DecodingSetting, end_token_ids
from hf_draftkd.evaluation.assisted import (
    AssistedStep,
    count_acceptance,
    fixed_draft_length,
    observe_steps,
    synchronize_accelerator,
)
from hf_draftkd.evaluation.report import DecodingDifference, GenerateOverhead, LatencyResult
from hf_draftkd.models.context import shared_context
from hf_draftkd.models.forward import seeded

# Draft lengths at which `generate` itself is timed: far enough apart to tell the cost of a token from that of a call.
_CALIBRATION_LENGTHS = (1, 8)


@dataclass(frozen=True)
class DecodingTimes:
    """Plain and assisted decoding of the same prompts, one list entry a prompt.

    Attributes:
        plain_tokens: Tokens written by plain decoding.
        plain_seconds: Its wall-clock, reading the prompt included.
        assisted_tokens: Tokens written with the draft.
        assisted_seconds: Its wall-clock.
        counts: What assisted decoding drafted and accepted.
        num_identical: Prompts whose two texts are equal, token by token. None when sampling.
        differences: The first difference of each other prompt. Empty when sampling.
    """

    plain_tokens: list[int]
    plain_seconds: list[float]
    assisted_tokens: list[int]
    assisted_seconds: list[float]
    counts: AcceptanceCounts
    num_identical: int | None
    differences: list[DecodingDifference]

    @property
    def paired_speedups(self) -> list[float]:
        """Tokens per second assisted ÷ plain, for each prompt."""
        plain = np.divide(self.plain_tokens, self.plain_seconds)
        return (np.divide(self.assisted_tokens, self.assisted_seconds) / plain).tolist()


@torch.inference_mode()
def time_decoding(
    target_model: PreTrainedModel,
    draft_model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    setting: DecodingSetting,
    *,
    max_new_tokens: int,
    num_assistant_tokens: int = 5,
    suppress_tokens: list[int] | None = None,
    num_warmup: int = 1,
    seed: int = 0,
    on_prompt: Callable[[], Any] = lambda: None,
    **generate_options: Any,
) -> DecodingTimes:
    """Decode every prompt plainly and with the draft, in turns, and time both.

    The draft proposes exactly `num_assistant_tokens` tokens a step. Every other prompt starts with assisted decoding,
    so that neither way always runs on the other's warm caches. Greedy texts are compared token by token.

    Args:
        target_model: The target.
        draft_model: The draft, with the target's vocabulary.
        prompts: Token ids of each prompt.
        setting: How to decode.
        max_new_tokens: Longest completion, in tokens.
        num_assistant_tokens: Draft length γ.
        suppress_tokens: Ids never to write, such as padded rows of the vocabulary.
        num_warmup: Prompts decoded both ways beforehand without being timed.
        seed: Sampled prompts are seeded one by one with this and their number.
        on_prompt: Called after every prompt.
        **generate_options: Further fields of the assisted call's generation config.

    Returns:
        Times and counts of every prompt.
    """
    config = single_text_config(target_model, setting, max_new_tokens, suppress_tokens=suppress_tokens)
    assisted_config = single_text_config(
        target_model, setting, max_new_tokens, suppress_tokens=suppress_tokens, **generate_options
    )
    plain: list[tuple[list[int], float]] = []
    assisted: list[tuple[list[int], float]] = []

    def decode(number: int, with_draft: bool) -> tuple[list[int], float]:
        if not with_draft:
            return generate_text(target_model, prompts[number], config, seed=seed + number)
        return generate_text(
            target_model, prompts[number], assisted_config, seed=seed + number, assistant_model=draft_model
        )

    with fixed_draft_length(draft_model, num_assistant_tokens):
        for number in range(min(num_warmup, len(prompts))):
            decode(number, with_draft=False)
            decode(number, with_draft=True)
        with count_acceptance(target_model) as counts:
            for number in range(len(prompts)):
                for with_draft in (False, True) if number % 2 == 0 else (True, False):
                    (assisted if with_draft else plain).append(decode(number, with_draft))
                on_prompt()
    differences = []
    if setting.is_greedy and not generate_options:
        for number, (expected, got) in enumerate(zip(plain, assisted, strict=True)):
            if expected[0] != got[0]:
                differences.append(
                    _first_difference(target_model, setting, number, prompts[number], expected[0], got[0])
                )
    return DecodingTimes(
        plain_tokens=[len(tokens) for tokens, _ in plain],
        plain_seconds=[seconds for _, seconds in plain],
        assisted_tokens=[len(tokens) for tokens, _ in assisted],
        assisted_seconds=[seconds for _, seconds in assisted],
        counts=counts,
        num_identical=len(prompts) - len(differences) if setting.is_greedy and not generate_options else None,
        differences=differences,
    )


def single_text_config(
    target_model: PreTrainedModel,
    setting: DecodingSetting,
    max_new_tokens: int,
    *,
    suppress_tokens: list[int] | None = None,
    **overrides: Any,
) -> GenerationConfig:
    """The generation config for decoding one prompt at a time, plainly or assisted.

    Nothing is padded then, so the pad id is set to the end token: transformers drops a mask of ones, and the draft's
    `generate` would guess a new one by taking every pad id *inside* the text for padding (transformers 5.23).
    """
    if suppress_tokens is not None:
        overrides["suppress_tokens"] = suppress_tokens
    ends = sorted(end_token_ids(target_model))
    return setting.generation_config(
        target_model, max_new_tokens, **{"pad_token_id": ends[0] if ends else None, **overrides}
    )


@torch.inference_mode()
def measure_latency(
    target_model: PreTrainedModel,
    draft_model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    draft_lengths: Sequence[int] = DRAFT_LENGTHS,
    suppress_tokens: list[int] | None = None,
    num_repeats: int = 7,
    seed: int = 0,
) -> LatencyResult:
    """What one step of each model costs here: forward passes with a filled cache, and what `generate` adds to them.

    Args:
        target_model: The target.
        draft_model: The draft.
        prompts: Token ids of prompts like those the pair will answer; their median length fills the cache.
        max_new_tokens: Longest completion; the cache holds half of it besides the prompt, as far as the models read.
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
    for size in sizes:  # the first pass of each size pays for compilation and memory
        target.seconds(size)
    draft.seconds(1)
    for _ in range(num_repeats):
        draft_step += [draft.seconds(1), draft.seconds(1)]
        for size in sizes:
            verify[size].append(target.seconds(size))
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
    found.generate_overhead = _generate_overhead(target_model, draft_model, prompts[:8], found, config, seed)
    return found


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
    for number, prompt in enumerate(prompts):
        generate_text(target_model, prompt, config, seed=seed + number, streamer=ticks)
        for length in _CALIBRATION_LENGTHS:
            with (
                fixed_draft_length(draft_model, length),
                observe_steps(target_model, steps.append, synchronize=True),
            ):
                generate_text(target_model, prompt, config, seed=seed + number, assistant_model=draft_model)
    later = [step for step in steps if not step.is_first and step.num_draft_tokens + 1 in latency.verify_seconds]
    by_length = {
        length: [step for step in later if step.num_draft_tokens == length]
        for length in {step.num_draft_tokens for step in later}
    }
    if len(by_length) < 2 or not ticks.intervals:
        return None
    lengths = sorted(by_length)
    drafting = [_cost([step.draft_seconds for step in by_length[length]]) for length in lengths]
    weights = [len(by_length[length]) ** 0.5 for length in lengths]
    per_token, per_call = np.polyfit(lengths, drafting, deg=1, w=weights)
    passes = latency.verify_seconds
    checking = [step.seconds - step.draft_seconds - passes[step.num_draft_tokens + 1] for step in later]
    return GenerateOverhead(
        plain_step_seconds=max(0.0, _cost(ticks.intervals) - latency.target_step_seconds),
        draft_step_seconds=max(0.0, float(per_token) - latency.draft_step_seconds),
        block_seconds=max(0.0, max(0.0, float(per_call)) + _cost(checking)),
    )


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


def generate_text(
    model: PreTrainedModel, prompt: Sequence[int], config: GenerationConfig, *, seed: int = 0, **options: Any
) -> tuple[list[int], float]:
    """One `generate` call for one prompt.

    Args:
        model: The target.
        prompt: Token ids.
        config: As `single_text_config` makes it.
        seed: Of sampling; the global random state is left alone.
        **options: Passed to `generate`, such as `assistant_model`.

    Returns:
        The completion's tokens, and the wall-clock of the call in seconds.
    """
    ids = torch.tensor([list(prompt)], device=model.device)
    with seeded(seed, model.device):
        synchronize_accelerator()
        started = perf_counter()
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, **options)
        synchronize_accelerator()
        elapsed = perf_counter() - started
    return output[0, ids.shape[1] :].tolist(), elapsed


def _first_difference(
    target_model: PreTrainedModel,
    setting: DecodingSetting,
    number: int,
    prompt: Sequence[int],
    plain: list[int],
    assisted: list[int],
) -> DecodingDifference:
    """Where two greedy texts part, and how close the target itself thought the two tokens were."""
    # Where one text merely continues after the other ended, the shorter one's last token is the one in question.
    shorter = min(len(plain), len(assisted))
    position = next((place for place in range(shorter) if plain[place] != assisted[place]), shorter - 1)
    ids = torch.tensor([[*prompt, *plain[:position]]], device=target_model.device)
    logits = target_model(input_ids=ids).logits[:, -1].float()
    lengths = torch.tensor([ids.shape[1]], device=ids.device)
    logits = process_logits(logits, ids, lengths, logits_processors(setting, target_model))[0]
    return DecodingDifference(
        prompt=number,
        position=position,
        plain_token=plain[position],
        assisted_token=assisted[position],
        logit_gap=float(logits[plain[position]] - logits[assisted[position]]),
    )
