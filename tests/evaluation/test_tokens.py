"""Acceptance by kind and by place, and answers token by token, from sums that were scored elsewhere."""

import pytest
import torch

from hf_draftkd import evaluate_draft
from hf_draftkd.acceptance import Estimate
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.evaluation.report import SettingResult, SpeculationReport
from hf_draftkd.evaluation.scoring import Text, TextSums
from hf_draftkd.evaluation.texts import TextSet
from hf_draftkd.evaluation.tokens import add_token_results, token_kinds, token_pieces


class Words:
    """A tokenizer whose vocabulary is a list; `▁` as SentencePiece writes it."""

    all_special_ids = (0,)

    def __init__(self, *tokens):
        self.tokens = tokens

    def convert_ids_to_tokens(self, ids):
        return [self.tokens[each] if each < len(self.tokens) else None for each in ids]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens).replace("▁", " ").lstrip(" ")


def test_kinds_of_tokens():
    """A word's second half counted as a word, a quotation mark as one, 中文 as the rest of 日本."""
    tokens = {
        "</s>": "special",
        "▁accept": "word",
        "ance": "rest of a word",
        "▁rate": "word",
        '":': "punctuation",
        "0": "number",
        "▁42": "number",
        "\n": "white space",
        "x": "word",
        "日本": "word",
        "中文": "word",
    }
    tokenizer = Words(*tokens)
    ids = range(len(tokens) + 1)
    assert token_kinds(tokenizer, ids) == [*tokens.values(), "word"]  # an id that the tokenizer does not know
    assert token_pieces(tokenizer, ids)[1:4] == [" accept", "ance", " rate"]


def test_pieces_make_the_text(tokenizer):
    text = 'Call the function {"name": "sorted"} 中\n'
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces).startswith('Call the function {"name": "sorted"} ')


def test_rates_by_kind_and_place_are_sums_over_sums():
    """Rates of texts averaged: a text of one number would weigh as much as one of a hundred."""
    kinds = [["word", "number", "word"], ["word", "word", "word", "word", "number"]]
    accepted = [[1.0, 0.0, 0.5], [0.0, 1.0, 1.0, 0.0, 1.0]]
    texts = TextSet(DecodingSetting(1.0), [Text([1], range(3)), Text([2], range(5))], prompts=[0, 1])
    sums = TextSums(
        num_tokens=torch.tensor([3.0, 5.0]).double(),
        acceptance=torch.zeros(2),
        target_calls=torch.zeros(2, 16),
        accepted=[torch.tensor(row).double() for row in accepted],
    )
    result = SettingResult(
        decoding=texts.setting,
        verification="rejection_sampling",
        num_texts=2,
        num_tokens=8,
        acceptance_rate=Estimate(0),
    )
    add_token_results(result, sums, texts, kinds)
    assert {
        kind: (each.acceptance_rate.value, each.num_tokens) for kind, each in result.acceptance_by_kind.items()
    } == {
        "word": (pytest.approx(3.5 / 6), 6),
        "number": (pytest.approx(1 / 2), 2),
    }
    by_place = {place: each.value for place, each in result.acceptance_by_place.items()}
    assert by_place == {1: pytest.approx(1 / 2), 2: pytest.approx(2.5 / 4), 4: pytest.approx(1 / 2)}


def test_answers_are_those_of_the_target_and_what_the_draft_had_in_mind(pair, tokenizer):
    """The proposal of the place before or behind; a text that is nobody's."""
    draft, target = pair
    prompts = ["The quick brown fox", "What is the capital of France?", "Numbers: 0 1 2", "def add("]
    options = {"temperatures": [0.0], "max_new_tokens": 12, "measure_speed": False}
    report = evaluate_draft(draft, target, tokenizer, prompts, num_answers=2, **options)
    assert SpeculationReport.from_json(report.to_json()) == report
    rates = [sum(answer.accepted) / len(answer.accepted) for answer in report.answers]
    assert rates == sorted(rates)
    for answer in report.answers:
        ids = tokenizer(answer.prompt, return_tensors="pt", add_special_tokens=True)["input_ids"]
        written = target.generate(ids, max_new_tokens=12, do_sample=False)[0]
        completion = written[ids.shape[1] :].tolist()
        assert answer.tokens == token_pieces(tokenizer, completion)
        proposed = draft(written[None]).logits[0, ids.shape[1] - 1 : -1].argmax(-1).tolist()
        differs = {place for place, token in enumerate(completion) if token != proposed[place]}
        assert {place for place, chance in enumerate(answer.accepted) if chance == 0} == differs == set(answer.proposed)
        assert answer.proposed == {place: token_pieces(tokenizer, [proposed[place]])[0] for place in differs}
    assert evaluate_draft(draft, target, tokenizer, prompts, **options).answers is None
