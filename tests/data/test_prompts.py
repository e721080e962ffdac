import json

import pytest
from datasets import Dataset, DatasetDict

from hf_draftkd.data.messages import without_nulls
from hf_draftkd.data.prompts import fitting_rows, load_prompts

CHAT = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "on the mat?"}]]


def as_file(folder, kind, rows):
    path = folder / f"prompts.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "txt":
        path.write_text("".join(row["prompt"] + "\n\n" for row in rows))
    elif kind == "csv":
        Dataset.from_list(rows).to_csv(path)
    else:
        Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "txt", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_prompts(tmp_path, kind):
    path = as_file(tmp_path, kind, [{"prompt": "the cat"}, {"prompt": "sat, on"}])
    assert load_prompts(path)["prompt"] == ["the cat", "sat, on"]
    assert load_prompts(str(path), limit=1)["prompt"] == ["the cat"]


def test_messages_and_further_columns_come_through(tmp_path):
    rows = [{"query": prompt, "domain": "a"} for prompt in CHAT]
    for source in (as_file(tmp_path, "jsonl", rows), as_file(tmp_path, "parquet", rows), rows, Dataset.from_list(rows)):
        loaded = load_prompts(source, column="query")
        assert loaded["prompt"] == CHAT
        assert loaded["domain"] == ["a", "a"]


def test_lists_of_strings_and_of_messages():
    assert load_prompts(["a", "b"])["prompt"] == ["a", "b"]
    assert load_prompts(CHAT)["prompt"] == CHAT


def test_rows_of_a_list_keep_what_the_first_lacks():
    """Catches tools that a later row brings: without them its prompt is another one."""
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    loaded = load_prompts([{"prompt": "a"}, {"prompt": "b", "tools": tools, "domain": "x"}])
    assert loaded["domain"] == [None, "x"]
    assert loaded[1]["tools"] == tools


