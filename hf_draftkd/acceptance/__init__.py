"""The arithmetic of speculative decoding: tensors in, numbers out."""

from hf_draftkd.acceptance.blocks import (
    DRAFT_LENGTHS,
    acceptance_by_position,
    block_efficiency,
    block_efficiency_by_length,
    expected_target_calls,
)
from hf_draftkd.acceptance.counts import (
    AcceptanceCounts,
    Estimate,
    bootstrap_paired_ratio_difference,
    bootstrap_paired_ratio_quotient,
    bootstrap_ratio,
)
from hf_draftkd.acceptance.lenience import LENIENCE_FORMS
from hf_draftkd.acceptance.speedup import (
    DraftLength,
    Latency,
    best_draft_length,
    break_even_acceptance_rate,
    expected_block_efficiency,
    mbsu,
    predicted_speedup,
)
from hf_draftkd.acceptance.token_rates import (
    VERIFICATION_RULES,
    accepted_given_output,
    token_acceptance_rate,
    token_logprob,
)
