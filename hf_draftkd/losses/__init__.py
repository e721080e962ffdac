"""How far the draft's next-token distribution is from the target's: logits in, per-position values out."""

from hf_draftkd.losses.divergences import (
    DIVERGENCES,
    check_divergence,
    cross_entropy,
    forward_kl,
    generalized_jsd,
    get_divergence,
    lk_hybrid,
    negative_log_acceptance,
    reverse_kl,
    total_variation,
    tvd_plus_plus,
)

__all__ = [
    "DIVERGENCES",
    "check_divergence",
    "cross_entropy",
    "forward_kl",
    "generalized_jsd",
    "get_divergence",
    "lk_hybrid",
    "negative_log_acceptance",
    "reverse_kl",
    "total_variation",
    "tvd_plus_plus",
]
