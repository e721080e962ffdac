"""From a report to the tables of a card. Nothing is computed here, and a column without any value is left out."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from hf_draftkd.acceptance import Estimate
from hf_draftkd.evaluation.recommendation import real_decoding
from hf_draftkd.evaluation.report import HardwareInfo, PairedDifference, SettingResult, SpeculationReport
from hf_draftkd.hub.markdown import Markdown, code, estimate_text, records, table

Entry = TypeVar("Entry", SettingResult, PairedDifference)


def recommended_length(report: SpeculationReport | None) -> int | None:
    """The draft length that a report recommends, None where it recommends none."""
    return report.recommendation.num_assistant_tokens if report and report.recommendation else None


def shown_length(report: SpeculationReport) -> int:
    """The draft length of the tables: the recommended one, else the one asked about."""
    return recommended_length(report) or report.num_assistant_tokens


def at_length(estimates: Mapping[int, Estimate] | None, length: int) -> Estimate | None:
    """The estimate for one draft length, None where there is none."""
    return (estimates or {}).get(length)


def by_domain(report: SpeculationReport) -> list[tuple[str | None, Sequence[SettingResult]]]:
    """(domain, settings) pairs: the whole first, then the report's groups.

    A group that holds every text is the whole again: it gives the whole its name, where that has none, and is not
    repeated.
    """
    whole, name, groups = report.settings, report.prompts.domain, report.groups or {}
    if len(groups) == 1:
        ((only, settings),) = groups.items()
        if [entry.num_texts for entry in settings] == [entry.num_texts for entry in whole]:
            return [(name or only, whole)]
    return [(name, whole), *groups.items()]


def acceptance_table(
    report: SpeculationReport, settings: Sequence[SettingResult], *, is_whole: bool
) -> Markdown | None:
    """Acceptance rate and block efficiency per setting; for the whole also the stock draft and the difference."""
    length = shown_length(report)
    stock = report.baseline.settings if report.baseline and is_whole else []
    differences = report.paired_difference or [] if is_whole else []
    rows = []
    for setting in settings:
        old, gain = _same(stock, setting), _same(differences, setting)
        efficiency = at_length(setting.block_efficiency, length)
        in_transformers = at_length(setting.transformers_block_efficiency, length)
        gained = at_length(gain.block_efficiency, length) if gain else None
        rows.append(
            {
                "Decoding": str(setting.decoding),
                "Verification": code(setting.verification),
                "Texts": setting.num_texts,
                "Acceptance rate α": estimate_text(setting.acceptance_rate, 3),
                f"Tokens per target call τ (γ = {length})": estimate_text(efficiency, 2),
                "τ in transformers' `generate`": estimate_text(in_transformers, 2),
                "α of the stock draft": estimate_text(old.acceptance_rate, 3) if old else None,
                "τ of the stock draft": estimate_text(at_length(old.block_efficiency, length), 2) if old else None,
                "Gain in α, paired": estimate_text(gain.acceptance_rate, 3, signed=True) if gain else None,
                "Gain in τ, paired": estimate_text(gained, 2, signed=True),
            }
        )
    return records(rows)


def _same(entries: Sequence[Entry], setting: SettingResult) -> Entry | None:
    """The entry about the same decoding and verification."""
    wanted = (setting.decoding, setting.verification)
    return next((entry for entry in entries if (entry.decoding, entry.verification) == wanted), None)


def length_table(settings: Sequence[SettingResult]) -> Markdown | None:
    """Block efficiency for every draft length that was computed."""
    lengths = sorted({length for setting in settings for length in setting.block_efficiency or {}})
    rows = []
    for setting in settings:
        estimates = [at_length(setting.block_efficiency, length) for length in lengths]
        cells = [estimate_text(estimate and estimate.value, 2) for estimate in estimates]
        rows.append([f"{setting.decoding}, {setting.verification}", *cells])
    return table(["τ at γ =", *map(str, lengths)], rows)


def vocabulary_table(settings: Sequence[SettingResult], length: int) -> Markdown | None:
    """What a smaller draft vocabulary costs and saves, for every size that was computed."""
    return records(
        [
            {
                "Decoding": str(setting.decoding),
                "Tokens proposed": f"{found.size:,}",
                "Acceptance rate α": estimate_text(found.acceptance_rate, 3),
                f"τ (γ = {length})": estimate_text(at_length(found.block_efficiency, length), 2),
                "Predicted speed-up": estimate_text(found.predicted_speedup, 2),
                "at γ": found.num_assistant_tokens,
            }
            for setting in settings
            for found in setting.draft_vocabulary or []
        ]
    )


def parallel_table(settings: Sequence[SettingResult]) -> Markdown | None:
    """What drafting in one pass gives at each draft length, beside drafting one by one."""
    both = [(each, each.parallel) for each in settings if each.parallel]
    # No text may be as long as the deepest block.
    lengths = range(1, max((found.num_tokens for _, found in both), default=0) + 1)
    rows = []
    for setting, found in both:
        for name, digits, estimates in (
            ("α at depth", 3, dict(enumerate(found.acceptance_by_depth, start=1))),
            ("τ, one by one", 2, setting.block_efficiency or {}),
            ("τ, in one pass", 2, found.block_efficiency),
        ):
            found_at = (estimates.get(length) for length in lengths)
            cells = [estimate_text(estimate and estimate.value, digits) for estimate in found_at]
            rows.append([str(setting.decoding), name, *cells])
    return table(["Decoding", "", *map(str, lengths)], rows) if rows else None


def speed_table(settings: Sequence[SettingResult]) -> Markdown | None:
    """Counted acceptance and wall-clock of real decoding with the draft, per setting and way that was run."""
    return records(
        [
            {
                "Decoding": str(setting.decoding),
                "With": way,
                "Prompts": run.num_prompts,
                "Draft length": run.num_assistant_tokens,
                "Plain, tokens/s": estimate_text(run.plain_tokens_per_second, 1),
                "With the draft, tokens/s": estimate_text(run.tokens_per_second, 1),
                "Speed-up": estimate_text(run.speedup, 2),
                "Share of the limit": estimate_text(run.share_of_limit, 2),
                "Tokens per target call, counted": estimate_text(run.mean_acceptance_length, 2),
                "Draft tokens accepted, counted": estimate_text(run.draft_acceptance_rate, 3),
            }
            for setting in settings
            for way, run in real_decoding(setting)
        ]
    )


def engine_table(report: SpeculationReport) -> Markdown | None:
    """What engines that served the pair counted, beside what was predicted of them."""
    return records(
        [
            {
                "Engine": f"{found.engine} {found.version}",
                "Decoding": str(found.decoding),
                "Verification": code(found.verification) if found.verification else None,
                "Threads": found.threads,
                "Draft length": found.num_assistant_tokens,
                "Texts equal": None if found.num_identical is None else f"{found.num_identical} of {found.num_prompts}",
                "Tokens per target call, counted": estimate_text(found.mean_acceptance_length, 2),
                "Predicted": estimate_text(found.predicted_mean_acceptance_length, 2),
                "Draft tokens accepted, counted": estimate_text(found.draft_acceptance_rate, 3),
                "Plain, tokens/s": estimate_text(found.plain_tokens_per_second, 1),
                "With the draft, tokens/s": estimate_text(found.tokens_per_second, 1),
                "Speed-up": estimate_text(found.speedup, 2),
                "Best draft length": found.recommendation and found.recommendation.num_assistant_tokens,
            }
            for found in report.engines or []
        ]
    )


def hardware_text(hardware: HardwareInfo) -> str:
    """The machine of a report in words."""
    details = [hardware.device, hardware.dtype]
    if hardware.device == "cpu":
        details.append(f"{hardware.num_threads} threads")
    count = f"{hardware.num_devices} × " if hardware.num_devices > 1 else ""
    return f"{count}{hardware.name} ({', '.join(details)})"
