"""What the trainer makes of rows as users bring them: the texts and labels that a draft learns from."""

import json

import pytest
from datasets import Dataset, load_dataset

from tests.tiny import tiny_tokenizer
from tests.training.rows import alignment_rows
from tests.training.trainers import build

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{{ mood or '' }}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PAIR = {"prompt": "one two", "completion": " three"}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **arguments):
    calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
    return {"role": "assistant", "content": content} | ({"tool_calls": calls} if arguments else {})


def tool(**properties):
    return {"type": "function", "function": {"name": "f", "parameters": properties}}


# Of which Arrow makes one type, with the keys of both.
CALLS = [
    {"messages": [user("hi"), assistant("", city="x")], "tools": [tool(city={"type": "string"})]},
    {"messages": [user("hi"), assistant("", n=1)], "tools": [tool(n={"type": "integer"})]},
    {"messages": [user("hi"), assistant("yes")], "tools": None},
]


@pytest.fixture
def learned(tmp_path, pair):
    """Function: (text, text that is learned from) of each row after the trainer has prepared them."""

    def prepared(rows, template=TEMPLATE, **options):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
        made = build(tmp_path, pair, tokenizer, dataset, **options).train_dataset
        return [
            (tokenizer.decode(row["input_ids"]), tokenizer.decode([each for each in row["labels"] if each != -100]))
            for row in made
        ]

    return prepared


def rendered(rows):
    """The conversations as they were written, before Arrow had them."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return [tokenizer.apply_chat_template(row["messages"], tools=row["tools"], tokenize=False) for row in rows]


@pytest.mark.parametrize("source", ["dataset", "parquet", "jsonl", "stream", "conversations", "pairs"])
def test_no_null_of_arrow_is_learned(tmp_path, learned, source):
    """Fault: with another row's keys the draft learned `{"city": "x", "n": null}`, which no target writes."""
    expected = rendered(CALLS)
    assert '{"n": 1}' in expected[1]
    assert not any("null" in text for text in expected)
    rows, options = CALLS, {}
    if source == "parquet":
        Dataset.from_list(CALLS).to_parquet(tmp_path / "rows.parquet")
        rows = load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train")
    elif source == "jsonl":
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, CALLS)))
        rows = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train")
    elif source == "stream":
        rows, options = Dataset.from_list(CALLS).to_iterable_dataset(), {"max_steps": 1}
    elif source == "conversations":
        rows = [{"conversations": row["messages"], "tools": row["tools"]} for row in CALLS]
    elif source == "pairs":
        rows = [
            {"prompt": row["messages"][:1], "completion": row["messages"][1:], "tools": row["tools"]} for row in CALLS
        ]
    found = learned(rows, **options)
    assert [text for text, _ in found] == expected
    if source == "pairs":
        assert [text for _, text in found] == ['{"city": "x"}</s>', '{"n": 1}</s>', "yes</s>"]


def test_options_of_the_template_are_each_rows_own(learned):
    """Fault: `TypeError: 'NoneType' object is not a mapping` where one row has none."""
    talk = {"messages": [user("a"), assistant("b")]}
    kwargs = [{"mood": "sad"}, {"other": 1}, None]
    found = learned([talk | {"chat_template_kwargs": each} for each in kwargs])
    assert [text.split("<|user|>")[0] for text, _ in found] == ["sad", "", ""]


@pytest.mark.parametrize(
    "extra",
    [
        {"text": "some text"},
        *({"labels": labels} for labels in (1, "good", [1, 2])),
        *({"decoding": each} for each in ("greedy", {"beams": 2})),
        *({"input_ids": each} for each in ("A1", ["a", "b"])),
        {"hf_draftkd": 1, "cache_index": 3, "completion_mask": [1], "assistant_masks": [0], "seq_lengths": 7},
        {"tools": "a hammer", "chat_template_kwargs": None},
        {"messages": [user("a"), assistant("b")]},
    ],
    ids=str,
)
def test_columns_that_a_format_does_not_need_are_left_aside(learned, extra):
    """Fault: `text` took the end token from every completion, silently; `labels` [1, 2] became the labels."""
    assert learned([PAIR | extra] * 2) == [("one two three</s>", " three</s>")] * 2


@pytest.mark.parametrize("extra", [{"prompt": "x"}, {"text": "x", "labels": 1, "decoding": "greedy"}], ids=str)
@pytest.mark.parametrize("streamed", [False, True])
def test_messages_need_no_other_column(learned, extra, streamed):
    rows = Dataset.from_list([{"messages": [user("a"), assistant("b")], **extra}] * 2)
    found = learned(rows.to_iterable_dataset() if streamed else rows, max_steps=1)
    assert [text for text, _ in found] == ["<|user|>a</s><|assistant|>b</s>"] * 2


