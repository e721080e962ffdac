"""What `trainer.evaluate()` reports: sums over every text on every process, divided once at the end."""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from hf_draftkd.acceptance import expected_target_calls, token_acceptance_rate
from hf_draftkd.data.decoding import DecodingSetting
from hf_draftkd.data.formatting import decoding_settings
from hf_draftkd.evaluation.processing import logits_processors, process_logits
from hf_draftkd.evaluation.teacher_forced import token_scores

# The columns of `row_sums`, in order.
_COLUMNS = ("tokens", "loss", "acceptance", "own_tokens", "own_calls", "foreign_rows")


def row_sums(
    losses: Tensor,
    draft_logits: Tensor,
    target_logits: Tensor | None,
    inputs: dict[str, Any],
    keep: Tensor,
    num_assistant_tokens: int,
    target_model: PreTrainedModel | None = None,
) -> Tensor:
    """The summands of one batch, a row per text.

    Args:
        losses: [N] loss of each completion token.
        draft_logits: [N, V] raw logits of the draft at these tokens.
        target_logits: [N, V] of the target; None in black-box training, where only the loss is summed.
        inputs: The batch: `input_ids` [B, L], and `decoding` [B, 4] where the collator gives it.
        keep: [B, L] bool, where the N tokens are predicted.
        num_assistant_tokens: Draft length γ.
        target_model: Brings the tokens it never writes (`suppress_tokens` of its generation config).

    Returns:
        [B, 6] float64: completion tokens; their loss; their acceptance Σα at temperature 1; tokens and expected target
        calls of texts that the target wrote under a known setting; 1 for each other text.
    """
    num_rows = keep.shape[0]
    row_of_token = keep.nonzero()[:, 0]
    sums = torch.zeros(num_rows, len(_COLUMNS), dtype=torch.float64, device=keep.device)
    sums[:, 0] = keep.sum(1)
    sums[:, 1].index_add_(0, row_of_token, losses.double())
    if target_logits is None:
        return sums
    alpha = token_acceptance_rate(draft_logits, target_logits)
    sums[:, 2].index_add_(0, row_of_token, alpha.double())

    sums[:, 5] = 1
    positions = keep.nonzero()[:, 1]
    groups = decoding_settings(inputs["decoding"]) if "decoding" in inputs else {}
    for setting, rows in groups.items():
        chosen = torch.isin(row_of_token, torch.tensor(rows, device=keep.device))
        accepted = _accepted(
            draft_logits[chosen],
            target_logits[chosen],
            inputs["input_ids"],
            row_of_token[chosen],
            positions[chosen],
            setting,
            target_model,
        )
        # Tokens are in row-major order, so each row's own stand together.
        lengths = keep[rows].sum(1)
        by_row = pad_sequence(accepted.double().split(lengths.tolist()), batch_first=True)
        valid = torch.arange(by_row.shape[1], device=keep.device) < lengths[:, None]
        sums[rows, 3] = lengths.double()
        sums[rows, 4] = expected_target_calls(by_row, num_assistant_tokens, valid).to(sums)
        sums[rows, 5] = 0
    return sums


def _accepted(
    draft_logits: Tensor,
    target_logits: Tensor,
    input_ids: Tensor,
    rows: Tensor,
    positions: Tensor,
    setting: DecodingSetting,
    target_model: PreTrainedModel | None,
) -> Tensor:
    """[n] a_t, the chance that each of n tokens, written under `setting`, had been an accepted draft token."""
    processors = logits_processors(setting, target_model)
    # Only the penalty looks back; the prefixes of all tokens are large.
    looks_back = setting.repetition_penalty != 1
    prefixes = input_ids[rows] if looks_back else input_ids.new_zeros(len(rows), 0)
    draft, target = (
        process_logits(logits.float(), prefixes, positions + 1, processors) for logits in (draft_logits, target_logits)
    )
    tokens = input_ids[rows, positions + 1]
    # Where the recorded setting could not have written the token, a_t is undefined (0 / 0); it counts as rejected.
    scores = token_scores(draft, target, tokens, is_greedy=setting.is_greedy)
    return scores.accepted.nan_to_num(0.0)


class EvaluationSums:
    """Adds up `row_sums` of all batches.

    Args:
        num_assistant_tokens: Draft length γ that the block efficiency is for.
    """

    def __init__(self, num_assistant_tokens: int) -> None:
        self.num_assistant_tokens = num_assistant_tokens
        self._total = torch.zeros(len(_COLUMNS), dtype=torch.float64)

    def add(self, sums: Tensor) -> None:
        """Add the rows [B, 6] of one batch, gathered over processes."""
        self._total += sums.sum(0).cpu()

    def figures(self) -> dict[str, float]:
        """`loss` per completion token and, where a target was at hand, `acceptance_rate` and `block_efficiency`.

        `block_efficiency` (tokens per target call, bonus token included) is exact for text that the target wrote
        under the setting it was recorded with, and means nothing for other text: with such rows in the data it is
        left out, with a warning.
        """
        tokens, loss, acceptance, own_tokens, own_calls, foreign_rows = self._total.tolist()
        if tokens == 0:
            return {}
        figures = {"loss": loss / tokens}
        if acceptance == 0 and foreign_rows == 0 and own_calls == 0:
            return figures
        figures["acceptance_rate"] = acceptance / tokens
        if foreign_rows:
            warnings.warn(
                f"eval_block_efficiency is left out: {int(foreign_rows)} evaluation rows do not say that this target "
                "wrote them, and under which setting. Make such rows with `draftkd generate` or "
                "`generate_alignment_data`.",
                stacklevel=2,
            )
        elif own_calls:
            figures["block_efficiency"] = own_tokens / own_calls
        return figures
