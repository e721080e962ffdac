"""What messages become before a template sees them, for templates that take different forms."""

import json

import pytest
from datasets import Dataset

from hf_draftkd.data.messages import read_messages, read_options, read_tools, template_form, turn_end_id
from hf_draftkd.data.rows import render_prompts, with_token_ids
from tests.data.small import TEMPLATE, make_tokenizer

TEXT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
PARTS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text | trim }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
)
# Of the user alone, as some templates have it.
USER_PARTS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'user' and m.content is not string %}"
    "{% for part in m.content %}{{ part.text or part.thinking }}"
    "{% if part.type == 'thinking' %}!{% endif %}{% endfor %}"
    "{% else %}{{ '' + m.content }}{% endif %}{% endfor %}"
)
# SmolVLM and Llava: text that stands in no part is left out.
ONLY_PARTS = (
    "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<pad>{% endfor %}"
)
OBJECT = "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
JSON = "{% for m in messages %}{% for c in m.tool_calls %}{{ '' + c.function.arguments }}{% endfor %}{% endfor %}"
PRINTED = "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments }}{% endfor %}{% endfor %}"


def user(*parts):
    return {"role": "user", "content": [{"type": "text", "text": part, "url": None} for part in parts]}


def call(arguments):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


@pytest.mark.parametrize(
    ("template", "roles", "arguments"),
    [
        (TEXT, (), None),
        (TEMPLATE, (), "object"),
        (PARTS, ("assistant", "system", "tool", "user"), None),
        (USER_PARTS, ("user",), None),
        (ONLY_PARTS, ("assistant", "system", "tool", "user"), None),
        (OBJECT, (), "object"),
        (JSON, (), "text"),
        (PRINTED, (), "text"),
        ("{{ raise_exception('no') }}", (), None),
    ],
)
def test_the_form_is_found_by_rendering(template, roles, arguments):
    """Roles in a set had another order in each process, so that `datasets` never found what it had cached."""
    form = template_form(make_tokenizer(template))
    assert (form.part_roles, form.arguments) == (roles, arguments)


@pytest.mark.parametrize(("template", "shown"), [(TEXT, "one  two"), (PARTS, "onetwo")])
def test_parts_of_text_are_joined_or_left_to_the_template(template, shown):
    """Fault: the list itself was printed into the prompt, `[{'type': 'text', ...`."""
    tokenizer = make_tokenizer(template)
    (ids,) = render_prompts([[user("one ", " two")]], tokenizer)
    assert tokenizer.decode(ids) == "<|user|>" + shown


def test_text_becomes_a_part_where_the_template_reads_nothing_else():
    """Every prompt was empty, without a word."""
    tokenizer = make_tokenizer(ONLY_PARTS)
    (ids,) = render_prompts([[{"role": "user", "content": "the cat"}]], tokenizer)
    assert tokenizer.decode(ids) == "<|user|>the cat<pad>"


@pytest.mark.parametrize("template", [TEXT, PARTS, USER_PARTS])
@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio", "video"])
def test_what_no_draft_reads_is_refused_by_row(template, kind):
    """Fault: templates that read parts pass over those they do not know, without a word."""
    prompts = [
        [user("one")],
        [{"role": "user", "content": [{"type": kind, "url": "x"}, {"type": "text", "text": "y"}]}],
    ]
    with pytest.raises(ValueError, match=f"prompt 1 .*user.*{kind}"):
        render_prompts(prompts, make_tokenizer(template))


@pytest.mark.parametrize("part", [{"type": "text"}, {"type": "text", "text": None}])
def test_a_part_without_its_text_is_refused_in_words(part):
    """Fault: "The chat template cannot render prompt 0 (from 0): 'text'"."""
    with pytest.raises(ValueError, match=r"prompt 0 .*user holds a part of type 'text' without a text"):
        render_prompts([[{"role": "user", "content": [part]}]], make_tokenizer())


def test_columns_of_json_are_read_or_named():
    """Fault: `chat_template_kwargs` as JSON, as `tools` may be, were "not a mapping"; no JSON was not named at all."""
    assert read_options('{"enable_thinking": false}') == {"enable_thinking": False}
    assert read_options("") == {}
    assert read_tools("") is None
    with pytest.raises(ValueError, match=r"its `tools` are text that is no JSON: 'search'"):
        read_tools("search")


def test_a_kind_of_part_that_the_template_names_reaches_it():
    message = {"role": "user", "content": [{"type": "thinking", "thinking": "hm"}, "then"]}
    tokenizer = make_tokenizer(USER_PARTS)
    assert tokenizer.decode(render_prompts([[message]], tokenizer)[0]) == "<|user|>hm!then"
    with pytest.raises(ValueError, match="'thinking'"):
        render_prompts([[message]], make_tokenizer(PARTS))


@pytest.mark.parametrize("given", [{"city": "Köln"}, '{"city": "Köln"}'])
@pytest.mark.parametrize("template", [OBJECT, JSON, PRINTED])
def test_arguments_are_written_once_as_json(template, given):
    """Fault: arguments in OpenAI's form, JSON text, were encoded again: a draft learns "{\\"city\\": ..."."""
    tokenizer = make_tokenizer(template)
    messages = read_messages([{"role": "user", "content": "x"}, call(given)], template_form(tokenizer))
    assert tokenizer.apply_chat_template(messages, tokenize=False) == '{"city": "Köln"}'


def test_only_a_null_in_json_text_was_meant():
    form = template_form(make_tokenizer(OBJECT))
    (read,) = read_messages([call({"a": 1, "b": None, "c": [{"d": None}]})], form)
    assert read == call({"a": 1, "c": [{}]})
    assert read_messages([call('{"a": null}')], form) == [call({"a": None})]
    tools = [{"name": "f", "parameters": {"default": None}}]
    assert read_tools(json.dumps(tools)) == tools
    assert read_tools(tools) == [{"name": "f", "parameters": {}}]
    assert (read_tools(None), read_options(None), read_options({"a": None, "b": 0})) == (None, {}, {"b": 0})


def test_text_that_exists_is_read_in_the_same_form(tokenizer):
    rows = [{"prompt": [user("the ", "cat")], "completion": [{"role": "assistant", "content": user("sat")["content"]}]}]
    (row,) = with_token_ids(Dataset.from_list(rows), tokenizer)
    assert tokenizer.decode(row["prompt_ids"] + row["completion_ids"]).endswith("the cat<|end|><|assistant|>sat<|end|>")
    rows[0]["completion"][0]["content"].append({"type": "image", "url": "x"})
    with pytest.raises(ValueError, match=r"Row 0 .*assistant.*'image'"):
        with_token_ids(Dataset.from_list(rows), tokenizer)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (TEMPLATE, "<|end|>"),
        (TEXT, None),
        (TEXT.replace("{% endfor", "<pad>\n{% endfor"), "<pad>"),
        (ONLY_PARTS, "<pad>"),
        (OBJECT, None),
    ],
)
def test_the_end_of_a_turn_is_what_follows_an_answer(template, end):
    tokenizer = make_tokenizer(template)
    assert turn_end_id(tokenizer) == (None if end is None else tokenizer.convert_tokens_to_ids(end))
