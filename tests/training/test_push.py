"""`trainer.push_to_hub()` through the real client, against a Hub on loopback."""

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_draftkd.evaluation.report import SpeculationReport
from tests.hub import samples
from tests.hub.conftest import hub as hub  # the fixture
from tests.training.rows import alignment_rows
from tests.training.trainers import build

# huggingface_hub 2.4 sends LFS parts as `data=`, which its own HTTP client deprecates; users upload through Xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


def test_a_lora_draft_is_published_merged_in_one_commit_without_pickles(hub, tmp_path, pair, tokenizer):
    """Trainer's own push uploads `training_args.bin`, adapters, and whatever else lies in the folder."""
    num_parameters = pair[0].num_parameters()
    peft = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = alignment_rows(pair[1], tokenizer)
    trainer = build(tmp_path / "out", pair, tokenizer, rows, peft=peft, hub_model_id="me/draft", max_steps=1)
    trainer.train()
    trainer.push_to_hub(private=True, license="mit")
    repo = hub.repos["me/draft"]
    files = repo.files()
    assert repo.private
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "provenance.json"} <= set(files)
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl")) or "adapter" in name]
    (tmp_path / "copy").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "copy" / name).write_bytes(files[name])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "copy").num_parameters() == num_parameters


class Tags(TrainerCallback):
    """As trackio's callback does: published beside the draft, and named on its card."""

    def on_push_begin(self, args, state, control, model, **kwargs):
        model.add_model_tags([f"private:{args.hub_private_repo}"])


def test_what_callbacks_do_before_a_push_stands_on_the_card(hub, tmp_path, pair, tokenizer):
    """Fault: `on_push_begin` was never called, and `add_model_tags` had no effect."""
    rows = alignment_rows(pair[1], tokenizer)
    trainer = build(tmp_path / "out", pair, tokenizer, rows, callbacks=[Tags()], hub_model_id="me/draft")
    trainer.push_to_hub(private=True, license="mit", tags="mine")
    tags = ModelCard(hub.repos["me/draft"].files()["README.md"].decode()).data.tags
    assert {"mine", "private:True", "hf_draftkd"} <= set(tags)
    assert len(tags) == len(set(tags))


def test_what_was_measured_and_what_people_wrote_is_published(hub, tmp_path, pair, tokenizer):
    """Fault: the report went into the folder's card alone, and the card that people had edited was written over."""
    draft, target = pair
    trainer = build(tmp_path / "out", pair, tokenizer, alignment_rows(target, tokenizer), hub_model_id="me/draft")
    trainer.save_model()
    trainer.create_model_card()
    card = tmp_path / "out" / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    models = {"draft": draft, "target": target}
    named = {kind: {"name": "", "num_parameters": model.num_parameters()} for kind, model in models.items()}
    trainer.push_to_hub(license="mit", report=SpeculationReport.from_dict(samples.report(**named)))
    files = hub.repos["me/draft"].files()
    assert "My own words." in card.read_text()
    assert b"My own words." in files["README.md"]
    assert b"Acceptance rate" in files["README.md"]
    assert "report.json" in files
