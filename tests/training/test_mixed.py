"""Alignment data mixed with other text, rows that are cut, rows without distributions: through the real trainer."""

import json
import logging

import pytest
from datasets import Dataset, concatenate_datasets

from hf_draftkd import DraftDistillTrainer, cache_target_distributions
from hf_draftkd.data.collator import SETTING_COLUMN
from hf_draftkd.data.rows import with_token_ids
from tests.training.rows import alignment_rows
from tests.training.trainers import build, config

WORDS = ["one two three", "four", "five six seven eight nine", "ten eleven", "twelve thirteen fourteen"]


@pytest.fixture
def text() -> Dataset:
    return Dataset.from_dict({"text": WORDS})


def text_ids(tokenizer, words):
    """As SFTTrainer has it: the end token closes each text."""
    return tokenizer(words + tokenizer.eos_token)["input_ids"]


def mixed_trainer(path, pair, tokenizer, rows, text, *, mix="1:1", **options):
    draft, target = pair
    return DraftDistillTrainer(
        model=draft,
        target_model=target,
        args=config(path, mix=mix, **options),
        train_dataset=rows,
        processing_class=tokenizer,
        mix_dataset=text,
    )


def test_each_row_is_read_by_what_it_holds(tmp_path, pair, tokenizer, text):
    """Alignment rows keep their exact ids, text is learned from on all its tokens, and the order is that of the mix."""
    rows = alignment_rows(pair[1], tokenizer, count=6)
    trainer = mixed_trainer(tmp_path, pair, tokenizer, rows, text)
    found, others = [], [text_ids(tokenizer, words) for words in WORDS]
    expected = [(row["prompt_ids"] + row["completion_ids"], len(row["prompt_ids"])) for row in rows]
    for row in trainer.train_dataset:
        assert (row[SETTING_COLUMN] is None) == (row["input_ids"] in others)
        found.append((row["input_ids"], 0 if row["input_ids"] in others else len(row["labels"])))
    assert [ids for ids, first in found if first] == [ids for ids, _ in expected]
    strewn = [ids for ids, first in found if not first]
    assert strewn == [others[number % len(others)] for number in range(len(strewn))]
    assert strewn
    labels = {str(ids): [-100] * first + ids[first:] for ids, first in [*expected, *((ids, 0) for ids in others)]}
    assert trainer.train_dataset["labels"] == [labels[str(ids)] for ids, _ in found]
    assert trainer.evaluate(rows)["eval_block_efficiency"] > 1
    trainer.train()


def test_prompts_are_masked_whatever_the_first_training_row_is(tmp_path, pair, tokenizer, text):
    """Beside training data of plain text the prompts of all other data were learned: TRL asks its first row alone."""
    pairs = Dataset.from_list([{"prompt": "one two", "completion": " three"}] * 5)
    trainer = build(tmp_path, pair, tokenizer, text, pairs, mix_dataset=pairs, mix="1:1")
    prompt = len(tokenizer("one two")["input_ids"])
    masked = [labels[:prompt] == [-100] * prompt for labels in trainer.train_dataset["labels"]]
    assert masked.count(True) == trainer.data_facts["num_mixed_rows"] > 0
    assert [labels.count(-100) for labels in trainer.eval_dataset["labels"]] == [prompt] * 5
    trainer = build(tmp_path, pair, tokenizer, text, pairs, completion_only_loss=False)
    assert -100 not in trainer.eval_dataset["labels"][0]


def test_a_formatting_function_leaves_text_alone_that_is_mixed_in(tmp_path, pair, tokenizer, text):
    """Fault: it was asked for the columns of the training data there, and failed with a bare `KeyError`."""
    asked = Dataset.from_list([{"question": "one", "answer": "two"}] * 5)
    read = {"formatting_func": lambda row: f"{row['question']} {row['answer']}", "mix": "1:1"}
    found = build(tmp_path, pair, tokenizer, asked, mix_dataset=text, **read).train_dataset["input_ids"]
    assert {str(ids) for ids in found} == {str(text_ids(tokenizer, words)) for words in ["one two", *WORDS]}
    # Rows that only the function can read go through it.
    found = build(tmp_path, pair, tokenizer, asked, mix_dataset=asked, **read).train_dataset["input_ids"]
    assert {str(ids) for ids in found} == {str(text_ids(tokenizer, "one two"))}


