"""From an untrained draft to assisted decoding, by the commands a user types, against a Hub that answers."""

import json
from pathlib import Path

import pytest
import torch

from hf_draftkd import find_drafts, load_draft, load_target
from hf_draftkd.cli.main import dispatch
from hf_draftkd.models.loading import load_tokenizer
from tests.hub import samples
from tests.hub.conftest import snapshot
from tests.hub.fake_hub import FakeHub
from tests.tiny import TEXT

# huggingface_hub 2.4 sends LFS parts as `data=`, which its own HTTP client deprecates; users upload through Xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


def command(*words: object) -> None:
    assert dispatch([str(word) for word in words]) == 0


def test_train_evaluate_push_find_generate(hub: FakeHub, tmp_path: Path, pair, tokenizer, capsys, monkeypatch):
    """Catches a step that does not accept what the step before it wrote: no file here is made by hand."""
    monkeypatch.setenv("COLUMNS", "200")
    stock, target_folder, out = tmp_path / "stock", tmp_path / "target", tmp_path / "draft"
    for model, folder in zip(pair, (stock, target_folder), strict=True):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    license_card = {"README.md": b"---\nlicense: mit\n---\n"}
    commit = hub.add(samples.TARGET, snapshot(target_folder) | license_card).refs["main"]
    rows = [{"prompt": text[:12], "completion": text[12:]} for text in TEXT[:3]]
    data, prompts = tmp_path / "data.jsonl", tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))

    train = ["--model", stock, "--target_model", samples.TARGET, "--dataset", data, "--output_dir", out]
    command("train", *train, "--max_steps", 2, "--report_to", "none", "--use_cpu", "--save_strategy", "no")
    measure = ["--model", out, "--target_model", samples.TARGET, "--dataset", prompts, "--output_dir", out]
    command("evaluate", *measure, "--max_new_tokens", 12, "--num_speed_prompts", 1, "--baseline", stock, "--write")
    push = ["push", "--model", out, "--repo_id", "me/draft"]
    command(*push, "--dry_run")
    planned = capsys.readouterr().out
    assert "nothing was uploaded" in planned
    assert "me/draft" not in hub.repos
    command(*push)
    published = hub.repos["me/draft"].files()
    assert "license: mit" in published["README.md"].decode()
    assert "Published although" not in published["README.md"].decode()
    assert {path for path in published if path != ".gitattributes" and path not in planned} == set()
    assert not [path for path in published if path.endswith((".bin", ".pt", ".py"))]
    capsys.readouterr()
    command("find", samples.TARGET)
    assert "me/draft" in capsys.readouterr().out

    [found] = find_drafts(samples.TARGET)
    assert json.loads(published["report.json"])["target"]["revision"] == commit
    draft, target, words = load_draft(found), load_target(samples.TARGET), load_tokenizer(found)
    assert draft.generation_config.num_assistant_tokens == load_draft(out).generation_config.num_assistant_tokens
    inputs = words(rows[0]["prompt"], return_tensors="pt")
    plain = target.generate(**inputs, max_new_tokens=16, do_sample=False)
    assisted = target.generate(**inputs, assistant_model=draft, max_new_tokens=16, do_sample=False)
    assert torch.equal(plain, assisted)
