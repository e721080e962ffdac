"""`draftkd train`: distil a target into a draft, from Hub ids or local paths."""

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging
from trl import ModelConfig, get_peft_config, get_quantization_config

from hf_draftkd.cli.errors import UsageError, usage_errors
from hf_draftkd.cli.options import new_directory, parse, required
from hf_draftkd.data.sources import open_dataset
from hf_draftkd.training.checkpoints import check_options, checkpoints, last_complete_checkpoint
from hf_draftkd.training.config import DraftDistillConfig
from hf_draftkd.training.trainer import DraftDistillTrainer
from hf_draftkd.utils.fields import option
from hf_draftkd.utils.files import only_run

logger = logging.get_logger(__name__)


@dataclass
class TrainOptions:
    """What `draftkd train` adds to the training configuration."""

    model: str | None = option(None, "The draft: a Hub id or a local path.")
    target_model: str | None = option(
        None, "The target. Not needed where the data holds its distributions, or for cross_entropy."
    )
    gguf_file: str | None = option(None, "Read the target from this GGUF file among its files.")
    reference_model: str | None = option(
        None, "A draft distilled before, for --token_selection adaspec: a Hub id or a local path."
    )
    dataset: str | None = option(
        None, "Training data: a Hub id, a file or a folder, such as `draftkd generate` writes."
    )
    dataset_config: str | None = option(None, "Configuration (subset) of a Hub dataset.")
    dataset_split: str = option("train", "Split of the training data.")
    eval_dataset: str | None = option(None, "Held-out data: a Hub id, a file or a folder.")
    eval_dataset_config: str | None = option(
        None, "Its configuration (subset) on the Hub; by default `dataset_config` where it is the same dataset."
    )
    eval_dataset_split: str = option("train", "Split of the held-out data.")
    mix_dataset: str | None = option(
        None, "Text to interleave with the training data, against forgetting: an id, a file or a folder."
    )
    mix_dataset_config: str | None = option(None, "Its configuration (subset) on the Hub.")
    mix_dataset_split: str = option("train", "Its split.")
    overwrite_output_dir: bool = option(False, "Start again in an output directory that is not empty.")


def run(argv: list[str]) -> int:
    options, args, model_config = parse(
        "train",
        (TrainOptions, DraftDistillConfig, ModelConfig),
        argv,
        "Distil a target into a draft. Every field of DraftDistillConfig is an option: first those of trl's SFTConfig, "
        "then, from --divergence on, those of distilling.",
        "--model DRAFT --target_model TARGET --dataset DATA --output_dir OUT",
    )
    required(model=options.model, dataset=options.dataset)
    if model_config.model_name_or_path is not None:
        raise UsageError("name the draft with `--model`; `--model_name_or_path` is not used")
    if not model_config.use_peft:
        _refuse_adapter_options(model_config)
    with usage_errors():
        new_directory(args.output_dir, overwrite=True, target_model=options.target_model)
        checkpoint = _where_to_start(args, overwrite=options.overwrite_output_dir)
        if checkpoint is not None:
            check_options(checkpoint, args, has_adapter=model_config.use_peft)
        trainer = build_trainer(options, args, model_config)
        if trainer.is_world_process_zero():
            with only_run(args.output_dir):  # asked now: with `--overwrite_output_dir` its checkpoints would go next
                pass
    if trainer.is_world_process_zero():
        # Checkpoints of an earlier run would be taken for this run's own when it is resumed. They go only now, when
        # nothing more can be refused.
        if options.overwrite_output_dir:
            for old in checkpoints(args.output_dir):
                shutil.rmtree(old, ignore_errors=True)
        processes = trainer.accelerator.num_processes
        print(f"Training on {processes} process{'es' if processes > 1 else ''}.")
    trainer.train(resume_from_checkpoint=checkpoint)
    # Not as a user's call: with `--push_to_hub` that would publish the draft before it is measured.
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if trainer.is_world_process_zero():
        print(f"The draft is in {args.output_dir}: target.generate(**inputs, assistant_model=draft)")
    with usage_errors():  # what somebody wrote into the card cannot be read
        trainer.create_model_card()
    if args.push_to_hub:
        _publish(trainer)
    return 0


