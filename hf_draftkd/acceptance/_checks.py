"""Checks of what users hand in, shared by the two foundation rooms."""

from collections.abc import Iterable
from difflib import get_close_matches

import torch


def unknown_name(kind: str, name: object, valid: Iterable[str]) -> ValueError:
    """Return the error for a name that does not exist; it suggests the nearest one that does.

    Args:
        kind: What the name is of, e.g. `"verification rule"`.
        name: What was given.
        valid: The names that exist.

    Returns:
        A `ValueError`, to be raised by the caller.
    """
    names = list(valid)
    # A short form ("jsd") is far from its name in letters, but part of it.
    near = get_close_matches(str(name), names, n=1, cutoff=0.6) or [valid for valid in names if str(name) in valid]
    near = near or get_close_matches(str(name), names, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"Unknown {kind} {name!r}.{hint} Choose one of: {', '.join(names)}.")


def check_same_shape(draft_logits: torch.Tensor, target_logits: torch.Tensor) -> None:
    """Refuse two logits tensors that are not the same positions over the same vocabulary.

    Args:
        draft_logits: `[..., V]`.
        target_logits: `[..., V]`.

    Raises:
        ValueError: If the shapes differ, or there is no vocabulary dimension.
    """
    if draft_logits.ndim == 0 or draft_logits.shape[-1:] == (0,):
        raise ValueError(f"Logits need a vocabulary as their last dimension, got shape {tuple(draft_logits.shape)}.")
    if draft_logits.shape == target_logits.shape:
        return
    given = f"draft_logits {tuple(draft_logits.shape)}, target_logits {tuple(target_logits.shape)}"
    if draft_logits.shape[:-1] == target_logits.shape[:-1]:
        raise ValueError(
            f"Draft and target must be compared over one vocabulary, got {given}. If one of them is only padded, cut "
            "both to the shared vocabulary first: logits[..., :shared_vocab_size]."
        )
    raise ValueError(f"Draft and target logits must cover the same positions, got {given}.")


def check_draft_length(num_assistant_tokens: int) -> None:
    """Refuse a draft length that is not a whole number of at least one.

    Args:
        num_assistant_tokens: The draft length γ.

    Raises:
        ValueError: If it is not an integer ≥ 1.
    """
    if isinstance(num_assistant_tokens, bool) or not isinstance(num_assistant_tokens, int) or num_assistant_tokens < 1:
        raise ValueError(f"num_assistant_tokens must be a whole number of at least 1, got {num_assistant_tokens!r}.")


def at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    """Return the tensor in float32, or as it is where it is already float64."""
    return logits if logits.dtype == torch.float64 else logits.float()


def widest_float(device: torch.device | str) -> torch.dtype:
    """Return float64, in which sums are taken, or float32 on a device that has none (Apple's MPS raises TypeError)."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64
