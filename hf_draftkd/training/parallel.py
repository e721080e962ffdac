"""`parallel_tokens`: the draft learns each token at several depths, from the one pass of the target that there is."""

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_draftkd.acceptance import token_logprob
from hf_draftkd.acceptance.tensors import widest_float
from hf_draftkd.data.parallel import attention_mask_for, draw_depths, parallel_rows, retained
from hf_draftkd.losses import DistillationLoss, Unprojected
from hf_draftkd.losses.chunked import scan
from hf_draftkd.models.forward import unwrapped
from hf_draftkd.models.parallel import choose_mask_token, parallel_draft, store_parallel_draft
from hf_draftkd.models.tokenizers import tokenizer_size
from hf_draftkd.training.config import DraftDistillConfig
from hf_draftkd.training.signals import Distributions

logger = logging.getLogger(__name__)


class Lesson(NamedTuple):
    """What the draft reads in one step, and its targets at each position."""

    inputs: dict[str, Any]
    """The batch, or the forward inputs that replace it."""
    keep: Tensor
    """[B, W] bool, the positions of N predictions."""
    target: Distributions | Unprojected | None
    """What is known of the target there."""
    tokens: Tensor
    """[N] that come next."""
    num_items: Tensor | float | None
    """What the sum of losses is divided by; None for N."""
    weights: Tensor | None = None
    """[N], or None where all count alike."""
    depth: Tensor | None = None
    """[N], or None where all are next tokens."""

    def at_depth_one(self, result: DistillationLoss) -> DistillationLoss:
        """The result with the acceptance rates of next tokens alone, which are those of an ordinary draft."""
        if self.depth is None or result.acceptance is None:
            return result
        return result._replace(acceptance=result.acceptance[self.depth == 1])


class ParallelTraining:
    """Turns the lesson of an ordinary draft into that of a parallel one; the draft's config records mask token and K.

    A `ValueError` if the vocabulary has no token to spare, or the draft's attention takes no mask.
    """

    def __init__(self, draft: PreTrainedModel, args: DraftDistillConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.num_tokens, self.by_confidence = args.parallel_tokens, args.parallel_weights == "confidence"
        self.temperature = args.loss_temperature
        self.mask_token_id = choose_mask_token(draft, tokenizer)
        attention_mask_for(draft, torch.ones(1, 1, 1, 1, dtype=torch.bool))
        store_parallel_draft(draft.config, self.mask_token_id, self.num_tokens)
        table = draft.get_input_embeddings().weight
        if tokenizer_size(tokenizer) <= self.mask_token_id < len(table) and not table[self.mask_token_id].any():
            # A padded row of zeros has no direction, which normalisation would divide by.
            with torch.no_grad():
                table[self.mask_token_id] = table[: tokenizer_size(tokenizer)].mean(0)

    def __call__(self, lesson: Lesson, model: torch.nn.Module) -> Lesson:
        """The same batch, in which each token is learned at several depths.

        The target's distribution of a token is the same from wherever it is drafted. The sum of losses is divided by
        the number of tokens times the expected share of depths, so that it is a mean over what is learned.
        """
        count = len(lesson.tokens)
        rows = parallel_rows(lesson.inputs, lesson.keep, draw_depths(count, self.num_tokens), self.mask_token_id)
        mask = attention_mask_for(unwrapped(model), rows.inputs["attention_mask"])
        weights = None
        if self.by_confidence:
            weights = self._confidence(lesson, rows.source, rows.depth)
        target: Any = lesson.target
        if isinstance(target, Unprojected):
            target = target._replace(hidden=target.hidden[rows.source])
        elif target is not None:
            target = target[rows.source]
        items = (count or 1) if lesson.num_items is None else lesson.num_items
        return Lesson(
            rows.inputs | {"attention_mask": mask},
            rows.keep,
            target,
            lesson.tokens[rows.source],
            items * sum(retained(self.num_tokens)),
            weights,
            rows.depth,
        )

    def _confidence(self, lesson: Lesson, source: Tensor, depth: Tensor) -> Tensor:
        """[M]: the target's probability of the tokens before each one in its block, 1 at depth 1."""
        logprobs = lesson.inputs.get("completion_logprobs")
        if logprobs is None:
            logprobs = torch.zeros(lesson.tokens.shape, device=lesson.tokens.device)

            def look(rows: slice, logits: Tensor) -> None:
                logprobs[rows] = token_logprob(logits / self.temperature, lesson.tokens[rows]).to(logprobs)

            scan((lesson.target,), look)
        # In the widest float, as a difference of sums over the whole batch; a chance of 0 would make it NaN.
        before = logprobs.to(widest_float(logprobs.device)).clamp(min=-50).cumsum(0)
        before = torch.cat([before.new_zeros(1), before])
        return (before[source] - before[source - depth + 1]).exp()


def parallel_training(
    draft: PreTrainedModel, args: DraftDistillConfig, tokenizer: PreTrainedTokenizerBase
) -> ParallelTraining | None:
    """What `parallel_tokens` asks for; None for an ordinary draft."""
    if args.parallel_tokens > 1:
        return ParallelTraining(draft, args, tokenizer)
    known = parallel_draft(draft.config)
    if known is not None:
        logger.warning(
            "The draft was trained to predict %d tokens in one pass, which it forgets with `parallel_tokens=1`. Set "
            "`parallel_tokens` to keep it.",
            known.num_tokens,
        )
    return None
