"""Checkpoints that are whole or not there, whenever the process dies.

transformers writes a checkpoint file by file into the folder that it will later choose by its number, so a run killed
in mid-save resumes from half a checkpoint, or not at all. Here every file goes into `_unfinished/` first, and the
folder takes its name in one step when the last file is written. Where a run saves a step for the second time, its
older checkpoint must make way first; a run that dies between these two steps is finished by whoever looks next.
"""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

with suppress(ImportError):  # Windows has none
    import fcntl

logger = logging.getLogger(__name__)

# Below the run's own folder, so that renaming never copies.
UNFINISHED = "_unfinished"
# An older checkpoint of the same step, which lies beside the new one while that takes its name.
_REPLACED = "replaced-"
_PATIENCE = 10  # seconds to wait for the lock of a run that may just have died


class WholeCheckpoints(Trainer):
    """A trainer whose folders named `checkpoint-N` are complete. Mix it in before another trainer class."""

    _writing = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; `True` takes the newest checkpoint in `args.output_dir` that is complete.

        Raises:
            ValueError: There is none, or another run is training into `args.output_dir`.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint, skipped = last_complete_checkpoint(self.args.output_dir)
            for reason in skipped if self.is_world_process_zero() else ():
                logger.warning("Not resumed from: %s", reason)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"`resume_from_checkpoint=True`, but {self.args.output_dir!r} holds no complete checkpoint"
                    + (f" ({'; '.join(skipped)})." if skipped else ".")
                    + " Train without it to start anew."
                )
        with only_run(self.args.output_dir) if self.is_world_process_zero() else nullcontext():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        directory = super()._get_output_dir(trial)
        return os.path.join(directory, UNFINISHED) if self._writing else directory

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        unfinished = run / UNFINISHED
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            # Whatever lies there was left by a run that died, and may be the only whole checkpoint.
            _finish_renaming(run)
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._writing = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writing = False
        self._point_to_best(run)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(unfinished / name / TRAINER_STATE_NAME))
            _take_name(unfinished / name, run / name)
            shutil.rmtree(unfinished)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _point_to_best(self, run: Path) -> None:
        # transformers looked for the best checkpoint among the unfinished ones.
        step = self.state.best_global_step
        if not step:
            return
        best = run / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if step == self.state.global_step or best.is_dir():
            self.state.best_model_checkpoint = str(best)


@contextmanager
def only_run(directory: str | Path) -> Iterator[None]:
    """Keep other runs out of a folder until this one ends, however it ends. Call it on one process of a run.

    Two would write their checkpoints into one unfinished folder, and remove each other's files there. The system's lock
    on the folder leaves no file behind; where there is no such lock (Windows, some network disks), nothing is kept out.

    Raises:
        ValueError: Another run is in the folder.
    """
    handle = None
    try:
        os.makedirs(directory, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY)
        # The workers of a run that was killed hold its lock until they notice.
        for attempt in range(_PATIENCE + 1):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == _PATIENCE:
                    raise ValueError(
                        f"Another run is training into {str(directory)!r}, and the checkpoints of both would mix. Wait "
                        "for it to end, stop it, or name another `output_dir`."
                    ) from None
                time.sleep(1)
    except OSError:
        pass  # no lock, or no folder to write into, which the first checkpoint will say
    try:
        yield
    finally:
        if handle is not None:
            with suppress(OSError, NameError):
                # Closing is not enough: persistent workers of the data loader hold the same lock.
                fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)


def _take_name(finished: Path, name: Path) -> None:
    if name.exists():
        # A folder cannot be renamed onto one that holds files.
        os.replace(name, finished.with_name(f"{_REPLACED}{name.name}"))
    os.replace(finished, name)


def _finish_renaming(run: Path) -> None:
    """Give a checkpoint its name back if the run died in `_take_name`, when nothing had it."""
    # Only there is an unfinished folder known to be whole: elsewhere other processes may have been writing into it.
    for replaced in (run / UNFINISHED).glob(f"{_REPLACED}*"):
        name = run / replaced.name.removeprefix(_REPLACED)
        if name.exists():
            continue
        whole = next((path for path in (run / UNFINISHED / name.name, replaced) if _fault(path) is None), None)
        if whole is None:
            continue
        try:
            os.replace(whole, name)
        except OSError:
            # Each process of a run looks for its checkpoint; another one was quicker.
            if not name.exists():
                raise
        else:
            logger.warning("%s was complete when its run died, and has its name back.", name)


def last_complete_checkpoint(output_dir: str | Path) -> tuple[str | None, list[str]]:
    """The newest checkpoint that a run can go on from. One that only lacked its name is given it.

    Args:
        output_dir: Where a run left its checkpoints; need not exist.

    Returns:
        Its path, None if there is none; and each newer one that was skipped, with what is wrong with it.
    """
    directory = Path(output_dir)
    _finish_renaming(directory)
    unfinished = directory.glob(f"{UNFINISHED}/{PREFIX_CHECKPOINT_DIR}-*")
    skipped = [f"{path} (its saving was interrupted)" for path in unfinished]
    numbered = {
        int(match[1]): path
        for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name))
    }
    for _, path in sorted(numbered.items(), reverse=True):
        fault = _fault(path)
        if fault is None:
            return str(path), skipped
        skipped.append(f"{path} ({fault})")
    return None, skipped


def _fault(checkpoint: Path) -> str | None:
    """What makes a checkpoint useless, None if nothing does. Weights are not read, only their extent is checked."""
    try:
        # The last file that transformers writes.
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return f"no readable {TRAINER_STATE_NAME}"
    try:
        for index in checkpoint.glob("*.safetensors.index.json"):
            shards = set(json.loads(index.read_text())["weight_map"].values())
            if missing := [shard for shard in shards if not (checkpoint / shard).is_file()]:
                return f"no {missing[0]}"
        weights = sorted(checkpoint.glob("*.safetensors"))
        for file in weights:
            with safe_open(file, framework="pt"):
                pass
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        return f"unreadable weights: {error}"
    # Folders of FSDP and DeepSpeed.
    sharded = [*checkpoint.glob("pytorch_model*"), *checkpoint.glob("global_step*")]
    return None if weights or sharded else "no weights"
