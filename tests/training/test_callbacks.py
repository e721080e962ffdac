"""Acceptance while training."""

import pytest

from hf_draftkd import AcceptanceCallback
from tests.training.rows import alignment_rows
from tests.training.trainers import build


def test_held_out_figures_are_logged_without_being_asked_for(tmp_path, pair, tokenizer):
    """A held-out set that is given and never looked at; a plot that is promised and not there."""
    rows = alignment_rows(pair[1], tokenizer)
    trainer = build(tmp_path, pair, tokenizer, rows, rows, max_steps=-1, num_train_epochs=2, plot=True)
    stock = trainer.evaluate()
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_acceptance_rate" in entry]
    assert [entry["epoch"] for entry in logged] == [1, 2]
    assert logged[-1]["eval_acceptance_rate"] > stock["eval_acceptance_rate"]
    assert 1 <= logged[0]["eval_block_efficiency_at_1"] <= 2
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_figures_at_each_draft_length_are_those_of_that_length(tmp_path, pair, tokenizer):
    """Columns that change places, or lengths that share one figure."""
    rows = alignment_rows(pair[1], tokenizer, count=5, temperature=0.8)
    draft, target = pair
    alone = {
        length: build(tmp_path, pair, tokenizer, eval_rows=rows, eval_num_assistant_tokens=length).evaluate()
        for length in (2, 4, 7)
    }
    trainer = build(tmp_path, (draft, target), tokenizer, eval_rows=rows, eval_num_assistant_tokens=4)
    trainer = type(trainer)(
        model=draft,
        target_model=target,
        args=trainer.args,
        eval_dataset=rows,
        processing_class=tokenizer,
        callbacks=[AcceptanceCallback([7, 2, 4])],
    )
    found = trainer.evaluate()
    assert found["eval_block_efficiency"] == alone[4]["eval_block_efficiency"]
    for length in (2, 7):
        assert found[f"eval_block_efficiency_at_{length}"] == alone[length]["eval_block_efficiency"]
    assert not any(name in found for name in ("eval_block_efficiency_at_1", "eval_block_efficiency_at_4"))


def test_callbacks_added_and_removed_later_count(tmp_path, pair, tokenizer):
    """One removed still gave its metrics, one added later or given without held-out data never did."""
    rows = alignment_rows(pair[1], tokenizer, count=2)
    trainer = build(tmp_path, pair, tokenizer, eval_rows=rows)
    trainer.remove_callback(AcceptanceCallback)
    assert "eval_block_efficiency_at_3" not in trainer.evaluate()
    trainer.add_callback(AcceptanceCallback([2], temperatures=[0.7]))
    assert {"eval_block_efficiency_at_2", "eval_acceptance_rate_t0.7"} <= trainer.evaluate().keys()
    trainer = build(tmp_path, pair, tokenizer, rows, callbacks=[AcceptanceCallback])  # Trainer takes classes too
    assert [type(each) for each in trainer.callback_handler.callbacks].count(AcceptanceCallback) == 1
    trainer = build(tmp_path, pair, tokenizer, rows, callbacks=[AcceptanceCallback([2])])
    assert "eval_block_efficiency_at_2" in trainer.evaluate(rows)


def test_why_block_efficiency_is_missing_is_said_once_for_each_set(tmp_path, pair, tokenizer):
    """It was said at every evaluation that followed a checkpoint, and of a set named `b` as if it were the only one."""
    rows = alignment_rows(pair[1], tokenizer, count=2)
    sets = {"a": rows, "b": alignment_rows(pair[1], tokenizer, count=2, name="another")}
    trainer = build(
        tmp_path,
        pair,
        tokenizer,
        rows,
        sets,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    with pytest.warns(UserWarning, match="is left out") as said:
        trainer.train()
    messages = [str(each.message) for each in said if "is left out" in str(each.message)]
    assert len(messages) == 1
    assert messages[0].startswith("eval_b_block_efficiency is left out: 2 ")


def test_data_that_is_first_given_to_evaluate_gets_the_same_metrics(tmp_path, pair, tokenizer):
    """They lacked those by temperature and draft length."""
    rows = alignment_rows(pair[1], tokenizer, count=2)
    known = build(tmp_path / "known", pair, tokenizer, rows, rows, report_to="none").evaluate()
    trainer = build(tmp_path / "later", pair, tokenizer, rows, max_steps=1)
    later = trainer.evaluate(rows)
    untimed = [
        {key: value for key, value in found.items() if "time" not in key and "second" not in key}
        for found in (known, later)
    ]
    assert untimed[0] == untimed[1]
    assert "eval_acceptance_rate_t0" in later


@pytest.mark.parametrize("length", [0, 2.5, "3", True])
def test_draft_lengths_are_whole_numbers(length):
    with pytest.raises(ValueError, match="`num_assistant_tokens` must be a whole number"):
        AcceptanceCallback([1, length])
