"""Training a draft that predicts several tokens in one pass."""

import logging

import pytest
import torch
from peft import LoraConfig

from hf_draftkd import SpeculativeDecoding, cache_target_distributions, load_draft
from hf_draftkd.losses import DIVERGENCES
from hf_draftkd.models.parallel import parallel_draft
from hf_draftkd.training import parallel
from hf_draftkd.training.run_provenance import describe_run
from tests.processes import in_two_processes
from tests.tiny import tiny_pair, tiny_tokenizer
from tests.training.rows import alignment_rows
from tests.training.trainers import assert_same, build, config, weights

K, MASK = 3, 2
SHARES = 1 + 0.7 + 0.49


@pytest.fixture
def whole(monkeypatch):
    """Nothing is dropped: every token is learned at every depth."""
    monkeypatch.setattr(parallel, "draw_depths", lambda count, num_tokens: torch.full((count,), num_tokens))


def reference_loss(draft, target, rows, divergence, options, by_confidence):
    """Σ over tokens and depths, each with a forward pass of its own, ÷ (tokens · expected share of depths)."""
    total, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor(row["prompt_ids"] + row["completion_ids"])
        first = len(row["prompt_ids"])
        with torch.no_grad():
            p = target(ids[None]).logits[0]
        tokens += len(ids) - first
        for end in range(first, len(ids)):  # the token that is predicted
            for depth in range(1, K + 1):
                if (start := end - depth) < first - 1:
                    continue
                text = torch.cat([ids[: start + 1], torch.full((depth - 1,), MASK)])
                loss = DIVERGENCES[divergence](draft(text[None]).logits[0, -1], p[end - 1], **options)
                weight = 1.0
                if by_confidence:
                    for before in range(start + 1, end):
                        weight = weight * p[before - 1].softmax(-1)[ids[before]]
                total = total + weight * loss
    return total / (tokens * SHARES)


@pytest.mark.parametrize(
    ("divergence", "options", "weighting"),
    [
        ("forward_kl", {}, "uniform"),
        ("forward_kl", {}, "confidence"),
        ("generalized_jsd", {"beta": 0.3}, "uniform"),
        ("negative_log_acceptance", {}, "confidence"),
    ],
)
@pytest.mark.parametrize("has_head", [True, False])
def test_value_and_gradient_are_those_of_one_pass_for_each_token_and_depth(
    tmp_path, pair, tokenizer, whole, divergence, options, weighting, has_head
):
    draft, target = (model.double() for model in pair)
    rows = alignment_rows(target, tokenizer, count=2, max_new_tokens=6)
    given = {"divergence": divergence, "parallel_tokens": K, "parallel_weights": weighting, **options}
    trainer = build(tmp_path, (draft, target), tokenizer, rows, **given)
    if not has_head:
        trainer.head_arithmetic = trainer.signal.head_arithmetic = None
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(draft, batch).backward()
    found = {name: parameter.grad.clone() for name, parameter in draft.named_parameters()}
    loss = trainer.compute_loss(draft, batch).detach()
    draft.zero_grad()
    expected = reference_loss(draft, target, rows, divergence, options, weighting == "confidence")
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-6)
    expected.backward()
    assert_same(found, {name: parameter.grad for name, parameter in draft.named_parameters()}, atol=1e-6)


