"""What a smaller draft vocabulary costs in acceptance and saves in time, for several sizes from one pass."""

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from hf_draftkd.acceptance import best_draft_length
from hf_draftkd.decoding.drafting import checked_vocabulary, with_sliced_head
from hf_draftkd.evaluation.recommendation import SPECULATIVE, way_latency
from hf_draftkd.evaluation.report import LatencyResult, SettingResult
from hf_draftkd.models.draft_length import recorded_vocabulary
from hf_draftkd.utils.checks import whole_number


def lists_to_report(draft: PreTrainedModel, sizes: Sequence[int] | None, vocab_size: int) -> list[list[int]]:
    """The first ids of the draft's recorded list, a list for each size, the smallest first.

    The whole list is always the last. Without sizes there are its half and its quarter beside it; nothing where the
    draft records none. `vocab_size` is the number of tokens that the pair shares.

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
        sizes = [len(ids) // 4, len(ids) // 2]
    chosen = sorted({*sizes, len(ids)} - {0})
    return [ids[: whole_number("draft_vocabulary_sizes", size, 1, len(ids))] for size in chosen]


def predict_by_size(settings: Sequence[SettingResult], latency: LatencyResult) -> None:
    """Fill in the predicted speed-up of every size with `SpeculativeDecoding`."""
    for setting in settings:
        for result in setting.draft_vocabulary or []:
            seconds = (latency.listed_draft_seconds or {}).get(result.size, latency.draft_step_seconds)
            if result.block_efficiency:
                of_size = replace(latency, draft_step_seconds=seconds, listed_draft_seconds=None)
                curve = {length: estimate.value for length, estimate in result.block_efficiency.items()}
                best = best_draft_length(curve, way_latency(of_size, SPECULATIVE))
                result.num_assistant_tokens, result.predicted_speedup = best
