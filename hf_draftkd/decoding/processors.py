"""Logits as decoding sees them: transformers' own processors, the same for draft and target, at many positions at once.

`generate` applies its processors one position at a time. Here many positions are processed in one go, each with the
prefix that it had: those of a written text (`process_logits`), so that the distributions p and q are those that
decoding would have had, and the next ones of texts that are being written (`Processing`).
"""

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.decoding.texts import Texts

# These look at the scores of one position and at nothing else. Any other processor may read the text before it.
_POINTWISE = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


def logits_processors(setting: DecodingSetting, target_model: PreTrainedModel | None = None) -> LogitsProcessorList:
    """The processors that `generate` builds for `setting.generation_config(target_model, ...)`, in its order.

    The target brings the `suppress_tokens` of its generation config, the one entry that a setting inherits.
    """
    processors = LogitsProcessorList()
    if setting.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(setting.repetition_penalty))
    if target_model is not None and (suppressed := target_model.generation_config.suppress_tokens):
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
    logits: Tensor, input_ids: Tensor, prefix_lengths: Tensor, processors: LogitsProcessorList
) -> Tensor:
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


def _warpers(setting: DecodingSetting) -> list[LogitsProcessor]:
    warpers: list[LogitsProcessor] = []
    if setting.is_greedy:
        return warpers
    if setting.temperature != 1:
        warpers.append(TemperatureLogitsWarper(setting.temperature))
    if setting.top_k > 0:
        warpers.append(TopKLogitsWarper(top_k=setting.top_k))
    if setting.top_p < 1:
        warpers.append(TopPLogitsWarper(top_p=setting.top_p))
    return warpers


def _sees_a_set(processor: LogitsProcessor) -> bool:
    """Whether a processor reads which tokens came before, and neither their order nor how many there were."""
    return type(processor) is RepetitionPenaltyLogitsProcessor and processor.prompt_ignore_length is None


class Processing:
    """Turns the logits of target and draft into scores, the same way for both, and once.

    Args:
        processors: As `generate` prepared them for the whole batch.
        texts: The texts, whose drafted tokens stand behind their ends.
        eos_ids: Tokens that end a text.
        is_greedy: Scores are only compared then: without processors logits stay as they are.
    """

    def __init__(self, processors: LogitsProcessorList, texts: Texts, eos_ids: set[int], *, is_greedy: bool) -> None:
        self.processors, self.texts, self._eos_ids = processors, texts, eos_ids
        looking_back = [processor for processor in processors if type(processor) not in _POINTWISE]
        self.looks_back = bool(looking_back)
        self.sees_sets = all(map(_sees_a_set, looking_back))
        self.is_identity = is_greedy and not processors

    def __call__(self, logits: Tensor, offset: int = 0) -> Tensor:
        """Process logits [A, K, V] of the unfinished texts' next K tokens, `offset` tokens behind their ends.

        The scores are float32, as in `generate`; the logits are left alone.
        """
        if self.is_identity:
            return logits
        scores = logits.float()
        if not self.looks_back:
            if not self.processors:
                return scores
            # Only the shape [N, 1] of the ids matters here.
            ids = self.texts.ids[:1, :1].expand(scores.shape[0] * scores.shape[1], 1)
            return self.processors(ids, scores.flatten(0, 1)).view(scores.shape)
        if self.sees_sets:
            texts, (_, width, _) = self.texts, scores.shape
            ids = texts.ids[texts.rows].repeat_interleave(width, dim=0)
            lengths = ids.new_tensor([texts.lengths[row] + offset + k for row in texts.rows for k in range(width)])
            return process_logits(scores.flatten(0, 1), ids, lengths, self.processors).view(scores.shape)
        steps = [self._with_prefix(scores[:, k], offset + k) for k in range(scores.shape[1])]
        return torch.stack(steps, dim=1)

    def _with_prefix(self, scores: Tensor, offset: int) -> Tensor:
        """Scores [A, V], given each text's first `length + offset` columns.

        A processor may hold something for every row of the batch, and may count columns: so it always gets all rows
        in their order, once for every length that occurs, and only the rows of that length are taken. In the place of
        the others it gets one of these: behind their own ends is nothing that a constraint could make sense of. What
        would follow a drafted end of sequence is never kept, so its scores stay as they are.
        """
        texts, result = self.texts, scores.clone()
        lengths = {place: texts.lengths[row] for place, row in enumerate(texts.rows) if self._goes_on(row, offset)}
        for length in set(lengths.values()):
            places = [place for place, other in lengths.items() if other == length]
            rows = [texts.rows[place] for place in places]
            batch = scores.new_zeros(len(texts.lengths), scores.shape[1])
            batch[rows] = scores[places]
            ids = texts.ids[rows[0], : length + offset].repeat(len(batch), 1)
            ids[rows] = texts.ids[rows, : length + offset]
            result[places] = self.processors(ids, batch)[rows]
        return result

    def _goes_on(self, row: int, offset: int) -> bool:
        """Whether none of the first `offset` tokens drafted for a text ends it."""
        start = self.texts.lengths[row]
        return self._eos_ids.isdisjoint(self.texts.ids[row, start : start + offset].tolist())
