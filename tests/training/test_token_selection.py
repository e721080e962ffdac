"""Which tokens a draft learns from: each selection against its definition, in float64."""

import copy

import pytest
import torch
from datasets import Dataset

from hf_draftkd import DraftDistillTrainer
from hf_draftkd.data.target_cache import cache_target_distributions
from hf_draftkd.models.forward import predicting_positions
from hf_draftkd.training.token_selection import adaspec_weights, completion_places, rejected_by
from tests.tiny import VOCAB_SIZE, tiny_llama, tiny_pair
from tests.training.rows import alignment_rows
from tests.training.trainers import assert_same, build, weights

PLACING = {
    "padded": {},
    "packed": {"packing": True, "max_length": 64},
    "padding-free": {"padding_free": True, "max_length": None},
}


def reference():
    """What AdaSPEC compares the draft with: another model of its size."""
    return tiny_llama(seed=11)


def log_probs(model, row) -> torch.Tensor:
    """[T, V] float64 at the completion tokens of one row, with gradient."""
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    return model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].double().log_softmax(-1)


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def loss_and_gradients(trainer, rows=None):
    """Of one batch that holds all the data."""
    trainer.model.eval().zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(rows or trainer.train_dataset)))
    loss.backward()
    return loss.item(), {name: value.grad.clone() for name, value in trainer.model.named_parameters()}


def expected_loss_and_gradients(draft, target, rows, weigh):
    """Σ weight · KL(p‖q) ÷ tokens; `weigh(row, log_p, log_q)` gives the weights of a row."""
    total, tokens = 0.0, 0
    for row in rows:
        with torch.no_grad():
            log_p = log_probs(target, row)
        log_q = log_probs(draft, row)
        total = total + (weigh(row, log_p, log_q.detach()) * kl(log_p, log_q)).sum()
        tokens += len(row["completion_ids"])
    loss = total / tokens
    gradients = torch.autograd.grad(loss, list(draft.parameters()))
    return loss.item(), dict(zip(weights(draft), gradients, strict=True))


def assert_close(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-3)


def not_rejected(row, log_p, log_q):
    """Π Σ min(p, q) over the tokens up to each one, by hand."""
    product, found = 1.0, []
    for here_p, here_q in zip(log_p.exp(), log_q.exp(), strict=True):
        product *= float(torch.minimum(here_p, here_q).sum())
        found.append(1 - product)
    return torch.tensor(found)


def mismatched(row, log_p, log_q):
    wrong = [bool(token != guess) for token, guess in zip(row["completion_ids"], log_q.argmax(-1), strict=True)]
    return torch.tensor([float(any(wrong[: t + 1])) for t in range(len(wrong))])


# What is computed ----------------------------------------------------------------------------------------------------


def test_places_start_anew_with_each_completion():
    """Products that run on into the next turn, the next row, or the next text of a packed row."""
    keep = predicting_positions(
        torch.tensor(
            [
                [-100, 5, 6, -100, -100, 7, 8, 9],  # two turns
                [-100, -100, -100, 5, -100, -100, -100, -100],
            ]
        )
    )
    completions, positions = completion_places(keep)
    assert completions.tolist() == [0, 0, 1, 1, 1, 2]
    assert positions.tolist() == [0, 1, 0, 1, 2, 0]
    # Texts without prompts, packed so that one's last token stands beside the next one's first.
    packed = predicting_positions(torch.tensor([[-100, 5, 6, -100, 7, 8]]))
    starts = torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert completion_places(packed, starts)[0].tolist() == [0, 0, 1, 1]
    touching = torch.tensor([[True, True, True, True, True, False]])
    assert completion_places(touching, starts)[1].tolist() == [0, 1, 2, 0, 1]
    assert completion_places(torch.zeros(2, 3, dtype=torch.bool))[0].shape == (0,)


def test_chance_of_a_rejection_so_far():
    acceptance = torch.tensor([0.5, 0.25, 0.0, 1.0, 1.0, 0.5])
    completions, positions = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0, 1, 2, 0, 0, 1])
    assert rejected_by(acceptance, positions, completions).tolist() == [0.5, 0.875, 1.0, 0.0, 0.0, 0.5]
    empty = torch.tensor([], dtype=torch.long)
    assert rejected_by(torch.tensor([]), empty, empty).shape == (0,)


