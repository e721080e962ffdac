"""The YAML block of a draft's card: what the Hub indexes, and what `find_drafts` reads back."""

from functools import partial
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry

from hf_draftkd.acceptance import Estimate
from hf_draftkd.evaluation.recommendation import WAYS, measured_run
from hf_draftkd.evaluation.report import SettingResult, SpeculationReport
from hf_draftkd.hub.report_tables import at_length, by_domain, hardware_text, shown_length
from hf_draftkd.models.resolve import is_hub_id
from hf_draftkd.utils.text import one_line

# `draft-model` is the tag `find_drafts` filters by, together with `draft_for_tag`.
TAGS = ("speculative-decoding", "draft-model", "assistant-model", "knowledge-distillation")


def draft_for_tag(target: str) -> str:
    """The tag under which a draft for this target is found."""
    return f"draft-for:{target}"


def eval_results(report: SpeculationReport | None) -> list[EvalResult]:
    """The report's metrics as `model-index` results, one group per domain.

    The setting under which a metric was measured, its interval and the target's revision stand in `metric_args`: two
    metrics of different settings never look alike.
    """
    if report is None:
        return []
    found, hardware = [], hardware_text(report.hardware)
    length = shown_length(report)
    for domain, settings in by_domain(report):
        for setting in settings:
            result = partial(_result, report, domain, setting=setting)
            found.append(result("acceptance_rate", "Acceptance rate", setting.acceptance_rate, {}))
            if efficiency := at_length(setting.block_efficiency, length):
                label = f"Tokens per target call, draft length {length}"
                found.append(result("block_efficiency", label, efficiency, {"num_assistant_tokens": length}))
            for way in WAYS:
                if run := measured_run(setting, way):
                    args = {"num_assistant_tokens": run.num_assistant_tokens, "hardware": hardware, "way": way}
                    found.append(result("speedup", f"Measured speed-up, {way}", run.speedup, args))
    if report.latency is not None:
        cost, label = report.latency.relative_cost, "Draft step ÷ target step"
        found.append(_result(report, report.prompts.domain, "relative_cost", label, cost, {"hardware": hardware}))
    return found


def _result(
    report: SpeculationReport,
    domain: str | None,
    kind: str,
    label: str,
    value: Estimate | float,
    args: dict[str, Any],
    setting: SettingResult | None = None,
) -> EvalResult:
    source, name = report.prompts.source, label
    if setting is not None:
        name = f"{label} ({setting.decoding}, {one_line(setting.verification)})"
        target = {"target": report.target.name, "target_revision": report.target.revision}
        about = {"verification": setting.verification, "num_texts": setting.num_texts, "num_tokens": setting.num_tokens}
        args = setting.decoding.to_dict() | about | target | args
    if isinstance(value, Estimate):
        args = args | {"low": value.low, "high": value.high}
        value = value.value
    return EvalResult(
        task_type="text-generation",
        task_name="Speculative decoding",
        # The index wants a data set's id; a local file has none and must not leak its path.
        dataset_type=source if _is_dataset(source) else "prompts",
        dataset_name=one_line(domain or (source if _is_dataset(source) else "prompts")),
        dataset_config=one_line(domain) if domain else None,
        dataset_args={"count": report.prompts.count, "sha256": one_line(report.prompts.sha256)},
        metric_type=kind,
        metric_name=name,
        metric_value=value,
        # Every text on one line, so that no YAML block scalar is ever needed.
        metric_args={
            key: one_line(item) if isinstance(item, str) else item for key, item in args.items() if item is not None
        },
    )


def _is_dataset(source: str) -> bool:
    return "/" in source and is_hub_id(source)


def benchmark_entries(report: SpeculationReport | None, task_id: str) -> list[EvalResultEntry]:
    """The report's tokens per target call for a benchmark's leaderboard (`.eval_results/*.yaml`).

    These files belong to data sets on the Hub that define tasks, and hold one value per task, by the id that the
    benchmark's repository gives it; they apply where the prompts are such a benchmark's, which only the person who
    measured knows. A `ValueError` if they are not from a data set on the Hub, or no block efficiency was measured.
    """
    if report is None or not _is_dataset(report.prompts.source):
        source = f"the report's are from {report.prompts.source!r}" if report else "there is no report"
        raise ValueError(
            f"Leaderboard results need prompts from a benchmark on the Hub, and {source}. "
            "Evaluate on the benchmark's data set by its id, or leave the task out."
        )
    length = shown_length(report)
    found = [(each, estimate) for each in report.settings if (estimate := at_length(each.block_efficiency, length))]
    if not found:
        raise ValueError("The report holds no block efficiency, which is what a leaderboard result says.")
    # Greedy decoding is what benchmarks of speculative decoding compare; other settings are in the model index.
    setting, estimate = min(found, key=lambda pair: pair[0].decoding.temperature)
    notes = f"tokens per target call, {setting.decoding}, {setting.verification}, draft length {length}"
    return [
        EvalResultEntry(dataset_id=report.prompts.source, task_id=task_id, value=estimate.value, notes=one_line(notes))
    ]
