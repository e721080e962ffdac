"""What `trainer.evaluate()` reports: sums over every text on every process, divided once at the end."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hf_draftkd.acceptance import expected_target_calls_by_length
from hf_draftkd.data.formatting import decoding_settings
from hf_draftkd.training.signal import Distributions, Text

# The first columns of `row_sums`, in order; target calls at each draft length follow.
_COLUMNS = ("tokens", "loss", "rated_tokens", "acceptance", "foreign_rows")


def row_sums(
    losses: Tensor,
    draft_logits: Tensor,
    target: Distributions | None,
    batch: dict[str, Any],
    keep: Tensor,
    draft_lengths: Sequence[int],
    signal: Text,
) -> Tensor:
    """The summands of one batch, a row per text.

    Args:
        losses: [N] loss of each completion token.
        draft_logits: [N, V] raw logits of the draft at these tokens.
        target: What the signal knows of the target there.
        batch: The batch: `input_ids` [B, L], and `decoding` [B, 4] where the collator gives it.
        keep: [B, L] bool, where the N tokens are predicted.
        draft_lengths: G draft lengths γ.
        signal: What the draft learns from.

    Returns:
        [B, 5 + G] float64: completion tokens; their loss; those whose acceptance can be told, and their Σα at
        temperature 1; 1 if block efficiency is not exact for this text; else its expected target calls at each γ.
    """
    num_rows = keep.shape[0]
    row_of_token = keep.nonzero()[:, 0]
    sums = torch.zeros(num_rows, len(_COLUMNS) + len(draft_lengths), dtype=torch.float64, device=keep.device)
    sums[:, 0] = keep.sum(1)
    sums[:, 1].index_add_(0, row_of_token, losses.double())
    alpha = signal.acceptance(draft_logits, target)
    if alpha is not None:
        sums[:, 2] = sums[:, 0]
        sums[:, 3].index_add_(0, row_of_token, alpha.double())

    sums[:, 4] = 1
    groups = decoding_settings(batch["decoding"]) if "decoding" in batch else {}
    for setting, rows in groups.items():
        chosen = torch.isin(row_of_token, torch.tensor(rows, device=keep.device))
        accepted = signal.accepted(draft_logits, target, batch, keep, chosen, setting)
        if accepted is None:
            continue
        # Tokens are in row-major order, so each row's own stand together.
        lengths = keep[rows].sum(1)
        by_row = pad_sequence(accepted.double().split(lengths.tolist()), batch_first=True)
        valid = torch.arange(by_row.shape[1], device=keep.device) < lengths[:, None]
        sums[rows, 4] = 0
        sums[rows, len(_COLUMNS) :] = expected_target_calls_by_length(by_row, draft_lengths, valid).to(sums)
    return sums


class EvaluationSums:
    """Adds up `row_sums` of all batches.

    Args:
        num_assistant_tokens: Draft length γ of the figure called `block_efficiency`.
        more_lengths: Further draft lengths, each reported as `block_efficiency_at_γ`.
        signal: What the draft learns from: it names the acceptance rate, and says which text it can judge.
    """

    def __init__(self, num_assistant_tokens: int, more_lengths: Sequence[int], signal: Text) -> None:
        self.draft_lengths = (num_assistant_tokens, *more_lengths)
        self._signal = signal
        self._total = torch.zeros(len(_COLUMNS) + len(self.draft_lengths), dtype=torch.float64)

    def add(self, sums: Tensor) -> None:
        """Add the rows of one batch, gathered over processes."""
        self._total += sums.sum(0).cpu()

    def figures(self) -> dict[str, float]:
        """`loss` per completion token and, as far as the signal can tell, `acceptance_rate` and `block_efficiency`.

        The acceptance rate is called `acceptance_rate_upper_bound` where the target's tail is not known.

        `block_efficiency` (tokens per target call, bonus token included) is exact for text that the target wrote
        under the setting it was recorded with, and means nothing for other text: with such rows in the data it is
        left out, with a warning.
        """
        tokens, loss, rated, acceptance, foreign_rows, *calls = self._total.tolist()
        if tokens == 0:
            return {}
        figures = {"loss": loss / tokens}
        if rated:
            figures[self._signal.acceptance_name] = acceptance / rated
        if foreign_rows == 0:
            names = ["block_efficiency", *(f"block_efficiency_at_{length}" for length in self.draft_lengths[1:])]
            return figures | {name: tokens / call for name, call in zip(names, calls, strict=True)}
        if type(self._signal) is not Text:
            warnings.warn(
                f"eval_block_efficiency is left out: {int(foreign_rows)} evaluation rows do not say that they "
                f"{self._signal.exact_text}. Make such rows with `draftkd generate` or `generate_alignment_data`.",
                stacklevel=2,
            )
        return figures
