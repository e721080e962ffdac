"""Where a text ends, among the tokens that one round brought."""

from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StoppingCriteriaList

from hf_draftkd.decoding.texts import Texts


class Stopping:
    """`generate`'s stopping criteria, looked at after every token as if it had come alone.

    End of sequence, length and time are checked on the host; any other criterion (stop strings, one of the user's) is
    called with the whole batch up to each token. `scores` is None for it.

    Args:
        criteria: As `generate` prepared them: a length is among them.
        prompt_length: Columns of the prompts. One token is written whatever the criteria say.
    """

    def __init__(self, criteria: StoppingCriteriaList, prompt_length: int) -> None:
        # A criterion of the user's replaces the call's own of its type, so the call's `max_length` may not count.
        self.max_length = max(prompt_length + 1, min(each.max_length for each in _of_type(MaxLengthCriteria, criteria)))
        self.eos_ids: set[int] = set()
        for each in _of_type(EosTokenCriteria, criteria):
            self.eos_ids.update(each.eos_token_id.flatten().tolist())
        self._times = _of_type(MaxTimeCriteria, criteria)
        known = (MaxLengthCriteria, EosTokenCriteria, MaxTimeCriteria)
        self._others = StoppingCriteriaList(each for each in criteria if type(each) not in known)

    def is_out_of_time(self, ids: Tensor) -> bool:
        """Whether no text may get another token."""
        return bool(self._times) and bool(self._times(ids[:1, :1], None).any())

    def kept(self, texts: Texts, row: int, tokens: list[int]) -> tuple[int, bool]:
        """How many of the new `tokens` of a text stay, and whether it ends there.

        The tokens stand in `texts.ids` behind the text's end.
        """
        length = texts.lengths[row]
        tokens = tokens[: self.max_length - length]
        for count, token in enumerate(tokens, start=1):
            if token in self.eos_ids:
                return count, True
            if self._others and bool(self._others(texts.ids[:, : length + count], None)[row]):
                return count, True
        return len(tokens), length + len(tokens) >= self.max_length


def _of_type(kind: type, criteria: StoppingCriteriaList) -> StoppingCriteriaList:
    """Those of exactly this type: one derived from it may decide otherwise."""
    return StoppingCriteriaList(each for each in criteria if type(each) is kind)
