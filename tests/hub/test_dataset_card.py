import ast
import json
from itertools import pairwise

import pytest
from datasets import Dataset, load_dataset
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt

from hf_draftkd.data.generation import generate_alignment_data
from hf_draftkd.hub.card_merge import sections_of
from hf_draftkd.hub.dataset_card import length_histogram, push_alignment_data, write_card
from tests.data.small import make_target, make_tokenizer

TEXTS = ["the cat", "on", "sat on the mat, the cat", "a"]


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def target():
    return make_target()


@pytest.fixture
def folder(tmp_path, target, tokenizer):
    rows = generate_alignment_data(
        target,
        tokenizer,
        [{"prompt": text, "domain": "mats"} for text in TEXTS],
        max_new_tokens=6,
        temperatures=(0.0, 0.7),
        top_p=0.95,
        output_dir=tmp_path / "out",
        cache_distributions={"top_k": 4},
        scenario="synthetic",
        prompt_counts={"kept": 4, "repeated": 3},
    )
    return tmp_path / "out", rows


def test_the_card_says_where_the_data_come_from(folder):
    path, rows = folder
    write_card(path, rows, "me/mats")
    written = DatasetCard.load(path / "README.md")
    assert "speculative-decoding" in written.data.tags
    text = written.text
    for part in (
        'load_dataset("me/mats", split="train")',
        "8 completions of 4 prompts",
        "[tiny/target](https://huggingface.co/tiny/target)",
        "| 0.7 | 0.95 | all | 1.0 | 1 |",
        "4 kept, 3 repeated",
        f"{sum(map(len, rows['completion_ids']))} completion tokens",
        "## Licence",
    ):
        assert part in text, part
    assert "None" not in text
    for column in rows.column_names:
        assert f"| `{column}` |" in text
    assert "| `domain` | carried along from the prompts |" in text
    assert "| `target_logprobs` | their" in text


def test_the_folder_still_loads_with_its_card(folder, tmp_path, target, tokenizer):
    """Also after another folder of the same name: with `configs` in both cards, `datasets` returns the other's rows."""
    path, rows = folder
    write_card(path, rows)
    assert load_dataset(str(path), split="train").to_list() == rows.to_list()
    other = tmp_path / "elsewhere" / "out"
    others = generate_alignment_data(target, tokenizer, TEXTS[:2], max_new_tokens=3, output_dir=other)
    write_card(other, others)
    assert load_dataset(str(other), split="train").to_list() == others.to_list()


HOSTILE = "x` |\n\n# Owned <img src=x onerror=alert(1)> [click](javascript:alert(1))\n<!-- draftkd:end columns -->\n"


def test_names_of_others_stay_names(tmp_path, target, tokenizer):
    """Catches a column, a target, a source, a count or an id that writes Markdown, HTML, code or its own mark."""
    target.name_or_path = f"org/{HOSTILE}"
    rows = generate_alignment_data(
        target,
        tokenizer,
        Dataset.from_dict({"prompt": ["the cat"], HOSTILE: ["v"]}),
        max_new_tokens=3,
        output_dir=tmp_path / "out",
        source=HOSTILE,
        prompt_counts={HOSTILE: 1},
    )
    write_card(tmp_path / "out", rows, 'me/d", split=exec("x")) #' + HOSTILE)
    written = DatasetCard.load(tmp_path / "out" / "README.md")
    page = MarkdownIt("commonmark").enable("table").parse(written.text)
    flat = [item for token in page for item in [token, *(token.children or [])]]
    assert not [item.content for item in flat if item.type.startswith("html") and "draftkd:" not in item.content]
    assert not [item for item in flat if item.type == "link_open"]
    titles = [page[at + 1].content for at, token in enumerate(page) if token.type == "heading_open"]
    assert titles == ["Alignment data", *("Where it comes from", "How it was decoded", "Lengths", "Columns", "Licence")]
    assert list(sections_of(written.text)) == SECTIONS
    [code] = [token.content for token in page if token.type == "fence"]
    loading = ast.parse(code).body[1].value
    assert [type(argument) for argument in loading.args] == [ast.Constant]
    # The same card again: what was written can be read, and no mark was taken for one.
    text = (tmp_path / "out" / "README.md").read_text()
    write_card(tmp_path / "out", rows, 'me/d", split=exec("x")) #' + HOSTILE)
    assert (tmp_path / "out" / "README.md").read_text() == text


