"""Alignment data: generate, publish, load from the Hub, through the real clients in processes of their own."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset

from tests.hub.fake_hub import FakeHub
from tests.hub.test_round_trip import run

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

LOAD = """
from datasets import load_dataset
load_dataset("me/mats", split="train").to_parquet({path!r})
"""


def test_push_and_load_alignment_data(hub: FakeHub, pair, tokenizer, tmp_path: Path):
    """Catches a link that holds with a mocked client only, and a number that the way to the Hub and back changes."""
    target, prompts, out, back = (tmp_path / name for name in ("target", "prompts.jsonl", "out", "back.parquet"))
    pair[1].save_pretrained(target)
    tokenizer.save_pretrained(target)
    prompts.write_text("".join(json.dumps({"prompt": text, "n": n}) + "\n" for n, text in enumerate("abcde")))
    arguments = ["--target_model", str(target), "--dataset", str(prompts), "--output_dir", str(out)]
    arguments += ["--max_new_tokens", "6", "--temperatures", "0", "0.7", "--batch_size", "2", "--shard_size", "2"]
    arguments += ["--cache_distributions", "top_k=4", "--push_to_hub", "me/mats", "--private"]
    done = run(hub, tmp_path / "cache", "generate", *arguments)
    assert done.returncode == 0, done.stderr
    assert f"Published at {hub.url}/datasets/me/mats" in done.stdout

    repo = hub.repos["me/mats"]
    assert repo.private
    shards = [f"data/train-{number:05d}-of-00003.parquet" for number in range(3)]
    assert sorted(repo.files()) == [".gitattributes", "README.md", *shards]
    card = repo.files()["README.md"].decode()
    assert 'load_dataset("me/mats", split="train")' in card
    assert "10 completions of 5 prompts" in card
    assert str(tmp_path) not in card

    loaded = run(hub, tmp_path / "other", code=LOAD.format(path=str(back)))
    assert loaded.returncode == 0, loaded.stderr
    here, there = load_dataset(str(out), split="train"), load_dataset("parquet", data_files=str(back), split="train")
    assert there.features == here.features
    # Where the target lies on this machine is the one thing that stays here.
    assert there.remove_columns("target").to_list() == here.remove_columns("target").to_list()
    assert (set(here["target"]), set(there["target"])) == ({str(target)}, {"path/to/target"})
    assert here.features["target_logprobs"].feature.feature.dtype == "float16"
    assert all(np.shape(row["target_token_ids"]) == (len(row["completion_ids"]), 4) for row in here)
