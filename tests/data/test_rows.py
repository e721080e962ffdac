import json

import pytest
from datasets import Dataset

from hf_draftkd.data.generation import generate_alignment_data
from hf_draftkd.data.prompts import load_prompts
from hf_draftkd.data.rows import render_prompts, template_hash, with_token_ids
from hf_draftkd.data.target_cache import cache_target_distributions
from tests.data.small import make_tokenizer

CHAT = {"prompt": [{"role": "user", "content": "the cat"}], "completion": [{"role": "assistant", "content": "sat"}]}
CHATS = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "on the mat?"}]]


def test_messages_are_rendered_once_with_the_generation_prompt():
    tokenizer = make_tokenizer()
    expected = tokenizer.convert_tokens_to_ids(["<s>", "<|user|>", "h", "i", "<|end|>", "<|assistant|>"])
    assert render_prompts([CHATS[0]], tokenizer) == [expected]


def test_no_beginning_of_text_token_stands_twice():
    """Fault: a template that writes `<s>` and a tokenizer that adds it give the target a text it has never seen."""
    tokenizer = make_tokenizer()
    for prompt in (CHATS[0], "the cat", "<s>the cat"):
        (ids,) = render_prompts([prompt], tokenizer)
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id


def test_plain_text_is_encoded_as_the_tokenizer_would():
    tokenizer = make_tokenizer()
    assert render_prompts(["the cat"], tokenizer) == [tokenizer("the cat")["input_ids"]]


def test_a_tokenizer_that_closes_every_text_does_not_close_the_prompt():
    tokenizer = make_tokenizer()
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|end|>", special_tokens=[("<s>", 0), ("<|end|>", 1)]
    )
    (ids,) = render_prompts(["the cat"], tokenizer)
    assert tokenizer.decode(ids) == "<s>the cat"
    (closed,) = render_prompts(["the cat<|end|>"], tokenizer)
    assert closed[-1] == tokenizer.eos_token_id


def test_tools_of_different_shape_render_alike_from_everywhere(tmp_path):
    """Arrow gives each schema the keys of all others, with null for a value: the target would read those."""

    def tool(name, **parameters):
        return {"type": "function", "function": {"name": name, "parameters": {"type": "object", **parameters}}}

    def call(name, **arguments):
        calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
        return {"role": "assistant", "content": None, "tool_calls": calls}

    weather = tool("weather", properties={"city": {"type": "string"}})
    add = tool("add", properties={"a": {"type": "integer"}}, required=["a"])
    rows = [
        {"prompt": [{"role": "user", "content": "hi"}], "tools": [weather]},
        {"prompt": [*CHATS[0], call("add", a=1), {"role": "tool", "content": "3"}], "tools": [weather, add]},
        {"prompt": [*CHATS[0], call("weather", city="Rome"), {"role": "tool", "content": "3"}], "tools": [add]},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{{ tools | tojson }}{% for message in messages %}{{ message.role }}{{ message.content }}"
        "{{ message.tool_calls | tojson if message.tool_calls else '' }}{% endfor %}"
    )
    expected = [tokenizer.apply_chat_template(row["prompt"], tools=row["tools"], tokenize=False) for row in rows]
    for source in (rows, Dataset.from_list(rows), tmp_path / "rows.jsonl", tmp_path / "rows.parquet"):
        rendered = render_prompts(load_prompts(source), tokenizer)
        assert [tokenizer.decode(ids) for ids in rendered] == expected


def test_tools_reach_the_template_as_list_and_as_json():
    tokenizer = make_tokenizer()
    tools = [{"type": "function", "function": {"name": "cat", "parameters": {}}}]
    for column in ([tools], [json.dumps(tools)]):
        rows = Dataset.from_dict({"prompt": [CHATS[0]], "tools": column})
        assert '"name": "cat"' in tokenizer.decode(render_prompts(rows, tokenizer)[0])


def test_keys_that_arrow_adds_do_not_reach_the_template():
    """Arrow gives every message the keys of all messages, and templates ask whether `tool_calls` is there at all."""
    tokenizer = make_tokenizer()
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "cat"}]}
    rows = Dataset.from_dict({"prompt": [[*CHATS[0], call, {"role": "tool", "content": "meow"}], CHATS[1]]})
    assert rows[1]["prompt"][0]["tool_calls"] is None
    assert "None" not in tokenizer.decode(render_prompts(rows, tokenizer)[1])
    assert "null" not in tokenizer.decode(render_prompts(rows, tokenizer)[1])


def test_messages_without_a_template_are_refused():
    with pytest.raises(ValueError, match="no chat template"):
        render_prompts(CHATS, make_tokenizer(template=None))


def test_a_template_that_refuses_a_prompt_names_the_row():
    tokenizer = make_tokenizer(template="{{ raise_exception('system only') }}")
    with pytest.raises(ValueError, match=r"prompt 0 .*system only"):
        render_prompts(CHATS, tokenizer)


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


def test_a_turn_may_end_with_another_token_than_a_text():
    """Gemma's turns end with `<end_of_turn>`, not `<eos>`: the line break behind it, which no target writes, stayed."""
    tokenizer = make_tokenizer(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer.add_special_tokens({"extra_special_tokens": ["<turn>"]})
    (row,) = with_token_ids(Dataset.from_list([CHAT]), tokenizer)
    assert tokenizer.decode(row["completion_ids"]) == "sat<turn>"
    # Cohere's answers end with a special token of their own, and the turn behind it.
    tokenizer.chat_template = tokenizer.chat_template.replace("<turn>", "<turn><|end|>")
    (row,) = with_token_ids(Dataset.from_list([CHAT]), tokenizer)
    assert tokenizer.decode(row["completion_ids"]) == "sat<turn><|end|>"


@pytest.mark.parametrize(
    ("completion", "got"),
    [([*CHAT["completion"], *CHAT["prompt"], *CHAT["completion"]], "3 messages"), ("sat", "text")],
)
def test_a_completion_of_several_messages_is_refused(tokenizer, completion, got):
    """All but the first were cut away without a word."""
    with pytest.raises(ValueError, match=rf"Row 0 .* must be one message, the answer, got {got}\."):
        with_token_ids(Dataset.from_list([CHAT | {"completion": completion}]), tokenizer)


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


def test_prompts_of_alignment_data_are_answered_once(target, tokenizer, caplog):
    """Answers at two temperatures, answered again: every greedy row came twice, at twice the cost, without a word."""
    options = {"max_new_tokens": 3, "temperatures": (0.0, 1.0)}
    old = generate_alignment_data(target, tokenizer, ["the cat", "a mat"], **options)
    new = generate_alignment_data(target, tokenizer, old, **options)
    assert new.to_list() == old.to_list()
    assert "holds 4 completions of 2 prompts: each of these is taken once" in caplog.text


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


def test_templates_are_told_apart():
    assert template_hash(make_tokenizer()) != template_hash(make_tokenizer(template="{{ messages }}"))
    assert template_hash(make_tokenizer(template=None)) is None
