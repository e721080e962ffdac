"""What a run was, in the words of the model card: taken from the run itself, so that a card cannot claim another."""

import datetime
import os
from collections.abc import Iterable
from typing import Any

from datasets import Dataset

from hf_draftkd.data.columns import distinct, row_lengths
from hf_draftkd.data.rows import authors
from hf_draftkd.decoding.setting import SETTING_COLUMNS, DecodingSetting
from hf_draftkd.evaluation.environment import hardware_info
from hf_draftkd.hub.provenance import PairFacts, Provenance, TrainingSummary
from hf_draftkd.models.forward import unwrapped
from hf_draftkd.models.identity import ModelIdentity, model_revision
from hf_draftkd.models.sizing import loaded_parameters
from hf_draftkd.training.config import DraftDistillConfig, plain_options
from hf_draftkd.utils.versions import package_versions

# Arguments that shape the weights. A list of what may be shown, since others hold tokens and paths.
_SHOWN = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "bf16",
    "fp16",
    "max_length",
    "packing",
    "padding_free",
    "assistant_only_loss",
    "completion_only_loss",
    "cross_entropy_weight",
    "parallel_tokens",
    "parallel_weights",
    "token_selection",
    "selected_share",
    "neftune_noise_alpha",
    "seq_kd",
    "max_new_tokens",
    "generation_temperature",
    "generation_top_p",
    "generation_top_k",
)
_METRICS = ("eval_loss", "eval_acceptance_rate", "eval_acceptance_rate_upper_bound", "eval_block_efficiency")


def author(datasets: Iterable[Any]) -> ModelIdentity | None:
    """The one target that wrote all alignment rows; None if they name none, or several."""
    rows = [data for data in datasets if isinstance(data, Dataset) and "target" in data.column_names]
    named = {author for data in rows for author in authors(data)}
    if not all(_all_by(each, named) for each in named):
        return None
    # One that knows its weights can be told from others; of several names for it always the same.
    return min(filter(None, named), key=lambda each: (each.weights is None, each.name), default=None)


def _all_by(target: ModelIdentity | None, named: Iterable[ModelIdentity | None]) -> bool:
    return target is not None and all(each is not None and each.matches(target) for each in named)


def data_facts(dataset: Any, target: ModelIdentity | None) -> dict[str, Any]:
    """What the training rows say about themselves; nothing for a stream, which is not read twice."""
    if not isinstance(dataset, Dataset):
        return {}
    facts: dict[str, Any] = {"num_rows": len(dataset), "completions": "data"}
    columns = set(dataset.column_names)
    named = authors(dataset)
    if "completion_ids" in columns and _all_by(target, named):
        facts["completions"] = "target"
        revisions = {each.revision for each in named if each is not None}
        if len(revisions) == 1 and None not in revisions:
            facts["target_revision"] = revisions.pop()
    if "scenario" in columns:
        facts["scenarios"] = sorted(row["scenario"] for row in distinct(dataset, ["scenario"]) if row["scenario"])
    if "completion_ids" in columns:
        facts["num_tokens"] = int(row_lengths(dataset, "completion_ids").sum())
    if set(SETTING_COLUMNS) <= columns:
        # Text that a person wrote was decoded under none.
        known = [row for row in distinct(dataset, SETTING_COLUMNS) if None not in row.values()]
        facts["sampling"] = sorted(DecodingSetting(**row) for row in known) or None
    return facts


def _facts_of_writing(data_facts: dict[str, Any], args: DraftDistillConfig) -> dict[str, Any]:
    """What the rows say about themselves, as far as it holds once completions are written while training."""
    facts = dict(data_facts)
    if not args.writes_completions:
        return facts
    if args.seq_kd or args.lmbda == 1:
        # Only the prompts were read.
        for name in ("num_tokens", "sampling", "completions"):
            facts.pop(name, None)
    if args.lmbda == 1:
        facts["completions"] = "draft"
    elif args.seq_kd:
        facts["completions"] = "mixed" if args.lmbda else "target"
    else:
        facts["completions"] = "mixed" if facts.get("completions") == "target" else "data_and_draft"
    if args.lmbda:
        facts["lmbda"] = args.lmbda
    if args.skd_top_k is not None:
        facts["skd_top_k"] = args.skd_top_k
    return facts


