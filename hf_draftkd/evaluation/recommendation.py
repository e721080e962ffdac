"""Is it worth it, and how? From block efficiency and measured times to a draft length, a way of decoding, a verdict."""

from collections.abc import Sequence
from dataclasses import replace

from hf_draftkd.acceptance import Estimate, Latency, best_draft_length, break_even_acceptance_rate, predicted_speedup
from hf_draftkd.evaluation.report import AssistedResult, GenerateOverhead, LatencyResult, Recommendation, SettingResult

ASSISTANT_MODEL, SPECULATIVE = "assistant_model=", "SpeculativeDecoding"
"""The two ways to decode with a draft in transformers: its own loop, and `custom_generate=` with this package's."""
PARALLEL = "SpeculativeDecoding in parallel"
"""The third, for a draft trained with `parallel_tokens`: one pass of the draft a round."""
WAYS = (ASSISTANT_MODEL, SPECULATIVE, PARALLEL)
# The field of `LatencyResult` that says what a way adds to the forward passes.
OVERHEADS = {ASSISTANT_MODEL: "generate_overhead", SPECULATIVE: "speculative_overhead", PARALLEL: "parallel_overhead"}


def way_overhead(measured: LatencyResult, way: str) -> GenerateOverhead | None:
    """What a way of decoding adds to the forward passes, where it was measured."""
    return getattr(measured, OVERHEADS[way])


def way_latency(measured: LatencyResult, way: str = ASSISTANT_MODEL) -> Latency:
    """Step times as one way of decoding has them: forward passes and what it adds to each of them."""
    overhead, passes = way_overhead(measured, way), forward_latency(measured, way)
    if overhead is None:
        return passes
    return Latency(
        target_step_seconds=passes.target_step_seconds + overhead.plain_step_seconds,
        draft_step_seconds=passes.draft_step_seconds + overhead.draft_step_seconds,
        verify_seconds={size: seconds + overhead.block_seconds for size, seconds in passes.verify_seconds.items()},
        draft_pass_seconds={
            length: seconds + length * overhead.draft_step_seconds
            for length, seconds in passes.draft_pass_seconds.items()
        },
    )


def forward_latency(measured: LatencyResult, way: str) -> Latency:
    """Step times of the forward passes alone: what no implementation can beat."""
    passes = measured.parallel_draft_seconds if way == PARALLEL else None
    step = measured.draft_step_seconds
    if way == SPECULATIVE and measured.listed_draft_seconds:
        step = measured.listed_draft_seconds[max(measured.listed_draft_seconds)]
    return Latency(measured.target_step_seconds, step, measured.verify_seconds, passes or {})


def expected_efficiency(setting: SettingResult, way: str = ASSISTANT_MODEL) -> dict[int, float]:
    """Block efficiency by draft length as a way of decoding will have it; empty where it is not known."""
    if way == ASSISTANT_MODEL:
        estimates = setting.transformers_block_efficiency or setting.block_efficiency
    elif way == SPECULATIVE:
        estimates = (setting.of_list or setting).block_efficiency
    else:
        estimates = setting.of_list.parallel_block_efficiency if setting.of_list else None
        if setting.parallel is not None:
            estimates = estimates or setting.parallel.block_efficiency
    return {length: estimate.value for length, estimate in (estimates or {}).items()}


def measured_run(setting: SettingResult, way: str) -> AssistedResult | None:
    """Real decoding in one of the ways, where it was timed."""
    if way == PARALLEL:
        return None if setting.parallel is None else setting.parallel.speculative
    return setting.speculative if way == SPECULATIVE else setting.assisted


def real_decoding(setting: SettingResult) -> list[tuple[str, AssistedResult]]:
    """What was measured of decoding with the draft under one setting, each with the way it was decoded in."""
    ways = {way: measured_run(setting, way) for way in WAYS}
    ways |= {f"{SPECULATIVE}, batches of {size}": run for size, run in (setting.speculative_batches or {}).items()}
    return [(way, run) for way, run in ways.items() if run]


