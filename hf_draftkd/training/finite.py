"""Nothing that is no number reaches the weights or a file: loss, gradient and weights are looked at before they count.

The loss is looked at in each batch, the gradient before each optimizer step, the weights before they are saved and when
training ends. Under DeepSpeed the engine has stepped by the time anybody sees the gradient, and in fp16 the scaler
skips such steps itself: both are left to it, and what they let through stops at the next loss or before it is saved.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

_REMEDY = "Lower `learning_rate`, or train in float32"


def require_finite_loss(loss: Tensor, batch: dict[str, Any], trainer: Any, *, evaluates: bool = False) -> None:
    """Stop before a loss that is no number reaches the weights, or a figure.

    Args:
        loss: Of one batch.
        batch: The batch.
        trainer: Names step, process, rows and the last checkpoint.
        evaluates: Whether nothing is learnt from the batch.

    Raises:
        FloatingPointError: It is NaN or infinite; the message names step, process and batch.
    """
    if torch.isfinite(loss):
        return
    step = trainer.state.global_step
    when = f"evaluation after {step} optimizer steps" if evaluates else f"optimizer step {step + 1}"
    raise FloatingPointError(
        f"The loss is {loss.item()} in {when}, process {trainer.accelerator.process_index}, in the batch whose rows "
        f"begin with {_row_starts([batch], trainer)}. {_reason(trainer, evaluates)}"
    )


def _reason(trainer: Any, evaluates: bool) -> str:
    ruined = weight_not_finite(trainer.model)
    if ruined is not None:
        return f"Those rows are not to blame: {_ruin(ruined, trainer)}"
    if evaluates:
        return "The draft's weights are finite. Look for logits that are not, its own or the target's, on those rows."
    return f"The weights were not updated. {_untouched(trainer)} Look for logits that are not finite there. {_REMEDY}."


def _ruin(name: str, trainer: Any) -> str:
    if trainer.state.global_step == 0:
        return f"the draft came with weights that are not finite ({name}). Load another copy of it."
    return (
        f"the draft's weights are not finite after optimizer step {trainer.state.global_step} ({name}), an update has "
        f"ruined them. {_untouched(trainer)} {_REMEDY}."
    )


def _untouched(trainer: Any) -> str:
    return f"The last checkpoint in {trainer.args.output_dir!r} is untouched."


def _row_starts(batches: Sequence[dict[str, Any]], trainer: Any) -> list[str]:
    return [text for batch in batches for text in trainer.processing_class.batch_decode(batch["input_ids"][:, :16])]


def weight_not_finite(model: nn.Module) -> str | None:
    """Name of the first parameter with a NaN or infinity among what this process holds; None if there is none."""
    for name, parameter in model.named_parameters():
        held = held_here(parameter)
        # The extremes of a tensor with a NaN are NaN: one pass, and no mask as large as the weights.
        if held.is_floating_point() and held.numel() and not torch.stack(held.aminmax()).isfinite().all():
            return name
    return None


def held_here(parameter: nn.Parameter) -> Tensor:
    """What this process holds of a weight, without gradient: all of it, unless FSDP or ZeRO-3 shard it."""
    # ZeRO-3 leaves an empty parameter, and keeps the share beside it.
    held: Tensor = getattr(parameter, "ds_tensor", parameter).detach()
    return held.to_local() if isinstance(held, DTensor) else held


class StaysFinite(Trainer):
    """A trainer that stops before what is no number is learnt or saved. Mix it in before another trainer class."""

    model: Any
    # Set by `PlainDrafts`.
    _saving_checkpoint: bool
    _step_batches: Sequence[dict[str, Any]] = ()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Remembers the batches that the next optimizer step learns from, to name them if it fails."""
        self._step_batches, num_items = super().get_batch_samples(*args, **kwargs)
        return self._step_batches, num_items

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Called before every optimizer step, with the norm if gradients were clipped. It is that of the whole
        # accumulation window, summed over processes: all of them stop alike.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.is_deepspeed_enabled or self.accelerator.scaler is not None:
            return norm
        value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not math.isfinite(value):
            raise FloatingPointError(
                f"The norm of the gradient is {value} in optimizer step {self.state.global_step + 1}, though "
                f"every loss was finite. Process {self.accelerator.process_index} learns there from the rows that "
                f"begin with {_row_starts(self._step_batches, self)}. The weights were not updated. {_untouched(self)} "
                f"A `token_loss` of your own may have no gradient there: a root or logarithm of 0, or 0 / 0. {_REMEDY}."
            )
        return norm

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, and the draft that it leaves has finite weights.

        Raises:
            FloatingPointError: A loss, a gradient or the weights are not finite.
        """
        result = super().train(*args, **kwargs)
        self._require_finite_weights()
        return result

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Before a file is written, and before older checkpoints give way to this one.
        self._require_finite_weights()
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers.

        Raises:
            FloatingPointError: The weights are not finite. Nothing is written.
        """
        if not self._saving_checkpoint:
            self._require_finite_weights()
        super().save_model(output_dir, _internal_call)

    def _require_finite_weights(self) -> None:
        ruined = [weight_not_finite(self.model)]
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # Each process holds a share, and all of them save together. Elsewhere one may save alone.
            ruined = gather_object(ruined)
        names = [name for name in ruined if name is not None]
        if names:
            raise FloatingPointError(f"Nothing is saved: {_ruin(names[0], self)}")
