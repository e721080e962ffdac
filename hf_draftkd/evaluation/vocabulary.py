"""What a smaller draft vocabulary costs in acceptance and saves in time, for several sizes from one pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from hf_draftkd.acceptance import Latency, best_draft_length
from hf_draftkd.decoding.drafting import checked_vocabulary, with_sliced_head
from hf_draftkd.evaluation.assisted import synchronize_accelerator
from hf_draftkd.evaluation.report import LatencyResult, SettingResult, VocabularyResult
from hf_draftkd.models.draft_length import recorded_vocabulary
from hf_draftkd.utils.checks import whole_number


@contextmanager
def whole_vocabulary(drafts: Sequence[PreTrainedModel]) -> Iterator[None]:
    """Let `SpeculativeDecoding` use the whole head of drafts that record a list, as all other decoding does."""
    recorded = [recorded_vocabulary(draft.generation_config) for draft in drafts]
    for draft, ids in zip(drafts, recorded, strict=True):
        if ids is not None:
            draft.generation_config.draft_vocabulary = None
    try:
        yield
    finally:
        for draft, ids in zip(drafts, recorded, strict=True):
            if ids is not None:
                draft.generation_config.draft_vocabulary = ids


def lists_to_report(draft: PreTrainedModel, sizes: Sequence[int] | None, vocab_size: int) -> list[list[int]]:
    """The first ids of the draft's recorded list, a list for each size, the smallest first.

    Args:
        draft: The draft.
        sizes: None: the whole list, its half and its quarter; nothing where the draft records none.
        vocab_size: Tokens that the pair shares.

    Raises:
        ValueError: Sizes are given, but the draft records no list, or a shorter one.
    """
    ids = recorded_vocabulary(draft.generation_config)
    if ids is None:
        if sizes is None:
            return []
        raise ValueError(
            f"`draft_vocabulary_sizes` takes parts of the list in the draft's generation config, but "
            f"{draft.name_or_path!r} has none. Choose one: `draftkd vocabulary`."
        )
    not_tokens = range(vocab_size, draft.config.get_text_config().vocab_size)
    ids = checked_vocabulary(ids, draft.config.get_text_config().vocab_size, not_tokens)
    if sizes is None:
        sizes = [len(ids) // 4, len(ids) // 2, len(ids)]
    return [ids[: whole_number("draft_vocabulary_sizes", size, 1, len(ids))] for size in sorted({*sizes} - {0})]


@torch.inference_mode()
def draft_step_seconds(
    draft: PreTrainedModel, lists: Sequence[Sequence[int]], context_length: int, num_repeats: int = 15
) -> list[float]:
    """Seconds of one token through the draft, with its whole head and with each list, measured in turns."""
    twins = [draft, *(with_sliced_head(draft, list(ids)) for ids in lists)]
    caches = [DynamicCache(config=draft.config) for _ in twins]
    context = torch.ones((1, context_length), dtype=torch.long, device=draft.device)
    for twin, cache in zip(twins, caches, strict=True):
        cache.activate_past_recording()
        twin(input_ids=context, past_key_values=cache, use_cache=True)
    times: list[list[float]] = [[] for _ in twins]
    for _ in range(num_repeats):
        for twin, cache, found in zip(twins, caches, times, strict=True):
            synchronize_accelerator()
            started = perf_counter()
            twin(input_ids=context[:, :1], past_key_values=cache, use_cache=True)
            synchronize_accelerator()
            found.append(perf_counter() - started)
            cache.crop(-1)
    return [float(np.quantile(found, 0.2)) for found in times]


def predict_by_size(settings: Sequence[SettingResult], latency: LatencyResult, draft_seconds: Sequence[float]) -> None:
    """Fill in the predicted speed-up of every size, from forward passes alone.

    Args:
        settings: With `draft_vocabulary`, whose last entry is the whole vocabulary.
        latency: Of the target.
        draft_seconds: As `draft_step_seconds` gives them: the whole head first.
    """
    whole, *listed = draft_seconds
    for setting in settings:
        for result, seconds in zip(setting.draft_vocabulary or [], [*listed, whole], strict=True):
            result.draft_step_seconds = seconds
            if result.block_efficiency:
                times = Latency(latency.target_step_seconds, seconds, latency.verify_seconds)
                curve = {length: estimate.value for length, estimate in result.block_efficiency.items()}
                best: Any = best_draft_length(curve, times)
                result.num_assistant_tokens = best.num_assistant_tokens
                result.predicted_speedup = best.predicted_speedup


def vocabulary_result(size: int, found: SettingResult) -> VocabularyResult:
    """The part of a setting's results that a size of vocabulary changes."""
    return VocabularyResult(size=size, acceptance_rate=found.acceptance_rate, block_efficiency=found.block_efficiency)