def _publish(trainer: DraftDistillTrainer) -> None:
    """Publish the draft; a `UsageError` says how it can be done without training again."""
    # Only the Hub knows whether a licence is missing: its card, or that of the base model, may have one.
    try:
        trainer.push_to_hub()
    except ValueError as error:
        name = trainer.args.hub_model_id or Path(trainer.args.output_dir).name
        words = shlex.join(["draftkd", "push", "--model", trainer.args.output_dir, "--repo_id", name])
        raise UsageError(f"{error} The draft is finished, `{words}` publishes it (see its --help).") from error


def build_trainer(options: TrainOptions, args: DraftDistillConfig, model_config: ModelConfig) -> DraftDistillTrainer:
    """Load everything the options name."""
    args.model_init_kwargs = {
        "dtype": model_config.dtype,
        "revision": model_config.model_revision,
        "attn_implementation": model_config.attn_implementation,
        **(args.model_init_kwargs or {}),
    }

    if options.gguf_file is not None:
        if options.target_model is None:
            raise UsageError("`--gguf_file` names a file of the target: give `--target_model` too.")
        given: Any = args.target_model_init_kwargs
        args.target_model_init_kwargs = {**(given or {}), "gguf_file": options.gguf_file}

    if options.eval_dataset_config is None and options.eval_dataset == options.dataset:
        options.eval_dataset_config = options.dataset_config

    learned = options.dataset, options.dataset_split, options.dataset_config
    if learned == (options.eval_dataset, options.eval_dataset_split, options.eval_dataset_config):
        logger.warning(
            "`--eval_dataset` is the training data: what is measured there, and goes on the card, says nothing of "
            "other text. Name another `--eval_dataset_split`, or other data."
        )

    def opened(name: str | None, split: str, config: str | None) -> Any:
        return None if name is None else open_dataset(name, split=split, config=config)

    return DraftDistillTrainer(
        model=options.model,
        target_model=options.target_model,
        reference_model=options.reference_model,
        args=args,
        train_dataset=opened(*learned),
        eval_dataset=opened(options.eval_dataset, options.eval_dataset_split, options.eval_dataset_config),
        mix_dataset=opened(options.mix_dataset, options.mix_dataset_split, options.mix_dataset_config),
        quantization_config=get_quantization_config(model_config),
        peft_config=get_peft_config(model_config),
    )


def _refuse_adapter_options(given: ModelConfig) -> None:
    """Refuse what says how an adapter is made where the whole draft is trained."""
    for name, default in vars(ModelConfig()).items():
        if (name.startswith("lora_") or name in ("use_rslora", "use_dora")) and getattr(given, name) != default:
            raise UsageError(
                f"`--{name}` would do nothing without `--use_peft`: the whole draft would be trained. Add that, or "
                "leave it out."
            )


def _where_to_start(args: DraftDistillConfig, *, overwrite: bool) -> Any:
    """The checkpoint to resume from, None for a start; refuses to write over anything else."""
    directory = Path(args.output_dir)
    wanted = args.resume_from_checkpoint
    if wanted is not None and overwrite:
        raise UsageError("`--resume_from_checkpoint` goes on and `--overwrite_output_dir` starts again: leave one out.")
    # `true`, as YAML and transformers' own scripts have it, means what is done anyway: the newest complete one.
    if wanted is not None and str(wanted).lower() != "true":
        if not Path(str(wanted)).is_dir():
            raise UsageError(f"`--resume_from_checkpoint {wanted}` is not a directory.")
        return wanted
    if overwrite or not directory.is_dir() or not any(directory.iterdir()):
        return None
    last, skipped = last_complete_checkpoint(directory)
    if last is None:
        useless = f" ({'; '.join(skipped)})" if skipped else ""
        raise UsageError(
            f"`--output_dir {directory}` is not empty and holds no checkpoint to resume from{useless}. Name another "
            "directory, or pass `--overwrite_output_dir`."
        )
    for reason in skipped:
        print(f"Not resumed from {reason}")
    print(f"Resuming from {last}. Pass `--overwrite_output_dir` to start again.")
    return last
