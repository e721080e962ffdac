"""How many tokens to draft in the next round: a fixed number, or the one that pays best so far."""

from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial
from statistics import fmean, linear_regression, median


class FixedLength:
    """The same γ in every round.

    Attributes:
        longest: No round drafts more.
    """

    def __init__(self, num_assistant_tokens: int) -> None:
        self.longest = num_assistant_tokens

    def choose(self, num_texts: int) -> int:
        """Tokens to draft in a round for this many texts; 0 is plain decoding."""
        return self.longest

    def record(self, num_texts: int, num_drafted: int, accepted: list[int], seconds: float | None) -> None:
        """Take note of a round: tokens accepted in each text, and its wall-clock where that is typical."""


# γ to begin with.
_START = 4
# Rounds between two looks at what was not chosen: plain decoding while drafting pays, drafting while it does not.
_LOOK_AT_PLAIN = 64
_FIRST_LOOK_AT_DRAFT = 16
_LAST_LOOK_AT_DRAFT = 1024
# How much of the acceptance seen so far still counts a round later: half of it after 23 rounds.
_MEMORY = 0.97
# Drafting must promise this much more than plain decoding, since both are measured with noise.
_MARGIN = 1.02


class AutoLength:
    """The γ that brings most tokens per second, by acceptance so far and the measured time of a round.

    A round with γ drafted tokens brings 1 + α + ... + α^γ tokens a text, α being the chance that a drafted token is
    accepted if those before it were, and takes T(γ) seconds. T is measured for each number of texts (in powers of
    two): a few rounds at three lengths, and a straight line between and beyond them. γ = 0 is plain decoding. What is
    learned is kept from call to call.

    Args:
        longest: Largest γ to consider.
    """

    def __init__(self, longest: int = 16) -> None:
        self.longest, start = longest, min(_START, longest)
        self._trials = (start, 0, max(1, start // 2))
        self._accepted, self._rejected = 3.0, 2.0  # as if five tokens had been seen: the first few do not decide
        # No lambdas, which could not be pickled: for other processes, say.
        self._seconds: dict[int, dict[int, deque[float]]] = defaultdict(partial(defaultdict, partial(deque, maxlen=9)))
        self._rounds_until_look: dict[int, int] = defaultdict(partial(int, _LOOK_AT_PLAIN))
        self._patience: dict[int, int] = defaultdict(partial(int, _FIRST_LOOK_AT_DRAFT))

    @property
    def acceptance_rate(self) -> float:
        """α: accepted tokens ÷ tokens that were accepted or rejected, of late."""
        return self._accepted / (self._accepted + self._rejected)

    def choose(self, num_texts: int) -> int:
        group = num_texts.bit_length()
        seconds = self._seconds[group]
        for length in self._trials:
            if len(seconds[length]) < 2:
                return length
        best = self._best(group)
        self._rounds_until_look[group] -= 1
        if self._rounds_until_look[group] > 0:
            return best
        if best > 0:
            self._rounds_until_look[group], self._patience[group] = _LOOK_AT_PLAIN, _FIRST_LOOK_AT_DRAFT
            return 0
        # Each look at a draft that does not pay costs a little: look ever more rarely.
        self._rounds_until_look[group] = self._patience[group]
        self._patience[group] = min(2 * self._patience[group], _LAST_LOOK_AT_DRAFT)
        return self._trials[2]

    def record(self, num_texts: int, num_drafted: int, accepted: list[int], seconds: float | None) -> None:
        if seconds is not None:
            self._seconds[num_texts.bit_length()][num_drafted].append(seconds)
        if num_drafted and accepted:
            self._accepted = _MEMORY * self._accepted + sum(accepted) / len(accepted)
            self._rejected = _MEMORY * self._rejected + sum(n < num_drafted for n in accepted) / len(accepted)

    def _best(self, group: int) -> int:
        alpha, line = self.acceptance_rate, self._line(group)
        # Not far beyond what was measured: the next rounds will have measured it.
        measured = max(length for length, times in self._seconds[group].items() if times)
        tokens, power, best, best_rate = 1.0, 1.0, 0, _MARGIN / line(0)
        for length in range(1, min(self.longest, 2 * measured) + 1):
            power *= alpha
            tokens += power
            if tokens / line(length) > best_rate:
                best, best_rate = length, tokens / line(length)
        return best

    def _line(self, group: int) -> Callable[[int], float]:
        """T(γ) by the line through the rounds measured so far; plain decoding is what it was measured to be."""
        seconds = {length: median(times) for length, times in self._seconds[group].items() if times}
        slope, fixed = linear_regression(list(seconds), list(seconds.values()))
        if slope < 0:
            slope, fixed = 0.0, fmean(seconds.values())
        return lambda length: seconds[0] if length == 0 else max(seconds[0], fixed + slope * length)
