"""`draftkd evaluate`: how good one or several drafts are for a target, on this machine, and whether they pay."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.markup import escape
from transformers import AutoConfig, GenerationConfig

from hf_draftkd.cli.errors import UsageError, usage_errors
from hf_draftkd.cli.options import new_directory, parse, required
from hf_draftkd.data.prompts import load_prompts
from hf_draftkd.data.sources import open_dataset
from hf_draftkd.decoding.setting import DecodingSetting, settings_at
from hf_draftkd.evaluation.checks import own_penalty
from hf_draftkd.evaluation.evaluate import check_options, evaluate_draft
from hf_draftkd.evaluation.plots import figure_class
from hf_draftkd.evaluation.report import SpeculationReport
from hf_draftkd.evaluation.spec_bench import is_spec_bench, spec_bench_prompts
from hf_draftkd.models.draft_length import draft_length_settings, drop_idle_sampling
from hf_draftkd.models.loading import load_draft, load_target
from hf_draftkd.models.pairing import check_own_tokenizer
from hf_draftkd.models.resolve import Checkpoint, resolve
from hf_draftkd.utils.text import printable

_RECORDED = {"prompt_ids", "completion_ids", "temperature", "top_p", "top_k", "repetition_penalty"}


@dataclass
class EvaluateOptions:
    """Options of `draftkd evaluate`; names equal those of `evaluate_draft`."""

    model: list[str] | None = field(
        default=None, metadata={"help": "The draft, or several to be ranked: Hub ids or local paths."}
    )
    target_model: str | None = field(default=None, metadata={"help": "The target: a Hub id or a local path."})
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Prompts (a Hub id or a local file with a `prompt` column, or Spec-Bench questions), which the "
            "target answers now; or alignment data, whose answers are taken as recorded."
        },
    )
    output_dir: str | None = field(default=None, metadata={"help": "Where report.json (and report.html) is written."})
    baseline: str | None = field(
        default=None, metadata={"help": "Another draft to compare with on the same texts, usually the stock one."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration (subset) of a Hub dataset."})
    dataset_split: str | None = field(default=None, metadata={"help": "Split of the dataset; `train` by default."})
    limit: int | None = field(default=None, metadata={"help": "Use only the first so many rows."})
    regenerate: bool = field(
        default=False, metadata={"help": "Let the target answer the prompts of alignment data anew."}
    )
    temperatures: list[float] | None = field(
        default=None, metadata={"help": "Sampling temperatures, 0 for greedy. 0 and 1, or what the data records."}
    )
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling at the temperatures above 0."})
    top_k: int = field(default=0, metadata={"help": "Top-k sampling at the temperatures above 0; 0 keeps everything."})
    repetition_penalty: float | None = field(
        default=None, metadata={"help": "For both models; by default that of the target's generation config."}
    )
    verification: list[str] = field(
        default_factory=lambda: ["rejection_sampling"],
        metadata={"help": "Rules for sampled text: rejection_sampling, greedy_draft (vLLM), exact_match (llama.cpp)."},
    )
    max_new_tokens: int = field(
        default=128, metadata={"help": "Longest completion, in tokens; of alignment data, that of the data counts."}
    )
    num_assistant_tokens: int | None = field(
        default=None, metadata={"help": "Draft length to decode with; by default the best one found."}
    )
    measure_speed: bool = field(default=True, metadata={"help": "Time steps and real decoding, and recommend."})
    num_speed_prompts: int = field(default=16, metadata={"help": "Prompts decoded both ways for each setting."})
    verify: int = field(default=0, metadata={"help": "Check computed against counted figures on so many prompts."})
    lossy: bool = field(default=False, metadata={"help": "Add the curve of lossy decoding at the sampled settings."})
    html: bool = field(default=False, metadata={"help": "Write report.html as well: one page with plots."})
    write: bool = field(
        default=False,
        metadata={"help": "Store the best draft length in the generation config of the (best) draft, a local path."},
    )
    batch_size: int = field(default=8, metadata={"help": "Texts a forward pass."})
    seed: int = field(default=0, metadata={"help": "Seed of the target's sampling."})
    domain: str | None = field(default=None, metadata={"help": "What the prompts are about, for the report."})
    dtype: str = field(default="auto", metadata={"help": "Number format of the weights, such as bfloat16."})
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the draft on the Hub."})
    target_model_revision: str | None = field(default=None, metadata={"help": "Revision of the target on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code that comes with a model."})


def run(argv: list[str]) -> int:
    """`draftkd evaluate *argv`; returns the exit code."""
    (options,) = parse("evaluate", (EvaluateOptions,), argv, "Measure drafts, and say whether they are worth using.")
    required(
        model=options.model, target_model=options.target_model, dataset=options.dataset, output_dir=options.output_dir
    )
    with usage_errors():
        # Its own files are replaced, nothing else is touched.
        out = new_directory(options.output_dir, overwrite=True)
        _check_write(options)
        if options.html:
            figure_class()  # before the work that the page would show
        check_options(
            options.verification,
            options.max_new_tokens,
            options.num_assistant_tokens,
            options.num_speed_prompts,
            batch_size=options.batch_size,
            verify=options.verify,
        )
        asked = _settings(options)
        rows = open_dataset(options.dataset, split=options.dataset_split, config=options.dataset_config)
        texts = _texts(rows, options)
        if "dataset" in texts and asked is None:
            _refuse_other_settings(options)
        target_checkpoint, *draft_checkpoints = _look_up(options)
        tokenizer = target_checkpoint.tokenizer
        loading = {"dtype": options.dtype, "device_map": _device_map()}
        target = load_target(target_checkpoint, **loading)
        drafts = [load_draft(checkpoint, **loading) for checkpoint in draft_checkpoints]
        baseline = None if options.baseline is None else drafts.pop()
        if asked is None and texts.get("dataset") is None:
            asked = _settings(options, temperatures=[0.0, 1.0], penalty=own_penalty(target))
        elif options.temperatures is not None and options.repetition_penalty is None:
            asked = _settings(options, penalty=own_penalty(target))
        # What evaluate_draft refuses, it refuses for the user's options and data.
        report = evaluate_draft(
            drafts if len(drafts) > 1 else drafts[0],
            target,
            tokenizer,
            **texts,
            baseline=baseline,
            settings=asked,
            verification=options.verification,
            max_new_tokens=options.max_new_tokens,
            num_assistant_tokens=options.num_assistant_tokens,
            measure_speed=options.measure_speed,
            num_speed_prompts=options.num_speed_prompts,
            verify=options.verify,
            lossy=options.lossy,
            batch_size=options.batch_size,
            seed=options.seed,
            source=options.dataset,
            domain=options.domain,
        )
    _write(report, options, out)
    return 0


def _look_up(options: EvaluateOptions) -> list[Checkpoint]:
    """The target, the drafts, and the baseline where there is one, once all of them fit together."""
    named = [(options.target_model, options.target_model_revision)]
    named += [(path, options.model_revision) for path in options.model or ()]
    named += [] if options.baseline is None else [(options.baseline, None)]
    found = [resolve(name, revision=at, trust_remote_code=options.trust_remote_code) for name, at in named]
    for checkpoint in found:
        _ = checkpoint.config  # refuses what is not a usable causal LM
        check_own_tokenizer(checkpoint, found[0].tokenizer)
    return found


def _settings(
    options: EvaluateOptions, *, temperatures: list[float] | None = None, penalty: float = 1.0
) -> list[DecodingSetting] | None:
    """The settings asked for; None where the data is to decide."""
    temperatures = temperatures or options.temperatures
    if temperatures is None:
        filters = {"top_p": options.top_p, "top_k": options.top_k}
        DecodingSetting(temperature=1.0, **filters)  # type: ignore[arg-type]  # out of range is refused at once
        return None
    if not any(temperatures) and (options.top_p < 1 or options.top_k > 0):
        raise UsageError(
            "temperature 0 is greedy decoding, which `--top_p` and `--top_k` cannot change. Leave them out, or give a "
            "temperature above 0."
        )
    return settings_at(
        temperatures,
        top_p=options.top_p,
        top_k=options.top_k,
        repetition_penalty=penalty if options.repetition_penalty is None else options.repetition_penalty,
    )


def _texts(rows: Dataset, options: EvaluateOptions) -> dict[str, Any]:
    """Prompts to answer, or recorded answers."""
    if options.limit is not None:
        if options.limit < 1:
            raise UsageError(f"`--limit` must be at least 1, got {options.limit}.")
        rows = rows.select(range(min(options.limit, len(rows))))
    if set(rows.column_names) >= _RECORDED and not options.regenerate:
        return {"dataset": rows}
    if is_spec_bench(rows):
        rows = spec_bench_prompts(rows)
    return {"prompts": load_prompts(rows)}


def _refuse_other_settings(options: EvaluateOptions) -> None:
    """Recorded answers were written under the settings in their rows, whatever is asked for beside them."""
    for name in ("top_p", "top_k", "repetition_penalty"):
        if getattr(options, name) != getattr(EvaluateOptions, name):
            raise UsageError(
                f"`--{name}` would do nothing: the data records the settings its answers were written under. Leave it "
                "out, or let the target answer anew with `--regenerate`."
            )


def _check_write(options: EvaluateOptions) -> None:
    if not options.write:
        return
    if not options.measure_speed:
        raise UsageError("`--write` stores the best draft length, which needs `--measure_speed`.")
    # An adapter's directory has no generation config of its own: the base model's would be changed.
    elsewhere = [path for path in options.model or [] if not (Path(path) / "config.json").is_file()]
    if elsewhere:
        raise UsageError(
            f"`--write` changes the draft's own generation config, so {elsewhere[0]!r} must be a local directory "
            "with a whole model (merge an adapter first)."
        )


def _device_map() -> dict[str, Any] | None:
    """Everything on the accelerator, where there is one."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if device is None else {"": device}