def test_ids_keep_their_labels_and_nothing_else(learned, tokenizer):
    ids = tokenizer("one two")["input_ids"]
    masked = {"input_ids": ids, "labels": [-100, *ids[1:]]}
    assert learned([masked | {"decoding": "x"}]) == [("one two", tokenizer.decode(ids[1:]))]
    assert learned([{"input_ids": ids, "labels": "good"}]) == [("one two", "one two")]
    with pytest.raises(ValueError, match=r"Row 1 .*`labels` of different lengths"):
        learned([masked, {"input_ids": ids, "labels": [1]}])


@pytest.mark.parametrize(("option", "first"), [(None, 3), (True, 3), (False, 2)])
def test_masks_that_come_with_ids_hold_together(learned, tokenizer, option, first):
    """Fault: `assistant_masks` was dropped beside `completion_mask`, which `completion_only_loss=False` kept."""
    ids = tokenizer("When the target agrees")["input_ids"]
    row = {"input_ids": ids, "completion_mask": [0] * 3 + [1] * (len(ids) - 3)}
    row["assistant_masks"] = [0] * 2 + [1] * (len(ids) - 2)
    options = {} if option is None else {"completion_only_loss": option}
    assert learned([row], **options)[0][1] == tokenizer.decode(ids[first:])


def test_completions_alone_are_not_learned_from_rows_without_one(learned, tokenizer):
    """Fault: `completion_only_loss=True` on chats, texts and bare ids learned every token, without a word."""
    chat = {"messages": [user("a"), assistant("b")]}
    for row in (chat, {"text": "one"}, {"input_ids": tokenizer("one two")["input_ids"]}):
        with pytest.raises(ValueError, match="rows of the train dataset have no `completion`"):
            learned([row], completion_only_loss=True)
    assert learned([PAIR], completion_only_loss=True)[0][1] == " three</s>"
    marked = TEMPLATE.replace("{{ m.content or '' }}", "{% generation %}{{ m.content or '' }}{% endgeneration %}")
    assert learned([chat], template=marked, completion_only_loss=True, assistant_only_loss=True)


@pytest.mark.parametrize("streamed", [False, True])
def test_speakers_of_sharegpt_are_those_of_the_template(learned, streamed):
    """Fault: `human` and `gpt`, roles that templates do not know. Qwen's writes nothing for them: that was learned."""
    turns = [("system", "s"), ("human", "a"), ("gpt", "b"), ("user", "c"), ("assistant", "d")]
    rows = Dataset.from_list([{"conversations": [{"from": who, "value": text} for who, text in turns]}] * 2)
    found = learned(rows.to_iterable_dataset() if streamed else rows, max_steps=1)
    expected = "<|system|>s</s><|user|>a</s><|assistant|>b</s><|user|>c</s><|assistant|>d</s>"
    assert [text for text, _ in found] == [expected] * 2


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("trains", [True, False])
def test_answers_of_conversations_are_learned_alone(tmp_path, pair, tokenizer, trains, streamed):
    """Fault: "the dataset is not conversational", since SFTTrainer looks for `messages`."""
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows = Dataset.from_list([{"conversations": turns, "id": 1}] * 2)
    rows = rows.to_iterable_dataset() if streamed else rows
    given = (rows, None) if trains else (None, rows)
    trainer = build(tmp_path, pair, tokenizer, *given, assistant_only_loss=True, max_steps=1)
    (row, _) = trainer.train_dataset if trains else trainer.eval_dataset
    assert tokenizer.decode([each for each in row["labels"] if each != -100]) == "b</s>"


def test_padding_that_a_tokenizer_left_is_not_learned(learned, tokenizer):
    """Fault: the collator's own mask counts every id, so half of what was learned was padding."""
    text = tokenizer(["one two three", "one"])
    padded = tokenizer(["one two three", "one"], padding=True)
    ids = Dataset.from_dict(dict(text))
    assert [found for found, _ in learned(ids)] == ["one two three", "one"]
    with pytest.raises(ValueError, match=r"Row 1 .*train dataset holds padding"):
        learned(Dataset.from_dict(dict(padded)))
    # Whoever says what is learned has seen to it.
    labels = [[each if each != tokenizer.pad_token_id else -100 for each in row] for row in padded["input_ids"]]
    assert [found for _, found in learned(Dataset.from_dict({**padded, "labels": labels}))] == ["one two three", "one"]
    # But in front of a text the draft and the target would read it.
    turned = {name: [row[::-1] for row in rows] for name, rows in {**padded, "labels": labels}.items()}
    with pytest.raises(ValueError, match=r"Row 1 .*train dataset holds padding"):
        learned(Dataset.from_dict(turned))


