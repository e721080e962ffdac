"""Spec-Bench's question files, by its six tasks."""

import pytest
from datasets import Dataset

from hf_draftkd.evaluation.spec_bench import is_spec_bench, spec_bench_prompts

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Compose a post.", "Rewrite it."]},
    {"question_id": 111, "category": "math", "turns": ["What is the area?", "And twice that?"]},
    {"question_id": 161, "category": "translation", "turns": ["Translate."]},
    {"question_id": 241, "category": "summarization", "turns": ["Summarise."]},
    {"question_id": 321, "category": "qa", "turns": ["Who?"]},
    {"question_id": 401, "category": "math_reasoning", "turns": ["How many?"]},
    {"question_id": 481, "category": "rag", "turns": ["Given this, what?"]},
]


def test_first_turns_by_task():
    """MT-Bench's eight categories are one of the six tasks; second turns depend on who answered the first."""
    dataset = Dataset.from_list(QUESTIONS)
    assert is_spec_bench(dataset)
    prompts = spec_bench_prompts(dataset)
    assert set(prompts["category"]) == {"mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag"}
    assert prompts["prompt"][0] == [{"role": "user", "content": "Compose a post."}]
    assert len(prompts) == len(QUESTIONS)
    assert prompts.column_names == ["category", "prompt"]


def test_other_data_is_not_taken_for_it():
    assert not is_spec_bench(Dataset.from_list([{"prompt": "x", "category": "y"}]))
    assert not is_spec_bench(Dataset.from_list([{"prompt": "x", "category": "y", "turns": ["z"]}]))


@pytest.mark.parametrize("turns", [[], [" "]])
def test_a_question_without_a_turn_is_refused(turns):
    with pytest.raises(ValueError, match=r"Question 1 .* has no first turn"):
        spec_bench_prompts(Dataset.from_list([QUESTIONS[0], {**QUESTIONS[1], "turns": turns}]))
