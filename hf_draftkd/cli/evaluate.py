"""`draftkd evaluate`: how good one or several drafts are for a target, on this machine, and whether they pay."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedModel

from hf_draftkd.cli.errors import UsageError, usage_errors
from hf_draftkd.cli.options import new_directory, parse, required, whole_draft
from hf_draftkd.data.prompts import is_answered, load_prompts
from hf_draftkd.data.sources import open_dataset
from hf_draftkd.decoding.setting import own_penalty
from hf_draftkd.evaluation.config import EvaluationConfig
from hf_draftkd.evaluation.engines import ENGINES
from hf_draftkd.evaluation.engines.config import EngineConfig
from hf_draftkd.evaluation.engines.measure import check_servers, check_settings, evaluate_in_engine, written_texts
from hf_draftkd.evaluation.evaluate import evaluate_draft
from hf_draftkd.evaluation.html import save_page, training_log
from hf_draftkd.evaluation.plots import figure_class
from hf_draftkd.evaluation.recommendation import ASSISTANT_MODEL, PARALLEL, overall_draft_lengths
from hf_draftkd.evaluation.report import SpeculationReport
from hf_draftkd.evaluation.spec_bench import is_spec_bench, spec_bench_prompts
from hf_draftkd.evaluation.tables import ReportTable
from hf_draftkd.evaluation.texts import answers
from hf_draftkd.evaluation.trackers import log_report, tracker_modules
from hf_draftkd.models.draft_length import draft_length_settings, write_draft_settings
from hf_draftkd.models.loading import load_draft, load_target
from hf_draftkd.models.pairing import check_own_tokenizer
from hf_draftkd.models.parallel import parallel_draft
from hf_draftkd.models.resolve import Checkpoint, resolve
from hf_draftkd.utils.checks import whole_number
from hf_draftkd.utils.fields import given_fields, option
from hf_draftkd.utils.text import printable


@dataclass
class EvaluateOptions:
    """What the command line adds to `EvaluationConfig`: files, and how models are loaded."""

    model: list[str] | None = option(None, "The draft, or several to be ranked: Hub ids or local paths.")
    target_model: str | None = option(None, "The target: a Hub id or a local path.")
    dataset: str | None = option(
        None,
        "Prompts (a Hub id or a local file with a `prompt` column, or Spec-Bench questions), which the target answers "
        "now; or alignment data, whose answers are taken as recorded.",
    )
    output_dir: str | None = option(None, "Where report.json (and report.html) is written.")
    baseline: str | None = option(None, "Another draft to compare with on the same texts, usually the stock one.")
    dataset_config: str | None = option(None, "Configuration (subset) of a Hub dataset.")
    dataset_split: str | None = option(None, "Split of the dataset; `train` by default.")
    prompt_column: str = option("prompt", "Column with the prompts, strings or lists of messages.")
    drop_last_answer: bool = option(False, "Drop a conversation's last answer; the target answers instead.")
    limit: int | None = option(None, "Use only this many rows from the start (prompts, with --regenerate).")
    regenerate: bool = option(False, "Let the target answer the prompts of alignment data again.")
    html: bool = option(False, "Write report.html as well: one page with plots.")
    report_to: list[str] | None = option(None, "Trackers that get the report: trackio, wandb, tensorboard.")
    project: str = option("huggingface", "trackio, wandb: the project.")
    run_name: str | None = option(None, "trackio, wandb: the run; trackio goes on with the one of that name.")
    write: bool = option(False, "Store the best draft length in the (best) draft's generation config, a local path.")
    dtype: str = option(
        "auto", "Number format of all weights, such as bfloat16; auto: the target's as saved, and the same for drafts."
    )
    device_map: str | None = option(
        None, "Device map of the target, such as auto; by default one device. Drafts go where the target begins."
    )
    model_revision: str | None = option(None, "Revision of the draft on the Hub.")
    target_model_revision: str | None = option(None, "Revision of the target on the Hub.")
    gguf_file: str | None = option(None, "Read the target from this GGUF file among its files.")
    trust_remote_code: bool = option(False, "Allow code that comes with a model.")


def run(argv: list[str]) -> int:
    about = "Measure drafts, and say whether they are worth using."
    usage = "--model DRAFT --target_model TARGET --dataset PROMPTS --output_dir REPORT"
    options, config, engine = parse("evaluate", (EvaluateOptions, EvaluationConfig, EngineConfig), argv, about, usage)
    required(**{name: getattr(options, name) for name in ("model", "target_model", "dataset", "output_dir")})
    with usage_errors():
        # Its own files are replaced, nothing else is touched.
        out = new_directory(options.output_dir, overwrite=True)
        _check_write(options, config)
        check_servers(engine)
        if engine.engine:
            if len(options.model or ()) > 1:
                raise UsageError("`--engine` measures one draft: name one with `--model`.")
            rule = ENGINES[engine.engine].sampled_rule
            if engine.launch and rule is not None and rule not in config.verification:
                config = replace(config, verification=[*config.verification, rule])  # to predict what will be counted
        if options.html:
            figure_class()  # before the work that the page would show
        _check_trackers(options)
        texts = _texts(options)
        target, *drafts = _look_up(options)
        target_model, models = _load(target, drafts, options)
        baseline = None if options.baseline is None else models.pop()
        if engine.parallel_drafting:
            _check_parallel_draft(models[0], config)
        if engine.engine:
            settings = config.settings(own_penalty(target_model))
            if "dataset" in texts:
                recorded = [each.setting for each in written_texts(texts["dataset"])]
                settings = recorded if config.temperatures is None else settings
            check_settings(engine, settings)
            if "prompts" in texts:  # the very texts are needed twice
                texts = {"dataset": answers(target_model, target.tokenizer, texts["prompts"], settings, config)}
                config = replace(config, temperatures=[setting.temperature for setting in settings])
        report = evaluate_draft(
            models if len(models) > 1 else models[0],
            target_model,
            target.tokenizer,
            **texts,
            baseline=baseline,
            source=options.dataset,
            config=config,
        )
    try:
        if engine.engine:
            report.save(out / "report.json")  # before a server can fail
            length = config.num_assistant_tokens
            if length is None and report.latency is not None:  # the best one, drafting as the engine does
                best = overall_draft_lengths(report.settings, report.latency)
                length = best.get(PARALLEL if engine.parallel_drafting else ASSISTANT_MODEL)
            with usage_errors():
                rows = texts["dataset"]
                evaluate_in_engine(report, rows, target.tokenizer, num_assistant_tokens=length, config=engine)
    finally:
        _write(report, options, out)
    return 0


def _look_up(options: EvaluateOptions) -> list[Checkpoint]:
    """The target, the drafts, and the baseline where there is one, once all of them fit together."""

    def look(name: str | None, revision: str | None = None, **more: Any) -> Checkpoint:
        return resolve(name, revision=revision, trust_remote_code=options.trust_remote_code, **more)

    found = [look(options.target_model, options.target_model_revision, gguf_file=options.gguf_file)]
    found += [look(path, options.model_revision) for path in options.model or ()]
    found += [] if options.baseline is None else [look(options.baseline)]
    for checkpoint in found:
        checkpoint.config  # noqa: B018 - raises where it is not a usable causal LM
        check_own_tokenizer(checkpoint, found[0].tokenizer)
    return found


def _load(
    target: Checkpoint, drafts: Sequence[Checkpoint], options: EvaluateOptions
) -> tuple[PreTrainedModel, list[PreTrainedModel]]:
    """The models: the target as asked for, drafts in its number format and where it begins."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    place = None if device is None else {"": device}
    target_model = load_target(target, dtype=options.dtype, device_map=options.device_map or place)
    if options.device_map is not None and target_model.device.type != "meta":  # as offloaded weights are
        place = {"": target_model.device}
    # Trained drafts are often saved in float32.
    dtype = target_model.dtype if options.dtype == "auto" else options.dtype
    return target_model, [load_draft(draft, dtype=dtype, device_map=place) for draft in drafts]


