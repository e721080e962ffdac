"""What the draft proposes: one token at a time, or all of them in one pass."""

import copy
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_draftkd.acceptance.tensors import draw
from hf_draftkd.decoding.caches import CachedModel
from hf_draftkd.decoding.processors import Processing
from hf_draftkd.decoding.texts import Piece, Texts


class Proposal(NamedTuple):
    """Drafted tokens, one row for each text that is still being written."""

    tokens: Tensor
    """[A, γ] ids; they also stand behind the texts' ends."""
    q: Tensor | None
    """[A, γ, V]: the distributions they were drawn from. None where only the tokens are needed."""

    @classmethod
    def joined(cls, steps: list["Proposal"]) -> "Proposal":
        """Proposals of one token each, one behind the other."""
        tokens, distributions = zip(*steps, strict=True)
        return cls(torch.cat(tokens, 1), None if distributions[0] is None else torch.cat(distributions, 1))


class Proposable:
    """The ids that a draft may propose, and how its logits become logits over all ids.

    Args:
        draft: The draft.
        draft_vocabulary: Ids [N] that its sliced head gives; None: it gives all.
        suppressed: Ids that are not tokens, such as padded rows of the draft.
    """

    def __init__(self, draft: PreTrainedModel, draft_vocabulary: list[int] | None, suppressed: list[int]) -> None:
        self.vocab_size = draft.config.get_text_config().vocab_size
        self.ids = None if draft_vocabulary is None else torch.tensor(draft_vocabulary, device=draft.device)
        self.suppressed = torch.tensor(suppressed, dtype=torch.long, device=draft.device) if suppressed else None

    @property
    def is_restricted(self) -> bool:
        """Whether there are ids that are not proposed."""
        return self.ids is not None or self.suppressed is not None

    def likeliest(self, logits: Tensor) -> Tensor:
        """[A] ids with the largest of the head's logits [A, N]."""
        if self.suppressed is not None and self.ids is None:
            logits = logits.index_fill(-1, self.suppressed, -torch.inf)
        tokens = logits.argmax(-1)
        return tokens if self.ids is None else self.ids[tokens]

    def full(self, logits: Tensor) -> Tensor:
        """Logits [A, N] of the head over all ids, [A, V]: −inf for what is not proposed."""
        if self.ids is not None:
            wide = logits.new_full((len(logits), self.vocab_size), -torch.inf)
            return wide.index_copy_(1, self.ids, logits)
        if self.suppressed is not None:
            return logits.index_fill(-1, self.suppressed, -torch.inf)
        return logits


class OneByOne:
    """Proposes γ tokens with γ steps of the draft.

    Args:
        draft: The draft with its cache.
        proposable: The ids it may propose.
        processing: Turns logits into scores.
        samples: Tokens are drawn from q; otherwise the likeliest is taken.
        needs_q: Whether verification looks at q.
    """

    def __init__(
        self,
        draft: CachedModel,
        proposable: Proposable,
        processing: Processing,
        *,
        samples: bool,
        needs_q: bool,
    ) -> None:
        self.draft, self._proposable, self._processing = draft, proposable, processing
        self._samples, self._needs_q = samples, needs_q

    def __call__(self, texts: Texts, num_tokens: int) -> Proposal:
        """Propose `num_tokens` for every unfinished text, and put them behind the texts' ends."""
        if num_tokens == 0:
            return Proposal(texts.ids.new_empty(len(texts.rows), 0), None)
        span = texts.piece(self.draft.read, num_tokens - 1)
        start = span.ids.shape[1] - (num_tokens - 1)
        piece = span.part(slice(0, start))
        steps = []
        for k in range(num_tokens):
            step = self._choose(self.draft(piece, num_logits=1), k)
            steps.append(step)
            if self._processing.looks_back:  # else all are written at once: in a batch each write is a transfer
                texts.write(step.tokens, offset=k)
            piece = Piece(step.tokens, span.positions[:, start + k : start + k + 1], None)
        self.draft.read = [texts.lengths[row] + num_tokens - 1 for row in texts.rows]
        proposal = Proposal.joined(steps)
        texts.write(proposal.tokens, offset=0)
        return proposal

    def _choose(self, logits: Tensor, offset: int) -> Proposal:
        """The token `offset` places behind the texts' ends, from the head's logits [A, 1, N]."""
        if self._processing.is_identity and not self._needs_q:
            return Proposal(self._proposable.likeliest(logits[:, 0])[:, None], None)
        scores = self._processing(self._proposable.full(logits[:, 0])[:, None], offset)
        if self._proposable.is_restricted and not self._processing.sees_sets:
            # A constraint may allow none of the ids that may be proposed: then propose any that it allows.
            nothing = scores.amax(-1, keepdim=True) == -torch.inf
            if nothing.any():
                scores = torch.where(nothing, self._processing(torch.zeros_like(scores), offset), scores)
        if not self._needs_q:
            return Proposal(scores.argmax(-1), None)
        q = scores.softmax(-1)
        return Proposal(draw(q[:, 0]) if self._samples else scores.argmax(-1), q)


