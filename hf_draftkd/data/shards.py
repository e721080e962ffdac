"""Alignment data on disk: numbered Parquet shards beside a manifest, so that a killed run goes on where it was.

    OUT/manifest.json                          what was asked for, and of which target
    OUT/data/train-00003-of-00016.parquet      a finished shard
    OUT/data/.train-00004-of-00016.parquet.17  a shard that process 17 is writing, or was when it was killed

A shard has its final name only when it is whole. `datasets` recognises these names as the split `train` and ignores
the manifest and what begins with a dot, so `load_dataset("OUT")` works.
"""

import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets, disable_progress_bars, enable_progress_bars, load_dataset
from datasets.utils import are_progress_bars_disabled
from transformers.utils import logging

from hf_draftkd.data.backends import Completion
from hf_draftkd.utils.files import replacing, write_text

logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"
DAY = "template_date"  # key of the manifest, where the chat template shows the date
_LARGEST_SHARD = 256
# Another version may still give the same rows: said, not refused. A server that comes back has another address.
_NOT_COMPARED = ("versions", "endpoint")


class StoppedError(RuntimeError):
    """The work cannot go on for now: the disk is full, or a server stopped answering. Finished shards stay valid."""


def this_process() -> PartialState:
    """One process among those that `accelerate launch` or `torchrun` started."""
    return PartialState(cpu=launched_on_cpus())


def launched_on_cpus() -> bool:
    """Whether this is one of several processes without an accelerator.

    accelerate takes each process that `torchrun` started on a CPU for the only one, unless it is told about the CPU.
    """
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()


