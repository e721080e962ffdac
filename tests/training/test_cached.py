"""Learning from cached distributions: the same as from the live target, and refused where it could not be."""

import json
import math

import pytest
import torch
from datasets import Dataset, concatenate_datasets

from hf_draftkd import DraftDistillTrainer
from hf_draftkd.data.collator import CachedDistributions, addresses
from hf_draftkd.data.target_cache import cache_target_distributions
from tests.tiny import VOCAB_SIZE, tiny_pair
from tests.training.rows import alignment_rows
from tests.training.trainers import build, weights

COLLATIONS = {
    "padded": {},
    "truncated": {"max_length": 18},
    "packed": {"packing": True, "max_length": 64},
    "packed and truncated": {"packing": True, "max_length": 18},
    "padding-free": {"padding_free": True, "max_length": None},
}


def cached(rows, target, **options):
    return cache_target_distributions(rows, target, **{"dtype": "float32"} | options)


def loss_and_gradients(path, models, tokenizer, rows, **options):
    """Of one batch that holds all the data."""
    trainer = build(path, models, tokenizer, rows, **options)
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    loss.backward()
    return loss.item(), {name: value.grad for name, value in trainer.model.named_parameters()}


def log_probs(model, row) -> torch.Tensor:
    """[T, V] float64 at the completion tokens of one row."""
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].double()
    return logits - logits.exp().sum(-1, keepdim=True).log()


# The loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("collation", COLLATIONS)
def test_the_whole_vocabulary_gives_the_live_loss_and_gradient(tmp_path, tokenizer, collation):
    """Distributions that slip against their tokens when rows are cut, packed or joined."""
    rows = alignment_rows(tiny_pair("llama")[1], tokenizer, count=5)
    options = COLLATIONS[collation]
    loss, gradients = loss_and_gradients(tmp_path, tiny_pair("llama"), tokenizer, rows, **options)
    draft, target = tiny_pair("llama")
    data = cached(rows, target, top_k=VOCAB_SIZE)
    cached_loss, cached_gradients = loss_and_gradients(tmp_path, (draft, None), tokenizer, data, **options)
    assert cached_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(cached_gradients[name], gradient, atol=1e-5, rtol=1e-4)