def test_a_list_is_checked_row_by_row():
    """Catches a bare error of Arrow for rows that do not fit together, and `skip_invalid` refused for lists."""
    for rows in ([{"prompt": "a"}, {"prompt": 3}], ["a", 3]):
        with pytest.raises(ValueError, match=r"row 1 .* is neither text nor a list of messages \(int\)"):
            load_prompts(rows)
    with pytest.raises(ValueError, match="mixes strings and message lists"):
        load_prompts([{"prompt": "a"}, {"prompt": CHAT[0]}])
    assert load_prompts(["a", "", 3, None, "b"], skip_invalid=True)[:] == {"prompt": ["a", "b"]}


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    for name, content in (("x.txt", "a\r\n\r\nb"), ("x.jsonl", '{"prompt": "a"}\r\n\r\n{"prompt": "b"}')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert load_prompts(tmp_path / name)["prompt"] == ["a", "b"]


def test_folders_and_splits(tmp_path):
    as_file(tmp_path, "jsonl", [{"prompt": "a"}])
    assert load_prompts(tmp_path)["prompt"] == ["a"]
    splits = DatasetDict({"train": Dataset.from_list([{"prompt": "a"}]), "test": Dataset.from_list([{"prompt": "b"}])})
    assert load_prompts(splits)["prompt"] == ["a"]
    assert load_prompts(splits, split="test")["prompt"] == ["b"]
    with pytest.raises(ValueError, match=r"split 'tset'.*Did you mean 'test'"):
        load_prompts(splits, split="tset")


def test_a_folder_with_files_of_several_kinds_is_refused(tmp_path):
    """Fault: `datasets` reads the commonest kind, so the rows of the others were missing without a word."""
    as_file(tmp_path, "csv", [{"prompt": "a"}])
    (tmp_path / "notes.txt").write_text("not prompts")
    assert load_prompts(tmp_path)["prompt"] == ["a"]
    as_file(tmp_path, "jsonl", [{"prompt": "b"}])
    with pytest.raises(ValueError, match=r"several kinds \(1 .csv, 1 .jsonl, 1 .txt\)"):
        load_prompts(tmp_path)
    card = "---\nconfigs:\n- config_name: one\n  data_files: prompts.jsonl\n---\n"
    (tmp_path / "README.md").write_text(card)
    assert load_prompts(tmp_path)["prompt"] == ["b"]


def test_a_folder_without_rows_is_not_called_a_dataset_of_the_hub(tmp_path):
    """Fault: it was "neither a local path nor a dataset that could be read from the Hub"."""
    with pytest.raises(ValueError, match=r"The folder .* cannot be read"):
        load_prompts(tmp_path)


@pytest.mark.parametrize("kind", ["file", "list"])
def test_a_configuration_that_nothing_has_is_refused(tmp_path, kind):
    """Fault: `dataset_config` did nothing, silently, beside a file."""
    source = as_file(tmp_path, "jsonl", [{"prompt": "a"}]) if kind == "file" else ["a"]
    with pytest.raises(ValueError, match=r"has configurations, not .*leave out 'wikitext'"):
        load_prompts(source, config="wikitext")


def test_half_a_surrogate_pair_is_named_by_its_line(tmp_path):
    """Fault: pyarrow names a row of the block that it was reading, not the line."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "whole \\ud83d\\ude00"}\n{"prompt": "half \\ud83d"}\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl, line 2 holds half of a surrogate pair"):
        load_prompts(path)


@pytest.mark.parametrize("kind", [None, "numpy", "pandas", "arrow"])
def test_rows_are_plain_whatever_format_was_set(kind):
    """Prompts in a format of tables were "neither text nor a list of messages (Series)"; where the format left a column
    out, its rows were lost with a KeyError once the target had answered them.
    """
    rows = Dataset.from_list([{"prompt": "a", "domain": "x"}, {"prompt": "b", "domain": "y"}])
    for given in (rows.with_format(kind, columns=["prompt"]), DatasetDict(train=rows.with_format(kind))):
        assert list(load_prompts(given)) == list(rows)


def test_a_transform_makes_the_prompts():
    rows = Dataset.from_list([{"prompt": "a"}]).with_transform(lambda batch: {"prompt": [f"{batch['prompt'][0]}!"]})
    assert load_prompts(rows)["prompt"] == ["a!"]


def test_what_save_to_disk_wrote_is_read(tmp_path):
    """`datasets` asked for `load_from_disk`, which nobody can call on a command line."""
    rows = Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]).select([2, 0])
    rows.with_format("numpy").save_to_disk(tmp_path / "rows")
    DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "splits")
    assert list(load_prompts(tmp_path / "rows")) == list(load_prompts(tmp_path / "splits")) == list(rows)
    assert load_prompts(tmp_path / "splits", split="test")["prompt"] == ["a"]
    with pytest.raises(ValueError, match=r"Unknown split 'test'"):
        load_prompts(tmp_path / "rows", split="test")


def test_a_folder_that_is_gone_is_not_another_of_its_name(tmp_path, monkeypatch):
    """Without a network, `datasets` found rows in its cache that it had read from another folder called so."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "part.jsonl").write_text('{"prompt": "a"}\n')
    monkeypatch.chdir(tmp_path)
    assert len(load_prompts("rows")) == 1
    (tmp_path / "rows" / "part.jsonl").unlink()
    (tmp_path / "rows").rmdir()
    with pytest.raises(ValueError, match=r"no file or folder 'rows'.*org/name"):
        load_prompts("rows")


def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub():
    with pytest.raises(ValueError, match=r"no file or folder './nowhere.jsonl'"):
        load_prompts("./nowhere.jsonl")


@pytest.mark.parametrize("source", [[], Dataset.from_list([]), Dataset.from_dict({"prompt": []})])
def test_nothing_to_answer(source):
    with pytest.raises(ValueError, match=r"is empty|nothing to answer|column"):
        load_prompts(source)


def test_rows_of_another_kind_are_refused_with_what_is_read(tmp_path):
    """A file that `datasets` takes for text, or a stream, which could not be resumed."""
    (tmp_path / "prompts.docx").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"Cannot read 'prompts\.docx': give one of \.jsonl"):
        load_prompts(tmp_path / "prompts.docx")
    stream = Dataset.from_dict({"prompt": ["a"]}).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"got IterableDataset.*without `streaming=True`"):
        load_prompts(stream)


