"""Rows that teach a draft to predict several tokens in one pass: mask tokens, positions, and who sees whom.

Behind a row's own tokens come blocks of mask tokens. A block belongs to a position t of the row, sees the row's tokens
up to t and itself from left to right, and takes the positions t + 1, t + 2, ...: just what a parallel draft reads when
it drafts from there. Its j-th mask token predicts the token at depth j + 1, which stands at t + j + 1, and the row's
own token at t predicts that at depth 1, as ever. So one forward pass holds all blocks of all positions.

Deeper copies are dropped at random (arXiv 2504.18583, section 3.2), so that a pass over K depths costs near three and
not K passes.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_draftkd.models.forward import evaluating, logits_at, unwrapped
from hf_draftkd.models.pairing import context_length

# The first share of the positions that teach depth k teaches depth k + 1 too, but never less than the second share of
# all positions. The values are the paper's.
_RETENTION, _LEAST = 0.7, 0.2

# Half precision rounds a logit by about 1%; a mask or a position that is not looked at changes most by far more.
_ROUNDING = 0.02
_PROBE_LENGTH = 16


class ParallelRows(NamedTuple):
    """A batch with its blocks of mask tokens: N tokens are learned from M predictions, at several depths."""

    inputs: dict[str, Tensor]
    """What the draft's forward takes: `input_ids` and `position_ids` [B, W], `attention_mask` [B, 1, W, W]."""
    keep: Tensor
    """[B, W] bool, the M positions that predict something."""
    source: Tensor
    """[M] which of the N tokens each of them predicts, in row-major order of `keep`."""
    depth: Tensor
    """[M] at which depth, 1 to K."""


def retained(num_tokens: int) -> list[float]:
    """The share of all positions that teach depth 1 to K."""
    return [max(_RETENTION**depth, _LEAST) if depth else 1.0 for depth in range(num_tokens)]


def draw_depths(count: int, num_tokens: int) -> Tensor:
    """How many depths each of N positions teaches, at random: [N], 1 to K, in the shares of `retained`."""
    # Stratified: whatever the batch, each depth has its share of the positions.
    u = (torch.randperm(count) + torch.rand(count)) / max(count, 1)
    return (u[:, None] < torch.tensor(retained(num_tokens))).sum(1)


def parallel_rows(batch: dict[str, Tensor], keep: Tensor, depths: Tensor, mask_token_id: int) -> ParallelRows:
    """Add to each row of a batch its blocks of mask tokens.

    Args:
        batch: `input_ids` [B, L] and, where there is padding, `attention_mask` [B, L]; one text a row.
        keep: [B, L] bool, the N positions that predict a token that is learned.
        depths: [N], how many depths each of them teaches. It is cut where the run of learned tokens ends: tokens
            of the user are not drafted.
        mask_token_id: What stands in the place of a token that is not known yet.
    """
    ids = batch["input_ids"]
    (size, width), device = ids.shape, ids.device
    rows, places = keep.nonzero(as_tuple=True)
    number = torch.arange(len(rows), device=device)
    # The last of a run has one token to predict, the one before it two. `ends.cumsum(0) - ends` is the number of the
    # run that a position is in, and so of its end among all ends.
    ends = torch.ones_like(rows, dtype=torch.bool)
    ends[:-1] = (rows[1:] != rows[:-1]) | (places[1:] != places[:-1] + 1)
    left = ends.nonzero()[:, 0][ends.cumsum(0) - ends.long()] - number + 1
    extra = torch.minimum(depths.to(device), left) - 1

    base = number.repeat_interleave(extra)  # [E]: of which position each mask token is
    step = torch.arange(len(base), device=device) - (extra.cumsum(0) - extra)[base] + 1
    of_row = rows[base]
    per_row = torch.bincount(of_row, minlength=size)
    column = width + torch.arange(len(base), device=device) - (per_row.cumsum(0) - per_row)[of_row]
    total = width + int(per_row.max()) if size else width

    def grid(values: Tensor, fill: int, masks: Tensor) -> Tensor:
        """[B, W]: `values` [B, L], then `masks` [E] at the mask tokens and `fill` behind them."""
        whole = torch.cat([values, values.new_full((size, total - width), fill)], 1)
        whole[of_row, column] = masks.to(whole)
        return whole

    columns = torch.arange(width, device=device).expand(size, width)
    numbers = torch.zeros_like(ids)
    numbers[keep] = number
    # What each sees of the row: tokens up to here. And the block that it is in: -1 for the row's own tokens.
    last_seen = grid(columns, -1, places[base])
    block = grid(torch.full_like(ids, -1), -2, base)
    is_text = torch.arange(total, device=device) < width
    is_token = grid(batch.get("attention_mask", torch.ones_like(ids)).long(), 0, torch.ones_like(base)).bool()
    order = torch.arange(total, device=device)
    sees_text = order <= last_seen[:, :, None]
    sees_block = (block[:, :, None] == block[:, None, :]) & (order <= order[:, None])
    sees = torch.where(is_text, sees_text, sees_block) & is_token[:, None, :]
    # What is padding sees itself: attention over nothing is not defined.
    sees |= torch.eye(total, dtype=torch.bool, device=device)

    everywhere = grid(keep.long(), 0, torch.ones_like(base)).bool()
    return ParallelRows(
        {
            "input_ids": grid(ids, mask_token_id, torch.full_like(base, mask_token_id)),
            "position_ids": grid(columns, 0, places[base] + step),
            "attention_mask": sees[:, None],
        },
        everywhere,
        grid(numbers, 0, base + step)[everywhere],
        grid(torch.ones_like(ids), 1, step + 1)[everywhere],
    )


