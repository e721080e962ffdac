"""The YAML block of a draft's card: what the Hub indexes, and what `find_drafts` reads back."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData

from hf_draftkd.hub.report_tables import decoding_name, domains, hardware_text, shown_length
from hf_draftkd.models.resolve import is_hub_id
from hf_draftkd.utils.text import one_line

Json = Mapping[str, Any]
# `draft-model` is the tag `find_drafts` filters by, together with `draft_for_tag`.
TAGS = ("speculative-decoding", "draft-model", "assistant-model", "knowledge-distillation")
TASK = ("text-generation", "Speculative decoding")


def draft_for_tag(target: str) -> str:
    """The tag under which a draft for this target is found."""
    return f"draft-for:{target}"


def card_data(
    *,
    name: str,
    target: str | None,
    base_model: str | None,
    datasets: Sequence[str] = (),
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    tags: Iterable[str] = (),
    results: Sequence[EvalResult] = (),
) -> ModelCardData:
    """The metadata of a card; whatever is not known stays out.

    Args:
        name: Name of the model in the `model-index`.
        target: Tagged as `draft-for:` where it is a Hub id.
        base_model: The model whose weights the draft started from. A draft that is not known to start from a model on
            the Hub names its target instead: it is distilled from it.
        datasets: Training data; names that are no Hub ids are left out.
        license: Licence identifier.
        language: Language code or codes.
        tags: Further tags.
        results: As `eval_results` gives them.
    """
    hub_target = target if is_hub_id(target) else None
    origin = base_model if is_hub_id(base_model) else hub_target
    all_tags = [*TAGS, *([draft_for_tag(hub_target)] if hub_target else []), *map(one_line, tags)]
    languages = [language] if isinstance(language, str) else list(language or ())
    return ModelCardData(
        base_model=origin,
        datasets=[dataset for dataset in datasets if is_hub_id(dataset)] or None,
        eval_results=list(results) or None,
        language=[one_line(item) for item in languages] or None,
        library_name="transformers",
        license=one_line(license) if license else None,
        # Without results a name would be a stray key: ModelCardData folds it into the model index.
        model_name=one_line(name) if results else None,
        pipeline_tag="text-generation",
        tags=all_tags,
    )


def eval_results(report: Json) -> list[EvalResult]:
    """The report's figures as `model-index` results, one group per domain.

    The setting under which a figure was measured, its interval and the target's revision stand in `metric_args`: two
    figures of different settings never look alike.
    """
    target = report.get("target", {})
    found = []
    for domain, settings in domains(report):
        length = shown_length(report, settings)
        for setting in settings:
            common = {**setting["decoding"]} | {
                key: setting[key] for key in ("verification", "num_texts", "num_tokens")
            }
            common |= {
                f"target{'' if key == 'name' else '_' + key}": target[key]
                for key in ("name", "revision")
                if key in target
            }
            measured = [
                ("acceptance_rate", "Acceptance rate", setting.get("acceptance_rate"), {}),
                (
                    "block_efficiency",
                    f"Tokens per target call, draft length {length}",
                    setting.get("block_efficiency", {}).get(str(length)),
                    {"num_assistant_tokens": length},
                ),
            ]
            if "assisted" in setting:
                run = setting["assisted"]
                extra = {key: run[key] for key in ("num_assistant_tokens",) if key in run}
                if "hardware" in report:
                    extra["hardware"] = hardware_text(report["hardware"])
                measured.append(("speedup", "Measured speed-up", run.get("speedup"), extra))
            found += [
                _result(report, domain, setting, kind, label, figure, common | extra)
                for kind, label, figure, extra in measured
                if figure is not None
            ]
    cost = report.get("latency", {}).get("relative_cost")
    if cost is not None:
        args = {"hardware": hardware_text(report.get("hardware"))}
        label = "Draft step ÷ target step"
        found.append(_result(report, report.get("prompts", {}).get("domain"), None, "relative_cost", label, cost, args))
    return found


def benchmark_entries(report: Json, task_id: str) -> list[EvalResultEntry]:
    """The report's tokens per target call for a benchmark's leaderboard (`.eval_results/*.yaml`).

    These files belong to data sets on the Hub that define tasks, and hold one value a task; they apply where the
    prompts are such a benchmark's, which only the person who measured knows.

    Args:
        report: The report as plain data.
        task_id: The task, as the benchmark's repository calls it.

    Raises:
        ValueError: The prompts are not from a data set on the Hub, or no block efficiency was measured.
    """
    source = report.get("prompts", {}).get("source")
    if not (isinstance(source, str) and "/" in source and is_hub_id(source)):
        raise ValueError(
            f"Leaderboard results need prompts from a benchmark on the Hub, and the report's are from {source!r}. "
            "Evaluate on the benchmark's data set by its id, or leave the task out."
        )
    settings = [setting for setting in report.get("settings", ()) if "block_efficiency" in setting]
    if not settings:
        raise ValueError("The report holds no block efficiency, which is what a leaderboard result says.")
    # Greedy decoding is what benchmarks of speculative decoding compare; other settings are in the model index.
    setting = min(settings, key=lambda setting: setting["decoding"]["temperature"])
    length = shown_length(report, [setting])
    notes = f"tokens per target call, {decoding_name(setting)}, {setting['verification']}, draft length {length}"
    value = setting["block_efficiency"][str(length)]["value"]
    return [EvalResultEntry(dataset_id=source, task_id=task_id, value=value, notes=one_line(notes))]


def _result(
    report: Json, domain: str | None, setting: Json | None, kind: str, label: str, figure: Any, args: Json
) -> EvalResult:
    prompts = report.get("prompts", {})
    source = prompts.get("source")
    interval = {key: figure[key] for key in ("low", "high") if key in figure} if isinstance(figure, Mapping) else {}
    name = domain or (source if is_hub_id(source) else None) or "prompts"
    return EvalResult(
        task_type=TASK[0],
        task_name=TASK[1],
        # The index wants a data set's id; a local file has none and must not leak its path.
        dataset_type=source if isinstance(source, str) and "/" in source and is_hub_id(source) else "prompts",
        dataset_name=one_line(name),
        dataset_config=one_line(domain) if domain else None,
        dataset_args=_clean({key: prompts[key] for key in ("count", "sha256") if key in prompts}) or None,
        metric_type=kind,
        metric_name=f"{label} ({decoding_name(setting)}, {one_line(setting['verification'])})" if setting else label,
        metric_value=figure["value"] if isinstance(figure, Mapping) else figure,
        metric_args=_clean(dict(args) | interval),
    )


def _clean(value: Any) -> Any:
    """Plain data with every text on one line, so that no YAML block scalar is ever needed."""
    if isinstance(value, Mapping):
        return {one_line(name): _clean(content) for name, content in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    return one_line(value) if isinstance(value, str) else value
