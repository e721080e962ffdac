"""What the functions of `acceptance` and `losses` do with logits first: compare shapes, choose a precision."""

import torch


def check_same_shape(draft_logits: torch.Tensor, target_logits: torch.Tensor) -> None:
    """Refuse two logits tensors `[..., V]` that are not the same positions over the same vocabulary.

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


def at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    """Return the tensor in float32, or as it is where it is already float64."""
    return logits if logits.dtype == torch.float64 else logits.float()


def only_listed(draft_logits: torch.Tensor, vocabulary: torch.Tensor | None) -> torch.Tensor:
    """Return the draft's logits `[..., V]` with −inf outside a list of ids `[n]`: q masked and renormalised.

    None as the list: as they are. They are never written into.
    """
    if vocabulary is None:
        return draft_logits
    kept = torch.full_like(draft_logits, -torch.inf)
    kept[..., vocabulary] = draft_logits[..., vocabulary]
    return kept


def widest_float(device: torch.device | str) -> torch.dtype:
    """Return float64, in which sums are taken, or float32 on a device that has none (Apple's MPS raises TypeError)."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def draw(weights: torch.Tensor) -> torch.Tensor:
    """Draw one id `[..., 1]` for each row of weights `[..., V]`, which need not sum to 1; ids of weight 0 never.

    By the inverse of the distribution function: some 4 to 20 times faster on a CPU than `torch.multinomial`, which
    draws a random number for every id.
    """
    cumulative = weights.cumsum(-1)
    # rand < 1, so the product stays below the last sum, and the search ends at an id that raised it.
    return torch.searchsorted(cumulative, torch.rand_like(cumulative[..., :1]) * cumulative[..., -1:], right=True)
