"""How likely one drafted token is to be accepted, per verification rule.

All functions take logits *after* the processing that decoding applies (temperature, top-k, top-p, penalties), the same
for both models. Processed logits may hold `-inf` (filtered tokens) and may be one-hot (greedy decoding: 0 for the
likeliest token, `-inf` for every other). Arithmetic is in float32, or in float64 where the logits are.

Rules (`VERIFICATION_RULES`):

- `rejection_sampling`: the draft samples x ~ q, the target keeps it with probability min(1, p(x)/q(x))
  (Leviathan et al., https://arxiv.org/abs/2211.17192; Chen et al., https://arxiv.org/abs/2302.01318). transformers.
- `top_10_draft`: the same, but the draft samples from its ten likeliest tokens alone. llama.cpp with
  `--spec-draft-sampling probabilistic` (`spec_retune` in its common/speculative.cpp).
- `greedy_draft`: the draft proposes argmax q, kept with probability p(argmax q). vLLM's default.
- `exact_match`: the target samples its own token and keeps the draft's likeliest token if they are equal; the
  probability is the same as for `greedy_draft`. llama.cpp.

At temperature 0 all agree: 1 where both models like the same token best, else 0.
"""

import torch

from hf_draftkd.acceptance.tensors import at_least_float32, check_same_shape
from hf_draftkd.utils.checks import one_of

VERIFICATION_RULES: tuple[str, ...] = ("rejection_sampling", "exact_match", "greedy_draft", "top_10_draft")
_SAMPLED = ("rejection_sampling", "top_10_draft")


def token_acceptance_rate(
    draft_logits: torch.Tensor, target_logits: torch.Tensor, verification: str = "rejection_sampling"
) -> torch.Tensor:
    """Return the chance that the draft's next token is accepted, in expectation over what the draft proposes.

    Where the draft samples this is α = Σ min(p, q), computed as 1 − ½ Σ |p − q|: then a draft that is its own target
    has exactly 1, while a sum of minima is 1 only up to rounding. With a greedy draft it is p(argmax q).

    Args:
        draft_logits: Processed draft logits `[..., V]`.
        target_logits: Processed target logits `[..., V]`, over the same vocabulary.
        verification: One of `VERIFICATION_RULES`.

    Returns:
        Acceptance rate in [0, 1], shape `[...]`; differentiable where the draft samples. A position whose logits
        are NaN, or all `-inf`, gives NaN.

    Raises:
        ValueError: If the shapes differ or the rule does not exist.
    """
    one_of("verification rule", verification, VERIFICATION_RULES)
    check_same_shape(draft_logits, target_logits)
    target_probs = at_least_float32(target_logits).softmax(dim=-1)
    if verification in _SAMPLED:
        draft_probs = at_least_float32(_sampled_from(draft_logits, verification)).softmax(dim=-1)
        # Two distributions without a common token can add up to 2 + 1e-7.
        return (1 - 0.5 * (target_probs - draft_probs).abs().sum(dim=-1)).clamp(min=0.0)
    proposed = draft_logits.argmax(dim=-1, keepdim=True)
    return target_probs.gather(-1, proposed).squeeze(-1)


def accepted_given_output(
    draft_logits: torch.Tensor,
    target_logits: torch.Tensor,
    tokens: torch.Tensor,
    verification: str = "rejection_sampling",
) -> torch.Tensor:
    """Return the probability a_t that output token x_t had been an accepted draft token, had it been drafted.

    Speculative decoding leaves the target's output distribution unchanged. So given a text that the target wrote under
    the setting of these logits, x_t was an accepted token of the draft with probability min(1, q(x_t)/p(x_t)) where
    the draft samples, and with probability 1{x_t = argmax q} for a draft that proposes its likeliest token. Text
    written under any other setting makes a_t meaningless.

    Args:
        draft_logits: Processed draft logits `[..., V]` for the positions of `tokens`.
        target_logits: Processed target logits `[..., V]`.
        tokens: The text's token at each position, `[...]`, integers in [0, V).
        verification: One of `VERIFICATION_RULES`.

    Returns:
        a_t in [0, 1], shape `[...]`. It is 0 where q(x_t) = 0, also if p(x_t) = 0 as well; it is 1 where only p(x_t)
        is 0 (a token at the edge of the target's top-k or top-p, moved across by rounding).

    Raises:
        ValueError: If shapes differ, a token is outside the vocabulary or the rule does not exist.
    """
    one_of("verification rule", verification, VERIFICATION_RULES)
    check_same_shape(draft_logits, target_logits)
    if tokens.shape != draft_logits.shape[:-1]:
        raise ValueError(
            f"tokens must hold one token per position {tuple(draft_logits.shape[:-1])}, got {tuple(tokens.shape)}."
        )
    vocab_size = draft_logits.shape[-1]
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise ValueError(
            f"tokens must lie in [0, {vocab_size}), got values from {int(tokens.min())} to {int(tokens.max())}. Select "
            "the completion positions first (a label of -100 is not a token)."
        )
    if verification not in _SAMPLED:
        return (draft_logits.argmax(dim=-1) == tokens).to(at_least_float32(draft_logits).dtype)
    draft_logprob = token_logprob(_sampled_from(draft_logits, verification), tokens)
    ratio = (draft_logprob - token_logprob(target_logits, tokens)).clamp(max=0.0).exp()
    return torch.where(draft_logprob == -torch.inf, 0.0, ratio)


def _sampled_from(draft_logits: torch.Tensor, verification: str) -> torch.Tensor:
    """The logits of what the draft samples from."""
    if verification == "rejection_sampling" or draft_logits.shape[-1] <= 10:
        return draft_logits
    least = draft_logits.topk(10, dim=-1).values[..., -1:]
    return draft_logits.masked_fill(draft_logits < least, -torch.inf)


def token_logprob(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return log p `[...]` of the `tokens` `[...]` under `logits` `[..., V]`, float32 or better.

    Without a log-softmax of the whole vocabulary.
    """
    logits = at_least_float32(logits)
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)