def test_an_empty_file(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        load_prompts(tmp_path / "prompts.jsonl")


def test_an_unknown_column_names_the_nearest():
    with pytest.raises(ValueError, match=r"column 'promt'.*Did you mean 'prompt'"):
        load_prompts([{"prompt": "a", "domain": "b"}], column="promt")


@pytest.mark.parametrize(
    ("column", "advice"),
    [("question", "Name the one with the prompts: `--prompt_column`"), ("messages", "--drop_last_answer")],
)
def test_prompts_in_another_column_are_said_how_to_read(column, advice):
    """Fault: "Unknown column 'prompt'. Choose one of: question." says neither where nor how to choose."""
    with pytest.raises(ValueError, match=rf"no column 'prompt'\. It has: {column}\. .*{advice}"):
        load_prompts([{column: "a"}])


def test_a_broken_line_is_named_by_its_number(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b"\n')
    with pytest.raises(ValueError, match=r"line 3 is not valid JSON"):
        load_prompts(path)
    path.write_text('{"prompt": "a"}\n["b"]\n')
    with pytest.raises(ValueError, match=r"line 2 holds a list"):
        load_prompts(path)


def test_a_line_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('{"prompt": "a"}\n{"prompt": "café"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"prompts.jsonl, line 2 is not UTF-8"):
        load_prompts(path)


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    path = tmp_path / "prompts.parquet"
    path.write_bytes(b"PAR1 and then something else")
    with pytest.raises(ValueError, match=r"prompts.parquet cannot be read as parquet"):
        load_prompts(path)


LATE = 6000  # rows of 200 characters: what follows lies outside the first block of a file


@pytest.mark.parametrize(
    ("common", "late"),
    [
        ({"prompt": CHAT[0]}, {"prompt": [{"role": "user", "content": [{"type": "text", "text": "y"}]}]}),
        ({"prompt": CHAT[0]}, {"prompt": [{"role": "user", "content": "y", "name": "me"}]}),
        ({"prompt": "a"}, {"prompt": "a", "tools": [{"f": 1}]}),
        ({"prompt": "a", "n": None}, {"prompt": "b", "n": "one"}),
        ({"prompt": "a", "n": 1}, {"prompt": "b", "n": 1.5}),
        ({"prompt": "a", "n": 1}, {"prompt": "b", "n": "one"}),
    ],
)
def test_what_a_jsonl_brings_late_comes_through_as_it_is(tmp_path, common, late):
    """`datasets` takes types from the first block: later lists became JSON text, new keys and floats failed."""
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({**common, "pad": "x" * 200})] * LATE + [json.dumps({**late, "pad": ""})]
    path.write_text("\n".join(lines))
    rows = load_prompts(path)
    assert len(rows) == LATE + 1
    last = rows[LATE]
    last["prompt"] = without_nulls(last["prompt"])
    assert {name: last[name] for name in late} == late


def test_a_jsonl_whose_prompts_change_type_names_file_and_rows(tmp_path):
    """The last row, far behind the others, became the text of its JSON and was answered as such."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in ["x" * 200] * LATE + [CHAT[0]]))
    with pytest.raises(ValueError, match=rf"prompts.jsonl mixes .*row 0 .* is text, row {LATE} holds messages"):
        load_prompts(path)


@pytest.mark.parametrize("prompt", ["a", CHAT[0]])
def test_prompts_left_out_leave_a_plain_column(tmp_path, prompt):
    """A number among the prompts makes the whole column JSON, which the row format does not know."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": each, "n": 1}) for each in (prompt, 5)))
    with pytest.raises(ValueError, match=r"prompts.jsonl: row 1 .* is neither text nor a list of messages \(int\)"):
        load_prompts(path)
    rows = load_prompts(path, skip_invalid=True)
    assert rows.features == Dataset.from_list([{"prompt": prompt, "n": 1}]).features
    assert rows[:] == {"prompt": [prompt], "n": [1]}


