"""Alignment data on disk: numbered Parquet shards beside a manifest, so that a killed run can be resumed.

    OUT/manifest.json                          what was asked for, and of which target
    OUT/data/train-00003-of-00016.parquet      a finished shard
    OUT/data/.train-00004-of-00016.journal     what was answered of a shard that is not finished
    OUT/data/.train-00004-of-00016.parquet.17  a shard that process 17 is writing, or was when it was killed

A shard has its final name only when it is whole. `datasets` recognises these names as the split `train` and ignores
the manifest and what begins with a dot, so `load_dataset("OUT")` works. One run at a time writes to a folder.
"""

import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import date
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, Features, concatenate_datasets, disable_progress_bars, enable_progress_bars, load_dataset
from datasets.exceptions import DatasetGenerationError
from datasets.utils import are_progress_bars_disabled
from pyarrow import ArrowInvalid
from pyarrow.parquet import read_metadata
from transformers.utils import logging

from hf_draftkd.data.backends import Completion
from hf_draftkd.data.journal import Journal
from hf_draftkd.data.rows import author_of, other_authors
from hf_draftkd.utils.files import only_run, replacing, write_text
from hf_draftkd.utils.text import one_line

logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"
DAY = "template_date"  # key of the manifest, where the chat template shows the date
_LARGEST_SHARD = 256
# Another version may still give the same rows: reported, not refused. A server that comes back has another address.
_NOT_COMPARED = ("versions", "endpoint")
# Where the weights are the same, the folder they lie in does not matter.
_PLACES = ("target", "target_revision", "target_is_local")


class StoppedError(RuntimeError):
    """The work cannot continue for now: the disk is full, or a server stopped answering. Finished shards stay valid."""


def this_process() -> PartialState:
    """One process among those that `accelerate launch` or `torchrun` started."""
    return PartialState(cpu=launched_on_cpus())


def launched_on_cpus() -> bool:
    """Whether this is one of several processes without an accelerator.

    accelerate takes each process that `torchrun` started on a CPU for the only one, unless it is told about the CPU.
    """
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()


def check_processes(folder: Path | None) -> PartialState:
    """Return this process; several of them are refused where no folder is given in which they could meet."""
    state = this_process()
    if folder is None and state.num_processes > 1:
        raise ValueError("Several processes meet in a folder: give an `output_dir` that all of them can write to.")
    return state


