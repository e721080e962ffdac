import math

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset

from hf_draftkd.data.generation import generate_alignment_data
from hf_draftkd.data.kept_distributions import CacheOptions
from hf_draftkd.data.target_cache import cache_target_distributions
from tests.data.small import make_target
from tests.tiny import ARCHITECTURES

TEXTS = ["the cat", "on", "sat on the mat, the cat", "a"]


@pytest.fixture
def data(target, tokenizer):
    return generate_alignment_data(target, tokenizer, TEXTS, max_new_tokens=7, temperatures=(0.0, 1.0))


def log_p(model, row, temperature=1.0, vocab_size=None):
    """[T, V] in float64, one row and one token at a time, straight from the definition."""
    text, rows = list(row["prompt_ids"]), []
    for token in row["completion_ids"]:
        with torch.no_grad():
            logits = model(torch.tensor([text])).logits[0, -1, :vocab_size].double() / temperature
        rows.append(logits - logits.exp().sum().log())
        text.append(token)
    return torch.stack(rows)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_top_k_and_tail_are_those_of_the_target(target, data, temperature, batch_size):
    """Off by one, padded or tempered wrongly, the cache would teach another distribution (faults 2 and 5)."""
    cached = cache_target_distributions(
        data, target, top_k=5, loss_temperature=temperature, dtype="float32", batch_size=batch_size
    )
    for row in cached:
        expected = log_p(target, row, temperature)
        torch.testing.assert_close(
            torch.tensor(row["completion_logprobs"]).double(),
            expected[range(len(expected)), row["completion_ids"]],
            atol=2e-5,
            rtol=0,
        )
        values, ids = expected.topk(5)
        assert row["target_token_ids"] == ids.tolist()
        torch.testing.assert_close(torch.tensor(row["target_logprobs"]).double(), values, atol=2e-5, rtol=0)
        tail = torch.log1p(-values.exp().sum(-1))
        torch.testing.assert_close(torch.tensor(row["target_tail_logprob"]).double(), tail, atol=1e-4, rtol=0)
        assert row["target_temperature"] == temperature


def test_rows_are_read_as_lists_whatever_format_was_set(target, data):
    expected, found = (cache_target_distributions(each, target, top_k=5) for each in (data, data.with_format("torch")))
    assert list(found) == list(expected)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture_gives_its_own_distribution(architecture):
    """Right padding and `logits_to_keep` must mean the same for learned and for rotary positions."""
    model = ARCHITECTURES[architecture]()
    rows = Dataset.from_list(
        [
            {"prompt_ids": [0, 9, 8, 7, 6, 5], "completion_ids": [20, 21]},
            {"prompt_ids": [0], "completion_ids": [30, 31, 32, 33]},
            {"prompt_ids": [0, 4], "completion_ids": [1]},
        ]
    )
    for row in cache_target_distributions(rows, model, top_k=3, dtype="float32"):
        torch.testing.assert_close(
            torch.tensor(row["target_logprobs"]).double(), log_p(model, row).topk(3).values, atol=1e-4, rtol=0
        )


def test_a_whole_vocabulary_leaves_an_empty_tail(target, data):
    cached = cache_target_distributions(data, target, top_k=264)
    assert all(value == -math.inf for row in cached for value in row["target_tail_logprob"])


def test_padded_rows_are_in_no_distribution(tokenizer):
    """Fault 6 of the field: rows that stand for no token hold real probability."""
    target = make_target(vocab_size=400)
    data = generate_alignment_data(target, tokenizer, TEXTS, max_new_tokens=4)
    cached = cache_target_distributions(data, target, top_k=264, tokenizer=tokenizer, dtype="float32")
    for row in cached:
        assert max(map(max, row["target_token_ids"])) < 264
        expected = log_p(target, row, vocab_size=264)
        torch.testing.assert_close(
            torch.tensor(row["target_logprobs"]).double(), expected.topk(264).values, atol=1e-4, rtol=0
        )


def test_draws_are_counted_and_follow_p(target, data):
    """Frequencies of many draws approach p; every position has exactly N of them."""
    draws = 2000
    cached = cache_target_distributions(data, target, sampled=draws)
    row = cached[0]
    p = log_p(target, row).exp()
    for position, (ids, counts) in enumerate(zip(row["target_token_ids"], row["target_counts"], strict=True)):
        assert sum(counts) == draws
        assert len(set(ids)) == len(ids)
        frequencies = torch.zeros(264, dtype=torch.float64)
        frequencies[ids] = torch.tensor(counts, dtype=torch.float64) / draws
        chance = (p[position] * (1 - p[position]) / draws).sqrt().sum() * (2 / math.pi) ** 0.5 / 2
        assert 0.5 * (frequencies - p[position]).abs().sum() < 1.6 * chance + 1e-9
    assert "target_logprobs" not in cached.column_names
    assert len(row["completion_logprobs"]) == len(row["completion_ids"])


