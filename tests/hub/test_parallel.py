"""The card of a parallel draft: what drafting in one pass gives, and commands that draft so."""

from transformers import LlamaConfig

from hf_draftkd import DraftModelCard, SpeculationReport
from hf_draftkd.hub.provenance import PairFacts
from hf_draftkd.hub.report_tables import parallel_table
from hf_draftkd.models.parallel import store_parallel_draft
from tests.hub import samples
from tests.tiny import tiny_tokenizer


def test_the_card_shows_both_ways_and_the_command_that_drafts_in_one_pass():
    """Catches a vLLM command without `parallel_drafting`, which would draft one token at a time."""
    one = samples.setting(0.0, "exact_match", 0.7, 2.0)
    efficiency = {"1": samples.estimate(1.6, 0.01), "2": samples.estimate(1.9, 0.01)}
    rates = [samples.estimate(0.7, 0.01), samples.estimate(0.4, 0.01)]
    one["block_efficiency"] |= {"1": samples.estimate(1.7, 0.01), "2": samples.estimate(2.1, 0.01)}
    one["parallel"] = {"num_tokens": 2, "acceptance_by_depth": rates, "block_efficiency": efficiency}
    advice = {
        "worth_it": True,
        "num_assistant_tokens": 5,
        "way": "SpeculativeDecoding in parallel",
        "predicted_speedup": 1.9,
        "reason": "It pays.",
    }
    report = samples.report(settings=[one], recommendation=advice, paired_difference=None, baseline=None)
    training = samples.training(hyperparameters={"parallel_tokens": 2})
    facts = samples.pair(parallel_tokens=2)
    card = DraftModelCard.from_report(report, name="me/draft", pair=facts, training=training).text
    assert "| temperature 0 | α at depth | 0.700 | 0.400 |" in card or "| greedy | α at depth | 0.700 | 0.400 |" in card
    assert "τ, one by one | 1.70 | 2.10 |" in card
    assert "τ, in one pass | 1.60 | 1.90 |" in card
    assert '"num_speculative_tokens": 2, "parallel_drafting": true' in card
    assert "It drafts all tokens of a step in one pass of the draft." in card
    assert "2504.18583" in card

    report["recommendation"] = advice | {"way": "assistant_model="}
    card = DraftModelCard.from_report(report, name="me/draft", pair=facts).text
    assert '"num_speculative_tokens": 5}' in card
    assert '"parallel_drafting": true' not in card


def test_texts_shorter_than_a_block_leave_cells_empty():
    """Catches a header that holds as many depths as the first row, and a card that cannot be written."""
    one = samples.setting(0.0, "exact_match", 0.7, 2.0)
    rates = [samples.estimate(0.7, 0.01)]
    one["parallel"] = {"num_tokens": 3, "acceptance_by_depth": rates, "block_efficiency": one["block_efficiency"]}
    (setting,) = SpeculationReport.from_dict(samples.report(settings=[one])).settings
    lines = parallel_table([setting]).splitlines()
    assert lines[0] == "| Decoding |  | 1 | 3 |"  # at 2 nothing is known
    assert len({line.count("|") for line in lines}) == 1
    assert parallel_table([]) is None


def test_an_ordinary_drafts_card_says_nothing_of_it():
    card = DraftModelCard.from_report(samples.report(), name="me/draft", pair=samples.pair()).text
    assert "parallel_drafting" not in card
    assert "in one pass" not in card


def test_the_pair_knows_from_the_drafts_config():
    config, tokenizer = LlamaConfig(), tiny_tokenizer()
    assert PairFacts.from_configs(config, config, tokenizer).parallel_tokens is None
    store_parallel_draft(config, 7, 6)
    assert PairFacts.from_configs(config, config, tokenizer).parallel_tokens == 6