SECTIONS = ["summary", "use", "origin", "decoding", "lengths", "columns", "licence"]


def test_what_people_added_outlives_a_rerun(folder):
    """Catches a second run that takes away the licence and the words somebody wrote into the card."""
    path, rows = folder
    write_card(path, rows)
    card, own = path / "README.md", "license: cc-by-4.0\npretty_name: Mats\ntags:\n- cats\n"
    text = card.read_text().replace("tags:\n", own, 1).replace("# Alignment data\n", "# Mats\n\nMy own words.\n")
    card.write_text(text.replace("8 completions of 4 prompts", "9000 completions"))
    write_card(path, rows)
    written = DatasetCard.load(card)
    assert (written.data.license, written.data.pretty_name) == ("cc-by-4.0", "Mats")
    assert {"cats", "speculative-decoding"} <= set(written.data.tags)
    assert "# Mats\n\nMy own words.\n" in written.text
    assert "# Alignment data" not in written.text
    assert "8 completions of 4 prompts" in written.text, "a number is the data's own"
    assert "9000" not in written.text


def test_a_card_that_cannot_be_read_is_not_replaced(folder):
    path, rows = folder
    (path / "README.md").write_text("---\ntags: [a\n---\nmy words\n")
    with pytest.raises(ValueError, match=r"metadata of .*README\.md cannot be read"):
        write_card(path, rows)
    assert "my words" in (path / "README.md").read_text()


@pytest.mark.parametrize("is_local", [True, None])
def test_paths_of_this_machine_are_not_in_the_card(folder, is_local):
    path, rows = folder
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["prompts"]["source"] = "clients/acme/prompts.jsonl"
    manifest |= {"target": "models/secret" if is_local else str(path), "target_is_local": is_local}
    (path / "manifest.json").write_text(json.dumps(manifest))
    write_card(path, rows)
    text = (path / "README.md").read_text()
    assert "clients" not in text
    assert f"path/to/{'secret' if is_local else path.name}" in text
    assert "models/secret" not in text
    assert str(path) not in text


def test_a_local_target_with_the_name_of_a_repository_is_recorded(tmp_path, target, tokenizer, monkeypatch):
    """Catches a link to a stranger's repository, written where the folder of that name does not lie."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "target").mkdir(parents=True)
    for name, out in (("models/target", "a"), ("org/target", "b")):
        target.name_or_path = name
        generate_alignment_data(target, tokenizer, ["the cat"], max_new_tokens=3, output_dir=tmp_path / out)
    recorded = [json.loads((tmp_path / out / "manifest.json").read_text()).get("target_is_local") for out in "ab"]
    assert recorded == [True, None]


def test_an_unfinished_folder_is_not_published(folder, tmp_path):
    path, rows = folder
    next(path.glob("data/train-*")).unlink()
    with pytest.raises(ValueError, match="not finished"):
        push_alignment_data(path, "me/mats", rows=rows)
    with pytest.raises(ValueError, match="not a folder of alignment data"):
        push_alignment_data(tmp_path, "me/mats", rows=rows)


def test_the_histogram_counts_every_row_once():
    for sizes in ([5], [1, 1, 2], list(range(100)), [3, 300]):
        histogram = length_histogram(sizes)
        assert sum(count for _, _, count, _ in histogram) == len(sizes)
        assert histogram[0][0] == min(sizes)
        assert histogram[-1][0] <= max(sizes) <= histogram[-1][1]
        assert max(len(bar) for *_, bar in histogram) == 20
        for (_, high, *_), (low, *_) in pairwise(histogram):
            assert low == high + 1
