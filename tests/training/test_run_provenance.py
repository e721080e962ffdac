"""What `provenance.json` claims: nothing that is not so of the weights beside it."""

import json

import pytest
from datasets import Dataset
from peft import IA3Config, LoraConfig
from transformers import TrainerCallback

from hf_draftkd.decoding.setting import SETTING_COLUMNS, DecodingSetting
from hf_draftkd.hub.upload_files import look_at_folder
from hf_draftkd.models.identity import ModelIdentity, weights_checksum
from hf_draftkd.training.run_provenance import author, data_facts, describe_run
from tests.tiny import tiny_pair
from tests.training.rows import alignment_rows
from tests.training.trainers import build


def test_rows_that_nobody_decoded_name_no_setting(pair, tokenizer):
    """Human answers beside generated ones: their empty settings could not be sorted, and no trainer was built."""
    written = alignment_rows(pair[1], tokenizer, count=2).to_list()
    human = written[1] | dict.fromkeys(SETTING_COLUMNS)
    assert data_facts(Dataset.from_list([written[0], human]), None)["sampling"] == [DecodingSetting()]
    assert data_facts(Dataset.from_list([human]), None)["sampling"] is None


def test_rows_of_one_name_and_several_weights_have_no_one_author():
    """Without a target at hand, rows from before and after it was tuned in its folder counted as one model's, and a
    row that knows no weights could stand between them. What is the same model has one name whatever the order.
    """

    def rows(*weights, name="tuned"):
        each = [{"target": name, "target_revision": None, "target_weights": known} for known in weights]
        return Dataset.from_list(each)

    assert author([rows("before", "after")]) is None
    assert author([rows(None, "before"), rows("after")]) is None
    assert author([rows(None, "before")]) == ModelIdentity("tuned", None, "before")
    assert author([rows("same"), rows("same", name="moved")]).name == "moved"
    assert author([]) is None


class StopAtThree(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


def test_metrics_are_those_of_the_weights(tmp_path, pair, tokenizer):
    """The last checkpoint's metrics and step on the card of the best one; an older one's, without a date."""
    rows = alignment_rows(pair[1], tokenizer)
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = build(tmp_path / "best", pair, tokenizer, rows, rows, **options, **best)
    trainer.train()
    # The loss falls, so by this choice the first checkpoint is the best one.
    assert (trainer.state.best_global_step, trainer.state.global_step) == (2, 4)
    entry = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    training = describe_run(trainer).training
    assert (training.num_steps, training.num_epochs) == (2, entry["epoch"])
    assert training.metrics["eval_loss"] == entry["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])

    trainer = build(tmp_path / "last", tiny_pair("llama"), tokenizer, rows, rows, callbacks=[StopAtThree()], **options)
    trainer.train()
    assert describe_run(trainer).training.metrics is None
    measured = trainer.evaluate()
    assert describe_run(trainer).training.metrics["eval_loss"] == measured["eval_loss"]


def test_a_second_run_into_a_folder_ends_with_its_own_checksum(tmp_path, pair, tokenizer):
    """Each checkpoint wrote the checksum of the first run's weights beside what it said of the second run, and what was
    saved at its end could not be pushed.
    """
    file = tmp_path / "provenance.json"

    def recorded():
        written = json.loads(file.read_text())
        return written["weights_sha256"], written["training"]["num_steps"]

    for steps in (1, 2):
        options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 1}
        trainer = build(tmp_path, tiny_pair("llama"), tokenizer, alignment_rows(pair[1], tokenizer), **options)
        before = recorded() if file.exists() else None
        trainer.train()
        assert (recorded() if file.exists() else None) == before, "the weights that lie there are still those"
        trainer.save_model()
        assert recorded() == (weights_checksum(tmp_path), steps)
        assert not look_at_folder(tmp_path).contradictions
    trainer.train()
    trainer.create_model_card()
    assert "weights_sha256" not in json.loads(file.read_text()), "trained further since they were saved"


@pytest.mark.parametrize("peft", [LoraConfig(modules_to_save=["lm_head"]), IA3Config()], ids=["lora", "ia3"])
def test_an_adapter_is_not_counted(tmp_path, pair, tokenizer, peft):
    """Only names with `lora_` in them were left out: not other adapters, nor whole copies beside them."""
    peft.target_modules, size = ["q_proj", "down_proj"], pair[0].num_parameters()
    if peft.peft_type == "IA3":
        peft.feedforward_modules = ["down_proj"]
    assert describe_run(build(tmp_path, pair, tokenizer, peft=peft)).pair.draft_parameters == size
