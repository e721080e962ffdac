"""Alignment data mixed with pretraining text, so that a draft does not forget what lies outside its data.

The drafter of https://arxiv.org/abs/2403.00858 was fine-tuned on nine parts of alignment data to one of such text.
"""

import math
from typing import Any

from datasets import Dataset, Features, IterableDataset, interleave_datasets

from hf_draftkd.data.collator import INDEX_COLUMN, SETTING_COLUMN


def parse_mix(mix: str) -> tuple[float, float]:
    """`"9:1"` as two positive numbers: parts of alignment data, parts of pretraining text."""
    if not isinstance(mix, str):
        raise ValueError(
            f"A mix is text such as '9:1', got {mix!r}. YAML needs the quotes: it reads 9:1 as a time, 541."
        )
    try:
        alignment, pretraining = (float(part) for part in mix.split(":"))
    except ValueError:
        raise ValueError(f"A mix is written as two numbers, such as 9:1, got {mix!r}.") from None
    if not (0 < alignment < math.inf and 0 < pretraining < math.inf):
        raise ValueError(f"Both parts of a mix must be positive, got {mix!r}. Leave the pretraining text out instead.")
    return alignment, pretraining


def check_mix(train_dataset: Any, mix_dataset: Any, args: Any) -> None:
    """Refuse, before anything is loaded, what cannot be mixed."""
    if mix_dataset is None:
        if args.mix is not None:
            raise ValueError(
                f"`mix={args.mix!r}` says how much text to mix in, but there is no `mix_dataset` to take it from."
            )
        return
    if train_dataset is None:
        raise ValueError("`mix_dataset` is mixed into `train_dataset`, which was not given.")
    if isinstance(train_dataset, IterableDataset) or isinstance(mix_dataset, IterableDataset):
        raise ValueError(
            "A stream does not say how many rows it has, so its share cannot be kept. Load both data sets without "
            "`streaming=True`: they are read from disk as needed, not into memory."
        )
    if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        raise ValueError("Rows are mixed as they are prepared: leave out `skip_prepare_dataset`, or `mix_dataset`.")


def mix_datasets(alignment: Dataset, text: Dataset, mix: str | None, seed: int) -> Dataset:
    """Interleave prepared rows of two data sets at random, `mix` being the parts of the first and of the second.

    Every row of `alignment` comes once, in its order. Those of `text` come in its order and are repeated if there are
    too few of them.
    """
    first, second = parse_mix(mix or "9:1")
    share = second / (first + second)
    types = text.features | alignment.features
    names = [name for name in ("input_ids", "labels", SETTING_COLUMN, INDEX_COLUMN) if name in types]
    parts = []
    for part in (alignment, text):
        own = [name for name in names if name in part.column_names]
        parts.append(part.select_columns(own).cast(Features({name: types[name] for name in own})))
    # Enough that the alignment data run out first: the others number n s / (1 - s), give or take sqrt(n s) / (1 - s).
    expected = len(alignment) * share / (1 - share)
    needed = math.ceil(expected + 8 * math.sqrt(len(alignment) * share) / (1 - share) + 8)
    repeated = parts[1].repeat(-(-needed // len(text)))
    return interleave_datasets(
        [parts[0], repeated], probabilities=[1 - share, share], seed=seed, stopping_strategy="first_exhausted"
    )
