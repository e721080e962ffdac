import json
from itertools import pairwise

import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard

from hf_draftkd.data import card
from hf_draftkd.data.card import length_histogram, push_alignment_data, write_card
from hf_draftkd.data.generation import generate_alignment_data

TEXTS = ["the cat", "on", "sat on the mat, the cat", "a"]


@pytest.fixture
def folder(tmp_path, target, tokenizer):
    rows = generate_alignment_data(
        target,
        tokenizer,
        [{"prompt": text, "domain": "mats"} for text in TEXTS],
        max_new_tokens=6,
        temperatures=(0.0, 0.7),
        top_p=0.95,
        output_dir=tmp_path / "out",
        cache_distributions={"top_k": 4},
        scenario="synthetic",
        prompt_counts={"kept": 4, "repeated": 3},
    )
    return tmp_path / "out", rows


def test_the_card_says_where_the_data_come_from(folder):
    path, rows = folder
    write_card(path, rows, "me/mats")
    written = DatasetCard.load(path / "README.md")
    assert "speculative-decoding" in written.data.tags
    text = written.text
    for part in (
        'load_dataset("me/mats", split="train")',
        "8 completions of 4 prompts",
        "[tiny/target](https://huggingface.co/tiny/target)",
        "| 0.7 | 0.95 | all | 1.0 | 1 |",
        "4 kept, 3 repeated",
        f"{sum(map(len, rows['completion_ids']))} completion tokens",
        "## Licence",
    ):
        assert part in text, part
    assert "None" not in text
    for column in rows.column_names:
        assert f"| `{column}` |" in text
    assert "| `domain` | carried along from the prompts |" in text
    assert "| `target_logprobs` | their" in text


def test_the_folder_still_loads_with_its_card(folder, tmp_path, target, tokenizer):
    """Also after another folder of the same name: with `configs` in both cards, `datasets` returns the other's rows."""
    path, rows = folder
    write_card(path, rows)
    assert load_dataset(str(path), split="train").to_list() == rows.to_list()
    other = tmp_path / "elsewhere" / "out"
    others = generate_alignment_data(target, tokenizer, TEXTS[:2], max_new_tokens=3, output_dir=other)
    write_card(other, others)
    assert load_dataset(str(other), split="train").to_list() == others.to_list()


def test_paths_of_this_machine_are_not_published(folder, monkeypatch):
    """The manifest names local paths; neither it nor they go to the Hub."""
    path, rows = folder
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["target"] = manifest["prompts"]["source"] = str(path)
    (path / "manifest.json").write_text(json.dumps(manifest))
    calls = {}

    class Hub:
        def __init__(self, token):
            pass

        def create_repo(self, repo_id, **options):
            calls["created"] = (repo_id, options)
            return f"https://huggingface.co/datasets/{repo_id}"

        def upload_folder(self, **options):
            calls["uploaded"] = options

    monkeypatch.setattr(card, "HfApi", Hub)
    address = push_alignment_data(path, "me/mats", rows=rows, private=True)
    assert address == "https://huggingface.co/datasets/me/mats"
    assert calls["created"] == ("me/mats", {"repo_type": "dataset", "private": True, "exist_ok": True})
    assert calls["uploaded"]["allow_patterns"] == ["README.md", "data/train-*.parquet"]
    assert str(path) not in (path / "README.md").read_text()


def test_an_unfinished_folder_is_not_published(folder, tmp_path):
    path, rows = folder
    next(path.glob("data/train-*")).unlink()
    with pytest.raises(ValueError, match="not finished"):
        push_alignment_data(path, "me/mats", rows=rows)
    with pytest.raises(ValueError, match="no folder of alignment data"):
        push_alignment_data(tmp_path, "me/mats", rows=rows)


def test_the_histogram_counts_every_row_once():
    for sizes in ([5], [1, 1, 2], list(range(100)), [3, 300]):
        histogram = length_histogram(sizes)
        assert sum(count for _, _, count, _ in histogram) == len(sizes)
        assert histogram[0][0] == min(sizes)
        assert histogram[-1][0] <= max(sizes) <= histogram[-1][1]
        assert max(len(bar) for *_, bar in histogram) == 20
        for (_, high, *_), (low, *_) in pairwise(histogram):
            assert low == high + 1