class OnePass(OneByOne):
    """Proposes γ tokens with one pass of a parallel draft, over the text and γ − 1 mask tokens behind it.

    Args:
        draft, proposable, processing, options: As in `OneByOne`.
        mask_token_id: What the draft reads in the place of a token that it has not chosen.
    """

    def __init__(
        self, draft: CachedModel, proposable: Proposable, processing: Processing, mask_token_id: int, **options: bool
    ) -> None:
        super().__init__(draft, proposable, processing, **options)
        self._mask_token_id = mask_token_id

    def __call__(self, texts: Texts, num_tokens: int) -> Proposal:
        """Propose `num_tokens` for every unfinished text, and put them behind the texts' ends."""
        if num_tokens == 0:
            return super().__call__(texts, 0)
        ends = [texts.lengths[row] for row in texts.rows]
        texts.write(texts.ids.new_full((len(ends), num_tokens - 1), self._mask_token_id), offset=0)
        logits = self.draft(texts.piece(self.draft.read, num_tokens - 1), num_logits=num_tokens)
        self.draft.read = [end + num_tokens - 1 for end in ends]
        # No later token may see the mask tokens.
        self.draft.keep(ends)
        steps = []
        for k in range(num_tokens):
            steps.append(self._choose(logits[:, k : k + 1], k))
            # The next one's processors look back at this one.
            texts.write(steps[k].tokens, offset=k)
        return Proposal.joined(steps)


def checked_vocabulary(ids: list[int], vocab_size: int, suppressed: Iterable[int] = ()) -> list[int]:
    """The ids in their order, each once, without those that are not tokens.

    Raises:
        ValueError: One of them is not an id of the vocabulary, or none is left.
    """
    wrong = [each for each in ids if type(each) is not int or not 0 <= each < vocab_size]
    never = set(suppressed)
    kept = [each for each in dict.fromkeys(ids) if each not in never]
    if wrong or not kept:
        raise ValueError(
            f"`draft_vocabulary` must be ids of the draft's vocabulary (0 to {vocab_size - 1}), got "
            f"{wrong[:3] or 'none'}."
        )
    return kept


def with_sliced_head(draft: PreTrainedModel, ids: list[int]) -> PreTrainedModel:
    """A twin of the draft whose head gives the logits of `ids` only, in their order; everything else is shared.

    Raises:
        ValueError: The head is not a plain linear layer directly below the model.
    """
    head = draft.get_output_embeddings()
    name = next((name for name, module in draft.named_children() if module is head), None)
    if name is None or type(head) is not nn.Linear:
        raise ValueError(
            f"`draft_vocabulary` needs a draft whose head is a linear layer of its own, but {type(draft).__name__} has "
            f"{type(head).__module__}.{type(head).__name__}. Leave `draft_vocabulary` out."
        )
    rows = torch.tensor(ids, device=head.weight.device)
    sliced = nn.Linear(head.in_features, len(ids), bias=head.bias is not None, device="meta")
    sliced.weight = nn.Parameter(head.weight.detach()[rows], requires_grad=False)
    if head.bias is not None:
        sliced.bias = nn.Parameter(head.bias.detach()[rows], requires_grad=False)
    twin = copy.copy(draft)
    twin.__dict__.pop("forward", None)  # accelerate's, of a model that is being trained: it runs the draft itself
    twin._modules = {**draft._modules, name: sliced}
    return twin
