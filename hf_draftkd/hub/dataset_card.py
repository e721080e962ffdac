"""The dataset card of alignment data, and its way to the Hub."""

import json
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from huggingface_hub.utils import validate_repo_id

from hf_draftkd.data.columns import distinct, row_lengths
from hf_draftkd.data.shards import MANIFEST, unfinished_shards
from hf_draftkd.hub.access import writing_token
from hf_draftkd.hub.card_merge import CARD_FILE, Place, local_card, merged, read_card
from hf_draftkd.hub.markdown import code, hub_link, render_card
from hf_draftkd.hub.public_names import is_public, public_name, public_source
from hf_draftkd.hub.repository import Repository
from hf_draftkd.hub.upload_files import PlannedFile, shard_files
from hf_draftkd.utils.files import write_text

SECTIONS = ("summary", "use", "origin", "decoding", "lengths", "columns", "licence")
# Rows of an earlier push under other names would be loaded as if they belonged to the new ones.
_SHARDS = ["data/train-*.parquet"]
_BARS = 20  # characters of the longest bar in the histogram


def alignment_card(rows: Dataset, manifest: dict[str, Any], repo_id: str | None = None) -> DatasetCard:
    """The card of finished alignment data, from the rows and the manifest beside their shards.

    Names of columns, targets and sources are data that somebody else may have written: the template escapes all that
    is not marked as `Markdown`, as the cards of drafts do. `repo_id` is where it is published, for the example.
    """
    sizes = row_lengths(rows, "completion_ids").tolist()
    target = public_target(manifest) or "a model without a name"
    # No `configs`: the names of the shards say which split they are, and `datasets` 5.2 takes local folders of one name
    # whose card has `configs` for the same data set, and returns the first from its cache.
    data = DatasetCardData(
        task_categories=["text-generation"],
        tags=["hf_draftkd", "speculative-decoding", "knowledge-distillation", "synthetic"],
        size_categories=[_size(len(rows))],
    )
    absent = dict.fromkeys(("target_revision", "prompt_counts", "target_dtype", "target_weights", "backend"))
    known = {
        "target": target,
        "target_link": hub_link(target) if is_public(target) else code(target),
        "repo_id": repo_id or "PATH_OR_ID",
        "rows": len(rows),
        "source": public_source(manifest["prompts"]["source"]),
        "all_exact": distinct(rows, ["ids_source"]) == [{"ids_source": "generated"}],
        "tokens": sum(sizes),
        "mean": f"{sum(sizes) / len(sizes):.1f}",
        "stopped": sum(reason == "stop" for reason in rows["finish_reason"]),
        "histogram": length_histogram(sizes),
        "columns": rows.column_names,
    }
    body = render_card("alignment_data_card.md", SECTIONS, absent | manifest | known)
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def public_target(manifest: dict[str, Any]) -> str:
    """The target's name for others: where it lies on one machine concerns nobody else. Empty where it has none."""
    target = manifest["target"]
    return public_name(target, manifest.get("target_is_local")) if target else ""


def length_histogram(sizes: list[int]) -> list[tuple[int, int, int, str]]:
    """Rows by length: (shortest, longest, how many, a bar), in up to 8 intervals of equal width."""
    low, high = min(sizes), max(sizes)
    width = max(1, -(-(high - low + 1) // 8))
    counts = Counter((size - low) // width for size in sizes)
    most = max(counts.values())
    return [
        (start, start + width - 1, count := counts[number], "█" * round(_BARS * count / most))
        for number, start in enumerate(range(low, high + 1, width))
    ]


def write_card(folder: Path, rows: Dataset, repo_id: str | None = None) -> None:
    """Put the card beside finished shards, as their README; words and metadata that people added to it are kept."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    _write_merged(folder, alignment_card(rows, manifest, repo_id))


def _write_merged(folder: Path, fresh: DatasetCard) -> DatasetCard:
    card, _ = merged(fresh, local_card(DatasetCard, folder))
    write_text(folder / CARD_FILE, str(card))
    return card


def push_alignment_data(
    folder: str | Path,
    repo_id: str,
    *,
    rows: Dataset,
    private: bool | None = None,
    prose: Place | None = None,
    token: str | None = None,
) -> str:
    """Publish a finished folder of alignment data with its card, in one commit; returns the address.

    The shards of an earlier push go out in the same commit. What people wrote into the card, on the Hub or in the
    folder, is kept, its licence above all. Paths of this machine stay here: rows of a local target are uploaded with
    its public name, from copies in a temporary folder beside the data, whose disk must hold them. Arguments and errors
    are as in `push_draft`; `rows` are the data in the folder.
    """
    validate_repo_id(repo_id)
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        raise ValueError(f"{folder} holds no {MANIFEST}, so it is not a folder of alignment data.")
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    count = manifest["num_shards"]
    if unfinished := unfinished_shards(folder, count):
        raise ValueError(f"{len(unfinished)} of {count} shards in {folder} are not finished. Resume the run first.")
    afterwards = f"Nothing was published; the data are finished in {folder}: the same command publishes them."
    api = HfApi(token=writing_token(token))
    there = Repository.look(api, repo_id, private=private, afterwards=afterwards, repo_type="dataset")
    fresh = alignment_card(rows, manifest, there.repo_id)
    local, remote = _write_merged(folder, fresh), read_card(DatasetCard, there.card, f"the card of {there.repo_id}")
    card, _ = merged(fresh, local, remote, prose)
    with TemporaryDirectory(prefix=".publishing-", dir=folder) as scratch:
        # The manifest names paths of this machine and stays here; the card says what concerns others.
        files = [PlannedFile(CARD_FILE, str(card).encode())]
        files += shard_files(folder, count, public_target(manifest), Path(scratch))
        url, _, _ = there.commit(files, there.stale(_SHARDS, files), "Alignment data", private=private)
    return str(url)


def _size(rows: int) -> str:
    names = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "n>1M")
    return names[min(max(len(str(rows)) - 3, 0), len(names) - 1)]
