"""Which checkpoint a run resumes from, and with which options.

transformers writes a checkpoint file by file, `trainer_state.json` last: where it can be read, the checkpoint is
complete. A run that was killed in mid-save has left a folder without it. (Before a checkpoint is written over an older
one of the same step, `DraftDistillTrainer` removes the older one's state.)
"""

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import ADAPTER_CONFIG_NAME

from hf_draftkd.training.config import DraftDistillConfig, plain_options
from hf_draftkd.utils.files import write_text

logger = logging.getLogger(__name__)

_OPTIONS_FILE = "distillation.json"  # in each checkpoint
# What a checkpoint goes on with, whatever is asked for. How long a run is may change.
_KEPT = (
    "divergence",
    "divergence_options",
    "loss_temperature",
    "cross_entropy_weight",
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "seed",
    "lmbda",
    "seq_kd",
    "token_selection",
    "selected_share",
    "parallel_tokens",
    "parallel_weights",
)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders of checkpoints, complete or not, the newest first."""
    name = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = [(int(match[1]), path) for path in Path(output_dir).glob("*") if (match := name.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def last_complete_checkpoint(output_dir: str | Path) -> tuple[str | None, list[str]]:
    """The newest checkpoint that a run can resume from, None if there is none; and why each newer one was skipped."""
    skipped = []
    for path in checkpoints(output_dir):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text())
        except (OSError, ValueError):
            skipped.append(f"{path} (its saving was interrupted: no readable {TRAINER_STATE_NAME})")
            continue
        if _recorded(path).get("save_only_model"):
            # transformers would go on with an empty optimizer and the learning rate of the first step.
            skipped.append(f"{path} (it holds weights alone: `save_only_model`)")
            continue
        return str(path), skipped
    return None, skipped


def record_options(checkpoint: str | Path, args: DraftDistillConfig) -> None:
    """Write into a checkpoint what it was trained with."""
    write_text(Path(checkpoint) / _OPTIONS_FILE, json.dumps(plain_options(args, (*_KEPT, "save_only_model"))))


def check_options(checkpoint: str | Path, args: DraftDistillConfig, *, has_adapter: bool) -> None:
    """A `ValueError` where a run would resume with other options than its checkpoint was trained with.

    Part of the draft would then have been trained otherwise than its card says, and the optimizer's settings are the
    checkpoint's whatever is asked for. `has_adapter`: this run trains an adapter, and not the whole draft.
    """
    holds_adapter = Path(checkpoint, ADAPTER_CONFIG_NAME).exists()
    if Path(checkpoint).is_dir() and holds_adapter != has_adapter:
        kinds = {True: "an adapter", False: "the whole draft"}
        raise ValueError(
            f"{str(checkpoint)!r} was trained as {kinds[holds_adapter]}, and this run trains {kinds[has_adapter]} "
            "(`peft_config`, `--use_peft`). Resume with the same, name another `output_dir`, or start again "
            "(`--overwrite_output_dir`)."
        )
    recorded = _recorded(Path(checkpoint))
    if recorded.get("save_only_model"):
        raise ValueError(
            f"{str(checkpoint)!r} holds weights alone (`save_only_model`): the optimizer would start anew, and the "
            "learning rate at its first step. Resume from another one, or begin a new run with this one as `model`."
        )
    for name, value in plain_options(args, _KEPT).items():
        if name in recorded and recorded[name] != value:
            raise ValueError(
                f"{str(checkpoint)!r} was trained with `{name}={recorded[name]!r}`, and this run asks for {value!r}. "
                "Resume with the same, name another `output_dir`, or start again (`--overwrite_output_dir`)."
            )


def _recorded(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says it was trained with; nothing, if an older version wrote it."""
    try:
        return json.loads((checkpoint / _OPTIONS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def checkpoint_to_resume(output_dir: str | Path, *, warns: bool) -> str:
    """The newest complete checkpoint, or a `ValueError`; what was passed over is logged where `warns`."""
    checkpoint, skipped = last_complete_checkpoint(output_dir)
    if warns:
        for reason in skipped:
            logger.warning("Not resumed from %s", reason)
    if checkpoint is None:
        raise ValueError(
            f"`resume_from_checkpoint=True`, but {str(output_dir)!r} holds no complete checkpoint"
            + (f" ({'; '.join(skipped)})." if skipped else ".")
            + " Leave it out to start from the beginning."
        )
    return checkpoint


def batches_read(checkpoint: str, accumulation_steps: int) -> tuple[int, int]:
    """How far a run over a stream had come: whole passes, and batches of the pass that its checkpoint lies in.

    transformers counts the batches of each pass as a share of all batches that `max_steps` would take.
    """
    state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
    # Batches are counted from 1: the whole number itself still belongs to the pass before.
    passes = math.ceil(state.epoch or 1) - 1
    return passes, round(((state.epoch or 0) - passes) * state.max_steps * accumulation_steps)
