"""Alignment data mixed with pretraining text, so that a draft does not forget what lies outside its data.

The drafter of https://arxiv.org/abs/2403.00858 was fine-tuned on nine parts of alignment data to one of such text.
"""

import math

from datasets import Dataset, concatenate_datasets, interleave_datasets


def parse_mix(mix: str) -> tuple[float, float]:
    """`"9:1"` as two positive numbers: parts of alignment data, parts of pretraining text."""
    try:
        alignment, pretraining = (float(part) for part in mix.split(":"))
    except ValueError:
        raise ValueError(f"A mix is written as two numbers, such as 9:1, got {mix!r}.") from None
    if not (0 < alignment < math.inf and 0 < pretraining < math.inf):
        raise ValueError(f"Both parts of a mix must be positive, got {mix!r}. Leave the pretraining text out instead.")
    return alignment, pretraining


def mix_datasets(alignment: Dataset, pretraining: Dataset, *, mix: str = "9:1", seed: int = 0) -> Dataset:
    """Interleave two data sets at random, in given parts.

    Every row of `alignment` comes once, in its order. Rows of `pretraining` come in its order and are repeated if there
    are too few of them. Columns that one of them lacks are None in its rows.

    Args:
        alignment: The data that decide the length.
        pretraining: The data to strew in.
        mix: Parts of the first and of the second.
        seed: Seed of the order.

    Raises:
        ValueError: The mix cannot be read, or a data set is empty.
    """
    first, second = parse_mix(mix)
    if not len(alignment) or not len(pretraining):
        raise ValueError(f"Cannot mix {len(alignment)} rows with {len(pretraining)}: one of the data sets is empty.")
    share = second / (first + second)
    # Enough that the alignment data run out first: the others number n s / (1 - s), give or take sqrt(n s) / (1 - s).
    expected = len(alignment) * share / (1 - share)
    needed = math.ceil(expected + 8 * math.sqrt(len(alignment) * share) / (1 - share) + 8)
    repeated = concatenate_datasets([pretraining] * -(-needed // len(pretraining)))
    return interleave_datasets(
        [alignment, repeated], probabilities=[1 - share, share], seed=seed, stopping_strategy="first_exhausted"
    )
