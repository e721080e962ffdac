"""What is watched in every training step: that the loss is a number, and the sums that the log is made of."""

from typing import Any

import torch
from torch import Tensor

from hf_draftkd.losses import DistillationLoss


def require_finite(loss: Tensor, batch: dict[str, Any], trainer: Any) -> None:
    """Stop before a loss that is no number reaches the weights.

    Raises:
        FloatingPointError: It is NaN or infinite; the message names step, process and batch.
    """
    if not torch.isfinite(loss):
        starts = trainer.processing_class.batch_decode(batch["input_ids"][:, :16])
        raise FloatingPointError(
            f"The loss is {loss.item()} in optimizer step {trainer.state.global_step + 1}, process "
            f"{trainer.accelerator.process_index}, in the batch whose rows begin with {starts}. The weights were not "
            f"updated, and the last checkpoint in {trainer.args.output_dir!r} is untouched. Look for logits that are "
            "not finite there, lower `learning_rate`, or train in float32."
        )


class LoggingWindow:
    """Sums over the steps since the last log entry on this process."""

    def __init__(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64)

    def add(self, batch: dict[str, Any], result: DistillationLoss) -> None:
        """Add one batch: tokens read, those whose acceptance could be told, and their Σα."""
        read = batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel()
        alpha = result.acceptance
        rated, accepted = (0, 0.0) if alpha is None else (alpha.numel(), alpha.double().sum())
        self._sums += torch.tensor([read, rated, accepted], dtype=torch.float64)

    def close(self, accelerator: Any) -> tuple[int, float | None]:
        """Sum over all processes and start anew.

        Returns:
            Tokens read, and the mean acceptance rate if it could be told.
        """
        read, rated, accepted = accelerator.reduce(self._sums.to(accelerator.device)).tolist()
        self._sums.zero_()
        return int(read), accepted / rated if rated else None
