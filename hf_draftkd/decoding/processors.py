"""Logits as decoding sees them: transformers' own processors, the same for draft and target, at every position at once.

`generate` applies its processors one position at a time. Here many positions of a written text are processed in one
go, each with its own prefix, so that the distributions p and q are those that decoding would have had.
"""

import torch
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_draftkd.decoding.setting import DecodingSetting


def logits_processors(setting: DecodingSetting, target_model: PreTrainedModel | None = None) -> LogitsProcessorList:
    """The processors that `generate` builds for `setting.generation_config(target_model, ...)`, in its order.

    Args:
        setting: Temperature, top-p, top-k, repetition penalty.
        target_model: Brings the `suppress_tokens` of its generation config, the one entry that a setting inherits.
    """
    processors = LogitsProcessorList()
    if setting.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(setting.repetition_penalty))
    suppressed = target_model.generation_config.suppress_tokens if target_model is not None else None
    if suppressed:
        assert target_model is not None
        processors.append(SuppressTokensLogitsProcessor(suppressed, device=str(target_model.device)))
    return LogitsProcessorList([*processors, *_warpers(setting)])


def transformers_draft_processors(
    setting: DecodingSetting, target_model: PreTrainedModel | None = None
) -> LogitsProcessorList | None:
    """What transformers' assisted decoding applies to the *draft*, where that is not what the target gets; else None.

    The draft's `generate` receives the target's finished list and then appends the sampling warpers again, so that
    temperature 0.5 becomes 0.25 for the draft (transformers 5.23; see huggingface/transformers#40976). The output
    stays the target's, but its block efficiency is not the one of equal processing.
    """
    if setting.is_greedy or (setting.temperature == 1 and setting.top_p == 1):
        return None
    return LogitsProcessorList([*logits_processors(setting, target_model), *_warpers(setting)])


def process_logits(
    logits: torch.Tensor, input_ids: torch.Tensor, prefix_lengths: torch.Tensor, processors: LogitsProcessorList
) -> torch.Tensor:
    """Apply processors to the logits of many positions.

    Args:
        logits: `[N, V]`, float32: next-token logits.
        input_ids: `[N, L]`: the text each row belongs to; what stands behind the prefix is not looked at.
        prefix_lengths: `[N]`: how many tokens of its text each row has seen.
        processors: Any whose effect depends on the set of tokens before, not on their order: see `logits_processors`.

    Returns:
        `[N, V]`, processed.
    """
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    # The id V stands for no token: the repetition penalty drops it, so nothing behind the prefix is penalised.
    prefixes = input_ids.masked_fill(columns >= prefix_lengths[:, None], logits.shape[-1])
    return processors(prefixes, logits)


def _warpers(setting: DecodingSetting) -> list[TemperatureLogitsWarper | TopKLogitsWarper | TopPLogitsWarper]:
    warpers: list[TemperatureLogitsWarper | TopKLogitsWarper | TopPLogitsWarper] = []
    if setting.is_greedy:
        return warpers
    if setting.temperature != 1:
        warpers.append(TemperatureLogitsWarper(setting.temperature))
    if setting.top_k > 0:
        warpers.append(TopKLogitsWarper(top_k=setting.top_k))
    if setting.top_p < 1:
        warpers.append(TopPLogitsWarper(top_p=setting.top_p))
    return warpers
