"""The `evaluate` metric, loaded as a user loads it."""

import math
from pathlib import Path

import evaluate
import pytest
import torch

import hf_draftkd
from hf_draftkd.acceptance import accepted_given_output, block_efficiency
from hf_draftkd.acceptance.token_rates import token_logprob

PATH = str(Path(hf_draftkd.__file__).parent / "evaluation" / "metric")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """`evaluate` copies metric code and writes batches into its cache: keep both out of the user's."""
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_CACHE", str(tmp_path))


def load(config_name=None):
    return evaluate.load(PATH, config_name=config_name)


def test_two_tokens_by_hand():
    """q/p is 1/2 and then above 1: blocks of one draft token start at 0, and at 1 if the first was rejected."""
    metric = load()
    draft, target = [math.log(0.25), math.log(0.9)], [math.log(0.5), math.log(0.3)]
    result = metric.compute(predictions=[draft], references=[target], num_assistant_tokens=1)
    assert result["acceptance_rate"] == pytest.approx(0.75)
    # Accept at 0 (1/2): the bonus token ends the text after one call. Reject (1/2): a second call. 1.5 calls.
    assert result["block_efficiency"] == {"1": pytest.approx(2 / 1.5)}


def test_batches_equal_the_house_figures():
    """`add_batch` in pieces of different lengths, against the functions the rest of the package uses."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(7, (length,), generator=generator) for length in (3, 9, 5)]
    logits = [torch.randn((2, len(text), 7), generator=generator, dtype=torch.float64) for text in texts]
    metric = load()
    for text, (draft, target) in zip(texts, logits, strict=True):
        metric.add_batch(
            predictions=[token_logprob(draft, text).tolist()], references=[token_logprob(target, text).tolist()]
        )
    result = metric.compute(num_assistant_tokens=[1, 4])
    accepted = [accepted_given_output(*pair, text) for text, pair in zip(texts, logits, strict=True)]
    padded = torch.nn.utils.rnn.pad_sequence(accepted, batch_first=True)
    mask = torch.arange(9) < torch.tensor([3, 9, 5])[:, None]
    assert result["acceptance_rate"] == pytest.approx(float(torch.cat(accepted).mean()))
    for length in (1, 4):
        assert result["block_efficiency"][str(length)] == pytest.approx(block_efficiency(padded, length, mask))


def test_counts():
    result = load("counts").compute(predictions=[3, 0, 5], references=[5, 5, 5])
    assert result == {
        "num_spec_steps": 3,
        "num_draft_tokens": 15,
        "num_accepted_draft_tokens": 8,
        "mean_acceptance_length": 11 / 3,
        "draft_acceptance_rate": 8 / 15,
    }


def test_it_works_inside_combine():
    """`evaluate.combine` passes the same predictions and references to every metric."""
    both = evaluate.combine({"first": load(), "second": load()})
    result = both.compute(predictions=[[-1.0, -2.0]], references=[[-1.0, -1.0]])
    assert result["first_acceptance_rate"] == result["second_acceptance_rate"] == pytest.approx((1 + math.exp(-1)) / 2)


@pytest.mark.parametrize(
    ("config_name", "predictions", "references", "message"),
    [
        (None, [[-1.0]], [[-1.0, -2.0]], "same tokens"),
        (None, [[0.5]], [[-1.0]], "log-probabilities are expected"),
        (None, [[]], [[]], "empty"),
        ("counts", [3], [2], "cannot be"),
    ],
)
def test_bad_input_is_refused(config_name, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        load(config_name).compute(predictions=predictions, references=references)


def test_a_draft_length_that_is_none_is_named():
    """A TypeError: a float is not iterable."""
    with pytest.raises(ValueError, match=r"whole number of at least 1, got 3\.0"):
        load().compute(predictions=[[-1.0]], references=[[-1.0]], num_assistant_tokens=3.0)


def test_an_unknown_configuration_is_refused():
    with pytest.raises(ValueError, match="no configuration 'count'"):
        load("count")
