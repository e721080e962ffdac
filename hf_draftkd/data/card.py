"""The dataset card of alignment data, and its way to the Hub."""

import json
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset
from huggingface_hub import DatasetCard, DatasetCardData, HfApi

from hf_draftkd.data.shards import MANIFEST, unfinished_shards

_TEMPLATE = Path(__file__).parent / "templates" / "alignment_data.md"
_BARS = 20  # characters of the longest bar in the histogram

_SCENARIOS = {
    "queries": "prompts of users, answered by the target",
    "curated": "domain text cut into prompts, answered or continued by the target",
    "synthetic": "prompts that the target wrote itself, then answered",
}
_COLUMNS = {
    "prompt": "what was asked: text, or a list of messages",
    "completion": "what the target wrote, without special tokens: text, or one assistant message",
    "prompt_ids": "the exact tokens the target read",
    "completion_ids": "the exact tokens it wrote, with the end token if it wrote one; do not tokenise the text again",
    "ids_source": "`generated`: these very tokens were written; `retokenized`: encoded once from text",
    "scenario": "`queries`, `curated` or `synthetic`",
    "target": "the model that wrote the completion",
    "target_revision": "its commit on the Hub, where known",
    "temperature": "sampling temperature, 0 for greedy decoding",
    "top_p": "nucleus sampling; 1 keeps every token",
    "top_k": "top-k sampling; 0 keeps every token",
    "repetition_penalty": "1 is none",
    "seed": "seed of the data set",
    "finish_reason": "`stop`: the target ended its text; `length`: the limit did",
    "completion_logprobs": "log p of each written token",
    "target_token_ids": "per token, the likeliest tokens under the target (or those drawn)",
    "target_logprobs": "their log-probabilities, likeliest first",
    "target_tail_logprob": "the log-probability of all other tokens together",
    "target_counts": "how often each token was drawn",
    "target_temperature": "the loss temperature of the cached distributions; train at the same one",
}


def alignment_card(rows: Dataset, manifest: dict[str, Any], repo_id: str | None = None) -> DatasetCard:
    """The card of finished alignment data.

    Args:
        rows: The data.
        manifest: The manifest beside its shards.
        repo_id: Where it is published, for the example.
    """
    sizes: list[int] = []
    for part in rows.select_columns(["completion_ids"]).with_format("arrow").iter(10_000):
        sizes += pc.list_value_length(part["completion_ids"]).to_pylist()
    target = manifest["target"]
    is_local = Path(target).exists()
    name = Path(target).name if is_local else target  # where it lies on one machine concerns nobody else
    source = manifest["prompts"]["source"]
    # No `configs`: the names of the shards say which split they are, and `datasets` 5.2 takes local folders of one name
    # whose card has `configs` for the same data set, and returns the first from its cache.
    data = DatasetCardData(
        task_categories=["text-generation"],
        tags=["hf_draftkd", "speculative-decoding", "knowledge-distillation", "synthetic"],
        size_categories=[_size(len(rows))],
    )
    return DatasetCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        repo_id=repo_id,
        target=name,
        target_link=name if is_local or "/" not in name else f"[{name}](https://huggingface.co/{name})",
        revision=manifest.get("target_revision"),
        rows=len(rows),
        prompts=manifest["prompts"]["count"],
        prompts_sha256=manifest["prompts"]["sha256"],
        prompt_counts=manifest.get("prompt_counts"),
        source=f"`{Path(source).name if Path(source).exists() else source}`",
        scenario=manifest["scenario"],
        scenario_text=_SCENARIOS[manifest["scenario"]],
        dtype=manifest.get("target_dtype"),
        weights=manifest.get("target_weights"),
        chat_template=manifest["chat_template"],
        max_new_tokens=manifest["max_new_tokens"],
        seed=manifest["seed"],
        versions=manifest["versions"],
        settings=manifest["settings"],
        tokens=sum(sizes),
        mean=f"{sum(sizes) / len(sizes):.1f}",
        stopped=sum(reason == "stop" for reason in rows["finish_reason"]),
        histogram=length_histogram(sizes),
        columns=[(column, _COLUMNS.get(column, "carried along from the prompts")) for column in rows.column_names],
    )


def length_histogram(sizes: list[int], bins: int = 8) -> list[tuple[int, int, int, str]]:
    """Rows by length: (shortest, longest, how many, a bar), in intervals of equal width."""
    low, high = min(sizes), max(sizes)
    width = max(1, -(-(high - low + 1) // bins))
    counts = [0] * -(-(high - low + 1) // width)
    for size in sizes:
        counts[(size - low) // width] += 1
    most = max(counts)
    return [
        (low + number * width, low + (number + 1) * width - 1, count, "█" * round(_BARS * count / most))
        for number, count in enumerate(counts)
    ]


def write_card(folder: Path, rows: Dataset, repo_id: str | None = None) -> None:
    """Put the card beside finished shards, as their README."""
    manifest = json.loads((folder / MANIFEST).read_text())
    temporary = folder / ".README.md"
    temporary.write_text(str(alignment_card(rows, manifest, repo_id)), encoding="utf-8")
    temporary.replace(folder / "README.md")


def push_alignment_data(
    folder: "str | Path", repo_id: str, *, rows: Dataset, private: bool | None = None, token: str | None = None
) -> str:
    """Publish a finished folder of alignment data with its card; returns the address.

    Raises:
        ValueError: The folder is not finished.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        raise ValueError(f"{folder} holds no {MANIFEST}, so it is no folder of alignment data.")
    count = json.loads((folder / MANIFEST).read_text())["num_shards"]
    if unfinished := unfinished_shards(folder, count):
        raise ValueError(f"{len(unfinished)} of {count} shards in {folder} are not finished. Go on with the run first.")
    write_card(folder, rows, repo_id)
    api = HfApi(token=token)
    address = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    api.upload_folder(
        repo_id=repo_id,
        repo_type="dataset",
        folder_path=str(folder),
        # The manifest names paths of this machine; the card says what concerns others.
        allow_patterns=["README.md", "data/train-*.parquet"],
        commit_message="Alignment data",
    )
    return str(address)


def _size(rows: int) -> str:
    for limit, name in ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M")):
        if rows < limit:
            return name
    return "n>1M" if rows >= 10**7 else "1M<n<10M"
