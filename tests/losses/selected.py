"""The objective on a batch: of its positions those with a label, as the trainer picks them, a few at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from hf_draftkd import losses
from hf_draftkd.losses import DistillationLoss, Unprojected, chunked


@contextmanager
def in_chunks_of(size: int | None) -> Iterator[None]:
    """Work on so many positions at once, where all of a test's are few enough for one chunk; None: in one."""
    with pytest.MonkeyPatch.context() as patch:
        if size is not None:
            patch.setattr(chunked, "_LEAST_POSITIONS", size)
            patch.setattr(chunked, "_CPU_CHUNK", 0)
        yield


def distillation_loss(
    draft: Any, target: Any, labels: torch.Tensor, chunk_size: int | None = None, **options: Any
) -> DistillationLoss:
    """`losses.distillation_loss` at the positions whose label is not -100, of sources like the labels [...]."""
    chosen = labels != -100

    def picked(source: Any) -> Any:
        if isinstance(source, Unprojected):
            return source._replace(hidden=picked(source.hidden))
        return None if source is None else source[chosen]

    with in_chunks_of(chunk_size):
        return losses.distillation_loss(picked(draft), picked(target), labels[chosen], **options)
