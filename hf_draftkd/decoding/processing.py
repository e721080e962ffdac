"""transformers' logits processors at several positions of several texts at once, each with the prefix that it had."""

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

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


class Processing:
    """Turns the logits of target and draft into scores, the same way for both, and once.

    Args:
        processors: As `generate` prepared them for the whole batch.
        texts: The texts, whose drafted tokens stand behind their ends.
        is_greedy: Scores are only compared then: without processors logits stay as they are.
    """

    def __init__(self, processors: LogitsProcessorList, texts: Texts, *, is_greedy: bool) -> None:
        self.processors, self.texts = processors, texts
        self.looks_back = any(type(processor) not in _POINTWISE for processor in processors)
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
        steps = [self._with_prefix(scores[:, k], offset + k) for k in range(scores.shape[1])]
        return torch.stack(steps, dim=1)

    def _with_prefix(self, scores: Tensor, offset: int) -> Tensor:
        """Scores [A, V], given each text's first `length + offset` columns.

        A processor may hold something for every row of the batch, and may count columns: so it always gets all rows
        in their order, once for every length that occurs, and only the rows of that length are taken.
        """
        texts = self.texts
        lengths = [texts.lengths[row] for row in texts.rows]
        if texts.is_single:
            return self.processors(texts.ids[:, : lengths[0] + offset], scores.clone())
        result = torch.empty_like(scores)
        for length in set(lengths):
            places = [place for place, other in enumerate(lengths) if other == length]
            rows = [texts.rows[place] for place in places]
            batch = scores.new_zeros(len(texts.lengths), scores.shape[1])
            batch[rows] = scores[places]
            result[places] = self.processors(texts.ids[:, : length + offset], batch)[rows]
        return result