def _write(report: SpeculationReport, options: EvaluateOptions, out: Path) -> None:
    console = Console()
    try:
        written = [report.save(out / "report.json")]
        if options.html:
            from hf_draftkd.evaluation.html import save_page

            written.append(save_page(report, out / "report.html"))
        if options.write and report.recommendation is not None:
            length = report.recommendation.num_assistant_tokens
            written.append(_store_length(Path(report.draft.name), length, trust_remote_code=options.trust_remote_code))
    finally:  # hours of measuring are shown, even where a full disk takes no file
        console.print(report.table())
    for warning in report.warnings:
        console.print(f"[yellow]note:[/yellow] {escape(printable(warning))}", highlight=False)
    if report.self_check is not None:
        verdict = "agree" if report.self_check.equal else "DO NOT agree"
        console.print(f"Self-check on {report.self_check.prompts} prompts: computed and counted figures {verdict}.")
    console.print(f"Written: {', '.join(map(printable, written))}", highlight=False, markup=False)


def _store_length(draft: Path, num_assistant_tokens: int, **trusted: bool) -> Path:
    """The draft's generation config with the tuned length; everything else in it stays."""
    try:
        config = GenerationConfig.from_pretrained(draft)
    except OSError:  # a draft saved without one: transformers then derives it from the model's config
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(draft, **trusted))
    drop_idle_sampling(config)
    config.update(**draft_length_settings(num_assistant_tokens))
    config.save_pretrained(draft)
    return draft / "generation_config.json"
