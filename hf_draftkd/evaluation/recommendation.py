"""Is it worth it? From block efficiency and measured times to a draft length and a sentence a person understands."""

from collections.abc import Sequence
from dataclasses import replace

from hf_draftkd.acceptance import (
    Estimate,
    Latency,
    best_draft_length,
    break_even_acceptance_rate,
    predicted_speedup,
)
from hf_draftkd.evaluation.report import LatencyResult, Recommendation, SettingResult


def generate_latency(measured: LatencyResult) -> Latency:
    """Step times as transformers' `generate` has them: forward passes and what it adds to each of them."""
    overhead = measured.generate_overhead
    if overhead is None:
        return forward_latency(measured)
    return Latency(
        target_step_seconds=measured.target_step_seconds + overhead.plain_step_seconds,
        draft_step_seconds=measured.draft_step_seconds + overhead.draft_step_seconds,
        verify_seconds={size: seconds + overhead.block_seconds for size, seconds in measured.verify_seconds.items()},
    )


def forward_latency(measured: LatencyResult) -> Latency:
    """Step times of the forward passes alone: what no implementation can beat."""
    return Latency(measured.target_step_seconds, measured.draft_step_seconds, measured.verify_seconds)


def expected_efficiency(setting: SettingResult) -> dict[int, float]:
    """Block efficiency by draft length as transformers' `generate` will have it; empty where it is not known."""
    estimates = setting.transformers_block_efficiency or setting.block_efficiency or {}
    return {length: estimate.value for length, estimate in estimates.items()}


def overall_draft_length(settings: Sequence[SettingResult], latency: LatencyResult) -> int | None:
    """The one draft length under which the setting that gains least gains most; None without block efficiencies."""
    curves = [expected_efficiency(setting) for setting in settings if setting.is_transformers_rule]
    curves = [curve for curve in curves if curve]
    if not curves:
        return None
    times = generate_latency(latency)
    return max(curves[0], key=lambda length: min(predicted_speedup(curve[length], length, times) for curve in curves))


def recommend(setting: SettingResult, latency: LatencyResult) -> Recommendation | None:
    """Judge one setting.

    Where real decoding was timed, its speed-up decides; but a loss with another draft length than the recommended one
    leaves it to the prediction.

    Args:
        setting: With block efficiency, and `assisted` where it was measured.
        latency: Measured on this machine.
    """
    efficiency = expected_efficiency(setting)
    if not efficiency:
        return None
    name = setting.words
    times = generate_latency(latency)
    best = best_draft_length(efficiency, times)
    break_even = break_even_acceptance_rate(times, efficiency)
    length = best.num_assistant_tokens
    worth_it = _gains(setting, length, best.predicted_speedup)
    cost = times.relative_cost
    if worth_it:
        reason = (
            f"Worth it for {name}: {_tokens(length)} a step give{'s' if length == 1 else ''} {efficiency[length]:.2f} "
            f"tokens per target call and {'is' if length == 1 else 'are'} predicted to decode "
            f"{best.predicted_speedup:.2f} times as fast here; a draft step takes {cost:.0%} of a target step."
        )
    elif _is_faster(best.predicted_speedup):
        reason = (
            f"Not worth it for {name}: {best.predicted_speedup:.2f} times the plain speed was predicted here for "
            f"{_tokens(length)} a step, and real decoding did not gain."
        )
    else:
        need = (
            "no acceptance rate would make up for that"
            if break_even is None
            else f"{break_even:.2f} would be needed to break even"
        )
        reason = (
            f"Not worth it for {name}: even the best draft length ({length}) is predicted to reach "
            f"{best.predicted_speedup:.2f} times the plain speed here. A draft step takes {cost:.0%} of a target step; "
            f"of single drafted tokens {setting.acceptance_rate.value:.2f} are accepted, and {need}."
        )
    measured = setting.assisted.speedup if setting.assisted is not None else None
    if measured is not None and setting.assisted is not None:
        reason += f" Measured with {_tokens(setting.assisted.num_assistant_tokens)}: {_times(measured)}."
        if _is_open(measured):
            why = (
                "One prompt gives no interval"
                if measured.low is None
                else "A gain and a loss both lie within this interval"
            )
            reason += f" {why}: more prompts would decide."
    return Recommendation(
        worth_it=worth_it,
        num_assistant_tokens=length,
        predicted_speedup=best.predicted_speedup,
        break_even_acceptance_rate=break_even,
        reason=reason,
    )