def overall_draft_lengths(settings: Sequence[SettingResult], latency: LatencyResult) -> dict[str, int]:
    """The best draft length for each way of decoding: the one at which the setting that gains least gains most.

    Both ways of drafting one by one share a length: that of the way that gains more. `SpeculativeDecoding` is left out
    where its times are not known, since it refuses a few models that transformers' loop takes. Without block
    efficiencies there is no entry.
    """
    judged = [setting for setting in settings if setting.is_transformers_rule and expected_efficiency(setting)]
    one_by_one = [ASSISTANT_MODEL, *([SPECULATIVE] if latency.speculative_overhead is not None else [])]
    found: dict[str, int] = {}
    for ways in (one_by_one, [PARALLEL] if latency.parallel_draft_seconds is not None else []):
        if judged and ways:
            lengths = expected_efficiency(judged[0], ways[0])
            best = max(lengths, key=lambda length: max(_least_gain(judged, latency, length, way) for way in ways))
            found |= dict.fromkeys(ways, best)
    return found


def recommend(setting: SettingResult, latency: LatencyResult) -> Recommendation | None:
    """Judge one setting by its block efficiency and the step times of this machine.

    Where real decoding was timed, its speed-up decides; but a loss with another draft length than the recommended one
    leaves it to the prediction.
    """
    if not expected_efficiency(setting):
        return None
    lengths = overall_draft_lengths([setting], latency)
    if not setting.is_transformers_rule:
        # The ways are transformers': they do not apply to a rule of another engine.
        best = best_draft_length(expected_efficiency(setting), way_latency(latency))
        lengths = {ASSISTANT_MODEL: best.num_assistant_tokens}
    way = _better_way([setting], latency, lengths)
    length = lengths[way]
    times, efficiency = way_latency(latency, way), expected_efficiency(setting, way)
    predicted = predicted_speedup(efficiency[length], length, times)
    found = Recommendation(
        worth_it=_gains(setting, length, predicted, way),
        num_assistant_tokens=length,
        way=way if setting.is_transformers_rule else None,
        predicted_speedup=predicted,
        break_even_acceptance_rate=break_even_acceptance_rate(times, efficiency),
        reason="",
    )
    found.reason = _verdict(found, setting, efficiency[length], times)
    if run := measured_run(setting, way):
        found.reason += f" Measured there with {_tokens(run.num_assistant_tokens)}: {_all_measured(setting, way)}."
        if run.speedup.low is None:
            found.reason += " One prompt gives no interval: more prompts would decide."
        elif run.speedup.leaves_open(1):
            found.reason += " A gain and a loss both lie within this interval: more prompts would decide."
    return found


def _verdict(found: Recommendation, setting: SettingResult, efficiency: float, times: Latency) -> str:
    """A recommendation in words, without what was measured; `efficiency` is that of its draft length."""
    name, length, predicted = setting.words, found.num_assistant_tokens, found.predicted_speedup
    break_even, accepted = found.break_even_acceptance_rate, setting.acceptance_rate.value
    drafting = f"draft step takes {times.relative_cost:.0%} of a target step"
    if times.draft_pass_seconds:
        cost = times.draft_pass_seconds[length] / times.target_step_seconds
        drafting = f"draft pass takes {cost:.0%} of a target step"
    if found.worth_it and not is_faster(predicted):
        return (
            f"Worth it for {name}: real decoding gained, though {predicted:.2f} times the plain speed was predicted "
            f"for transformers on this machine with {_tokens(length)} a step; a {drafting}."
        )
    if found.worth_it:
        return (
            f"Worth it for {name}: {_tokens(length)} a step give{'s' if length == 1 else ''} {efficiency:.2f} tokens "
            f"per target call and {'is' if length == 1 else 'are'} predicted to decode {predicted:.2f} times as fast "
            f"in transformers on this machine; a {drafting}."
        )
    if is_faster(predicted):
        return (
            f"Not worth it for {name}: {predicted:.2f} times the plain speed was predicted for transformers on this "
            f"machine with {_tokens(length)} a step, and real decoding did not gain."
        )
    need = "no acceptance rate would make up for that"
    if break_even is not None:
        need = f"{break_even:.2f} would be needed to break even"
        if break_even <= accepted:
            need = f"{break_even:.2f} would do in long texts whose tokens all have the same chance"
    return (
        f"Not worth it for {name}: even the best draft length ({length}) is predicted to reach {predicted:.2f} times "
        f"the plain speed in transformers on this machine. A {drafting}; of single drafted tokens {accepted:.2f} are "
        f"accepted, and {need}."
    )