def attention_mask_for(model: PreTrainedModel, sees: Tensor) -> Tensor:
    """The mask [B, 1, Q, K] bool in the form that the model's attention takes; a `ValueError` if it takes none."""
    kind = unwrapped(model).config._attn_implementation
    if kind == "sdpa":
        return sees
    if kind == "eager":
        dtype = unwrapped(model).dtype
        return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)
    raise ValueError(
        f"Mask tokens need an attention mask of their own, which {kind!r} attention does not take. Load the draft with "
        '`attn_implementation="sdpa"` (or `"eager"`).'
    )


@torch.no_grad()
def check_reads_mask_tokens(model: torch.nn.Module, mask_token_id: int, num_tokens: int, row_length: int) -> None:
    """Compare what a draft, wrapped or not, says in rows of `parallel_rows` with separate passes, one for each block.

    A `ValueError` if they differ, since the architecture makes nothing of such a mask or of positions (Bloom, MPT), or
    has layers with a window that is shorter than the longest row, of `row_length` tokens; or if it cannot read such a
    row.
    """
    inner = unwrapped(model)
    config = inner.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    length = _PROBE_LENGTH if window is None else min(row_length, window + _PROBE_LENGTH)
    length = max(min(length, context_length(inner) or length), 4)
    ids = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    keep = torch.zeros_like(ids, dtype=torch.bool)
    keep[:, length // 2 : -1] = True
    starts = keep.nonzero()[:, 1]
    depths = torch.full((len(starts),), num_tokens)
    rows = parallel_rows({"input_ids": ids}, keep, depths, mask_token_id)
    mask = attention_mask_for(inner, rows.inputs["attention_mask"])
    error: Exception | None = None
    reason = "its attention does not follow the mask or the positions that are given"
    if window is not None:
        reason += f", or its window of {window} tokens is shorter than a row of {row_length}"
    try:
        with evaluating(model):
            found = logits_at(model, rows.inputs | {"attention_mask": mask}, rows.keep).float()
            expected = torch.zeros_like(found)
            for start in (0, len(starts) // 2):
                text = ids[:, : int(starts[start]) + 1]
                count = min(num_tokens, len(starts) - start)
                plain = torch.cat([text, text.new_full((1, count - 1), mask_token_id)], 1)
                there = torch.zeros_like(plain, dtype=torch.bool)
                there[:, text.shape[1] - 1 :] = True
                chosen = rows.source - rows.depth + 1 == start
                expected[chosen] = logits_at(model, {"input_ids": plain}, there).float()
        compared = expected.any(-1)
        apart = (found - expected)[compared].norm(dim=-1) / expected[compared].norm(dim=-1).clamp(min=1e-6)
        if apart.median() <= _ROUNDING and apart.mean() <= 5 * _ROUNDING:
            return
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, TypeError, ValueError) as caught:
        error, reason = caught, str(caught).rstrip(".")
    raise ValueError(
        f"The draft (model type {inner.config.model_type!r}) cannot learn to draft in parallel: {reason}. Leave out "
        "`parallel_tokens`."
    ) from error
