"""One forward pass of a causal LM that projects only the positions asked for.

The vocabulary is what makes logits large, and most positions of a batch (prompts, padding) are never looked at. The
positions are chosen in front of the head, inside the model's own forward, so that wrappers (DDP, FSDP, PEFT) run as
always and whatever the model does after its head (scaling, soft-capping) still happens.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def predicting_positions(labels: Tensor) -> Tensor:
    """Which positions predict a token that counts.

    Args:
        labels: [B, L] token ids, -100 where a token does not count.

    Returns:
        [B, L] bool, True at position t where `labels[:, t + 1]` counts. The last column is False.
    """
    keep = torch.zeros_like(labels, dtype=torch.bool)
    keep[:, :-1] = labels[:, 1:] != -100
    return keep


@contextmanager
def _project_only(model: nn.Module, keep: Tensor) -> Iterator[None]:
    """Let `model`'s output head see only the kept positions, so that its logits are [N, V] instead of [B, L, V]."""
    head = unwrapped(model).get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: (args[0][keep.to(args[0].device)], *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def logits_at(model: nn.Module, inputs: Mapping[str, Any], keep: Tensor) -> Tensor:
    """Next-token logits at chosen positions.

    Args:
        model: A causal LM, wrapped or not (DDP, FSDP, PEFT).
        inputs: What its forward takes: `input_ids` [B, L] and, as the batch needs, `attention_mask` or `position_ids`.
        keep: [B, L] bool, N of them True.

    Returns:
        [N, V] logits in row-major order of `keep`, in the model's own dtype.
    """
    device = unwrapped(model).get_input_embeddings().weight.device
    placed = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    with _project_only(model, keep):
        return model(**placed, use_cache=False).logits


def unwrapped(model: nn.Module) -> Any:
    """The transformers model inside data-parallel, compile and PEFT wrappers."""
    from accelerate.utils import extract_model_from_parallel, is_peft_model

    inner = extract_model_from_parallel(model, keep_fp32_wrapper=True, keep_torch_compile=False)
    return inner.get_base_model() if is_peft_model(inner) else inner