def cut_shards(num_prompts: int, batch_size: int, shard_size: int | None = None) -> list[range]:
    """The prompts of each shard: a function of their number and the batch size, never of who does the work."""
    if shard_size is None:
        # Small enough that several processes share the work, large enough that batches of like length can be made.
        shard_size = min(max(-(-num_prompts // 16), 4 * batch_size), max(_LARGEST_SHARD, batch_size))
    shard_size = -(-shard_size // batch_size) * batch_size  # whole batches
    return [range(start, min(start + shard_size, num_prompts)) for start in range(0, num_prompts, shard_size)]


def run_shards(
    make_shard: Callable[[int, Journal], Dataset],
    sizes: Sequence[int],
    manifest: dict[str, Any],
    output_dir: Path | None,
    brought: Features | None = None,
) -> Dataset:
    """Make every shard that is not there yet, this process's share of them, and return all rows.

    Args:
        make_shard: (number of the shard, what was answered of it and where answers are noted) -> its rows.
        sizes: Completions of each shard.
        manifest: Everything that decides the rows.
        output_dir: Where the shards go; None keeps them in memory.
        brought: Columns that completions bring along.
    """
    count = len(sizes)
    check_processes(output_dir)
    if output_dir is None:
        with completion_progress(sum(sizes)) as on_finished:
            journal = Journal(None, brought, on_finished)
            return concatenate_datasets([make_shard(number, journal) for number in range(count)])
    # What is finished may be read by several runs at a time.
    with alone_in(output_dir) if unfinished_shards(output_dir, count) else nullcontext():
        _write_shards(make_shard, sizes, manifest, output_dir, brought)
    files = [shard_path(output_dir, number, count) for number in range(count)]
    if not any(map(_num_rows, files)):
        raise StoppedError(f"Every prompt was refused and left out: {output_dir} holds no rows. Name another folder.")
    try:
        return load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    except (DatasetGenerationError, OSError) as error:
        reason = one_line(error.__cause__ or error)
        raise StoppedError(
            f"All shards are finished in {output_dir}, but `datasets` cannot read them into its cache ({reason}). Make "
            "room there, or set HF_DATASETS_CACHE to a folder on another disk, and run the same command again."
        ) from error


def _write_shards(
    make_shard: Callable[[int, Journal], Dataset],
    sizes: Sequence[int],
    manifest: dict[str, Any],
    output_dir: Path,
    brought: Features | None,
) -> None:
    """Make this process's share of the shards that are not there yet, and wait for the others'."""
    count, state = len(sizes), this_process()
    open_folder(output_dir, manifest, write=state.is_main_process)
    unfinished = unfinished_shards(output_dir, count)
    for number in sorted(set(range(count)) - set(unfinished)):
        _num_rows(shard_path(output_dir, number, count))  # a copy may have been cut off
    if len(unfinished) < count:
        left = "resuming with the others" if unfinished else "nothing is left to answer"
        logger.warning(f"{output_dir} holds {count - len(unfinished)} of {count} shards; {left}.")
    mine = [number for number in unfinished if number % state.num_processes == state.process_index]
    with completion_progress(sum(sizes[number] for number in mine), not state.is_main_process) as on_finished:
        for number in mine:
            path = shard_path(output_dir, number, count)
            unfinished_path = path.with_name(f".{path.stem}.journal")
            with (
                full_disk_is_reported(f"shard {number}", output_dir),
                Journal(unfinished_path, brought, on_finished) as journal,
            ):
                rows = make_shard(number, journal)
                with replacing(path) as temporary:
                    write_parquet(rows, temporary)
    # The other processes' shards: by looking at the folder, since a barrier would time out.
    wait_until(lambda: not unfinished_shards(output_dir, count))
    if state.is_main_process:
        for pattern in (".train-*.journal", ".train-*.parquet.*"):
            for left_by_a_killed_run in (output_dir / "data").glob(pattern):
                left_by_a_killed_run.unlink(missing_ok=True)


def _num_rows(shard: Path) -> int:
    """Rows of a shard; a `ValueError` if it is damaged."""
    try:
        return read_metadata(shard).num_rows
    except (ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{shard} is damaged: {error} Restore it; or delete it, and the same command answers its prompts again."
        ) from None


def alone_in(folder: Path | None) -> AbstractContextManager[None]:
    """Keep other runs out of a folder, on behalf of all processes of this one."""
    return only_run(folder) if folder is not None and this_process().is_main_process else nullcontext()


@contextmanager
def completion_progress(total: int, disable: bool = False) -> Iterator[Callable[..., None]]:
    """A progress bar over completions that shows tokens per second and the time left."""
    tokens, start = 0, perf_counter()
    with logging.tqdm(total=total, desc="Target answers", unit="completion", disable=disable) as bar:

        def on_finished(completions: Mapping[Any, Completion], *, written: bool = True) -> None:
            nonlocal tokens
            tokens += sum(len(each.token_ids) for each in completions.values()) if written else 0
            bar.update(len(completions))
            bar.set_postfix_str(f"{tokens / (perf_counter() - start):.0f} tokens/s", refresh=False)

        yield on_finished


def open_folder(folder: Path, manifest: dict[str, Any], *, write: bool = True) -> None:
    """Begin a folder of shards, or make sure that an existing one was begun with the same settings.

    The manifest holds everything that decides the rows, as JSON values. Processes other than the first do not `write`
    it: they wait for the first one's and compare.

    Raises:
        ValueError: The folder holds other files, or shards of other settings; the message says what differs.
    """
    path = folder / MANIFEST

    def holds_rows() -> bool:
        return any(not each.name.startswith(".") for each in (folder / "data").glob("*"))

    if write and not (path.exists() and holds_rows()):  # nothing that other settings could be mixed with
        check_shard_folder(folder)
        with full_disk_is_reported(f"the {MANIFEST}", folder):
            (folder / "data").mkdir(parents=True, exist_ok=True)
            if path.exists() and _differences(folder, manifest):
                for answered_otherwise in (folder / "data").glob(".train-*.journal"):
                    answered_otherwise.unlink()
            write_text(path, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
        return
    # A manifest of other settings is about to be replaced where nothing was finished.
    wait_until(lambda: path.exists() and (holds_rows() or not _differences(folder, manifest)))
    if differing := _differences(folder, manifest):
        raise ValueError(
            f"{folder} was begun with other settings, and rows of both must not mix ({'; '.join(differing)}). Resume "
            "with the old settings, or name another folder."
        )
    there, now = _read_manifest(folder), manifest
    if there.get("versions") != now.get("versions"):
        logger.warning(
            f"{folder} was begun with other package versions ({there.get('versions')}; now {now.get('versions')}), "
            "which may change sampled text."
        )


def day_begun(folder: Path | None) -> str:
    """The day on which a folder was begun, as its manifest records it; today where there is none."""
    there = {} if folder is None or not (folder / MANIFEST).exists() else _read_manifest(folder)
    return there.get(DAY) or date.today().isoformat()


def check_shard_folder(folder: Path) -> None:
    """Raise a `ValueError` for what no shards can go to: a file, or a folder with somebody else's files."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file. Name a folder for the shards.")
    if (folder / MANIFEST).exists():
        _read_manifest(folder)
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty and holds no {MANIFEST}, so it was not begun by this command, which will not write "
            "over it. Name another folder."
        )


def shard_path(folder: Path, number: int, count: int) -> Path:
    return folder / "data" / f"train-{number:05d}-of-{count:05d}.parquet"


def unfinished_shards(folder: Path, count: int) -> list[int]:
    return [number for number in range(count) if not shard_path(folder, number, count).exists()]


@contextmanager
def full_disk_is_reported(what: str, folder: Path) -> Iterator[None]:
    """Turn the error of a full disk into a `StoppedError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        finished = len(list((folder / "data").glob("train-*")))
        raise StoppedError(
            f"The disk is full: {what} could not be written to {folder} ({error.strerror}). {finished} shards are "
            "finished and stay valid; make room and run the same command again."
        ) from error


def write_parquet(rows: Dataset, path: Path) -> None:
    """Write and flush to the disk; without a bar, which would break up the one over completions."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with path.open("wb") as file:
            rows.to_parquet(file)
            file.flush()
            os.fsync(file.fileno())
    finally:
        if shown:
            enable_progress_bars()


def wait_until(condition: Callable[[], bool]) -> None:
    """Look again and again, until another process has done its part."""
    while not condition():
        time.sleep(0.5)


def _differences(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """What differs between a folder's manifest and this one, in words."""
    there, now = _read_manifest(folder), json.loads(json.dumps(manifest))  # tuples become lists, as in the file
    began, target = author_of(there), author_of(now)
    same_weights = None if began is None or target is None else began.has_weights_of(target)
    left_out = (*_NOT_COMPARED, *(_PLACES if same_weights else ()))
    another = other_authors([began], target) if target is not None and same_weights is False else []
    return [f"the target was {each}" for each in another] + [
        f"{name}: {_shown(there, name)} there, {_shown(now, name)} now"
        for name in dict.fromkeys([*there, *now])
        if name not in left_out and (name in there, there.get(name)) != (name in now, now.get(name))
    ]


def _read_manifest(folder: Path) -> dict[str, Any]:
    """What a folder was begun with; a `ValueError` where that file is somebody else's, which many programs call so."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or "schema_version" not in manifest:
        raise ValueError(
            f"{folder} holds a {MANIFEST} of something else: `draftkd generate` writes another. Name another folder."
        )
    return manifest


def _shown(manifest: dict[str, Any], name: str) -> str:
    return json.dumps(manifest[name], ensure_ascii=False) if name in manifest else "not set"
