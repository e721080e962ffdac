"""Counts from real decoding: what `target.generate(assistant_model=draft)` did, without a copy of its loop.

`generate` builds one candidate generator per call and talks to it through two methods: `get_candidates` (draft) and
`update_candidate_strategy` (what was kept). Listening to these two is enough to count every drafted and accepted
token. The target carries the listener only inside the `with` block; results are untouched.

    with count_acceptance(target) as counts:
        target.generate(**inputs, assistant_model=draft)
    print(counts.mean_acceptance_length)
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation import CandidateGenerator

from hf_draftkd.acceptance import AcceptanceCounts
from hf_draftkd.decoding.speculative import listening
from hf_draftkd.models.draft_length import draft_length_settings
from hf_draftkd.models.forward import unwrapped

# The private method of `GenerationMixin` that returns the candidate generator of one `generate` call.
_FACTORY = "_get_candidate_generator"


@dataclass(frozen=True)
class AssistedStep:
    """One target call of an assisted `generate`: a draft, its verification, and the tokens it brought.

    Attributes:
        num_draft_tokens: Tokens proposed. Zero where nothing could be drafted, as for the last token before a limit.
        num_accepted_tokens: Proposed tokens that are now part of the text, an accepted end of sequence included.
        num_new_tokens: Tokens added to the text: the accepted ones, and the target's own unless the text ended.
        draft_seconds: Wall-clock inside `get_candidates`.
        seconds: Wall-clock of the whole step: drafting, verifying and choosing.
        is_first: The first step of a call; it also reads the prompt, so it does not tell a step's cost.
    """

    num_draft_tokens: int
    num_accepted_tokens: int
    num_new_tokens: int
    draft_seconds: float
    seconds: float
    is_first: bool


@contextmanager
def count_acceptance(target_model: PreTrainedModel) -> Iterator[AcceptanceCounts]:
    """Count drafted and accepted tokens of every assisted `generate` call on a target.

    Works around anything that ends in `target_model.generate(...)` with a draft: direct calls, `pipeline(...,
    assistant_model=...)`, streaming (also from another thread, joined before the block ends), a draft with another
    tokenizer, and prompt lookup. `custom_generate=SpeculativeDecoding(...)` is counted too, each text of a
    batch by itself. Calls without a draft add nothing. The counts are live: they can be read inside the
    block and stay valid after it.

    Args:
        target_model: The model whose `generate` is called. PEFT, DDP and `torch.compile` wrappers are looked through.

    Yields:
        The counts, with vLLM's field names. `num_spec_steps` counts target calls; a call for which nothing could be
        drafted (the last token before the length limit) is one of them, as it costs the same.

    Raises:
        ValueError: The target has no `generate`, or its calls are being counted already.
    """
    counts = AcceptanceCounts()
    lock = threading.Lock()

    def add(*numbers: int) -> None:
        with lock:
            counts.record(*numbers)

    def add_step(step: AssistedStep) -> None:
        add(step.num_draft_tokens, step.num_accepted_tokens, step.num_new_tokens)

    with observe_steps(target_model, add_step), listening(unwrapped(target_model), add):
        yield counts


@contextmanager
def observe_steps(
    target_model: PreTrainedModel, on_step: Callable[[AssistedStep], None], *, synchronize: bool = False
) -> Iterator[None]:
    """Call `on_step` after every target call of an assisted `generate`.

    Args:
        target_model: The model whose `generate` is called.
        on_step: Receives each `AssistedStep`, in the thread that generates.
        synchronize: Wait for the accelerator before reading the clock, so that the seconds of a step are its own.
            Costs a little speed; counting does not need it.

    Raises:
        ValueError: As `count_acceptance`.
    """
    target = unwrapped(target_model)
    if not hasattr(target, _FACTORY):
        raise ValueError(
            f"`target_model` must be a transformers model with `generate(assistant_model=...)`, got "
            f"{type(target_model).__name__}. Pass the model itself, not a pipeline or a serving client."
        )
    outer = target.__dict__.get(_FACTORY)
    if getattr(outer, "_draftkd_observer", False):
        raise ValueError(
            f"This target ({type(target).__name__}) is being counted already: `count_acceptance` cannot be nested on "
            "one model, since every token would be counted twice. Read the outer counts, or close that block first."
        )
    build = getattr(target, _FACTORY)

    def build_and_listen(*args: Any, **kwargs: Any) -> CandidateGenerator:
        return _listen(build(*args, **kwargs), on_step, synchronize)

    build_and_listen._draftkd_observer = True  # type: ignore[attr-defined]
    setattr(target, _FACTORY, build_and_listen)
    try:
        yield
    finally:
        if outer is None:
            delattr(target, _FACTORY)
        else:
            setattr(target, _FACTORY, outer)


@contextmanager
def fixed_draft_length(draft_model: PreTrainedModel, num_assistant_tokens: int) -> Iterator[None]:
    """Make the draft propose exactly `num_assistant_tokens` tokens a step, and put its settings back afterwards.

    Raises:
        ValueError: γ is not a positive whole number.
    """
    fixed = draft_length_settings(num_assistant_tokens)
    config = unwrapped(draft_model).generation_config
    before = {name: getattr(config, name) for name in fixed}
    config.update(**fixed)
    try:
        yield
    finally:
        config.update(**before)


def synchronize_accelerator() -> None:
    """Wait until the accelerator, if there is one, has done what it was asked to: clocks lie otherwise."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _listen(
    generator: CandidateGenerator, on_step: Callable[[AssistedStep], None], synchronize: bool
) -> CandidateGenerator:
    """Shadow the two methods on this one object: it keeps its class (the loop asks), and dies with the call."""
    get_candidates = generator.get_candidates
    update_candidate_strategy = generator.update_candidate_strategy

    def clock() -> float:
        if synchronize:
            synchronize_accelerator()
        return perf_counter()

    prefix_length = 0
    candidates: torch.Tensor | None = None
    started = drafted = 0.0
    is_first = True

    def counting_get(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        nonlocal prefix_length, candidates, started, drafted
        started = clock()
        prefix_length = input_ids.shape[1]
        candidate_ids, candidate_logits = get_candidates(input_ids, *args, **kwargs)
        candidates = candidate_ids[0, prefix_length:]
        drafted = clock()
        return candidate_ids, candidate_logits

    def counting_update(input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        nonlocal candidates, is_first
        finished = clock()
        if candidates is not None:
            new_tokens = input_ids[0, prefix_length:]
            on_step(
                AssistedStep(
                    num_draft_tokens=candidates.numel(),
                    num_accepted_tokens=_length_of_common_prefix(candidates, new_tokens),
                    num_new_tokens=new_tokens.numel(),
                    draft_seconds=drafted - started,
                    seconds=finished - started,
                    is_first=is_first,
                )
            )
            candidates, is_first = None, False
        update_candidate_strategy(input_ids, scores, num_matches)

    generator.get_candidates = counting_get
    generator.update_candidate_strategy = counting_update
    return generator


def _length_of_common_prefix(candidates: torch.Tensor, new_tokens: torch.Tensor) -> int:
    """How many drafted tokens stand in the text.

    `num_matches` cannot say: after an accepted end of sequence, and where a draft reaches the length limit, there is
    no token of the target's own behind the accepted ones, and transformers still counts one less than was added. A
    correction never equals the token it corrects, so comparing is exact.
    """
    length = min(candidates.numel(), new_tokens.numel())
    same = candidates[:length].to(new_tokens.device) == new_tokens[:length]
    return int(same.long().cumprod(0).sum())