def test_a_formatting_function_that_rows_of_ids_do_not_need_is_said_to_be_ignored(learned, tokenizer, caplog):
    rows = [{"input_ids": tokenizer("one two")["input_ids"]}]
    assert learned(rows, formatting_func=lambda row: "three") == [("one two", "one two")]
    assert "`formatting_func` will be ignored" in caplog.text


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize("streamed", [False, True])
def test_rows_come_as_lists_whatever_format_was_set(tmp_path, pair, tokenizer, kind, streamed):
    """Fault: `prompt_ids + completion_ids` added arrays up, or failed because their lengths differed."""
    rows = alignment_rows(pair[1], tokenizer, count=2)
    rows = rows.to_iterable_dataset() if streamed else rows
    expected, found = (build(tmp_path, pair, tokenizer, each).train_dataset for each in (rows, rows.with_format(kind)))
    assert list(found) == list(expected)


@pytest.mark.filterwarnings("ignore:eval_block_efficiency is left out")
@pytest.mark.parametrize(
    "options", [{}, {"padding_free": True, "max_length": None}, {"lmbda": 1.0, "max_new_tokens": 2}]
)
def test_a_transform_makes_rows_where_nothing_is_prepared(tmp_path, pair, tokenizer, options):
    """Fault: the columns below it were looked through for `labels`; a KeyError where rows are prepared."""

    def read(batch):
        joined = zip(batch["prompt_ids"], batch["completion_ids"], strict=True)
        made = [(prompt + completion, [-100] * len(prompt) + completion) for prompt, completion in joined]
        return {"input_ids": [ids for ids, _ in made], "labels": [labels for _, labels in made]}

    rows = alignment_rows(pair[1], tokenizer, count=4)
    lazy = rows.with_transform(read)
    with pytest.raises(ValueError, match=r"Rows of the train dataset are made by a transform"):
        build(tmp_path, pair, tokenizer, lazy)
    as_they_are = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    trainer = build(tmp_path, pair, tokenizer, lazy, lazy, **as_they_are, **options)
    assert trainer.evaluate()["eval_loss"] == build(tmp_path, pair, tokenizer, rows, rows).evaluate()["eval_loss"]
    trainer.train()


def test_a_formatting_function_reads_every_column_and_leaves_none(learned):
    rows = [{"question": "one", "answer": "two", "labels": 1, "decoding": "x"}]

    def text(row):
        return f"{row['question']} {row['labels']} {row['answer']}"

    assert learned(rows, formatting_func=text) == [("one 1 two</s>", "one 1 two</s>")]


def test_parts_are_read_and_images_refused_by_row(learned):
    """Fault: `[{'type': 'text', ...` was learned; with another template images went without a word."""
    part = {"type": "text", "text": "two"}
    rows = [{"messages": [user([part, part | {"text": " three"}]), assistant([part])]}]
    assert learned(rows)[0][0] == "<|user|>two three</s><|assistant|>two</s>"
    rows.append({"messages": [user([part, {"type": "image", "url": "x"}]), assistant([part])]})
    with pytest.raises(ValueError, match=r"Row 1 .*train.*'image'"):
        learned(rows)
    with pytest.raises(ValueError, match=r"Row 1 .*train dataset lacks `messages`"):
        learned([rows[0], {"text": "one", "messages": None}])


@pytest.mark.parametrize("row", [{"messages": []}, {"prompt": [], "completion": [assistant("x")]}])
def test_a_conversation_without_messages_is_refused_by_row(learned, row):
    """An IndexError inside of trl, or a row of a lone beginning-of-text token."""
    full = {name: [user("hi"), assistant("yes")][-1:] for name in row}
    column = next(iter(row))
    for rows, number in (([row, full], 0), ([full, row], 1)):
        with pytest.raises(ValueError, match=rf"Row {number} .*train dataset: `{column}` holds no message"):
            learned(rows)


def test_messages_beside_text_are_refused(learned):
    with pytest.raises(ValueError, match=r"Row 0 .*`completion` is text"):
        learned([{"prompt": [user("a")], "completion": "b"}])
