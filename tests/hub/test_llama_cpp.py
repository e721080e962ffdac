"""Which tokenizers llama.cpp's converter takes."""

from dataclasses import replace
from hashlib import sha256

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_draftkd import DraftModelCard
from hf_draftkd.hub import llama_cpp
from hf_draftkd.hub.llama_cpp import conversion_facts, converter
from hf_draftkd.models.demo import demo_path
from hf_draftkd.models.loading import load_tokenizer
from tests.hub import samples
from tests.tiny import tiny_tokenizer


def test_a_vocabulary_of_its_own_is_refused_and_its_rules_are_named():
    """The demo pair: every digit alone, then GPT-2's expression, which llama.cpp calls smollm."""
    facts = conversion_facts(load_tokenizer(demo_path("target")))
    assert facts == {"llama_cpp_converts": False, "llama_cpp_pre_tokenizer": "smollm"}


def test_rules_that_llama_cpp_lacks_have_no_name():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert conversion_facts(tokenizer) == {"llama_cpp_converts": False, "llama_cpp_pre_tokenizer": None}
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert conversion_facts(tokenizer)["llama_cpp_pre_tokenizer"] == "gpt-2"


def test_a_hash_that_the_converter_lists_is_known(monkeypatch):
    tokenizer = tiny_tokenizer()
    hashed = sha256(str(tokenizer.encode(converter()["text"])).encode()).hexdigest()
    monkeypatch.setattr(llama_cpp, "converter", lambda: {**converter(), "known": [hashed]})
    assert conversion_facts(tokenizer)["llama_cpp_converts"]


def test_a_name_that_llama_cpp_does_not_know_gets_into_no_command():
    """Catches code in a stranger's `provenance.json` that a card would print to be run."""
    rules = 'gpt-2"; import os; "'
    facts = samples.pair(llama_cpp_converts=False, llama_cpp_pre_tokenizer=rules)
    card = DraftModelCard.from_report(samples.report(), name="me/draft", pair=facts).text
    assert "import os" not in card
    assert "No command: llama.cpp" in card
    known = replace(facts, llama_cpp_pre_tokenizer="gpt-2")
    assert 'tokenizer: "gpt-2"' in DraftModelCard.from_report(samples.report(), name="me/draft", pair=known).text


def test_other_kinds_of_tokenizers_are_not_judged():
    """SentencePiece vocabularies are read from other files, without a hash."""
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    assert conversion_facts(words) == {}
