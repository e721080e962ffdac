"""Target-corrected drafting, SKD (arXiv 2410.11325): the draft proposes tokens, the target replaces the worst."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from hf_draftkd.decoding.processors import logits_processors
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.models.forward import CACHE, unwrapped


def corrected_distribution(draft: Tensor, target: Tensor, allowed: Tensor) -> Tensor:
    """How a token [..., V] is distributed that the draft proposes and the target replaces where it is not `allowed`.

    With q the draft and p the target it is q(v)·[v allowed] + (1 − Σ_allowed q)·p(v), all [..., V].
    """
    kept = draft * allowed
    return kept + (1 - kept.sum(-1, keepdim=True)).clamp(min=0) * target


class CorrectedByTarget(LogitsProcessor):
    """Turns the draft's logits, inside its own `generate`, into those of corrected drafting.

    The paper has the target check several proposals in one pass. Which tokens come out, and how likely each is, is the
    same where it checks each as it comes; this way a whole batch is written at once, and the two key-value caches never
    have to be cut back. For one batch; make another for the next.

    Args:
        target: The target, in evaluation mode.
        setting: How both sample. `generate` itself then has to sample at temperature 1 without filters, or greedily.
        top_k: The target allows its k likeliest tokens, before temperature and filters.
        vocab_size: Tokens that draft and target share.
        prompt_mask: [B, L] 1 where the left-padded prompts have a token.
    """

    def __init__(self, target: Any, setting: DecodingSetting, top_k: int, vocab_size: int, prompt_mask: Tensor) -> None:
        self._target = target
        self._setting = setting
        self._processors = logits_processors(setting)
        self._top_k = min(top_k, vocab_size)
        self._vocab_size = vocab_size
        self._mask = prompt_mask
        self._parameters = inspect.signature(unwrapped(target).forward).parameters
        self._cache: Any = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] logits of the next token, from the texts so far [B, L] and the draft's own [B, V]."""
        # In float32, as `generate` has the draft's, so that both soften alike.
        p_logits = self._next_logits(input_ids)[:, : self._vocab_size].float()
        q_logits = scores[:, : self._vocab_size]
        # What the draft may not write (rows that stand for no token) is not the target's to write either.
        p_logits = p_logits.masked_fill(q_logits == -torch.inf, -torch.inf)
        likeliest = p_logits.topk(self._top_k, -1).indices
        allowed = torch.zeros_like(p_logits, dtype=torch.bool).scatter_(-1, likeliest, True)
        q, p = (self._probabilities(logits, input_ids) for logits in (q_logits, p_logits))
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, : self._vocab_size] = corrected_distribution(q, p, allowed).log()
        return chosen

    def _probabilities(self, logits: Tensor, input_ids: Tensor) -> Tensor:
        if self._setting.is_greedy:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        return torch.softmax(self._processors(input_ids, logits), -1)

    def _next_logits(self, input_ids: Tensor) -> Tensor:
        new = input_ids if self._cache is None else input_ids[:, -1:]
        self._mask = torch.nn.functional.pad(self._mask, (0, input_ids.shape[1] - self._mask.shape[1]), value=1)
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        # Only the last token's logits are read: of all tokens of a prompt they would take [B, L, V].
        wanted = {"position_ids": positions, "logits_to_keep": 1}
        output = self._target(
            input_ids=new,
            attention_mask=self._mask,
            **{CACHE: self._cache},
            use_cache=True,
            **{name: value for name, value in wanted.items() if name in self._parameters},
        )
        self._cache = getattr(output, CACHE)
        return output.logits[:, -1]
