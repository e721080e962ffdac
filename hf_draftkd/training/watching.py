"""What is watched in every training step: the sums that the log is made of."""

from functools import cached_property
from typing import Any

import torch
from transformers import Trainer

from hf_draftkd.losses import DistillationLoss
from hf_draftkd.training.signal import Text


class LoggingWindow:
    """Sums over the steps since the last log entry on this process."""

    def __init__(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64)

    def add(self, batch: dict[str, Any], result: DistillationLoss) -> None:
        """Add one batch: tokens read, those whose acceptance could be told, and their Σα."""
        read = batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel()
        alpha = result.acceptance
        # Summed over batches in float64 on the CPU: not every accelerator has it.
        rated, accepted = (0, 0.0) if alpha is None else (alpha.numel(), float(alpha.cpu().double().sum()))
        self._sums += torch.tensor([int(read), rated, accepted], dtype=torch.float64)

    def close(self, accelerator: Any) -> tuple[int, float | None]:
        """Sum over all processes and start anew.

        Returns:
            Tokens read, and the mean acceptance rate if it could be told.
        """
        sums = self._sums.to(accelerator.device) if accelerator.num_processes > 1 else self._sums
        read, rated, accepted = accelerator.reduce(sums).tolist()
        self._sums.zero_()
        return int(read), accepted / rated if rated else None


class LogsAcceptance(Trainer):
    """A trainer that logs the acceptance rate of what it trains on. Mix it in before another trainer class."""

    signal: Text
    _total_train_tokens: int

    @cached_property
    def _window(self) -> LoggingWindow:
        return LoggingWindow()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds `num_tokens` read so far and, where it can be told, the window's `acceptance_rate`.

        It stands at the loss temperature and is one minus total variation: what `tvd_plus_plus`, whose own value says
        nothing, has to be watched by. From a cache without the whole tail it is named `acceptance_rate_upper_bound`.
        """
        if self.model.training:
            read, acceptance = self._window.close(self.accelerator)
            self._total_train_tokens += read
            if read:
                logs["num_tokens"] = self._total_train_tokens
            if acceptance is not None:
                logs[self.signal.acceptance_name] = acceptance
        super().log(logs, start_time)
