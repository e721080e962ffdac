"""How far the draft's next-token distribution is from the target's: logits in, per-position values out."""

from hf_draftkd.losses.chunked import LinearHead, Unprojected
from hf_draftkd.losses.divergences import (
    DIVERGENCES,
    check_divergence,
    cross_entropy,
    forward_kl,
    generalized_jsd,
    get_divergence,
    lk_hybrid,
    negative_log_acceptance,
    reads_target,
    reverse_kl,
    total_variation,
    tvd_plus_plus,
)
from hf_draftkd.losses.objective import DistillationLoss, distillation_loss
from hf_draftkd.losses.sparse import SampledTarget, SparseTarget, acceptance_upper_bound, sample_target, top_k_target
