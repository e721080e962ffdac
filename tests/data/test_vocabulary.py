"""Which tokens a draft proposes, and where the list is kept."""

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, GenerationConfig

from hf_draftkd import SpeculativeDecoding, choose_draft_vocabulary
from hf_draftkd.cli.main import dispatch
from hf_draftkd.data.vocabulary import vocabulary_coverage
from tests.tiny import tiny_prompts
from tests.training.rows import alignment_rows

ROWS = Dataset.from_list([{"completion_ids": ids} for ids in ([7, 7, 7, 2], [9, 2, 9, 250], [], [7])])


def test_the_likeliest_come_first_and_prefixes_are_the_smaller_lists():
    """Catches counts that are overwritten between batches of different range, and an order that changes by size."""
    assert choose_draft_vocabulary(ROWS, 4) == [7, 2, 9, 250]
    assert choose_draft_vocabulary(ROWS, 2) == [7, 2]
    assert choose_draft_vocabulary(ROWS, 3, keep=[1, 9]) == [1, 9, 7]
    assert choose_draft_vocabulary(ROWS, 100) == [7, 2, 9, 250], "what never occurs is not made up"
    assert vocabulary_coverage(ROWS, [7, 2]) == 6 / 9
    many = Dataset.from_list([{"completion_ids": [5 + (row >= 1000)]} for row in range(2500)])
    assert choose_draft_vocabulary(many, 2) == [6, 5]


def test_tokens_of_prompts_fill_the_list():
    """Catches a short list where answers will repeat names from prompts, and prompts that displace what was written."""
    rows = Dataset.from_list([{"completion_ids": [7, 2], "prompt_ids": [5, 5, 7, 1]}] * 2)
    assert choose_draft_vocabulary(rows, 2) == [2, 7]
    assert choose_draft_vocabulary(rows, 3) == [2, 7, 5]
    assert choose_draft_vocabulary(rows, 9) == [2, 7, 5, 1]


def test_data_without_exact_ids_is_refused():
    with pytest.raises(ValueError, match="completion_ids"):
        choose_draft_vocabulary(Dataset.from_list([{"text": "a"}]), 3)
    with pytest.raises(ValueError, match="no completion tokens"):
        choose_draft_vocabulary(Dataset.from_list([{"completion_ids": []}]), 3)
    with pytest.raises(ValueError, match="size"):
        choose_draft_vocabulary(ROWS, 0)


def test_the_command_records_the_list_and_assisted_decoding_ignores_it(saved_pair, tmp_path, tokenizer, capsys):
    """Catches a list that is lost on the way through `save_pretrained`, and one that other decoding stumbles over."""
    draft_path, target_path = saved_pair
    target = AutoModelForCausalLM.from_pretrained(target_path)
    alignment_rows(target, tokenizer).to_json(tmp_path / "rows.jsonl")
    words = ["vocabulary", "--model", str(draft_path), "--dataset", str(tmp_path / "rows.jsonl")]
    assert dispatch([*words, "--size", "5000"]) == 0
    assert "No more different tokens occur" in capsys.readouterr().out
    assert dispatch([*words, "--size", "8"]) == 0
    ids = GenerationConfig.from_pretrained(draft_path).draft_vocabulary
    assert len(ids) == 8
    assert f"The draft may propose 8 of {target.config.vocab_size} tokens" in capsys.readouterr().out

    draft = AutoModelForCausalLM.from_pretrained(draft_path)
    draft.save_pretrained(tmp_path / "again")
    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert SpeculativeDecoding(draft)._proposable.ids.tolist() == sorted(ids)
    prompt = tiny_prompts(tokenizer, 1)[0]
    plain = target.generate(prompt, max_new_tokens=12, do_sample=False)
    assisted = target.generate(prompt, max_new_tokens=12, do_sample=False, assistant_model=draft)
    ours = target.generate(prompt, max_new_tokens=12, do_sample=False, custom_generate=SpeculativeDecoding(draft))
    assert assisted.tolist() == plain.tolist() == ours.tolist()
    assert draft.get_output_embeddings().weight.shape[0] == draft.config.vocab_size


def test_bad_usage_changes_nothing(saved_pair, tmp_path, capsys):
    draft_path, _ = saved_pair
    before = (draft_path / "generation_config.json").read_text()
    Dataset.from_list([{"completion_ids": [100_000]}]).to_json(tmp_path / "foreign.jsonl")
    words = ["vocabulary", "--model", str(draft_path), "--size", "4"]
    for dataset, message in ((tmp_path / "foreign.jsonl", "got [100000]"), (tmp_path / "none.jsonl", "none.jsonl")):
        assert dispatch([*words, "--dataset", str(dataset)]) == 2
        assert message in capsys.readouterr().err
    assert dispatch(["vocabulary", "--model", "org/draft", "--size", "4", "--dataset", "x"]) == 2
    assert "must be a local folder with a whole model" in capsys.readouterr().err
    assert (draft_path / "generation_config.json").read_text() == before