def cut_shards(num_prompts: int, batch_size: int, shard_size: int | None = None) -> list[range]:
    """The prompts of each shard: a function of their number and the batch size, never of who does the work."""
    if shard_size is None:
        # Small enough that several processes share the work, large enough that batches of like length can be made.
        shard_size = min(max(-(-num_prompts // 16), 4 * batch_size), max(_LARGEST_SHARD, batch_size))
    if shard_size < 1:
        raise ValueError(f"`shard_size` must be at least 1, got {shard_size}.")
    shard_size = -(-shard_size // batch_size) * batch_size  # whole batches
    return [range(start, min(start + shard_size, num_prompts)) for start in range(0, num_prompts, shard_size)]


def run_shards(
    make_shard: Callable[[int, Callable[[Completion], None]], Dataset],
    sizes: Sequence[int],
    manifest: dict[str, Any],
    output_dir: Path | None,
) -> Dataset:
    """Make every shard that is not there yet, this process's share of them, and return all rows.

    Args:
        make_shard: (number of the shard, what to call after each completion) -> its rows.
        sizes: Completions of each shard.
        manifest: Everything that decides the rows.
        output_dir: Where the shards go; None keeps them in memory.
    """
    count = len(sizes)
    state = this_process()
    if output_dir is None:
        if state.num_processes > 1:
            raise ValueError("Several processes meet in a folder: give an `output_dir` that all of them can write to.")
        with completion_progress(sum(sizes)) as on_finished:
            return concatenate_datasets([make_shard(number, on_finished) for number in range(count)])
    open_folder(output_dir, manifest, write=state.is_main_process)
    unfinished = unfinished_shards(output_dir, count)
    if len(unfinished) < count:
        logger.warning(f"{output_dir} holds {count - len(unfinished)} of {count} shards; going on with the others.")
    mine = [number for number in unfinished if number % state.num_processes == state.process_index]
    with completion_progress(sum(sizes[number] for number in mine), not state.is_main_process) as on_finished:
        for number in mine:
            write_shard(output_dir, number, count, make_shard(number, on_finished))
    wait_for_shards(output_dir, count)
    if state.is_main_process:
        remove_leftovers(output_dir)
    return load_shards(output_dir, count)


@contextmanager
def completion_progress(
    total: int, disable: bool = False, desc: str = "Target answers", unit: str = "completion"
) -> Iterator[Callable[[Completion], None]]:
    """A progress bar over completions that shows tokens per second and the time left."""
    tokens, start = 0, perf_counter()
    with logging.tqdm(total=total, desc=desc, unit=unit, disable=disable) as bar:

        def on_finished(completion: Completion) -> None:
            nonlocal tokens
            tokens += len(completion.token_ids)
            bar.update(1)
            bar.set_postfix_str(f"{tokens / (perf_counter() - start):.0f} tokens/s", refresh=False)

        yield on_finished


def open_folder(folder: Path, manifest: dict[str, Any], *, write: bool = True) -> None:
    """Begin a folder of shards, or make sure that an existing one was begun with the same settings.

    Args:
        folder: Where the shards go.
        manifest: Everything that decides the rows, as JSON values.
        write: False for processes other than the first: they wait for its manifest and compare.

    Raises:
        ValueError: The folder holds other files, or shards of other settings; the message says what differs.
    """
    path = folder / MANIFEST
    if path.exists():
        _compare(json.loads(path.read_text(encoding="utf-8")), manifest, folder)
    elif not write:
        _wait_until(path.exists)
        _compare(json.loads(path.read_text(encoding="utf-8")), manifest, folder)
    else:
        check_shard_folder(folder)
        (folder / "data").mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def day_begun(folder: Path | None) -> str:
    """The day on which a folder was begun, as its manifest records it; today where there is none."""
    path = None if folder is None else folder / MANIFEST
    there = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}
    return there.get(DAY) or date.today().isoformat()


def check_shard_folder(folder: Path) -> None:
    """Refuse what no shards can go to.

    Raises:
        ValueError: It is a file, or a folder with files of somebody else's.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file. Name a folder for the shards.")
    if not folder.is_dir() or (folder / MANIFEST).exists():
        return
    if any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty and holds no {MANIFEST}, so it was not begun by this command, which will not write "
            "over it. Name another folder."
        )


def shard_path(folder: Path, number: int, count: int, split: str = "train") -> Path:
    return folder / "data" / f"{split}-{number:05d}-of-{count:05d}.parquet"


def unfinished_shards(folder: Path, count: int) -> list[int]:
    return [number for number in range(count) if not shard_path(folder, number, count).exists()]


def write_shard(folder: Path, number: int, count: int, rows: Dataset) -> None:
    """Write one shard under a temporary name, flush it to the disk, and give it its name."""

    def finished() -> str:
        return f"{count - len(unfinished_shards(folder, count))} of {count} shards are finished and stay valid"

    path = shard_path(folder, number, count)
    try:
        with _told_of_a_full_disk(f"shard {number}", folder, finished), replacing(path) as temporary:
            write_parquet(rows, temporary)
    except FileNotFoundError:
        # Another run of the same command finished this shard too, and all others, and cleared the folder.
        if not path.exists():
            raise


@contextmanager
def _told_of_a_full_disk(what: str, folder: Path, finished: Callable[[], str] | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise StoppedError(
            f"The disk is full: {what} could not be written to {folder} ({error.strerror}). "
            f"{finished() if finished else 'What is finished stays valid'}; make room and run the same command again."
        ) from error


def write_parquet(rows: Dataset, path: Path) -> None:
    with path.open("wb") as file, _no_bar_of_its_own():
        rows.to_parquet(file)
        file.flush()
        os.fsync(file.fileno())


def load_shards(folder: Path, count: int) -> Dataset:
    """All finished shards in order, memory-mapped."""
    files = [str(shard_path(folder, number, count)) for number in range(count)]
    return load_dataset("parquet", data_files=files, split="train")


def wait_for_shards(folder: Path, count: int) -> None:
    """Wait for the shards of the other processes: by looking at the folder, since a barrier would time out."""
    _wait_until(lambda: not unfinished_shards(folder, count))


def remove_leftovers(folder: Path) -> None:
    """Take away what a killed run left half written."""
    for path in (folder / "data").glob(".*"):
        path.unlink(missing_ok=True)


def write_round(folder: Path, number: int, queries: list[tuple[str, bool]]) -> None:
    """Keep one round of synthetic queries: (text, whether it came to an end)."""
    path = folder / "data" / f"round-{number:05d}.json"
    with _told_of_a_full_disk(f"round {number} of the queries", folder):
        write_text(path, json.dumps(queries, ensure_ascii=False))


def read_round(folder: Path, number: int, wait: bool = False) -> list[tuple[str, bool]] | None:
    """A kept round, or None if there is none. `wait`: another process is writing it."""
    path = folder / "data" / f"round-{number:05d}.json"
    if wait:
        _wait_until(path.exists)
    return (
        [(text, finished) for text, finished in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else None
    )


def _compare(there: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    now = json.loads(json.dumps(now))  # tuples become lists, as they did in the file
    differing = [
        f"{name}: {_shown(there, name)} there, {_shown(now, name)} now"
        for name in dict.fromkeys([*there, *now])
        if name not in _NOT_COMPARED and (name in there, there.get(name)) != (name in now, now.get(name))
    ]
    if differing:
        raise ValueError(
            f"{folder} was begun with other settings, and rows of both must not mix ({'; '.join(differing)}). Go on "
            "with the old settings, or name another folder."
        )
    if there.get("versions") != now.get("versions"):
        logger.warning(
            f"{folder} was begun with other package versions ({there.get('versions')}; now {now.get('versions')}), "
            "which may change sampled text."
        )


def _shown(manifest: dict[str, Any], name: str) -> str:
    return json.dumps(manifest[name], ensure_ascii=False) if name in manifest else "not set"


@contextmanager
def _no_bar_of_its_own() -> Iterator[None]:
    # One bar a shard, each of one batch, would tear the bar over completions apart.
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _wait_until(condition: Callable[[], bool], seconds: float = 0.5) -> None:
    while not condition():
        time.sleep(seconds)