@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name != "forward_kl"])
def test_every_divergence_learns_all_depths_and_logs_the_rate_of_next_tokens(tmp_path, pair, tokenizer, divergence):
    draft, _ = pair
    trainer = build(tmp_path, pair, tokenizer, divergence=divergence, parallel_tokens=4, max_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.compute_loss(draft, batch)
    rated = 0 if divergence == "cross_entropy" else int((batch["labels"] != -100).sum())
    assert trainer._training_sums._sums[1] == rated
    trainer._training_sums._sums.zero_()
    trainer.train()
    assert parallel_draft(draft.config) == (MASK, 4)


def test_cached_distributions_give_the_loss_of_the_target(tmp_path, tokenizer, whole):
    losses = []
    rows = alignment_rows(tiny_pair()[1], tokenizer, count=4)
    for is_cached in (False, True):
        draft, target = tiny_pair()
        data = cache_target_distributions(rows, target, top_k=target.config.vocab_size) if is_cached else rows
        given = {"parallel_tokens": K, "parallel_weights": "confidence", "per_device_train_batch_size": 4}
        trainer = build(tmp_path, (draft, None if is_cached else target), tokenizer, data, **given)
        losses.append(trainer.compute_loss(draft, next(iter(trainer.get_train_dataloader()))).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_black_box_text_and_drafts_that_write(tmp_path, pair, tokenizer):
    trainer = build(tmp_path, pair, tokenizer, divergence="cross_entropy", parallel_tokens=4)
    trainer.train()
    trainer = build(tmp_path, tiny_pair(), tokenizer, lmbda=1.0, max_new_tokens=6, parallel_tokens=4)
    trainer.train()


def test_an_adapter_is_merged_into_a_draft_that_says_that_it_is_parallel(tmp_path, tokenizer):
    pair = tiny_pair(draft_vocab_size=304, target_vocab_size=304, real_vocab_size=300)
    peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = build(tmp_path, pair, tokenizer, peft=peft, parallel_tokens=4)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    draft = load_draft(str(tmp_path / "saved"))
    assert parallel_draft(draft.config) == (300, 4)
    # The padded row was zero: as the mask token it is given a direction.
    assert draft.get_input_embeddings().weight[300].any()
    assert SpeculativeDecoding(draft).mask_token_id == 300
    assert describe_run(trainer).training.hyperparameters["parallel_tokens"] == 4  # the card cites the paper by it


def test_deeper_predictions_get_better(tmp_path, tokenizer):
    """Decoding sees it: more tokens are accepted in one pass than before."""
    draft, target = tiny_pair(agreement=0.9)
    rows = alignment_rows(target, tokenizer, count=6, max_new_tokens=10)
    options = {"parallel_tokens": K, "max_steps": 15, "learning_rate": 1e-2, "per_device_train_batch_size": 6}
    trainer = build(tmp_path, (draft, target), tokenizer, rows, **options)

    def counted():
        decoding = SpeculativeDecoding(draft.eval(), K)
        for row in rows:
            prompt = torch.tensor([row["prompt_ids"]])
            target.generate(prompt, max_new_tokens=10, do_sample=False, custom_generate=decoding)
        return decoding.counts.mean_acceptance_length

    before = counted()
    trainer.train()
    assert counted() > before + 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parallel_tokens": 0}, "parallel_tokens"),
        ({"parallel_tokens": 17}, "from 1 to 16"),
        ({"parallel_tokens": 4, "packing": True}, "square of a row"),
        ({"parallel_tokens": 4, "token_selection": "after_first_mismatch"}, "several depths"),
        ({"parallel_tokens": 4, "parallel_weights": "confident"}, "confidence"),
        ({"parallel_tokens": 4, "parallel_weights": "confidence", "divergence": "cross_entropy"}, "only its text"),
    ],
)
def test_what_cannot_be_is_refused_at_once(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_other_refusals_and_a_word_before_depths_are_forgotten(tmp_path, pair, tokenizer, caplog):
    with pytest.raises(ValueError, match="mask token"):
        build(tmp_path, tiny_pair(), tiny_tokenizer(pad_is_eos=True), parallel_tokens=4)
    build(tmp_path, pair, tokenizer, parallel_tokens=4)
    with caplog.at_level(logging.WARNING):
        build(tmp_path, pair, tokenizer)
    assert "predict 4 tokens in one pass" in caplog.text


def train_in_two(out, kept):
    parallel.draw_depths = lambda count, num_tokens: torch.full((count,), num_tokens)
    draft, target = tiny_pair()
    rows = alignment_rows(target, tiny_tokenizer(), count=8)
    options = {"parallel_tokens": 3, "max_steps": 2, "learning_rate": 1e-3}
    trainer = build(out, (draft, target), tiny_tokenizer(), rows, **options)
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save(weights(draft), kept)


def test_two_processes_learn_what_one_does(tmp_path, tokenizer, whole):
    in_two_processes(tmp_path, __name__, "train_in_two", tmp_path / "out", tmp_path / "weights.pt")
    draft, target = tiny_pair()
    rows = alignment_rows(target, tokenizer, count=8)
    options = {"parallel_tokens": 3, "max_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 4}
    trainer = build(tmp_path / "one", (draft, target), tokenizer, rows, **options)
    trainer.train()
    assert_same(weights(draft), torch.load(tmp_path / "weights.pt"), atol=2e-5)
