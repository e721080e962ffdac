"""The metric that chooses the best checkpoint: it has to be there, and to mean something."""

import pytest
from datasets import Dataset

from hf_draftkd import AcceptanceCallback
from hf_draftkd.data.target_cache import cache_target_distributions
from hf_draftkd.training.callbacks import asked_metrics
from hf_draftkd.training.metrics import check_best_metric
from tests.tiny import tiny_pair
from tests.training.rows import alignment_rows
from tests.training.trainers import build, config

STEPS = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
BEST = STEPS | {"load_best_model_at_end": True}


def test_tvd_plus_plus_chooses_by_acceptance(tmp_path, pair, tokenizer):
    """Its own value measures nothing: a worse draft was taken for the best."""
    rows = alignment_rows(pair[1], tokenizer, count=4)
    trainer = build(tmp_path, pair, tokenizer, rows, rows, divergence="tvd_plus_plus", **BEST)
    assert trainer.args.metric_for_best_model == "eval_acceptance_rate"
    assert trainer.args.greater_is_better is True
    trainer.train()
    rates = [entry["eval_acceptance_rate"] for entry in trainer.state.log_history if "eval_acceptance_rate" in entry]
    assert trainer.state.best_metric == max(rates[:3])


def test_every_other_default_is_as_in_transformers(tmp_path):
    assert config(tmp_path, **BEST).metric_for_best_model == "loss"
    assert config(tmp_path, divergence="tvd_plus_plus").metric_for_best_model is None
    chosen = config(tmp_path, divergence="tvd_plus_plus", metric_for_best_model="eval_block_efficiency", **BEST)
    assert chosen.metric_for_best_model == "eval_block_efficiency"


def of_another(rows):
    return rows.map(lambda row: row | {"target": "another/target"})


def as_text(rows):
    return rows.select_columns(["prompt", "completion"])


def without_a_setting(rows):
    return rows.remove_columns("top_p")


@pytest.mark.parametrize("change", [of_another, as_text, without_a_setting])
def test_block_efficiency_that_these_rows_cannot_give_is_refused(tmp_path, pair, tokenizer, change):
    """A KeyError of transformers, after an epoch."""
    rows = alignment_rows(pair[1], tokenizer, count=4)
    options = BEST | {"metric_for_best_model": "eval_block_efficiency"}
    with pytest.raises(ValueError, match=r"left out: 4 evaluation rows do not say"):
        build(tmp_path, pair, tokenizer, rows, change(rows), **options)


def test_of_several_evaluation_sets_one_has_to_be_named(tmp_path, pair, tokenizer):
    rows = alignment_rows(pair[1], tokenizer, count=4)
    several = {"chat": rows, "code": as_text(rows)}
    for metric in ("block_efficiency", "loss", "eval_acceptance_rate"):
        with pytest.raises(ValueError, match="does not say which evaluation data it is of: there are 'chat', 'code'"):
            build(tmp_path, pair, tokenizer, rows, several, **BEST, metric_for_best_model=metric)
    with pytest.raises(ValueError, match="left out: 4 evaluation rows"):
        build(tmp_path, pair, tokenizer, rows, several, **BEST, metric_for_best_model="eval_code_block_efficiency")
    right = {"metric_for_best_model": "eval_chat_block_efficiency"}
    trainer = build(tmp_path, pair, tokenizer, rows, several, **BEST, **right)
    with pytest.warns(UserWarning, match="eval_code_block_efficiency is left out"):
        trainer.train()
    assert trainer.state.best_metric >= 1


@pytest.mark.parametrize("metric", ["loss", "eval_loss"])
def test_the_value_of_tvd_plus_plus_cannot_be_asked_for(tmp_path, pair, tokenizer, metric):
    rows = alignment_rows(pair[1], tokenizer, count=4)
    options = BEST | {"metric_for_best_model": metric, "divergence": "tvd_plus_plus"}
    with pytest.raises(ValueError, match="does not measure how good a draft is"):
        build(tmp_path, pair, tokenizer, rows, rows, **options)


def test_no_figure_that_is_reported_is_refused(tmp_path, tokenizer):
    """What is refused and what `evaluate()` says must not drift apart: of every signal, text and draft length."""
    draft, target = tiny_pair("llama")
    greedy, sampled = (alignment_rows(target, tokenizer, count=3, temperature=t) for t in (0.0, 1.0))
    half = cache_target_distributions(sampled, target, top_k=8)
    runs = [
        ((draft, target), greedy, {}),
        ((draft, target), sampled, {}),
        ((draft, None), half, {}),
        ((draft, None), greedy, {"divergence": "cross_entropy"}),
    ]
    for models, rows, options in runs:
        trainer = build(tmp_path, models, tokenizer, rows, rows, callbacks=[AcceptanceCallback([2])], **options)
        reported = [name for name in trainer.evaluate() if "loss" in name or "block" in name or "acceptance" in name]
        assert any("block_efficiency_at_2_t" in name for name in reported)
        for name in reported:
            check_best_metric(
                config(tmp_path, metric_for_best_model=name, eval_strategy="epoch", **options),
                trainer.eval_dataset,
                trainer.signal,
                asked_metrics(trainer.callback_handler.callbacks, 5),
            )
    with pytest.raises(ValueError, match="Choose 'acceptance_rate_upper_bound'"):
        build(tmp_path, (draft, None), tokenizer, half, half, metric_for_best_model="acceptance_rate")
    with pytest.raises(ValueError, match="need the target's distributions"):
        build(tmp_path, (draft, None), tokenizer, greedy, greedy, divergence="cross_entropy",
              metric_for_best_model="acceptance_rate")  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "why"),
    [
        ("eval_block_efficiency_at_4", r"nothing asks for it. Give `AcceptanceCallback\(\[4\]\)`"),
        ("block_efficiency_at_5_t0", "at `eval_num_assistant_tokens=5` it is called 'block_efficiency_t0'"),
        ("eval_acceptance_rate_t0.7", r"nothing asks for it. Give `AcceptanceCallback\(temperatures=\[0.7\]\)`"),
    ],
)
def test_a_figure_that_nothing_asks_for_is_refused(tmp_path, pair, tokenizer, metric, why):
    """A KeyError of transformers, after an epoch."""
    rows = alignment_rows(pair[1], tokenizer, count=4)
    with pytest.raises(ValueError, match=why):
        build(tmp_path, pair, tokenizer, rows, rows, **BEST, metric_for_best_model=metric)


def test_a_scheduler_that_follows_a_metric_knows_which_way_is_better(tmp_path):
    """It took a rising acceptance for a plateau, and lowered the rate."""
    follows = STEPS | {"lr_scheduler_type": "reduce_lr_on_plateau"}
    rising = config(
        tmp_path, **follows, metric_for_best_model="eval_acceptance_rate", lr_scheduler_kwargs={"patience": 0}
    )
    assert rising.lr_scheduler_kwargs == {"mode": "max", "patience": 0}
    assert config(tmp_path, **follows).lr_scheduler_kwargs is None  # the loss


def test_a_figure_of_a_subclass_and_a_stream_are_left_to_the_run(tmp_path, pair, tokenizer):
    rows = alignment_rows(pair[1], tokenizer, count=4)
    build(tmp_path, pair, tokenizer, rows, rows, metric_for_best_model="eval_rouge", **STEPS)
    stream = Dataset.to_iterable_dataset(as_text(rows))
    build(tmp_path, pair, tokenizer, rows, stream, metric_for_best_model="eval_block_efficiency", **STEPS)