@pytest.mark.parametrize("other", ["chats", "pairs", "ids"])
def test_any_format_can_be_mixed_in(tmp_path, pair, tokenizer, other):
    """Not only plain text: what SFTTrainer reads alone is read in a mix."""
    rows = alignment_rows(pair[1], tokenizer, count=4)
    strewn = {
        "chats": [{"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}],
        "pairs": [{"prompt": "one two", "completion": " three"}],
        "ids": [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}],
    }[other]
    strewn = Dataset.from_list(strewn)
    alone = build(tmp_path, pair, tokenizer, strewn).train_dataset[0]
    mixed = mixed_trainer(tmp_path, pair, tokenizer, rows, strewn).train_dataset
    found = [row for row in mixed if row[SETTING_COLUMN] is None]
    assert found
    for row in found:
        assert (row["input_ids"], row["labels"]) == (alone["input_ids"], alone["labels"])


def test_a_packed_mix_holds_every_token(tmp_path, pair, tokenizer, text):
    rows = alignment_rows(pair[1], tokenizer, count=4)
    plain = mixed_trainer(tmp_path, pair, tokenizer, rows, text).train_dataset
    packed = mixed_trainer(tmp_path, pair, tokenizer, rows, text, packing=True, max_length=64).train_dataset
    assert len(packed) < len(plain)
    for name in ("input_ids", "labels"):
        assert sorted(x for row in packed for x in row[name]) == sorted(x for row in plain for x in row[name])


def test_black_box_takes_a_mix(tmp_path, pair, tokenizer, text):
    rows = alignment_rows(pair[1], tokenizer, count=4)
    trainer = mixed_trainer(tmp_path, (pair[0], None), tokenizer, rows, text, divergence="cross_entropy")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_cached_distributions_take_a_mix_that_brings_its_own(tmp_path, pair, tokenizer, text):
    """Text without distributions would need the target, which is not there: refused, with the way out, which works."""
    draft, target = pair
    rows = cache_target_distributions(alignment_rows(target, tokenizer, count=5), target, top_k=4)
    with pytest.raises(ValueError, match=r"the mix dataset holds no cached distributions.*with_token_ids"):
        mixed_trainer(tmp_path, (draft, None), tokenizer, rows, text)
    known = cache_target_distributions(with_token_ids(text, tokenizer), target, top_k=4)
    trainer = mixed_trainer(tmp_path, (draft, None), tokenizer, rows, known)
    live = mixed_trainer(tmp_path, pair, tokenizer, rows, text)
    # What SFTTrainer learns from of a text: all its tokens but the first, which nothing predicts.
    assert trainer.train_dataset["input_ids"] == live.train_dataset["input_ids"]
    labels = [[-100, *row[1:]] for row in live.train_dataset["labels"]]
    assert [[-100, *row[1:]] for row in trainer.train_dataset["labels"]] == labels
    trainer.train()
    assert trainer.data_facts["num_mixed_rows"] == len(trainer.train_dataset) - 5


def test_the_card_says_what_was_mixed_in(tmp_path, pair, tokenizer, text):
    """The facts of the alignment rows (writer, settings, tokens) stay their own."""
    rows = alignment_rows(pair[1], tokenizer, name="org/target", count=6)
    trainer = mixed_trainer(tmp_path, (pair[0], None), tokenizer, rows, text, divergence="cross_entropy", max_steps=1)
    trainer.train()
    trainer.create_model_card()
    training = json.loads((tmp_path / "provenance.json").read_text())["training"]
    mixed = len(trainer.train_dataset) - 6
    assert (training["num_rows"], training["num_mixed_rows"]) == (6, mixed)
    assert (training["completions"], training["target"]) == ("target", "org/target")
    assert training["num_tokens"] == sum(map(len, rows["completion_ids"]))
    card = (tmp_path / "README.md").read_text()
    assert f"| Mixed in | {mixed} rows of other text ({mixed / (mixed + 6):.0%} of all) |" in card


@pytest.mark.parametrize(
    ("options", "other", "message"),
    [
        ({"mix": "9:1"}, None, "no `mix_dataset` to take it from"),
        ({"mix": "9-1"}, {"text": ["a"]}, "written as two numbers, such as 9:1, got '9-1'"),
        ({}, {"question": ["a"]}, r"The mix dataset has the columns \['question'\], none of which"),
        (
            {"mix": "1:3"},
            {"text": ["a", None, "b"]},
            "Row 1 .* of the mix dataset lacks `text`",
        ),
    ],
)
def test_a_mix_that_cannot_be(tmp_path, pair, tokenizer, options, other, message):
    rows = alignment_rows(pair[1], tokenizer, count=3)
    other = None if other is None else Dataset.from_dict(other)
    with pytest.raises(ValueError, match=message):
        mixed_trainer(tmp_path, pair, tokenizer, rows, other, **{"mix": None, **options})


def test_a_stream_is_not_mixed(tmp_path, pair, tokenizer, text):
    with pytest.raises(ValueError, match="A stream does not say"):
        mixed_trainer(tmp_path, pair, tokenizer, text, text.to_iterable_dataset())


# What is not learned from is said ------------------------------------------------------------------------------------


def test_rows_that_max_length_cuts_are_counted(tmp_path, pair, tokenizer, caplog):
    rows = [
        {"prompt_ids": [0] * 10, "completion_ids": [5] * 10},
        {"prompt_ids": [0] * 10, "completion_ids": [5] * 11},
        {"prompt_ids": [0] * 25, "completion_ids": [5] * 2},
    ]
    with caplog.at_level(logging.WARNING):
        trainer = build(tmp_path, pair, tokenizer, Dataset.from_list(rows), max_length=20)
    (said,) = [record.getMessage() for record in caplog.records if "max_length" in record.getMessage()]
    assert "2 of 3 rows of the train dataset" in said
    assert "(the longest has 27): 1 are cut at the end, and 1, of which nothing to learn is left" in said
    assert len(trainer.train_dataset) == 2
    caplog.clear()
    build(tmp_path, pair, tokenizer, Dataset.from_list(rows), max_length=27)
    assert not [record for record in caplog.records if "max_length" in record.getMessage()]


def test_learning_from_exact_prompts_is_refused_by_name(tmp_path, pair, tokenizer):
    with pytest.raises(ValueError, match="`completion_only_loss=False` has no meaning for the exact tokens"):
        build(tmp_path, pair, tokenizer, completion_only_loss=False)


def test_answers_that_came_without_distributions_are_left_out_and_counted(tmp_path, pair, tokenizer, caplog):
    """An endpoint's answers of which some hold no usable log-probabilities: the others keep their own."""
    draft, target = pair
    rows = alignment_rows(target, tokenizer, count=6)
    known = cache_target_distributions(rows, target, top_k=4)
    lacking = rows.select([1, 4]).map(lambda row: {"ids_source": "retokenized"})
    data = concatenate_datasets([known.select([0]), lacking, known.select([2, 3])])
    with caplog.at_level(logging.WARNING):
        trainer = build(tmp_path, (draft, None), tokenizer, data, data)
    for name in ("train", "eval"):
        said = [each for each in caplog.messages if f"2 of 5 rows of the {name} dataset are left out" in each]
        assert len(said) == 1
    alone = build(tmp_path, (draft, None), tokenizer, eval_rows=known.select([0, 2, 3])).evaluate()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-6)
    assert len(trainer.train_dataset) == 3
    trainer.train()
