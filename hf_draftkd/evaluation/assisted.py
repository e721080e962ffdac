"""Counts from real decoding: what `target.generate(assistant_model=draft)` did, without a copy of its loop.

`generate` builds one candidate generator per call and talks to it through two methods: `get_candidates` (draft) and
`update_candidate_strategy` (what was kept). Listening to these two is enough to count every drafted and accepted
token. The target carries the listener only inside the `with` block; results are untouched.

    with count_acceptance(target) as counts:
        target.generate(**inputs, assistant_model=draft)
    print(counts.mean_acceptance_length)
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation import CandidateGenerator

from hf_draftkd.acceptance import AcceptanceCounts
from hf_draftkd.decoding.speculative import OnRound, listening
from hf_draftkd.models.draft_length import draft_length_settings
from hf_draftkd.models.forward import unwrapped

# The private method of `GenerationMixin` that returns the candidate generator of one `generate` call.
_FACTORY = "_get_candidate_generator"


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
    counts, lock = AcceptanceCounts(), threading.Lock()

    def add(*numbers: int) -> None:
        with lock:
            counts.record(*numbers)

    with observe_rounds(target_model, add):
        yield counts


@contextmanager
def observe_rounds(target_model: PreTrainedModel, on_round: OnRound) -> Iterator[None]:
    """Call `on_round(drafted, accepted, new)` for every text and target call of a `generate` with a draft, in the
    thread that generates.

    Accepted tokens are those that are now part of the text, an end of sequence included; new ones are the accepted and
    the target's own. A `ValueError` as in `count_acceptance`.
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
        return _listen(build(*args, **kwargs), on_round)

    build_and_listen._draftkd_observer = True  # type: ignore[attr-defined]
    setattr(target, _FACTORY, build_and_listen)
    try:
        with listening(target, on_round):
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


def _listen(generator: CandidateGenerator, on_round: OnRound) -> CandidateGenerator:
    """Shadow the two methods on this one object: it keeps its class (the loop asks), and dies with the call."""
    get_candidates = generator.get_candidates
    update_candidate_strategy = generator.update_candidate_strategy
    length = 0
    candidates = torch.empty(0)

    def counting_get(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        nonlocal length, candidates
        found = get_candidates(input_ids, *args, **kwargs)
        length = input_ids.shape[1]
        candidates = found[0][0, length:]
        return found

    def counting_update(input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        new_tokens = input_ids[0, length:]
        on_round(candidates.numel(), _length_of_common_prefix(candidates, new_tokens), new_tokens.numel())
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
