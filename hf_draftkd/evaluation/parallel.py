"""What a parallel draft says at every depth of every position, exactly: no decoding, no sampling noise.

A draft of K tokens reads the text so far and up to K − 1 mask tokens. Over a text that the target wrote, that is done
from every position at once: behind the cached text come the blocks of all positions, each of which sees the text up to
its own position and itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_draftkd.acceptance import DRAFT_LENGTHS, bootstrap_ratio, expected_target_calls
from hf_draftkd.data.parallel import attention_mask_for
from hf_draftkd.evaluation.report import ParallelResult
from hf_draftkd.models.parallel import ParallelDraft


@dataclass(frozen=True)
class ParallelSums:
    """Sums per text of one parallel draft, to be added up over texts and divided once.

    Attributes:
        num_tokens: `[N]`, float64: completion tokens.
        counts: `[N, K]`, float64: tokens that can be drafted at each depth; the first cannot be the second of a block.
        acceptance: `[N, K]`, float64: α summed over them.
        target_calls: `[N, G]`, float64: expected target calls for γ = 1…min(K, 16).
    """

    num_tokens: Tensor
    counts: Tensor
    acceptance: Tensor
    target_calls: Tensor

    @classmethod
    def of(cls, acceptance: Tensor, accepted: Tensor, mask: Tensor) -> "ParallelSums":
        """Add up two tensors `[B, T, K]` over the tokens of each text, `[B, T]`, padded on the right."""
        mask, acceptance, accepted = mask.cpu(), acceptance.cpu().double(), accepted.cpu().double()
        depths = acceptance.shape[-1]
        can_be = mask[..., None] & (torch.arange(depths) <= torch.arange(mask.shape[1])[:, None])
        return cls(
            mask.sum(1).double(),
            can_be.sum(1).double(),
            (acceptance * can_be).sum(1),
            expected_target_calls(accepted * can_be, lengths_of(depths), mask),
        )


Sums = TypeVar("Sums")


def joined(parts: Sequence[Sums], order: Sequence[int]) -> Sums:
    """Sums per text of several batches as one, its texts in the order named."""
    columns: list[Any] = []
    for column in zip(*(vars(part).values() for part in parts), strict=True):
        rows = [row for rows in column for row in rows]
        chosen = [rows[text] for text in order]
        columns.append(torch.stack(chosen) if isinstance(column[0], Tensor) else chosen)
    return type(parts[0])(*columns)


def lengths_of(num_tokens: int) -> tuple[int, ...]:
    """The draft lengths of a draft of K tokens that are reported."""
    return tuple(length for length in DRAFT_LENGTHS if length <= num_tokens)


def deeper_logits(reader: Any, begin: int, end: int, first: int, draft: ParallelDraft) -> Tensor:
    """What a draft says at depth 2 to K of the tokens behind positions `begin` to `end`, which `reader` has just read.

    Returns:
        `[B, end − begin, K − 1, V]`; meaningless where a block would begin before `first`, the first position that is
        ever drafted from.
    """
    model, device = reader.model, reader.device
    steps = draft.num_tokens - 1
    bases = torch.arange(max(first, begin - steps), end, device=device)
    base, step = bases.repeat_interleave(steps), torch.arange(1, steps + 1, device=device).repeat(len(bases))
    sees_text = torch.arange(end, device=device) <= base[:, None]
    sees_block = (base == base[:, None]) & (step <= step[:, None])
    sees = torch.cat([sees_text, sees_block], 1).expand(reader.batch_size, 1, -1, -1)
    logits = model(
        input_ids=torch.full((reader.batch_size, len(base)), draft.mask_token_id, device=device),
        position_ids=(base + step).expand(reader.batch_size, -1),
        attention_mask=attention_mask_for(model, sees),
        past_key_values=reader.cache,
        use_cache=True,
        return_dict=True,
    ).logits.unflatten(1, (len(bases), steps))
    reader.cache.crop(-len(base))
    # The block of base t says at its j-th mask token what comes after position t + j.
    positions = torch.arange(begin, end, device=device)[:, None]
    jumps = torch.arange(steps, device=device)
    places = (positions - jumps - 1 - bases[0]).clamp(min=0)
    return logits[:, places, jumps]


def parallel_result(sums: ParallelSums, by_prompt: Any) -> ParallelResult:
    """Estimates from sums per text; `by_prompt` adds columns up over the texts of a prompt."""

    def ratio(numerator: Tensor, denominator: Tensor) -> Any:
        return bootstrap_ratio(*by_prompt(numerator, denominator))

    num_tokens = sums.counts.shape[1]
    return ParallelResult(
        num_tokens=num_tokens,
        acceptance_by_depth=[
            ratio(sums.acceptance[:, depth], sums.counts[:, depth])
            for depth in range(num_tokens)
            if sums.counts[:, depth].sum() > 0
        ],
        block_efficiency={
            length: ratio(sums.num_tokens, sums.target_calls[:, index])
            for index, length in enumerate(lengths_of(num_tokens))
        },
    )
