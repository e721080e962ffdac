"""Which tokens a draft needs to propose: those that its target writes most.

With 50k to 150k tokens the head is most of what a small draft costs, and most of its tokens are hardly ever written.
`SpeculativeDecoding` slices the head to a list of ids; the draft itself stays whole (VocabTrim,
https://arxiv.org/abs/2506.22694).
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from hf_draftkd.data.columns import tables
from hf_draftkd.utils.checks import whole_number


def choose_draft_vocabulary(dataset: Dataset, size: int, *, keep: Iterable[int] = ()) -> list[int]:
    """The tokens that occur most in text that the target wrote: in the `completion_ids` of alignment data.

    Where fewer than `size` different tokens occur there, those of its `prompt_ids` follow: answers repeat the names in
    their questions. Fewer come back where both are used up. The ids in `keep`, such as those that end a text, come
    first whether they occur or not.

    Returns:
        Ids in the order of how often they occur (the smaller id first where they tie), those of completions before
        those of prompts, so that the first n of them are the list of size n.

    Raises:
        ValueError: The size is out of range, or the data has no `completion_ids`, or no tokens in them.
    """
    whole_number("size", size)
    if "completion_ids" not in dataset.column_names:
        raise ValueError(
            "The tokens to keep are counted in text that the target wrote, as exact ids, but the data has no column "
            f"`completion_ids` (it has {', '.join(dataset.column_names)}). Make it with `draftkd generate`."
        )
    written = _by_count(dataset, "completion_ids")
    if not written:
        raise ValueError("The data holds no completion tokens to count.")
    asked = _by_count(dataset, "prompt_ids") if "prompt_ids" in dataset.column_names else []
    return list(dict.fromkeys([*keep, *written, *asked]))[:size]


def _by_count(dataset: Dataset, column: str) -> list[int]:
    """The ids in a column, the most frequent first."""
    counts: Any = np.zeros(0, dtype=np.int64)
    for _, table in tables(dataset, [column]):
        found = np.bincount(_ids(table, column), minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    return np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].tolist()


def vocabulary_coverage(dataset: Dataset, ids: Iterable[int]) -> float:
    """Share of the completion tokens of alignment data that are on the list: what the draft could propose at all."""
    listed = np.asarray(sorted(ids))
    inside = total = 0
    for _, table in tables(dataset, ["completion_ids"]):
        tokens = _ids(table, "completion_ids")
        inside, total = inside + int(np.isin(tokens, listed).sum()), total + len(tokens)
    return inside / max(total, 1)


def _ids(table: pa.Table, column: str) -> np.ndarray:
    """All token ids in a column; one of empty lists alone has no type."""
    return pc.list_flatten(table[column]).cast(pa.int64()).to_numpy()
