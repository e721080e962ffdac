"""Texts that share a packed row: apart, or refused; and what truncation leaves of them."""

import pytest
import torch
from datasets import Dataset

from examples.benchmarks.tiny_architectures import tiny_model
from hf_draftkd.training.packing import check_packing, longest_packed_row
from tests.tiny import tiny_gpt2, tiny_llama
from tests.training.trainers import build


def rows(count, prompt_length=6):
    """Of random tokens, each text another; the prompts have `prompt_length` tokens, the completions 5."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(6, 290, (count, prompt_length + 4), generator=generator).tolist()
    return Dataset.from_list(
        [{"prompt_ids": row[:prompt_length], "completion_ids": [*row[prompt_length:], 1]} for row in ids]
    )


@pytest.mark.parametrize("kind", ["gpt_oss", "opt", "bloom", "mpt", "biogpt", "afmoe"])
def test_architectures_whose_packed_texts_see_each_other_are_refused(tmp_path, tokenizer, kind):
    """The packed loss differed from the padded one without a word: opt 8.4881 for 7.4576."""
    leaking = tiny_model(kind)
    with pytest.raises(ValueError, match=rf"The target \(model type '{kind}'\) .* texts see each other"):
        check_packing(leaking, "target", 0)
    with pytest.raises(ValueError, match="see each other"):
        check_packing(leaking.bfloat16(), "target", 0)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "gemma3_text", "gpt_neox", "gpt_neo", "cohere", "mixtral"])
def test_architectures_that_keep_texts_apart_are_not(kind):
    check_packing(tiny_model(kind), "draft", 0)
    check_packing(tiny_model(kind).bfloat16(), "draft", 0)


@pytest.mark.parametrize("options", [{"packing": True}, {"padding_free": True, "max_length": None}])
@pytest.mark.parametrize("leaks", ["draft", "target", "reference model"])
def test_each_model_is_tried_before_the_first_step(tmp_path, tokenizer, options, leaks):
    names = ("draft", "target", "reference model")
    *pair, reference = (
        tiny_model("opt") if name == leaks else tiny_llama(seed=seed) for seed, name in enumerate(names)
    )
    options = options | {"reference_model": reference, "token_selection": "adaspec"}
    trainer = build(tmp_path, pair, tokenizer, rows(4), **options)
    with pytest.raises(ValueError, match=rf"The {leaks} \(model type 'opt'\)"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not pair[1].training, "left as it was"


def test_a_packed_row_beyond_the_context_is_tried_where_it_can_come(tmp_path, tokenizer):
    """GPT-Neo's table of masks ends there, and training died of it; GPT-2 reads on, since positions start again."""
    check_packing(tiny_model("gpt_neo"), "draft", 256)
    with pytest.raises(ValueError, match=r"packed rows longer than its context of 256 tokens: .*Lower `per_device"):
        check_packing(tiny_model("gpt_neo"), "draft", 257)
    check_packing(tiny_gpt2(), "draft", 10_000)
    trainer = build(tmp_path, (tiny_llama(), tiny_llama(1)), tokenizer, rows(30), packing=True, max_length=64)
    # Five texts of 11 tokens a row, and two rows a batch.
    assert longest_packed_row(trainer.train_dataset, 2, 64) == 110
    assert longest_packed_row(trainer.train_dataset.to_iterable_dataset(), 2, 64) == 128


def test_rows_that_were_packed_before_are_refused_where_their_texts_would_see_each_other(tmp_path, pair, tokenizer):
    """Padded batches read each of them as one text: evaluated on its own training data, a draft got other figures."""
    data = Dataset.from_list(rows(4))
    trainer = build(tmp_path, pair, tokenizer, data, packing=True, max_length=24)
    packed = trainer.train_dataset
    refused = "Rows of the {} dataset are packed .*as they were before"
    with pytest.raises(ValueError, match=refused.format("eval")):
        trainer.evaluate(packed)
    with pytest.raises(ValueError, match=refused.format("eval")):
        build(tmp_path, pair, tokenizer, data, packed)
    for options in ({}, {"packing": True, "max_length": 24}):
        with pytest.raises(ValueError, match=refused.format("train")):
            build(tmp_path, pair, tokenizer, packed, **options)
    plain = build(tmp_path, pair, tokenizer, data)
    kept_apart = build(tmp_path, pair, tokenizer, packed, padding_free=True, max_length=None)
    losses = [
        each.compute_loss(each.model, each.data_collator(list(each.train_dataset))) for each in (plain, kept_apart)
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("streams", [False, True])
def test_packing_drops_rows_of_which_only_the_prompt_is_left(tmp_path, pair, tokenizer, streams):
    """The warning said that they are dropped, but they were kept: steps of loss 0."""
    data = Dataset.from_list([*rows(2), *rows(2, prompt_length=40)])
    data = data.to_iterable_dataset() if streams else data
    trainer = build(tmp_path, pair, tokenizer, data, packing=True, max_length=24)
    (packed,) = trainer.train_dataset
    assert packed["seq_lengths"] == [11, 11]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_data_that_truncation_leaves_nothing_of_is_refused(tmp_path, pair, tokenizer, streams, packing):
    """A stream ended after 0 steps, or packed after four of loss 0, without an error."""
    data = rows(3, prompt_length=40)
    data = data.to_iterable_dataset() if streams else data
    with pytest.raises(ValueError, match=r"Nothing is left .* in the train dataset: .*max_length=24"):
        build(tmp_path, pair, tokenizer, data, packing=packing, max_length=24)


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
def test_strategies_that_cut_completions_from_their_prompts_are_refused(tmp_path, pair, tokenizer, strategy):
    """Rows that come masked as ids and labels were cut in silence."""
    options = {"packing": True, "packing_strategy": strategy}
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for row in (
        {"prompt_ids": [0, 5], "completion_ids": [6, 1]},
        {"prompt": "a", "completion": "b"},
        {"input_ids": [0, 5, 6], "completion_mask": [0, 0, 1]},
        {"input_ids": [0, 5, 6], "labels": [-100, -100, 6]},
        {"input_ids": [0, 5, 6], "assistant_masks": [0, 0, 1]},
    ):
        with pytest.raises(ValueError, match="without the prompt they answer"):
            build(tmp_path, pair, tokenizer, Dataset.from_list([row]), **options)
    with pytest.raises(ValueError, match="without the prompt they answer"):
        build(tmp_path, pair, tokenizer, Dataset.from_list([{"messages": chat}]), assistant_only_loss=True, **options)
    build(tmp_path, pair, tokenizer, Dataset.from_list([{"text": "a b"}] * 4), max_length=8, **options)