def test_rows_are_shuffled_before_they_are_packed(tmp_path, pair, tokenizer):
    """`shuffle_dataset=True` did nothing where a cache was in use."""
    data = cached(alignment_rows(pair[1], tokenizer), pair[1], top_k=4)
    options = {"packing": True, "max_length": 64}
    usual, shuffled = (
        build(tmp_path, (pair[0], None), tokenizer, data, shuffle_dataset=shuffles, **options).train_dataset
        for shuffles in (False, True)
    )
    assert shuffled["input_ids"] != usual["input_ids"]
    tokens = [sorted(token for row in rows["input_ids"] for token in row) for rows in (usual, shuffled)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "reverse_kl"},
        {"divergence": "generalized_jsd", "beta": 0.3},
        {"divergence": "lk_hybrid", "loss_temperature": 2.0},
        {"divergence": "tvd_plus_plus", "tvd_estimator": "full"},
        {"divergence": "forward_kl", "cross_entropy_weight": 0.25},
    ],
    ids=lambda options: options["divergence"],
)
def test_every_divergence_has_its_live_gradient(tmp_path, tokenizer, options):
    """A divergence that the cached path computes in another way, or at another temperature."""
    draft, target = tiny_pair("llama")
    rows = alignment_rows(target, tokenizer, count=3)
    data = cached(rows, target, top_k=VOCAB_SIZE, loss_temperature=options.get("loss_temperature", 1.0))
    loss, gradients = loss_and_gradients(tmp_path, tiny_pair("llama"), tokenizer, rows, **options)
    cached_loss, cached_gradients = loss_and_gradients(tmp_path, (draft, None), tokenizer, data, **options)
    assert cached_loss == pytest.approx(loss, rel=1e-4, abs=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(cached_gradients[name], gradient, atol=2e-5, rtol=1e-3)


def test_top_k_and_tail_are_compared_as_k_plus_one_outcomes(tmp_path, pair, tokenizer):
    """The tail dropped, or the tokens of another position taken."""
    draft, target = pair
    rows = alignment_rows(target, tokenizer, count=3, temperature=1.0)
    total = tokens = 0
    for row in rows:
        for log_p, log_q in zip(log_probs(target, row), log_probs(draft, row), strict=True):
            ids = log_p.argsort(descending=True)[:7]
            p, q = log_p[ids].exp(), log_q[ids].exp()
            p, q = torch.cat([p, 1 - p.sum()[None]]), torch.cat([q, 1 - q.sum()[None]])
            total += float((p * (p / q).log()).sum())
            tokens += 1
    trainer = build(tmp_path, (draft, None), tokenizer, eval_rows=cached(rows, target, top_k=7))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_draws_learn_their_frequencies(tmp_path, pair, tokenizer):
    """Counts lost where positions keep different numbers of tokens, or padding counted as token 0."""
    draft, target = pair
    rows = cached(alignment_rows(target, tokenizer, count=3), target, sampled=9)
    assert len({len(ids) for row in rows for ids in row["target_token_ids"]}) > 1
    total = tokens = 0
    for row in rows:
        kept = zip(row["target_token_ids"], row["target_counts"], log_probs(draft, row), strict=True)
        for ids, counts, log_q in kept:
            share = torch.tensor(counts).double() / 9
            total += float((share * (share.log() - log_q[ids])).sum())
            tokens += 1
    trainer = build(tmp_path, (draft, None), tokenizer, rows, max_steps=6, learning_rate=2e-2)
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < 0.9 * total / tokens


def test_a_loss_of_ones_own_sees_the_tail_as_one_more_token(tmp_path, pair, tokenizer):
    class Squared(DraftDistillTrainer):
        def token_loss(self, draft_logits, target_logits):
            assert draft_logits.shape[-1] == target_logits.shape[-1] == 8
            return (draft_logits.softmax(-1) - target_logits.softmax(-1)).pow(2).sum(-1)

    rows = cached(alignment_rows(pair[1], tokenizer, count=4), pair[1], top_k=7)
    trainer = build(tmp_path, (pair[0], None), tokenizer, rows, trainer_class=Squared, max_steps=4)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_cached_training_takes_the_steps_of_live_training(tmp_path, tokenizer):
    """A shuffled or accumulated batch that looks its distributions up in the wrong rows."""
    rows = alignment_rows(tiny_pair("llama")[1], tokenizer)
    options = {"max_steps": 4, "optim": "sgd", "learning_rate": 0.1, "gradient_accumulation_steps": 2}
    live = build(tmp_path, tiny_pair("llama"), tokenizer, rows, **options)
    live.train()
    draft, target = tiny_pair("llama")
    data = cached(rows, target, top_k=VOCAB_SIZE)
    # Rows reached through indices, as a split or a shuffled data set has them, and read by worker processes.
    data = concatenate_datasets([data.select(range(4, 8)), data]).select(range(4, 12))
    trainer = build(tmp_path, (draft, None), tokenizer, data, dataloader_num_workers=1, **options)
    trainer.train()
    for name, value in weights(live.model).items():
        torch.testing.assert_close(weights(trainer.model)[name], value, atol=2e-5, rtol=0)


def test_a_cache_beside_a_target_is_said_to_be_unread(tmp_path, pair, tokenizer, caplog):
    """A big target loaded, and a cache that was paid for left aside, without a word."""
    rows = cached(alignment_rows(pair[1], tokenizer), pair[1], top_k=8)
    build(tmp_path, pair, tokenizer, rows)
    assert "cached distributions, which are not read beside a `target_model`" in caplog.text


# Evaluation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_figures_of_the_whole_vocabulary_are_the_live_ones(tmp_path, pair, tokenizer, temperature):
    draft, target = pair
    rows = alignment_rows(target, tokenizer, count=5, temperature=temperature)
    live = build(tmp_path, pair, tokenizer, eval_rows=rows).evaluate()
    found = build(tmp_path, (draft, None), tokenizer, eval_rows=cached(rows, target, top_k=VOCAB_SIZE)).evaluate()
    for name in ("eval_loss", "eval_acceptance_rate", "eval_block_efficiency", "eval_block_efficiency_at_3"):
        assert found[name] == pytest.approx(live[name], rel=1e-5), name


def test_acceptance_from_top_k_is_called_an_upper_bound(tmp_path, pair, tokenizer):
    """A bound that goes by the name of the rate; block efficiency needs no tail, and stays exact."""
    draft, target = pair
    rows = alignment_rows(target, tokenizer, count=5, temperature=1.0)
    live = build(tmp_path, pair, tokenizer, eval_rows=rows).evaluate()
    data = cached(rows, target, top_k=4)
    trainer = build(tmp_path, (draft, None), tokenizer, data, max_steps=1)
    found = trainer.evaluate(data)
    assert "eval_acceptance_rate" not in found
    assert live["eval_acceptance_rate"] < found["eval_acceptance_rate_upper_bound"] < 1
    assert found["eval_block_efficiency"] == pytest.approx(live["eval_block_efficiency"], rel=1e-5)
    trainer.train()
    assert "acceptance_rate_upper_bound" in trainer.state.log_history[0]
    assert not any("acceptance_rate" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize(("written_at", "cached_at"), [(0.7, 1.0), (1.0, 2.0)], ids=["tempered text", "tempered cache"])
def test_no_block_efficiency_where_the_cache_cannot_tell(tmp_path, pair, tokenizer, written_at, cached_at):
    """min(1, q/p) with p and q of another temperature than the text was written at."""
    rows = alignment_rows(pair[1], tokenizer, count=3, temperature=written_at)
    data = cached(rows, pair[1], top_k=4, loss_temperature=cached_at)
    trainer = build(tmp_path, (pair[0], None), tokenizer, eval_rows=data, loss_temperature=cached_at)
    with pytest.warns(UserWarning, match="eval_block_efficiency is left out: 3 evaluation rows"):
        found = trainer.evaluate()
    assert "eval_block_efficiency" not in found
    assert ("eval_acceptance_rate_upper_bound" in found) == (cached_at == 1)


def test_each_dataset_has_its_own_cache(tmp_path, pair, tokenizer):
    """Evaluation rows looked up among the training rows."""
    draft, target = pair
    data = cached(alignment_rows(target, tokenizer, count=8), target, top_k=5)
    parts = [data.select(range(5)), data.select(range(5, 8)), data.select(range(2, 4))]
    trainer = build(tmp_path, (draft, None), tokenizer, parts[0], parts[1])
    alone = [build(tmp_path, (draft, None), tokenizer, eval_rows=part).evaluate()["eval_loss"] for part in parts]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(alone[1], rel=1e-6)
    assert trainer.evaluate(parts[2])["eval_loss"] == pytest.approx(alone[2], rel=1e-6)
    assert len(set(alone)) == 3


def test_greedy_text_alone_gives_its_block_efficiency(tmp_path, pair, tokenizer):
    """Black box, too: a greedy target accepts what equals its text."""
    rows = alignment_rows(pair[1], tokenizer, count=4)
    live = build(tmp_path, pair, tokenizer, eval_rows=rows).evaluate()
    text = build(tmp_path, (pair[0], None), tokenizer, eval_rows=rows, divergence="cross_entropy").evaluate()
    assert text["eval_block_efficiency"] == live["eval_block_efficiency"]
    assert "eval_acceptance_rate" not in text


def test_the_card_says_what_was_learned_from(tmp_path, pair, tokenizer):
    rows = cached(alignment_rows(pair[1], tokenizer, name="org/target"), pair[1], top_k=4)
    trainer = build(tmp_path, (pair[0], None), tokenizer, rows, max_steps=1)
    trainer.train()
    trainer.create_model_card()
    training = json.loads((tmp_path / "provenance.json").read_text())["training"]
    assert (training["signal"], training["target"]) == ("cached", "org/target")


# Bad input -----------------------------------------------------------------------------------------------------------


def test_the_lookup_gives_every_column_of_the_token_asked_for():
    """Ragged positions and rows without tokens shift all that follow."""
    rows = Dataset.from_dict(
        {
            "completion_logprobs": [[-1.0, -2.0], [], [-3.0]],
            "target_token_ids": [[[1, 2, 3], [4]], [], [[5, 6]]],
            "target_counts": [[[7, 1, 1], [9]], [], [[4, 5]]],
        }
    )
    cache = CachedDistributions()
    assert [cache.add(rows), cache.add(rows)] == [0, 3]
    assert addresses(0, 2, 0) == [-1, -1]
    wanted = [addresses(5, 1, 1)[1], addresses(3, 0, 2)[0], addresses(3, 0, 2)[1], addresses(5, 1, 1)[1]]
    found = cache.lookup(torch.tensor(wanted))
    assert found["completion_logprobs"].tolist() == [-3, -1, -2, -3]
    assert found["target_token_ids"].tolist() == [[5, 6, 0], [1, 2, 3], [4, 0, 0], [5, 6, 0]]
    assert found["target_counts"].tolist() == [[4, 5, 0], [7, 1, 1], [9, 0, 0], [4, 5, 0]]
    assert len(cache.lookup(torch.tensor([], dtype=torch.long))["completion_logprobs"]) == 0


@pytest.fixture
def refused(tmp_path, pair, tokenizer):
    """Builds a cached trainer that must say why it cannot be built, without reading a model."""
    data = alignment_rows(pair[1], tokenizer, count=4)

    def check(message, cache, change=lambda rows: rows, **options):
        rows = change(cached(data, pair[1], **cache))
        with pytest.raises(ValueError, match=message):
            build(tmp_path, ("never/loaded", None), None, rows, **options)

    return check


@pytest.mark.parametrize("divergence", ["reverse_kl", "total_variation", "lk_hybrid"])
def test_draws_serve_forward_kl_only(refused, divergence):
    refused("cannot be learned from tokens drawn", {"sampled": 5}, divergence=divergence)


def test_another_temperature_than_the_cache_has_is_refused(refused):
    """The tail cannot be re-tempered: the loss would be that of no distribution."""
    refused("cached at `loss_temperature=1`, but `loss_temperature=2`", {"top_k": 4}, loss_temperature=2.0)
    refused("cached at `loss_temperature=2`, but `loss_temperature=1`", {"top_k": 4, "loss_temperature": 2.0})


def test_rows_without_distributions_are_refused(refused):
    """Rows that were never cached, or a completion edited afterwards."""
    refused("holds no cached distributions .*target_tail_logprob", {"top_k": 4}, _without("target_tail_logprob"))
    bare = Dataset.from_list([{"prompt_ids": [0, 9], "completion_ids": [7, 1]}])
    refused("Row 4 of the train dataset has 2 .* no dist", {"top_k": 4}, lambda r: concatenate_datasets([r, bare]))
    refused("Row 0 of the train dataset has 1 completion tokens, but 1[12]", {"top_k": 4}, _edited)


def _without(column):
    return lambda rows: rows.remove_columns(column)


def _edited(rows):
    return rows.map(lambda row: {"completion_ids": row["completion_ids"][:1]})


def test_the_cache_is_not_written_again(tmp_path, pair, tokenizer, monkeypatch):
    """`Dataset.unique` copies all columns of a split, `Dataset.cast` those of every data set: gigabytes of
    distributions, before the first step.
    """
    data = cached(alignment_rows(pair[1], tokenizer, count=6), pair[1], top_k=4)
    splits = data.train_test_split(test_size=2, seed=0)
    heavy, cast = [], Dataset.cast

    def noted(dataset, *args, **options):
        heavy.append("target_token_ids" in dataset.column_names)
        return cast(dataset, *args, **options)

    monkeypatch.setattr(Dataset, "cast", noted)
    monkeypatch.setattr(Dataset, "flatten_indices", None)
    build(tmp_path, (pair[0], None), tokenizer, splits["train"], splits["test"], mix_dataset=data.select([0, 1]))
    assert heavy
    assert not any(heavy)


def test_caches_of_different_size_are_refused(refused, pair):
    refused(
        r"different numbers of tokens \(\[3, 4\]\)",
        {"top_k": 4},
        lambda rows: concatenate_datasets([rows, cached(rows.select([0]), pair[1], top_k=3)]),
    )


def test_caches_of_both_kinds_in_one_data_set_are_refused(refused, pair):
    """All rows were read as draws: those of the likeliest tokens with the counts of other rows."""
    refused(
        "holds both kinds of cache",
        {"top_k": 4},
        lambda rows: concatenate_datasets([rows, cached(rows.select([0]), pair[1], sampled=3)]),
    )


def test_what_would_lose_the_link_to_the_cache_is_refused(refused):
    refused("is a stream", {"top_k": 4}, lambda rows: rows.to_iterable_dataset())
    refused("`skip_prepare_dataset` cannot", {"top_k": 4}, dataset_kwargs={"skip_prepare_dataset": True})


def test_a_cache_of_another_vocabulary_is_refused(tmp_path, pair, tokenizer):
    rows = cached(alignment_rows(pair[1], tokenizer, count=2), pair[1], top_k=4)
    rows = rows.map(lambda row: {"target_token_ids": [[VOCAB_SIZE, *ids[1:]] for ids in row["target_token_ids"]]})
    # Fault: it was seen in the first batch that named it, hours into a run perhaps.
    with pytest.raises(ValueError, match=f"name token {VOCAB_SIZE}, but"):
        build(tmp_path, (pair[0], None), tokenizer, rows)


def test_float16_stays_within_its_bound(tmp_path, pair, tokenizer):
    """The form that is written by default: each log-probability is off by at most 2**-11 of its size."""
    rows = alignment_rows(pair[1], tokenizer, count=4)
    live = build(tmp_path, pair, tokenizer, eval_rows=rows).evaluate()["eval_loss"]
    data = cached(rows, pair[1], top_k=VOCAB_SIZE, dtype="float16")
    found = build(tmp_path, (pair[0], None), tokenizer, eval_rows=data).evaluate()["eval_loss"]
    # |Δ log p| ≤ 2**-11 · |log p|, and p |log p| ≤ 1/e for each token that carries weight.
    assert found == pytest.approx(live, abs=2**-11 * (math.log(VOCAB_SIZE) + live) * 2)


# The vocabulary ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft_rows", [304, 336])
@pytest.mark.parametrize("place", ["prompt_ids", "completion_ids"])
def test_the_draft_is_fitted_to_the_vocabulary_that_the_cache_records(tmp_path, tokenizer, draft_rows, place):
    """Fault: an id of a padded row of the target died in the draft's embedding, after minutes of training."""

    def models():
        return tiny_pair("llama", draft_vocab_size=draft_rows, target_vocab_size=320)

    rows = alignment_rows(models()[1], tokenizer, count=4).to_list()
    rows[2][place][2] = 310
    rows = Dataset.from_list(rows)
    loss, gradients = loss_and_gradients(tmp_path, models(), tokenizer, rows)
    draft, target = models()
    data = cached(rows, target, top_k=VOCAB_SIZE, tokenizer=tokenizer)
    assert set(data["target_vocab_size"]) == {320}
    found, cached_gradients = loss_and_gradients(tmp_path, (draft, None), tokenizer, data)
    assert found == pytest.approx(loss, rel=1e-5)
    assert (draft.config.vocab_size, draft.generation_config.suppress_tokens) == (320, list(range(300, 320)))
    for name, gradient in gradients.items():
        torch.testing.assert_close(cached_gradients[name], gradient, atol=1e-5, rtol=1e-3)


def test_an_id_that_is_none_is_refused_with_its_row(tmp_path, pair, tokenizer):
    """An IndexError of the embedding, in the middle of training: -100 had been put among the ids too."""
    rows = Dataset.from_list([{"input_ids": [5, 6]}, {"input_ids": [5, -100, 6]}])
    with pytest.raises(ValueError, match=r"Row 1 .*train dataset holds -100 in `input_ids`, which is no token"):
        build(tmp_path, pair, tokenizer, rows)


@pytest.mark.parametrize("black_box", [True, False])
def test_an_id_that_the_draft_lacks_is_refused_with_its_row(tmp_path, tokenizer, black_box):
    draft, target = tiny_pair("llama", draft_vocab_size=304, target_vocab_size=320)
    rows = alignment_rows(target, tokenizer, count=4).to_list()
    rows[2]["completion_ids"][2] = 310
    data, options = Dataset.from_list(rows), {"divergence": "cross_entropy"}
    if not black_box:  # a cache from where the size of the vocabulary was not known
        data, options = cached(data, target, top_k=4, tokenizer=tokenizer).remove_columns("target_vocab_size"), {}
    with pytest.raises(ValueError, match=r"Row 2 .*train.*token id 310 .*`completion_ids`.*304 rows"):
        build(tmp_path, (draft, None), tokenizer, data, **options)
