import pytest
from datasets import Dataset

from hf_draftkd.data.curation import curate_prompts, has_tokens, opening
from hf_draftkd.data.generation import generate_alignment_data
from tests.data.small import make_tokenizer

DOCUMENTS = [
    "the cat sat on the mat and the other cat sat on the other mat",
    "  ",
    "the cat",
    "the cat sat on the mat and the other cat sat on the other mat, again",
    "a mat is where cats sit when they sit, and cats do sit",
]


def test_openings_are_cut_at_words(tokenizer):
    for tokens in range(1, 20):
        cut = opening(DOCUMENTS[0], tokenizer, tokens)
        assert DOCUMENTS[0].startswith(cut)
        assert len(tokenizer(cut, add_special_tokens=False)["input_ids"]) <= tokens
        if " " in cut:
            assert DOCUMENTS[0][len(cut)] == " "
    assert opening("the cat", tokenizer, 99) == "the cat"


def test_scripts_without_spaces_are_cut_between_characters(tokenizer):
    """A byte-level token can be a third of a character; the cut must not leave a replacement sign."""
    text = "猫坐在垫子上面睡觉" * 20
    for tokens in range(1, 12):
        cut = opening(text, tokenizer, tokens)
        assert text.startswith(cut)
        assert "\ufffd" not in cut


def test_documents_become_openings_and_are_counted(tokenizer):
    data = Dataset.from_dict({"text": DOCUMENTS, "source": list("abcde")})
    prompts, counts = curate_prompts(data, tokenizer, opening_tokens=10)
    assert counts == {"kept": 2, "empty": 1, "too_short": 1, "repeated": 1}
    assert prompts["source"] == ["a", "e"]
    assert all(
        text.startswith(prompt) for text, prompt in zip((DOCUMENTS[0], DOCUMENTS[4]), prompts["prompt"], strict=True)
    )


def test_cells_without_text_are_counted_as_empty(tmp_path, tokenizer):
    """One empty cell of a CSV file ended the run, and nothing could leave it out."""
    (tmp_path / "faq.csv").write_text("question,number\nwhere?,1\n,2\nwhen?,3\n")
    prompts, counts = curate_prompts(tmp_path / "faq.csv", tokenizer, question_column="question")
    assert counts == {"kept": 2, "empty": 1}
    assert prompts["number"] == [1, 3]


def test_a_book_is_not_tokenised_whole(tokenizer):
    """Catches minutes of tokenising long documents of which a sentence is used."""
    read = []

    class Counting:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, text, **options):
            read.append(len(text))
            return tokenizer(text, **options)

    _, counts = curate_prompts([{"text": "the cat sat " * 50_000}], Counting(), opening_tokens=8)
    assert counts == {"kept": 1}
    assert max(read) < 1000


def test_tokens_are_counted_as_in_the_whole_text(tokenizer):
    """Catches a document that is left out because its first characters make few tokens."""

    def blanks_are_free(text, **options):
        return {"input_ids": text.split()}

    assert has_tokens(" " * 5000 + "a b c", blanks_are_free, 3)
    assert not has_tokens(" " * 5000 + "a b c", blanks_are_free, 4)
    for document in DOCUMENTS:
        size = len(tokenizer(document, add_special_tokens=False)["input_ids"])
        assert has_tokens(document, tokenizer, size)
        assert not has_tokens(document, tokenizer, size + 1)


def test_questions_are_asked(tokenizer):
    data = Dataset.from_dict({"question": ["why do cats sit?", "what is a mat?"], "answer": ["x", "y"]})
    prompts, _ = curate_prompts(data, tokenizer, question_column="question")
    assert prompts["prompt"][1] == [{"role": "user", "content": "what is a mat?"}]
    assert prompts["answer"] == ["x", "y"]
    plain, _ = curate_prompts(data, make_tokenizer(template=None), question_column="question")
    assert plain["prompt"] == data["question"]


def test_an_instruction_makes_the_opening_a_message(tokenizer):
    prompts, _ = curate_prompts(
        Dataset.from_dict({"text": DOCUMENTS}), tokenizer, opening_tokens=10, instruction="Go on: {text}"
    )
    assert prompts["prompt"][0][0]["content"].startswith("Go on: the cat")
    with pytest.raises(ValueError, match="no chat template"):
        curate_prompts(DOCUMENTS, make_tokenizer(template=None), instruction="Go on: {text}")
    with pytest.raises(ValueError, match=r"where the text goes"):
        curate_prompts(DOCUMENTS, tokenizer, instruction="Go on")


def test_the_target_goes_on_with_domain_text(target, tokenizer):
    prompts, _ = curate_prompts(Dataset.from_dict({"text": DOCUMENTS}), tokenizer, opening_tokens=10)
    rows = generate_alignment_data(target, tokenizer, prompts, max_new_tokens=4, scenario="curated")
    assert rows["prompt_ids"][0] == tokenizer(prompts["prompt"][0])["input_ids"]
    assert set(rows["scenario"]) == {"curated"}


def test_bad_input(tokenizer):
    data = Dataset.from_dict({"text": DOCUMENTS})
    with pytest.raises(ValueError, match="column 'texts'.*Did you mean 'text'"):  # noqa: RUF043
        curate_prompts(data, tokenizer, text_column="texts")
    with pytest.raises(ValueError, match=r"No prompt could be cut from 2 rows .*'too_short': 1.* fewer than 8 tokens"):
        curate_prompts(Dataset.from_dict({"text": ["a mat", ""]}), tokenizer)
    with pytest.raises(ValueError, match=r"Row 0 .* not text \(int\)"):
        curate_prompts(Dataset.from_dict({"text": [1]}), tokenizer)
    with pytest.raises(ValueError, match="opening_tokens"):
        curate_prompts(data, tokenizer, opening_tokens=0)
    with pytest.raises(ValueError, match="limit"):
        curate_prompts(data, tokenizer, limit=0)
