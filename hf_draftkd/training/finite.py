"""Stop before a NaN or Inf reaches the weights or a checkpoint.

The loss is checked in each batch, the gradient before each optimizer step, the weights before they are saved and when
training ends. Under DeepSpeed the engine has stepped before anybody sees the gradient, and in fp16 the scaler skips
such steps itself: what they let through stops at the next loss, or before it is saved.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_REMEDY = "Lower `learning_rate`, or train in float32."


def check_loss(
    loss: Tensor, model: nn.Module, step: int, rows: Callable[[], list[str]], *, evaluates: bool = False
) -> None:
    """Raise a `FloatingPointError` with step, process and rows if the loss of one batch is NaN or infinite.

    `step` counts the optimizer steps taken so far; `rows` says how the rows of the batch begin; `evaluates` where
    nothing is learned from it. Whether the model's weights are still finite tells what is to blame.
    """
    if torch.isfinite(loss):
        return
    ruined = nonfinite_weight(model)
    if ruined is not None:
        cause = f"Those rows are not to blame: {_ruin(ruined, step)}"
    elif evaluates:
        cause = "The draft's weights are finite. Look for logits that are not, its own or the target's, on those rows."
    else:
        cause = f"The weights were not updated. Look for logits that are not finite on those rows. {_REMEDY}"
    when = f"evaluation after {step} optimizer steps" if evaluates else f"optimizer step {step + 1}"
    raise FloatingPointError(
        f"The loss is {loss.item()} in {when}, process {PartialState().process_index}, in the batch whose rows begin "
        f"with {rows()}. {cause}"
    )


class StopOnNonFiniteGradient(TrainerCallback):
    """Stops all processes before an optimizer step whose gradient is NaN or infinite on one of them.

    `rows` is called to say how the rows of this step begin on this process.
    """

    def __init__(self, rows: Callable[[], list[str]]) -> None:
        self._rows = rows

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        parameters = (parameter for group in kwargs["optimizer"].param_groups for parameter in group["params"])
        gradients = [held_here(parameter.grad) for parameter in parameters if parameter.grad is not None]
        # The norm is NaN or Inf if any entry is; clipping keeps every other norm finite.
        stops = torch.tensor(not math.isfinite(get_total_norm(gradients)), dtype=torch.int32, device=args.device)
        if args.world_size > 1:
            # Shards differ between processes.
            torch.distributed.all_reduce(stops)
        if stops:
            raise FloatingPointError(
                f"The gradient is not finite in optimizer step {state.global_step + 1}, though every loss was. Process "
                f"{args.process_index} learns there from the rows that begin with {self._rows()}. The weights were not "
                "updated. A custom `token_loss` may have no gradient there: a root or logarithm of 0, or 0 / 0. "
                + _REMEDY
            )


def check_weights(trainer: Trainer) -> None:
    """Raise a `FloatingPointError` with the name of the first weight that is NaN or infinite.

    Where processes hold parts of the draft, call it on all of them.
    """
    ruined: Iterable[str | None] = [nonfinite_weight(trainer.model)]
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    names = [name for name in (gather_object(ruined) if sharded else ruined) if name is not None]
    if names:
        raise FloatingPointError(f"Nothing is saved: {_ruin(names[0], trainer.state.global_step)}")


def _ruin(name: str, step: int) -> str:
    if step == 0:
        return f"the draft came with weights that are not finite ({name}). Load another copy of it."
    return (
        f"the draft's weights are not finite after optimizer step {step} ({name}): an update has ruined them. The last "
        f"checkpoint is untouched. {_REMEDY}"
    )


def nonfinite_weight(model: nn.Module) -> str | None:
    """Name of the first parameter with a NaN or Inf in what this process holds of it; None if there is none."""
    for name, parameter in model.named_parameters():
        held = held_here(parameter)
        # The extremes of a tensor with a NaN are NaN: one pass, and no mask as large as the weights.
        if held.is_floating_point() and held.numel() and not torch.stack(held.aminmax()).isfinite().all():
            return name
    return None


def held_here(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, unless FSDP2 or ZeRO-3 shard it."""
    # ZeRO-3 leaves an empty parameter, and keeps the share beside it.
    held: Tensor = getattr(tensor, "ds_tensor", tensor).detach()
    return held.to_local() if isinstance(held, DTensor) else held