def test_draws_do_not_depend_on_the_batch(target, data):
    one = cache_target_distributions(data, target, sampled=50, batch_size=1)
    all_at_once = cache_target_distributions(data, target, sampled=50, batch_size=8)
    assert one["target_counts"] == all_at_once["target_counts"]
    other = cache_target_distributions(data, target, sampled=50, seed=1)
    assert other["target_counts"] != one["target_counts"]


@pytest.mark.parametrize(("old", "new"), [({"sampled": 4}, {"top_k": 5}), ({"top_k": 5}, {"sampled": 4})])
def test_a_new_cache_takes_the_place_of_an_old_one(target, data, old, new):
    """Counts of the former draws stood beside the likeliest tokens, which were learned as if they had been drawn."""
    again = cache_target_distributions(cache_target_distributions(data, target, **old), target, **new)
    assert again.to_list() == cache_target_distributions(data, target, **new).to_list()


@pytest.mark.parametrize("where", ["parquet", "hub format"])
def test_float16_keeps_its_promised_bound_through_disk(tmp_path, target, data, where):
    exact = cache_target_distributions(data, target, top_k=200, dtype="float32")
    compact = cache_target_distributions(data, target, top_k=200)
    if where == "parquet":
        compact.to_parquet(tmp_path / "cache.parquet")
        compact = load_dataset("parquet", data_files=str(tmp_path / "cache.parquet"), split="train")
    else:
        compact.save_to_disk(tmp_path / "cache")
        compact = Dataset.load_from_disk(tmp_path / "cache")
    for name in ("completion_logprobs", "target_tail_logprob", "target_logprobs"):
        for precise, stored in zip(exact[name], compact[name], strict=True):
            precise, stored = np.asarray(precise, dtype=np.float64), np.asarray(stored, dtype=np.float64)
            assert (np.abs(stored - precise) <= np.maximum(2.0**-11 * np.abs(precise), 2.0**-25)).all()
    assert compact["target_token_ids"] == exact["target_token_ids"]


def test_ids_take_the_smallest_type_that_fits():
    top_k = CacheOptions().features(50_000)
    assert top_k["target_token_ids"].feature.feature.dtype == "uint16"
    assert CacheOptions().features(2**16 + 1)["target_token_ids"].feature.feature.dtype == "int32"
    assert top_k["target_logprobs"].feature.feature.dtype == "float16"
    assert CacheOptions(sampled=50).features(9)["target_counts"].feature.feature.dtype == "uint8"
    assert CacheOptions(sampled=256).features(9)["target_counts"].feature.feature.dtype == "uint16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5, "sampled": 5}, "one form"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 265}, "between 1 and the vocabulary's 264"),
        ({"sampled": 0}, "from 1 to 65535"),
        ({"sampled": 65_536}, "from 1 to 65535"),
        ({"loss_temperature": 0.0}, "temperature"),
        ({"loss_temperature": math.nan}, "temperature"),
        ({"dtype": "bfloat16"}, "float16"),
    ],
)
def test_bad_options_are_refused(target, data, options, message):
    with pytest.raises(ValueError, match=message):
        cache_target_distributions(data, target, **options)


def test_a_name_in_place_of_the_target_is_refused(data):
    with pytest.raises(ValueError, match="'org/target' is a name: load the model"):
        cache_target_distributions(data, "org/target")


def test_data_without_tokens_are_refused(target):
    with pytest.raises(ValueError, match="no completion_ids"):
        cache_target_distributions(Dataset.from_list([{"prompt_ids": [1], "text": "x"}]), target)


def test_a_target_with_broken_weights_is_named(target, data):
    target.lm_head.weight.data[5, 0] = math.inf  # NaN is found before
    with pytest.raises(FloatingPointError, match="NaN"):
        cache_target_distributions(data, target, top_k=5)


def test_a_pass_that_fails_leaves_the_targets_mode(target, tokenizer, monkeypatch):
    """Catches a target that was training and is not any more, since the memory ran out in between."""
    rows = generate_alignment_data(target, tokenizer, ["the cat"], max_new_tokens=3)
    target.train()
    monkeypatch.setattr(target.lm_head, "forward", lambda _: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        cache_target_distributions(rows, target)
    assert target.training
