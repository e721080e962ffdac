"""The objective on a batch: of its positions those with a label, as the trainer picks them."""

from typing import Any

import torch

from hf_draftkd import losses
from hf_draftkd.losses import DistillationLoss, Unprojected


def distillation_loss(draft: Any, target: Any, labels: torch.Tensor, **options: Any) -> DistillationLoss:
    """`losses.distillation_loss` at the positions whose label is not -100, of sources like the labels [...]."""
    chosen = labels != -100

    def picked(source: Any) -> Any:
        if isinstance(source, Unprojected):
            return source._replace(hidden=picked(source.hidden))
        return None if source is None else source[chosen]

    return losses.distillation_loss(picked(draft), picked(target), labels[chosen], **options)
