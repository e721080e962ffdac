"""One config for `evaluate_draft` and for `draftkd evaluate`."""

from dataclasses import fields

import pytest

from hf_draftkd import EvaluationConfig, evaluate_draft
from hf_draftkd.cli.evaluate import EvaluateOptions
from hf_draftkd.cli.options import parse
from hf_draftkd.decoding.setting import DecodingSetting
from tests.tiny import tiny_pair, tiny_tokenizer


def test_every_field_is_a_documented_option():
    """Catches a field that the command line does not know, or two fields of one name."""
    words = [word for each in fields(EvaluationConfig) for word in each.metadata["help"].split()]
    assert words
    argv = ["--temperatures", "0.5", "--top_p", "0.9", "--no_measure_speed", "--verification", "greedy_draft"]
    _, config = parse("evaluate", (EvaluateOptions, EvaluationConfig), argv, "")
    assert config == EvaluationConfig([0.5], top_p=0.9, measure_speed=False, verification=["greedy_draft"])
    assert not {each.name for each in fields(EvaluationConfig)} & {each.name for each in fields(EvaluateOptions)}


def test_settings_take_the_targets_penalty_unless_one_is_given():
    """Catches filters applied to greedy decoding, and a penalty of 1 taken for none given."""
    config = EvaluationConfig(top_k=5)
    assert config.settings(1.2) == [
        DecodingSetting(repetition_penalty=1.2),
        DecodingSetting(1.0, top_k=5, repetition_penalty=1.2),
    ]
    assert EvaluationConfig([0.0], repetition_penalty=1.0).settings(1.2) == [DecodingSetting()]


def test_keywords_win_over_the_config():
    """Catches a keyword that is checked, and then ignored for the config's value."""
    draft, target = tiny_pair("llama")
    config = EvaluationConfig([1.0], max_new_tokens=4, measure_speed=False, domain="maths")
    report = evaluate_draft(draft, target, tiny_tokenizer(), ["Hello"], config=config, temperatures=[0.0])
    assert [entry.decoding for entry in report.settings] == [DecodingSetting()]
    assert (report.max_new_tokens, report.prompts.domain) == (4, "maths")
    with pytest.raises(TypeError, match="temperature"):
        evaluate_draft(draft, target, tiny_tokenizer(), ["Hello"], temperature=[0.0])
