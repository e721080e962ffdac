"""A smaller draft vocabulary: computed numbers are those that SpeculativeDecoding with the list counts."""

import pytest
import torch
from rich.console import Console

from hf_draftkd import SpeculativeDecoding, evaluate_draft
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.evaluation.report import SpeculationReport
from hf_draftkd.evaluation.scoring import EXACT, Text, score_texts
from hf_draftkd.evaluation.statistics import setting_result
from hf_draftkd.evaluation.tables import ReportTable
from hf_draftkd.hub.model_card import DraftModelCard
from hf_draftkd.models.draft_length import store_draft_settings
from tests.evaluation.test_exactness import NEW_TOKENS, VOCAB_SIZE, aligned_pair, write_together
from tests.tiny import tiny_llama, tiny_pair, tiny_prompts, tiny_tokenizer

IDS = list(range(0, VOCAB_SIZE, 2))


def counted(target, draft, prompts, ids, length, **sampling):
    decoding = SpeculativeDecoding(draft, length, draft_vocabulary=ids)
    for number, prompt in enumerate(prompts):
        torch.manual_seed(10_000 + number)
        target.generate(prompt, max_new_tokens=NEW_TOKENS, custom_generate=decoding, **sampling)
    return decoding.counts.mean_acceptance_length


def test_greedy_block_efficiency_equals_the_counted_one_for_every_size():
    """Catches a p that is masked as well, and a q that is not renormalised before it is compared."""
    draft, target, tokenizer = aligned_pair("llama")
    prompts = tiny_prompts(tokenizer, 3)
    texts = write_together(target, tokenizer, prompts, DecodingSetting())
    lists = [IDS[:20], IDS]
    scored = score_texts(
        target, [draft], texts, DecodingSetting(), vocab_size=VOCAB_SIZE,
        draft_vocabularies=[(0, ids) for ids in lists], batch_size=2,
    )  # fmt: skip
    found = []
    for of_list in scored.listed:  # each written token is the target's likeliest of all, in the list or not
        assert torch.equal(of_list[EXACT].acceptance, torch.stack([row.sum() for row in of_list[EXACT].accepted]))
    for ids, sums in zip(lists, scored.listed, strict=True):
        result = setting_result(DecodingSetting(), EXACT, sums, range(3), num_assistant_tokens=4, parameter_ratio=1.0)
        for length in (1, 4):
            assert result.block_efficiency[length].value == counted(
                target, draft, prompts, ids, length, do_sample=False
            )
        found.append(result.block_efficiency[4].value)
    assert found[0] < found[1]
    plain = score_texts(target, [draft], texts, DecodingSetting(), vocab_size=VOCAB_SIZE)
    assert torch.equal(scored.drafts[0][EXACT].target_calls, plain.drafts[0][EXACT].target_calls)


def test_a_draft_is_scored_by_its_list_alone_where_that_is_wanted():
    """A whole head that nobody asked for, or the sums of one draft given to another."""
    target, listed, whole = (tiny_llama(seed=seed) for seed in range(3))
    texts, lists = [Text([1, 2], [3, 4, 5])], [(0, IDS[:20])]
    options = {"vocab_size": VOCAB_SIZE, "draft_vocabularies": lists}
    both = score_texts(target, [listed, whole], texts, DecodingSetting(), **options)
    alone = score_texts(target, [listed, whole], texts, DecodingSetting(), **options, listed_only=True)
    (of_whole,), (of_list,) = alone.drafts, alone.listed
    assert torch.equal(of_whole[EXACT].target_calls, both.drafts[1][EXACT].target_calls)
    assert torch.equal(of_list[EXACT].target_calls, both.listed[0][EXACT].target_calls)


def test_sampled_block_efficiency_is_the_counted_one_within_its_interval():
    draft, target, tokenizer = aligned_pair("llama")
    setting = DecodingSetting(0.7, top_p=0.9)
    prompts = tiny_prompts(tokenizer, 6)
    texts = write_together(target, tokenizer, prompts, setting, copies=18)
    scored = score_texts(
        target, [draft], texts, setting, vocab_size=VOCAB_SIZE, draft_vocabularies=[(0, IDS)], batch_size=36
    )
    rule = "rejection_sampling"
    expected = setting_result(
        setting, rule, scored.listed[0], range(len(texts)), num_assistant_tokens=4, parameter_ratio=1.0
    ).block_efficiency[4]
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "num_return_sequences": 10}
    found = counted(target, draft, prompts, IDS, 4, **sampling)
    spread = 2 * (expected.high - expected.low)  # two samples, each with its own noise
    assert expected.value - spread < found < expected.value + spread


def test_a_list_may_name_padded_rows():
    """An IndexError of the self-check, at the end: it took the list as recorded, decoding leaves such ids out."""
    draft, target = tiny_pair("qwen3", draft_vocab_size=304, target_vocab_size=320, real_vocab_size=VOCAB_SIZE)
    store_draft_settings(draft, {"draft_vocabulary": [*IDS[:120], 302]})
    options = {"temperatures": [0.0], "max_new_tokens": 8, "verify": 1, "measure_speed": False}
    report = evaluate_draft(draft, target, tiny_tokenizer(), ["The quick brown"], **options)
    assert report.self_check.equal
    assert report.settings[0].draft_vocabulary[-2].size == 120


def test_the_report_holds_several_sizes_and_leaves_the_rest_alone(pair, tokenizer):
    draft, target = pair
    prompts = [tokenizer.decode(prompt[0]) for prompt in tiny_prompts(tokenizer, 3)]
    options = {"temperatures": [0.0], "max_new_tokens": 12, "num_speed_prompts": 3}
    before = evaluate_draft(draft, target, tokenizer, prompts, **options | {"measure_speed": False}).settings[0]
    with pytest.raises(ValueError, match="draftkd vocabulary"):
        evaluate_draft(draft, target, tokenizer, prompts, draft_vocabulary_sizes=[8], **options)
    store_draft_settings(draft, {"draft_vocabulary": IDS[:120]})
    report = evaluate_draft(draft, target, tokenizer, prompts, verify=1, **options)
    assert draft.generation_config.draft_vocabulary == IDS[:120]
    setting = report.settings[0]
    assert setting.block_efficiency == before.block_efficiency, "the setting's own numbers are of the whole head"
    sizes = [result.size for result in setting.draft_vocabulary]
    assert sizes == [30, 60, 120, draft.config.vocab_size]
    assert setting.draft_vocabulary[-1].block_efficiency == setting.block_efficiency
    assert all(result.predicted_speedup > 0 for result in setting.draft_vocabulary)
    run, plain = setting.speculative, setting.assisted
    assert run.mean_acceptance_length == setting.of_list.block_efficiency[run.num_assistant_tokens].value
    assert plain.mean_acceptance_length == setting.block_efficiency[plain.num_assistant_tokens].value
    assert run.mean_acceptance_length < plain.mean_acceptance_length, "SpeculativeDecoding proposes from the list alone"
    assert report.self_check.equal
    assert sorted(report.latency.listed_draft_seconds) == sizes[:-1]
    assert SpeculationReport.from_json(report.to_json()) == report
    console = Console(width=120)
    with console.capture() as shown:
        console.print(ReportTable(report))
    assert "120 tokens proposed" in shown.get()
    card = DraftModelCard.from_report(report).render()
    assert "A smaller vocabulary" in card
    assert "| 120 |" in card
    with pytest.raises(ValueError, match="draft_vocabulary_sizes"):
        evaluate_draft(draft, target, tokenizer, prompts, draft_vocabulary_sizes=[121], **options)
