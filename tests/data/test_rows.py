import json

import pytest
from datasets import Dataset

from hf_draftkd.data.generation import generate_alignment_data
from hf_draftkd.data.rows import with_token_ids
from hf_draftkd.data.target_cache import cache_target_distributions
from tests.data.small import make_tokenizer

CHAT = {"prompt": [{"role": "user", "content": "the cat"}], "completion": [{"role": "assistant", "content": "sat"}]}


def test_text_that_exists_gets_its_tokens(target, tokenizer):
    """Prompt and completion must join to what the template renders, end token included, and serve the cache."""
    (row,) = with_token_ids(Dataset.from_list([CHAT]), tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == "<s><|user|>the cat<|end|><|assistant|>"
    assert tokenizer.decode(row["completion_ids"]) == "sat<|end|>"
    assert row["ids_source"] == "retokenized"
    assert row["prompt"] == CHAT["prompt"]
    cached = cache_target_distributions(with_token_ids(Dataset.from_list([CHAT]), tokenizer), target, top_k=3)
    assert len(cached[0]["target_logprobs"]) == len(row["completion_ids"])


def test_plain_text_is_closed_by_the_end_token(tokenizer):
    (row,) = with_token_ids(Dataset.from_list([{"prompt": "the cat", "completion": " sat"}]), tokenizer)
    assert tokenizer.decode([*row["prompt_ids"], *row["completion_ids"]]) == "<s>the cat sat<|end|>"


def test_what_a_template_puts_behind_the_end_token_is_no_completion():
    tokenizer = make_tokenizer(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    (row,) = with_token_ids(Dataset.from_list([CHAT]), tokenizer)
    assert tokenizer.decode(row["completion_ids"]) == "sat<|end|>"


def test_a_template_that_changes_the_prompt_is_refused():
    """Templates that rewrite earlier turns once an answer follows have no completion tokens."""
    tokenizer = make_tokenizer(
        "{{ messages | length }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"Row 0 .* does not continue"):
        with_token_ids(Dataset.from_list([CHAT]), tokenizer)


def test_missing_columns_are_named(tokenizer):
    with pytest.raises(ValueError, match="column 'completion'"):
        with_token_ids(Dataset.from_list([{"prompt": "x"}]), tokenizer)


def test_columns_of_the_prompts_give_way_to_those_of_the_rows(target, tokenizer):
    """An old `completion` or `seed` among the prompts' columns must not stand beside the target's answer."""
    prompts = Dataset.from_list([{"prompt": "the cat", "completion": "an old answer", "seed": 77, "domain": "mats"}])
    (row,) = generate_alignment_data(target, tokenizer, prompts, max_new_tokens=3)
    assert row["completion"] == tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
    assert row["seed"] == 0
    assert row["domain"] == "mats"


@pytest.mark.parametrize("cache", [None, {"top_k": 4}])
def test_distributions_of_old_completions_do_not_stand_beside_new_ones(target, tokenizer, cache):
    """Catches alignment data whose prompts are answered again: a draft would learn from the old answers' p."""
    options = {"max_new_tokens": 3, "temperatures": (1.0,)}
    old = generate_alignment_data(target, tokenizer, ["the cat"], cache_distributions={"sampled": 2}, **options)
    new = generate_alignment_data(target, tokenizer, old, seed=1, cache_distributions=cache, **options)
    fresh = generate_alignment_data(target, tokenizer, ["the cat"], seed=1, cache_distributions=cache, **options)
    assert new[:] == fresh[:]


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_and_template_options_stand_in_prompt_and_conversation(as_json):
    """Catches a conversation rendered without what its prompt was rendered with: refused as if its template did it."""
    tokenizer = make_tokenizer(
        "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{{ mood }}"
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tools = [{"name": "sat", "on": "mat"}, {"name": "the"}]  # Arrow gives the second tool a null
    row = CHAT | {"tools": json.dumps(tools) if as_json else tools, "chat_template_kwargs": {"mood": "cat"}}
    (found,) = with_token_ids(Dataset.from_list([row]), tokenizer)
    assert tokenizer.decode(found["completion_ids"]) == "sat<|end|>"
    text = tokenizer.apply_chat_template(CHAT["prompt"], tools=tools, mood="cat", add_generation_prompt=True)
    assert found["prompt_ids"] == list(text["input_ids"])