def _texts(options: EvaluateOptions) -> dict[str, Any]:
    """Prompts to answer, or recorded answers."""
    assert options.dataset is not None
    rows = open_dataset(options.dataset, split=options.dataset_split, config=options.dataset_config)
    if is_answered(rows) and not options.regenerate:
        if options.prompt_column != "prompt" or options.drop_last_answer:
            raise UsageError(
                "`--prompt_column` and `--drop_last_answer` would do nothing: the data holds the target's answers. "
                "Leave them out."
            )
        return {"dataset": rows if options.limit is None else rows.take(whole_number("limit", options.limit))}
    rows = spec_bench_prompts(rows) if is_spec_bench(rows) else rows
    how: dict[str, Any] = {"column": options.prompt_column, "drop_last_answer": options.drop_last_answer}
    return {"prompts": load_prompts(rows, limit=options.limit, **how)}


def _check_parallel_draft(draft: PreTrainedModel, config: EvaluationConfig) -> None:
    parallel, length = parallel_draft(draft.config), config.num_assistant_tokens
    if parallel is None:
        raise UsageError(f"`--parallel_drafting` needs a parallel draft, which {draft.name_or_path} is not.")
    if length is not None and length > parallel.num_tokens:
        raise UsageError(
            f"`--num_assistant_tokens {length}` cannot be compared with a prediction: {draft.name_or_path} drafts "
            f"{parallel.num_tokens} tokens in one pass at most. Serve it with that many, or fewer."
        )


def _check_trackers(options: EvaluateOptions) -> None:
    for name in given_fields(options, ("project", "run_name")):
        if not options.report_to:
            raise UsageError(f"`--{name}` would do nothing without `--report_to`. Leave it out, or name a tracker.")
    tracker_modules(options.report_to or [])


def _check_write(options: EvaluateOptions, config: EvaluationConfig) -> None:
    if options.write and not config.measure_speed:
        raise UsageError("`--write` stores the best draft length, which needs `--measure_speed`.")
    if options.write:
        for path in options.model or ():
            whole_draft(path, "`--write`")


def _write(report: SpeculationReport, options: EvaluateOptions, out: Path) -> None:
    console = Console()
    try:
        written = [report.save(out / "report.json")]
        if options.html:
            written.append(save_page(report, out / "report.html", training_log(report.draft.name)))
        if options.write and report.recommendation is not None:
            advice = report.recommendation
            settings = draft_length_settings(advice.num_assistant_tokens, parallel=advice.way == PARALLEL)
            written.append(write_draft_settings(Path(report.draft.name), settings, options.trust_remote_code))
    finally:  # hours of measuring are shown even if the disk is full
        console.print(ReportTable(report))
    if options.report_to:
        names: dict[str, Any] = {"project": options.project, "run_name": options.run_name}
        log_report(report, options.report_to, **names, logging_dir=out / "runs")
    for warning in report.warnings:
        console.print(f"[yellow]note:[/yellow] {escape(printable(warning))}", highlight=False)
    if report.self_check is not None:
        verdict = "agree" if report.self_check.equal else "DO NOT agree"
        console.print(f"Self-check on {report.self_check.prompts} prompts: computed and counted numbers {verdict}.")
    console.print(f"Written: {', '.join(map(printable, written))}", highlight=False, markup=False)