def recommend_overall(settings: Sequence[SettingResult], latency: LatencyResult) -> Recommendation | None:
    """One verdict, one draft length and one way of decoding over all settings; the setting that gains least decides.

    Every setting must have its own recommendation already.
    """
    lengths = overall_draft_lengths(settings, latency)
    if not lengths:
        return None
    judged = [
        (setting, setting.recommendation)
        for setting in settings
        if setting.recommendation is not None and setting.is_transformers_rule
    ]
    way = _better_way([setting for setting, _ in judged], latency, lengths)
    length = lengths[way]
    speedups = [_predicted(setting, latency, length, way) for setting, _ in judged]
    least = min(range(len(judged)), key=lambda place: speedups[place])
    weakest = judged[least][1]
    if len(judged) == 1:
        return replace(weakest, num_assistant_tokens=length, way=way, predicted_speedup=speedups[0])
    good: list[str] = []
    bad: list[str] = []
    undecided, parts = [], []
    for (setting, _), predicted in zip(judged, speedups, strict=True):
        name, found = setting.words, measured_run(setting, way)
        (good if _gains(setting, length, predicted, way) else bad).append(name)
        parts.append(f"{name} predicted {predicted:.2f} times the plain speed")
        if found is not None:
            other = "" if found.num_assistant_tokens == length else f" with {_tokens(found.num_assistant_tokens)}"
            parts[-1] += f", measured {_all_measured(setting, way)}{other}"
            undecided += [name] if found.speedup.leaves_open(1) else []
    verdict = f"Worth it for {' and '.join(good)}, not for {' and '.join(bad)}"
    if not (good and bad):
        verdict = "Worth it" if good else "Not worth it"
    reason = f"{verdict}. By {way} with {_tokens(length)} a step, in transformers on this machine: {'; '.join(parts)}."
    if undecided:
        reason += f" More prompts would be needed to be sure for {' and '.join(undecided)}."
    return Recommendation(
        worth_it=not bad,
        num_assistant_tokens=length,
        way=way,
        predicted_speedup=speedups[least],
        break_even_acceptance_rate=weakest.break_even_acceptance_rate,
        reason=reason,
    )


def _predicted(setting: SettingResult, latency: LatencyResult, length: int, way: str) -> float:
    return predicted_speedup(expected_efficiency(setting, way)[length], length, way_latency(latency, way))


def _least_gain(settings: Sequence[SettingResult], latency: LatencyResult, length: int, way: str) -> float:
    return min(_predicted(setting, latency, length, way) for setting in settings)


def _better_way(settings: Sequence[SettingResult], latency: LatencyResult, lengths: dict[str, int]) -> str:
    """The way of decoding that is best for the setting which gains least by it, each way at its own draft length.

    Measured speed-ups decide if every way was timed under every setting, predicted ones otherwise.
    """
    runs = {way: [run.speedup.value for each in settings if (run := measured_run(each, way))] for way in lengths}
    if all(len(speedups) == len(settings) for speedups in runs.values()):
        return max(lengths, key=lambda way: min(runs[way]))
    return max(lengths, key=lambda way: _least_gain(settings, latency, lengths[way], way))


def _gains(setting: SettingResult, length: int, predicted: float, way: str) -> bool:
    """Whether decoding with this draft is faster: as measured, or as predicted for a length that was not measured.

    A gain measured with another length is a gain; a loss with another length does not apply to this one.
    """
    found = measured_run(setting, way)
    if found is None:
        return is_faster(predicted)
    return is_faster(found.speedup.value) or (found.num_assistant_tokens != length and is_faster(predicted))


def is_faster(speedup: float) -> bool:
    """Whether a speed-up is a gain."""
    # To the two digits that are shown: 1.00 times the plain speed is worth nobody's while.
    return round(speedup, 2) > 1


def _all_measured(setting: SettingResult, first: str) -> str:
    """The recommended way first: "1.50 times (1.40 to 1.60) by SpeculativeDecoding, 1.28 times by assistant_model="."""
    ways = sorted(WAYS, key=lambda way: way != first)
    return ", ".join(f"{times_text(run.speedup)} by {way}" for way in ways if (run := measured_run(setting, way)))


def _tokens(count: int) -> str:
    return f"{count} draft token{'s' if count > 1 else ''}"


def times_text(speedup: Estimate) -> str:
    """A speed-up with its interval: "1.50 times (1.40 to 1.60)"."""
    return f"{speedup.value:.2f} times{speedup.interval(' ({:.2f} to {:.2f})')}"