@pytest.mark.parametrize(("share", "chosen"), [(0.4, [1, 3]), (0.41, [1, 3, 4]), (1.0, [0, 1, 2, 3, 4]), (0.01, [1])])
def test_the_largest_gaps_are_chosen(share, chosen):
    """The smallest gaps, the largest losses, or a share that is rounded to none."""
    losses, of_reference = torch.tensor([9.0, 5.0, 1.0, 2.0, 3.0]), torch.tensor([9.0, 1.0, 2.0, 0.0, 2.0])
    found = adaspec_weights(losses, of_reference, share)
    assert found.nonzero().squeeze(-1).tolist() == chosen
    assert found.sum() == len(chosen)
    assert adaspec_weights(losses[:0], of_reference[:0], share).shape == (0,)
    assert adaspec_weights(torch.arange(10.0), torch.zeros(10), 0.3).sum() == 3


# In the trainer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_chunks", [True, False], ids=["in chunks", "whole logits"])
def test_adaspec_learns_from_where_the_draft_lags_most(tmp_path, pair, tokenizer, in_chunks):
    """A gap with the wrong sign, against the wrong model, or a divisor that counts other tokens than all."""
    rows = alignment_rows(pair[1], tokenizer, count=4)
    other = reference()
    with torch.no_grad():
        every = [kl(log_probs(pair[1], row), log_probs(pair[0], row)) for row in rows]
        gaps = torch.cat(every) - torch.cat([kl(log_probs(pair[1], row), log_probs(other, row)) for row in rows])
    count = -(-2 * len(gaps) // 5)
    threshold = gaps.sort(descending=True).values[count - 1]

    def weigh(row, log_p, log_q):
        return (kl(log_p, log_q) - kl(log_p, log_probs(other, row).detach()) >= threshold).double()

    trainer = build(tmp_path, pair, tokenizer, rows, token_selection="adaspec", reference_model=other)
    if not in_chunks:
        trainer.head_arithmetic = trainer.reference_signal.head_arithmetic = None
    assert_close(loss_and_gradients(trainer), expected_loss_and_gradients(*pair, rows, weigh))
    # With the whole share it is plain distillation.
    trainer.args.selected_share = 1.0
    everything = expected_loss_and_gradients(*pair, rows, lambda row, log_p, log_q: torch.ones(len(log_p)))
    assert_close(loss_and_gradients(trainer), everything)


@pytest.mark.parametrize("placing", PLACING)
@pytest.mark.parametrize(
    ("selection", "weigh"), [("after_first_rejection", not_rejected), ("after_first_mismatch", mismatched)]
)
def test_from_the_first_rejection_on(tmp_path, pair, tokenizer, selection, weigh, placing):
    """The first rejection taken per batch or per packed row, off by one, or shut out itself."""
    rows = alignment_rows(pair[1], tokenizer, count=5)
    trainer = build(tmp_path, pair, tokenizer, rows, token_selection=selection, **PLACING[placing])
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert (placing == "padded") == (len(batch["input_ids"]) == 5)
    assert_close(loss_and_gradients(trainer), expected_loss_and_gradients(*pair, rows, weigh))


def test_from_the_first_rejection_on_by_cached_distributions(tmp_path, pair, tokenizer):
    rows = alignment_rows(pair[1], tokenizer, count=3)
    data = cache_target_distributions(rows, pair[1], top_k=VOCAB_SIZE, dtype="float32")
    trainer = build(tmp_path, (pair[0], None), tokenizer, data, token_selection="after_first_rejection")
    assert_close(loss_and_gradients(trainer), expected_loss_and_gradients(*pair, rows, not_rejected))


def test_text_alone_is_enough_where_the_draft_is_asked_for_its_likeliest_token(tmp_path, pair, tokenizer):
    """Black box, and AdaSPEC's gap between cross-entropies: neither reads the target."""
    rows = alignment_rows(pair[1], tokenizer, count=3)
    options = {"divergence": "cross_entropy", "token_selection": "after_first_mismatch"}
    trainer = build(tmp_path, (pair[0], None), tokenizer, rows, **options)
    total = tokens = 0
    for row in rows:
        log_q = log_probs(pair[0], row).detach()
        total -= float(
            (mismatched(row, None, log_q) * log_q.gather(1, torch.tensor(row["completion_ids"])[:, None])[:, 0]).sum()
        )
        tokens += len(row["completion_ids"])
    assert loss_and_gradients(trainer)[0] == pytest.approx(total / tokens, rel=1e-5)
    options = {"divergence": "cross_entropy", "token_selection": "adaspec", "reference_model": reference()}
    trainer = build(tmp_path, (pair[0], None), tokenizer, rows, **options)
    assert loss_and_gradients(trainer)[0] > 0


def test_draws_of_the_target_can_be_selected_from(tmp_path, pair, tokenizer):
    """The frequencies stand in both losses of a gap, so they need not be the target's distributions."""
    rows = alignment_rows(pair[1], tokenizer, count=3)
    data = cache_target_distributions(rows, pair[1], sampled=20)
    trainer = build(
        tmp_path, (pair[0], None), tokenizer, data, token_selection="adaspec", reference_model=reference(), max_steps=2
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(0 < entry["loss"] < 10 for entry in logged)


@pytest.mark.parametrize("selection", ["after_first_rejection", "after_first_mismatch"])
def test_batch_times_accumulation_does_not_change_the_trajectory(tmp_path, tokenizer, selection):
    """A weight that depends on which texts stand in the same micro-batch."""
    rows = alignment_rows(tiny_pair("llama")[1], tokenizer, count=8)
    runs = []
    for batch in (8, 2):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 8 // batch, "max_steps": 2}
        options |= {"optim": "sgd", "learning_rate": 0.1, "token_selection": selection}
        trainer = build(tmp_path, tiny_pair("llama"), tokenizer, rows, **options)
        trainer.train()
        runs.append(weights(trainer.model))
    assert_same(*runs, atol=2e-5)


def test_weights_of_ones_own(tmp_path, pair, tokenizer):
    """Figures that slip against their tokens, or that are not what their names say."""
    rows = alignment_rows(pair[1], tokenizer, count=3)
    other = reference()
    seen = []

    class Flat(DraftDistillTrainer):
        def token_weights(self, metrics):
            assert not metrics.losses.requires_grad
            seen.append(metrics)
            return super().token_weights(metrics) * (metrics.positions % 2) * metrics.acceptance

    trainer = build(tmp_path, pair, tokenizer, rows, trainer_class=Flat, reference_model=other, loss_temperature=1.0)
    found = loss_and_gradients(trainer)

    def weigh(row, log_p, log_q):
        return torch.minimum(log_p.exp(), log_q.exp()).sum(-1) * (torch.arange(len(log_p)) % 2)

    assert_close(found, expected_loss_and_gradients(*pair, rows, weigh))
    (metrics,) = seen
    with torch.no_grad():
        log_p, log_q, log_r = (
            torch.cat([log_probs(model, row) for row in rows]) for model in (pair[1], pair[0], other)
        )
    assert metrics.tokens.tolist() == [token for ids in rows["completion_ids"] for token in ids]
    assert metrics.likeliest.tolist() == log_q.argmax(-1).tolist()
    torch.testing.assert_close(metrics.losses.double(), kl(log_p, log_q), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(metrics.reference_losses.double(), kl(log_p, log_r), atol=1e-5, rtol=1e-4)
    lengths = [len(ids) for ids in rows["completion_ids"]]
    assert metrics.completions.tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]
    assert metrics.positions.tolist() == [place for n in lengths for place in range(n)]


def test_only_the_head_is_passed_twice(tmp_path, pair, tokenizer):
    """A forward pass of the draft or the reference for the weights, and another for the loss."""
    calls = []
    other = reference()
    for name, model in (("draft", pair[0]), ("target", pair[1]), ("reference", other)):
        model.model.register_forward_hook(lambda *_, name=name: calls.append(name))
    trainer = build(tmp_path, pair, tokenizer, token_selection="adaspec", reference_model=other)
    calls.clear()
    loss_and_gradients(trainer)
    assert sorted(calls) == ["draft", "reference", "target"]


def test_the_reference_is_left_as_it_is_and_saved_nowhere(tmp_path, pair, tokenizer):
    other = reference().train()
    before = copy.deepcopy(other.state_dict())
    options = {"token_selection": "adaspec", "reference_model": other, "save_strategy": "steps", "save_steps": 4}
    trainer = build(tmp_path, pair, tokenizer, max_steps=8, per_device_train_batch_size=8, **options)
    losses = [entry["loss"] for entry in (trainer.train(), trainer.state.log_history)[1] if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in other.parameters())
    assert not other.training
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(list(tmp_path.glob("checkpoint-*")))


def test_a_batch_without_completion_tokens_is_a_finite_zero(tmp_path, pair, tokenizer):
    """A maximum or a top-k over nothing."""
    for options in (
        {"token_selection": "adaspec", "reference_model": reference()},
        {"token_selection": "after_first_rejection"},
    ):
        trainer = build(tmp_path, pair, tokenizer, **options)
        nothing = [{"input_ids": [0, 5, 6], "labels": [-100, -100, -100]}]
        loss, gradients = loss_and_gradients(trainer, nothing)
        assert loss == 0
        assert not any(value.any() for value in gradients.values())


def test_a_loss_that_is_not_finite_still_names_its_batch(tmp_path, pair, tokenizer):
    with torch.no_grad():
        pair[1].get_output_embeddings().weight[5] = float("nan")
    rows = Dataset.from_list([{"prompt_ids": [0, 9], "completion_ids": [7, 1]}])
    for selection in ("after_first_rejection", "after_first_mismatch"):
        trainer = build(tmp_path, pair, tokenizer, rows, token_selection=selection)
        with pytest.raises(FloatingPointError, match=r"rows begin with \['<s>"):
            trainer.train()


# Bad input -----------------------------------------------------------------------------------------------------------


def test_weights_that_are_none(tmp_path, pair, tokenizer):
    class Wrong(DraftDistillTrainer):
        def token_weights(self, metrics):
            return self.wrong(metrics)

    trainer = build(tmp_path, pair, tokenizer, trainer_class=Wrong)
    batch = next(iter(trainer.get_train_dataloader()))
    for wrong, message in (
        (lambda metrics: metrics.losses[:-1], r"one weight for each completion token, \(\d+,\), got \(\d+,\)"),
        (lambda metrics: None, "got NoneType"),
        (lambda metrics: -metrics.losses, "negative, infinite or NaN"),
        (lambda metrics: metrics.losses / 0, "negative, infinite or NaN"),
    ):
        trainer.wrong = wrong
        with pytest.raises(ValueError, match=message):
            trainer.compute_loss(trainer.model, batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_selection": "adaspec"}, "`reference_model` is None. Distil a copy"),
        (
            {"token_selection": "adaspec", "divergence": "tvd_plus_plus", "reference_model": "never/loaded"},
            "have no meaning",
        ),
        ({"reference_model": "never/loaded"}, "`reference_model` is read by"),
        (
            {"token_selection": "after_first_rejection", "divergence": "cross_entropy"},
            "only the target's text is known",
        ),
    ],
)
def test_what_cannot_be_selected_is_refused_before_anything_is_loaded(tmp_path, tokenizer, options, message):
    rows = Dataset.from_list([{"prompt_ids": [0, 9], "completion_ids": [7, 1]}])
    with pytest.raises(ValueError, match=message):
        build(tmp_path, ("never/loaded", "never/loaded"), tokenizer, rows, **options)


def test_draws_do_not_tell_a_rejection(tmp_path, pair, tokenizer):
    data = cache_target_distributions(alignment_rows(pair[1], tokenizer, count=2), pair[1], sampled=5)
    with pytest.raises(ValueError, match="only tokens drawn from the target is known"):
        build(tmp_path, ("never/loaded", None), tokenizer, data, token_selection="after_first_rejection")


def test_references_that_cannot_serve(tmp_path, pair, tokenizer, saved_pair):
    adaspec = {"token_selection": "adaspec"}
    for same in pair:
        with pytest.raises(ValueError, match="same object as the draft or the target"):
            build(tmp_path, pair, tokenizer, reference_model=same, **adaspec)
    with pytest.raises(ValueError, match="predicts 280 tokens, but draft and target share 300"):
        build(tmp_path, pair, tokenizer, reference_model=tiny_llama(vocab_size=280), **adaspec)
    with pytest.raises(ValueError, match="nowhere"):
        build(tmp_path, pair, tokenizer, reference_model=str(tmp_path / "nowhere"), **adaspec)
    trainer = build(tmp_path, pair, tokenizer, reference_model=str(saved_pair[0]), max_steps=1, **adaspec)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] >= 0