def test_unusable_prompts_are_listed_with_their_rows():
    with pytest.raises(ValueError, match=r"rows 1, 2 \(counted from 0\) is empty"):
        load_prompts(Dataset.from_dict({"prompt": ["a", "", "  \n"]}))
    with pytest.raises(ValueError, match=r"row 0 .* is neither text nor a list of messages \(int\)"):
        load_prompts(Dataset.from_dict({"prompt": [3]}))
    with pytest.raises(ValueError, match=r"row 0 .* is empty"):
        load_prompts([[{"role": "user", "content": " \n"}]])
    with pytest.raises(ValueError, match=r"row 0 .* ends with an empty user message"):
        load_prompts([[{"role": "system", "content": "be brief"}, {"role": "user", "content": ""}]])
    with pytest.raises(ValueError, match=r"rows 0, 1 .* list of numbers, .* \(ids are not taken\)"):
        load_prompts([[5, 6, 7], [8]])
    with pytest.raises(ValueError, match=r"row 1 .* without a role"):
        load_prompts([CHAT[0], [{"content": "x"}]])
    with pytest.raises(ValueError, match=r"row 0 .* content is not text"):
        load_prompts(Dataset.from_dict({"prompt": [[{"role": "user", "content": 3}]]}))
    with pytest.raises(ValueError, match="mixes strings and message lists"):
        load_prompts(["a", CHAT[0]])


def test_unusable_prompts_are_skipped_only_if_asked():
    data = Dataset.from_dict({"prompt": ["a", "", "b"]})
    assert load_prompts(data, skip_invalid=True)["prompt"] == ["a", "b"]
    with pytest.raises(ValueError, match="is empty"):
        load_prompts(Dataset.from_dict({"prompt": ["", " "]}), skip_invalid=True)


def test_a_conversation_that_is_already_answered():
    """Logs end with the old answer; rendered as a prompt it would make the target speak twice in a row."""
    log = [[*CHAT[0], {"role": "assistant", "content": "hello"}]]
    with pytest.raises(ValueError, match="drop_last_answer"):
        load_prompts(Dataset.from_dict({"prompt": log}))
    assert load_prompts(Dataset.from_dict({"prompt": log}), drop_last_answer=True)["prompt"] == [CHAT[0]]
    with pytest.raises(ValueError, match="holds prompts that are text"):  # of which it would take nothing away
        load_prompts(["User: hi\nAssistant: hello"], drop_last_answer=True)


def test_a_folder_with_a_broken_line_names_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "a"}\n{"prompt": broken\n')
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2 is not valid JSON"):
        load_prompts(tmp_path)


def test_prompts_longer_than_the_context_are_listed():
    with pytest.raises(ValueError, match=r"rows 1, 3 .* longer than 96 tokens .*longest has 200"):
        fitting_rows([96, 97, 1, 200], context=128, max_new_tokens=32)
    assert fitting_rows([96, 97, 1, 200], context=128, max_new_tokens=32, skip_too_long=True) == [0, 2]
    assert fitting_rows([96, 10**6], context=None, max_new_tokens=32) == [0, 1]
    with pytest.raises(ValueError, match="no prompt is left"):
        fitting_rows([97], context=128, max_new_tokens=32, skip_too_long=True)
    with pytest.raises(ValueError, match=r"leaves no room"):
        fitting_rows([1], context=128, max_new_tokens=128)
    with pytest.raises(ValueError, match=r"row 1 .* no tokens at all"):
        fitting_rows([1, 0], context=128, max_new_tokens=8)