def recommend_overall(settings: Sequence[SettingResult], latency: LatencyResult) -> Recommendation | None:
    """One verdict and one draft length over all settings: the setting that gains least decides.

    Args:
        settings: With their own recommendations.
        latency: Measured on this machine.
    """
    length = overall_draft_length(settings, latency)
    if length is None:
        return None
    judged = [
        (setting.words, setting, setting.recommendation)
        for setting in settings
        if setting.recommendation is not None and setting.is_transformers_rule
    ]
    times = generate_latency(latency)
    speedups = {
        name: predicted_speedup(expected_efficiency(setting)[length], length, times) for name, setting, _ in judged
    }
    good = [name for name, setting, _ in judged if _gains(setting, length, speedups[name])]
    bad = [name for name in speedups if name not in good]
    weakest = min(judged, key=lambda item: speedups[item[0]])
    if len(judged) == 1:
        return replace(weakest[2], num_assistant_tokens=length, predicted_speedup=speedups[weakest[0]])
    if not bad:
        verdict = "Worth it"
    elif not good:
        verdict = "Not worth it"
    else:
        verdict = f"Worth it for {' and '.join(good)}, not for {' and '.join(bad)}"
    parts = [f"{name} {_speedup_words(setting, speedups[name], length)}" for name, setting, _ in judged]
    reason = f"{verdict}. With {_tokens(length)} a step: {'; '.join(parts)}."
    undecided = [
        name
        for name, setting, _ in judged
        if setting.assisted is not None and setting.assisted.speedup is not None and _is_open(setting.assisted.speedup)
    ]
    if undecided:
        reason += f" More prompts would be needed to be sure for {' and '.join(undecided)}."
    return Recommendation(
        worth_it=not bad,
        num_assistant_tokens=length,
        predicted_speedup=speedups[weakest[0]],
        break_even_acceptance_rate=weakest[2].break_even_acceptance_rate,
        reason=reason,
    )


def _gains(setting: SettingResult, length: int, predicted: float) -> bool:
    """Whether decoding with this draft is faster: as measured, or as predicted for a length that was not measured.

    A gain measured with another length is a gain; a loss with another length does not apply to this one.
    """
    found = setting.assisted
    if found is None or found.speedup is None:
        return _is_faster(predicted)
    return _is_faster(found.speedup.value) or (found.num_assistant_tokens != length and _is_faster(predicted))


def _is_faster(speedup: float) -> bool:
    # To the two digits that are shown: 1.00 times the plain speed is worth nobody's while.
    return round(speedup, 2) > 1


def _is_open(measured: Estimate) -> bool:
    """Whether a measured speed-up leaves both a gain and a loss possible; that of one prompt has no interval."""
    return measured.low is None or measured.high is None or measured.low <= 1 <= measured.high


def _speedup_words(setting: SettingResult, predicted: float, length: int) -> str:
    words = f"predicted {predicted:.2f} times the plain speed"
    if setting.assisted is not None and setting.assisted.speedup is not None:
        words += f", measured {_times(setting.assisted.speedup)}"
        if setting.assisted.num_assistant_tokens != length:
            words += f" with {_tokens(setting.assisted.num_assistant_tokens)}"
    return words


def _tokens(count: int) -> str:
    return f"{count} draft token{'s' if count > 1 else ''}"


def _times(speedup: Estimate) -> str:
    if speedup.low is None or speedup.high is None:
        return f"{speedup.value:.2f} times"
    return f"{speedup.value:.2f} times ({speedup.low:.2f} to {speedup.high:.2f})"
