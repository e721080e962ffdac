"""From sums per text to estimates with intervals: counts added up, divided once, resampled over prompts."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.nn.utils.rnn import pad_sequence

from hf_draftkd.acceptance import (
    DRAFT_LENGTHS,
    Estimate,
    acceptance_by_position,
    bootstrap_paired_ratio_difference,
    bootstrap_paired_ratio_quotient,
    bootstrap_ratio,
    mbsu,
    predicted_speedup,
)
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.evaluation.recommendation import (
    ASSISTANT_MODEL,
    WAYS,
    expected_efficiency,
    forward_latency,
    measured_run,
    way_latency,
)
from hf_draftkd.evaluation.report import AssistedResult, LatencyResult, PairedDifference, ParallelResult, SettingResult
from hf_draftkd.evaluation.scoring import AS_TRANSFORMERS, TextSums, in_one_pass
from hf_draftkd.evaluation.timing import DecodingRun

# In so few texts a hopeless draft may have nothing accepted, and an interval of equal counts has no width. Where five
# acceptances are expected, none comes up in less than one run of a hundred.
_MAY_BE_MISSED = 5


def setting_result(
    setting: DecodingSetting,
    verification: str,
    scored: dict[str, TextSums],
    prompts: Sequence[int],
    *,
    num_assistant_tokens: int,
    parameter_ratio: float,
    has_blocks: bool = True,
) -> SettingResult:
    """The results of one draft under one setting and rule, from its sums by name (an entry of `PassResult`).

    Texts of one prompt are resampled together: `prompts` says which each answers. `num_assistant_tokens` is the draft
    length of acceptance by position, `parameter_ratio` draft ÷ target parameters. Without `has_blocks` (the target did
    not write the texts under this very setting) only acceptance is given.
    """
    sums = scored[verification]
    result = SettingResult(
        decoding=setting,
        verification=verification,
        num_texts=len(sums.num_tokens),
        num_tokens=int(sums.num_tokens.sum()),
        acceptance_rate=bootstrap_ratio(*by_prompt(prompts, sums.acceptance, sums.num_tokens)),
    )
    if not has_blocks:
        return result
    result.block_efficiency = _block_efficiency(sums, prompts)
    accepted = pad_sequence(sums.accepted, batch_first=True)
    mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in sums.accepted], batch_first=True)
    kept = acceptance_by_position(accepted, num_assistant_tokens, mask).sum(0)
    calls = sums.target_calls[:, DRAFT_LENGTHS.index(num_assistant_tokens)].sum()
    result.acceptance_by_position = (kept / calls).tolist()
    result.mbsu = {
        length: mbsu(estimate.value, length, parameter_ratio=parameter_ratio)
        for length, estimate in result.block_efficiency.items()
    }
    if verification == "rejection_sampling" and AS_TRANSFORMERS in scored:
        result.transformers_block_efficiency = _block_efficiency(scored[AS_TRANSFORMERS], prompts)
    if in_one_pass(verification) in scored:
        result.parallel = parallel_result(scored[in_one_pass(verification)], prompts)
    return result


def paired_difference(
    setting: DecodingSetting,
    verification: str,
    draft: dict[str, TextSums],
    baseline: dict[str, TextSums],
    prompts: Sequence[int],
    *,
    has_blocks: bool,
) -> PairedDifference:
    """Draft minus baseline on the same texts; arguments as in `setting_result`."""
    ours, theirs = draft[verification], baseline[verification]
    columns = (ours.acceptance, ours.num_tokens, theirs.acceptance, theirs.num_tokens)
    difference = PairedDifference(
        decoding=setting,
        verification=verification,
        acceptance_rate=bootstrap_paired_ratio_difference(*by_prompt(prompts, *columns)),
    )
    if has_blocks:
        difference.block_efficiency = _block_efficiency_difference(ours, theirs, prompts)
        in_parallel = in_one_pass(verification)
        if in_parallel in draft and in_parallel in baseline:
            difference.parallel_block_efficiency = _block_efficiency_difference(
                draft[in_parallel], baseline[in_parallel], prompts
            )
    return difference


def _block_efficiency_difference(ours: TextSums, theirs: TextSums, prompts: Sequence[int]) -> dict[int, Estimate]:
    return {
        length: bootstrap_paired_ratio_difference(
            *by_prompt(prompts, ours.num_tokens, our_calls, theirs.num_tokens, their_calls)
        )
        for length, our_calls, their_calls in zip(
            DRAFT_LENGTHS, ours.target_calls.T, theirs.target_calls.T, strict=False
        )
    }


def parallel_result(sums: TextSums, prompts: Sequence[int]) -> ParallelResult:
    """The results of drafting in one pass, by sums at each of K depths."""
    rates, num_tokens = [], sums.acceptance.shape[1]
    for depth in range(num_tokens):
        # The first tokens of a text cannot stand so deep in a block.
        can_be = (sums.num_tokens - depth).clamp(min=0)
        if can_be.any():
            rates.append(bootstrap_ratio(*by_prompt(prompts, sums.acceptance[:, depth], can_be)))
    return ParallelResult(
        num_tokens=num_tokens, acceptance_by_depth=rates, block_efficiency=_block_efficiency(sums, prompts)
    )


def _block_efficiency(sums: TextSums, prompts: Sequence[int]) -> dict[int, Estimate]:
    return {
        length: bootstrap_ratio(*by_prompt(prompts, sums.num_tokens, calls))
        for length, calls in zip(DRAFT_LENGTHS, sums.target_calls.T, strict=False)
    }


def assisted_result(run: DecodingRun, plain: DecodingRun, num_assistant_tokens: int) -> AssistedResult:
    """Counts and speed of real decoding in one way, beside plain decoding of the same prompts."""
    columns = (run.tokens, run.seconds, plain.tokens, plain.seconds)
    return AssistedResult(
        num_assistant_tokens=num_assistant_tokens,
        num_prompts=run.num_prompts,
        **run.counts.to_dict(),
        tokens_per_second=sum(run.tokens) / sum(run.seconds),
        plain_tokens_per_second=sum(plain.tokens) / sum(plain.seconds),
        speedup=bootstrap_paired_ratio_quotient(*columns),
        num_identical=run.num_identical,
        differences=run.differences or None,
    )


def compare_with_prediction(setting: SettingResult, latency: LatencyResult) -> None:
    """Put what was predicted, and what forward passes alone would allow, beside the measured speed-ups.

    The limit of `assistant_model=` is that of the draft, each of whose distributions is processed once.
    """
    if not expected_efficiency(setting):
        return
    for way in WAYS:
        if found := measured_run(setting, way):
            length = found.num_assistant_tokens
            efficiency = expected_efficiency(setting, way)[length]
            most = efficiency
            if way == ASSISTANT_MODEL and setting.block_efficiency:
                most = setting.block_efficiency[length].value
            found.predicted_speedup = predicted_speedup(efficiency, length, way_latency(latency, way))
            found.share_of_limit = found.speedup.value / predicted_speedup(most, length, forward_latency(latency, way))


def by_prompt(prompts: Sequence[int], *columns: torch.Tensor) -> list[torch.Tensor]:
    """Each column added up over the texts of a prompt: prompts, not texts, are what is independent."""
    _, groups = torch.tensor(prompts).unique(return_inverse=True)
    size = int(groups.max()) + 1
    return [torch.zeros(size, dtype=torch.float64).index_add_(0, groups, column.double()) for column in columns]


def sampled_agree(computed: Estimate, counted: Estimate, num_tokens: float, num_calls: int) -> bool:
    """Whether intervals of two samples overlap, that of the `num_tokens` counted in `num_calls` with what it may have
    missed.
    """
    most = num_tokens / max(num_calls - _MAY_BE_MISSED, 1)
    high = None if counted.high is None else max(counted.high, most)
    return not computed.lies_apart(replace(counted, high=high))
