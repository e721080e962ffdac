"""What makes two tokenizers the same: contents, never sizes or files."""

import json

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_draftkd.models.pairing import check_own_tokenizer, check_tokenizers
from hf_draftkd.models.resolve import resolve
from hf_draftkd.models.tokenizers import tokenizer_fingerprint, tokenizer_size
from tests.tiny import TEXT, tiny_llama, tiny_tokenizer

OTHER_TEXT = [line[::-1] for line in TEXT]


def _edited(change):
    """The tiny tokenizer after `change` was applied to its JSON."""
    tokenizer = tiny_tokenizer()
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    change(parts)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def test_fingerprint_survives_saving_use_and_what_does_not_matter(tmp_path):
    """A fingerprint of the files, or of truncation left over from the last call, would refuse good pairs."""
    plain = tiny_tokenizer()
    before = tokenizer_fingerprint(plain)
    assert len(before) == 64
    assert int(before, 16) >= 0

    plain.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == before
    # The same file in other clothes: indented, keys in another order.
    parts = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(dict(reversed(parts.items())), indent=7))
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == before

    # Whether `skip_special_tokens` drops a token changes no id.
    not_special = _edited(lambda parts: parts["added_tokens"][4].update(special=False))
    assert tokenizer_fingerprint(not_special) == before

    plain(["a", "longer text than that"], padding=True, truncation=True, max_length=3)
    plain.chat_template = "{{ messages }}"
    plain.pad_token = plain.eos_token
    plain.padding_side = "left"
    assert tokenizer_fingerprint(plain) == before
    check_tokenizers(plain, tiny_tokenizer())


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts["model"]["merges"].reverse(),
        lambda parts: parts.update(normalizer={"type": "Lowercase"}),
        lambda parts: parts["pre_tokenizer"].update(add_prefix_space=True),
        lambda parts: parts.update(decoder=None),
        lambda parts: parts["added_tokens"][3].update(lstrip=True),
    ],
    ids=["merges", "normalizer", "pre_tokenizer", "decoder", "added_token"],
)
def test_fingerprint_sees_every_part(change):
    assert tokenizer_fingerprint(_edited(lambda parts: None)) == tokenizer_fingerprint(tiny_tokenizer())
    assert tokenizer_fingerprint(_edited(change)) != tokenizer_fingerprint(tiny_tokenizer())


def test_same_size_other_contents_is_refused_by_the_first_token_that_differs():
    """Equal sizes say nothing: this is the pair that decodes happily and is never accepted."""
    draft, target = tiny_tokenizer(text=OTHER_TEXT), tiny_tokenizer()
    assert len(draft) == len(target)
    ids = draft.get_vocab(), target.get_vocab()
    first = min(
        (i for i in range(300) if draft.convert_ids_to_tokens(i) != target.convert_ids_to_tokens(i)),
    )
    with pytest.raises(ValueError, match="build_draft") as caught:
        check_tokenizers(draft, target)
    message = str(caught.value)
    assert f"id {first} in the" in message
    named = next(
        t for t in (draft.convert_ids_to_tokens(first), target.convert_ids_to_tokens(first)) if repr(t) in message
    )
    for vocab, name in zip(ids, ("draft", "target"), strict=True):
        place = f"id {vocab[named]} in the {name}'s" if named in vocab else f"absent from the {name}'s"
        assert place in message
    assert "family" in message


def test_swapped_ids_are_found():
    """Same tokens, same size: only the ids differ."""

    def swap(parts):
        vocab = parts["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    ids = tiny_tokenizer().get_vocab()
    a, b = sorted((ids["a"], ids["b"]))
    with pytest.raises(ValueError, match=f"token 'a' is id {b} in the draft's and id {a} in the target's"):
        check_tokenizers(_edited(swap), tiny_tokenizer())


def test_a_token_only_the_target_has_is_named_with_its_own_remedy():
    target = tiny_tokenizer()
    target.add_special_tokens({"additional_special_tokens": ["<|tool|>"]}, replace_extra_special_tokens=False)
    with pytest.raises(
        ValueError, match=r"'<\|tool\|>' is absent from the draft's and id 300 in the target's"
    ) as caught:
        check_tokenizers(tiny_tokenizer(), target)
    assert "resize_token_embeddings" in str(caught.value)
    with pytest.raises(ValueError, match=r"'<\|tool\|>' is id 300 in the draft's and absent") as caught:
        check_tokenizers(target, tiny_tokenizer())
    assert "resize_token_embeddings" not in str(caught.value)


def test_a_targets_own_tokenizer_is_called_the_targets(tmp_path):
    """Draft and target changed places in the message, and with them the remedy."""
    own = tiny_tokenizer()
    own.add_special_tokens({"additional_special_tokens": ["<|tool|>"]}, replace_extra_special_tokens=False)
    own.save_pretrained(tmp_path)
    tiny_llama().config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="absent from the draft's and id 300 in the target's"):
        check_own_tokenizer(resolve(tmp_path), tiny_tokenizer(), is_target=True)
    with pytest.raises(ValueError, match="id 300 in the draft's and absent from the target's"):
        check_own_tokenizer(resolve(tmp_path), tiny_tokenizer())


def test_merges_and_normalizer_are_compared_where_the_vocabulary_agrees():
    with pytest.raises(ValueError, match="other merges"):
        check_tokenizers(_edited(lambda parts: parts["model"]["merges"].reverse()), tiny_tokenizer())
    with pytest.raises(ValueError, match="is cut into"):
        check_tokenizers(_edited(lambda parts: parts.update(normalizer={"type": "Lowercase"})), tiny_tokenizer())
    with pytest.raises(ValueError, match="become"):
        check_tokenizers(_edited(lambda parts: parts.update(decoder=None)), tiny_tokenizer())


def test_another_way_of_writing_the_same_pipeline_is_accepted():
    """Versions of `tokenizers` write one behaviour differently; a pair must not be refused for that."""
    same = tiny_tokenizer()
    same.backend_tokenizer.normalizer = normalizers.Sequence([])
    same.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False)])
    assert tokenizer_fingerprint(same) != tokenizer_fingerprint(tiny_tokenizer())
    check_tokenizers(same, tiny_tokenizer())


def test_special_ids_are_only_noted(caplog):
    other = tiny_tokenizer(pad_is_eos=True)
    other.eos_token = "<|user|>"
    with caplog.at_level("INFO", logger="hf_draftkd"):
        check_tokenizers(other, tiny_tokenizer())
    assert "eos_token_id is 4 in the draft's tokenizer and 1 in the target's" in caplog.text


def test_size_counts_the_largest_id_and_not_the_number_of_tokens():
    """A vocabulary with holes needs rows up to its largest id."""

    def move(parts):
        vocab = parts["model"]["vocab"]
        last = max(vocab, key=vocab.get)
        parts["model"]["merges"] = []
        vocab[last] = 310

    holed = _edited(move)
    assert len(holed.get_vocab()) == 300
    assert tokenizer_size(holed) == 311
    assert tokenizer_size(tiny_tokenizer()) == 300
