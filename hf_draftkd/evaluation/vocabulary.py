"""What a smaller draft vocabulary costs in acceptance and saves in time, for several sizes from one pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from transformers import PreTrainedModel

from hf_draftkd.acceptance import best_draft_length
from hf_draftkd.decoding.drafting import checked_vocabulary, with_sliced_head
from hf_draftkd.evaluation.recommendation import SPECULATIVE, way_latency
from hf_draftkd.evaluation.report import LatencyResult, SettingResult
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

    Without sizes: the whole list, its half and its quarter; nothing where the draft records none. `vocab_size` is the
    number of tokens that the pair shares.

    Raises:
        ValueError: Sizes are given, but the draft records no list, or a shorter one; or its head cannot be cut.
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
    with_sliced_head(draft, ids[:1])
    if sizes is None:
        sizes = [len(ids) // 4, len(ids) // 2, len(ids)]
    return [ids[: whole_number("draft_vocabulary_sizes", size, 1, len(ids))] for size in sorted({*sizes} - {0})]


def predict_by_size(settings: Sequence[SettingResult], latency: LatencyResult, draft_seconds: Sequence[float]) -> None:
    """Fill in the predicted speed-up of every size with `SpeculativeDecoding`, from seconds of a draft step by size.

    The whole vocabulary comes last in the settings, and first in `draft_seconds`.
    """
    whole, *listed = draft_seconds
    for setting in settings:
        for result, seconds in zip(setting.draft_vocabulary or [], [*listed, whole], strict=True):
            result.draft_step_seconds = seconds
            if result.block_efficiency:
                times = way_latency(replace(latency, draft_step_seconds=seconds), SPECULATIVE)
                curve = {length: estimate.value for length, estimate in result.block_efficiency.items()}
                result.num_assistant_tokens, result.predicted_speedup = best_draft_length(curve, times)