def describe_run(trainer: Any, dataset_name: str | None = None) -> Provenance:
    """How the draft of a `DraftDistillTrainer` came to be; `dataset_name` is the training data's id on the Hub."""
    args: DraftDistillConfig = trainer.args
    draft = unwrapped(trainer.model)
    target = None if trainer.target_model is None else unwrapped(trainer.target_model)
    facts = _facts_of_writing(trainer.data_facts, args)
    if target is not None:
        facts["target_revision"] = model_revision(target)
    step = _step_of_weights(trainer)
    logged = [entry for entry in trainer.state.log_history if entry["step"] == step]
    evaluated: dict[str, Any] = next((entry for entry in reversed(logged) if "eval_loss" in entry), {})
    metrics = {name: value for name, value in evaluated.items() if name in _METRICS}
    training = TrainingSummary(
        target=(trainer.target_id and trainer.target_id.name) or None,
        # Rows record the target's name, but not whether it is a local path.
        target_is_local=_is_local(trainer.target_id.name) if target is not None else None,
        draft=trainer.draft_name or None,
        draft_is_local=_is_local(trainer.draft_name),
        draft_revision=model_revision(draft),
        signal=trainer.signal.name if trainer.learns_from_target else "black_box",
        divergence=args.divergence,
        divergence_options=args.divergence_options or None,
        loss_temperature=args.loss_temperature,
        dataset=dataset_name,
        dataset_is_local=_is_local(dataset_name),
        peft=_adapter(trainer.model),
        num_steps=step,
        num_epochs=next((entry["epoch"] for entry in logged if "epoch" in entry), trainer.state.epoch),
        seed=args.seed,
        hyperparameters=_changed(args),
        metrics=metrics or None,
        **facts,
    )
    pair = None
    if target is not None:
        pair = PairFacts.from_configs(
            draft.config,
            target.config,
            trainer.processing_class,
            draft_generation_config=draft.generation_config,
            draft_parameters=loaded_parameters(trainer.model),
            target_parameters=loaded_parameters(target),
        )
    return Provenance(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=package_versions(),
        hardware=_hardware(draft, trainer.accelerator.num_processes),
        training=training,
        pair=pair,
        weights_sha256=trainer.weights_sha256,
    )


def _step_of_weights(trainer: Any) -> int:
    """The optimizer step that the draft's weights are of."""
    state = trainer.state
    # When a run ends, transformers loads the best checkpoint if it was asked to, and goes on counting from the last.
    is_best = trainer.args.load_best_model_at_end and trainer.control.should_training_stop
    return (is_best and state.best_global_step) or state.global_step


def _is_local(name: str | None) -> bool | None:
    """Recorded where the run is: later, and elsewhere, nobody can tell a relative path from an id on the Hub."""
    return os.path.exists(name) if name else None


def _hardware(draft: Any, num_processes: int) -> str:
    info = hardware_info(draft)
    threads = f", {info.num_threads} thread{'s' if info.num_threads > 1 else ''}" if info.device == "cpu" else ""
    return f"{num_processes} process{'es' if num_processes > 1 else ''} on {info.name}{threads}"


def _changed(args: DraftDistillConfig) -> dict[str, Any]:
    fields, shown = DraftDistillConfig.__dataclass_fields__, plain_options(args, _SHOWN)
    # TRL's default of None stands for a choice by machine, and False is what an ordinary CPU gets.
    shown["bf16"] = shown["bf16"] or None
    return {name: value for name, value in shown.items() if value is not None and value != fields[name].default}


def _adapter(model: Any) -> str | None:
    config = next(iter(getattr(model, "peft_config", {}).values()), None)
    if config is None:
        return None
    rank = getattr(config, "r", None)
    return f"{getattr(config.peft_type, 'value', config.peft_type)}" + (f", rank {rank}" if rank else "")
