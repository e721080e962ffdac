"""What `evaluate()` reports, and what it takes to do so."""

import logging

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import EarlyStoppingCallback

from hf_draftkd import AcceptanceCallback, DraftDistillConfig, DraftDistillTrainer
from hf_draftkd.data.collator import SETTING_COLUMN, DraftDistillCollator, rows_by_setting
from hf_draftkd.data.rows import AUTHOR_COLUMNS
from hf_draftkd.data.target_cache import cache_target_distributions
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.losses import chunked
from hf_draftkd.models.identity import identity_of
from hf_draftkd.training.signals import LiveTarget
from tests.tiny import tiny_llama, tiny_pair
from tests.training.rows import alignment_rows
from tests.training.trainers import build

ALL = (0, 0.7, 1)


def written_at(target, tokenizer, *temperatures, count=3):
    return concatenate_datasets(
        [alignment_rows(target, tokenizer, count=count, temperature=float(t)) for t in temperatures]
    )


def logits(model, row) -> torch.Tensor:
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    with torch.no_grad():
        return model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].double()


def test_predict_reads_padded_batches_as_evaluate_does(tmp_path, pair, tokenizer):
    """Padding-free batches in `predict`, whose texts are then one row that no setting is known of."""
    rows = alignment_rows(pair[1], tokenizer, count=4)
    trainer = build(tmp_path, pair, tokenizer, eval_rows=rows, padding_free=True, max_length=None)
    expected = trainer.evaluate()
    found = trainer.predict(trainer.eval_dataset).metrics
    for name in ("loss", "acceptance_rate", "block_efficiency", "block_efficiency_at_3"):
        assert found[f"test_{name}"] == pytest.approx(expected[f"eval_{name}"], rel=1e-6)


def test_workers_that_stay_read_what_is_evaluated(tmp_path, pair, tokenizer):
    """Figures of the data that were evaluated first, whatever was given: transformers hands out their workers again."""
    rows = alignment_rows(pair[1], tokenizer, count=4)
    parts = rows.select([0, 1]), rows.select([2, 3])
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = build(tmp_path, pair, tokenizer, eval_rows=parts[0], **workers)
    first, other, again = (trainer.evaluate(*data)["eval_loss"] for data in ((), (parts[1],), ()))
    assert first == again
    assert other == build(tmp_path, pair, tokenizer, eval_rows=parts[1]).evaluate()["eval_loss"] != first


def test_every_row_is_evaluated_whatever_training_drops(tmp_path, pair, tokenizer):
    """`dataloader_drop_last` left rows out here too, and where they filled no batch there were no figures at all."""
    rows = alignment_rows(pair[1], tokenizer, count=3)
    trainer = build(tmp_path, pair, tokenizer, eval_rows=rows, dataloader_drop_last=True)
    expected = build(tmp_path, pair, tokenizer, eval_rows=rows).evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == trainer.predict(rows).metrics["test_loss"] == expected
    assert trainer.args.dataloader_drop_last


def test_data_that_comes_later_is_prepared_and_checked_as_any(tmp_path, pair, tokenizer):
    """KeyErrors from inside of trl, figures of texts longer than the models read; `predict` took prepared rows only."""
    rows = alignment_rows(pair[1], tokenizer, count=4)
    trainer = build(tmp_path, pair, tokenizer, eval_rows=rows)
    assert trainer.predict(rows).metrics["test_block_efficiency"] == trainer.evaluate()["eval_block_efficiency"]
    long = Dataset.from_list([{"prompt_ids": [0] * 100, "completion_ids": [4] * 200}])
    trainer.args.max_length = None
    for data, message in (
        (Dataset.from_list([{"question": "a"}]), r"eval dataset has the columns \['question'\]"),
        ({"a": rows.select([])}, r"a dataset is empty|`predict` takes one data set, got \['a'\]"),
        (list(rows), "got a `list`"),
        (long, "row of the eval dataset has 300 tokens, but the models read 256"),
    ):
        for method in (trainer.evaluate, trainer.predict):
            with pytest.raises(ValueError, match=message):
                method(data)


def test_evaluation_data_may_be_named_as_training_data_is(tmp_path, pair, tokenizer):
    """The set named `mix` looked its distributions up behind the last; one named `train` hid the training data."""
    rows = cache_target_distributions(alignment_rows(pair[1], tokenizer), pair[1], top_k=8)
    named = {"train": rows.select(range(4)), "mix": rows.select(range(4, 8))}
    trainer = build(tmp_path, (pair[0], None), tokenizer, rows, named, mix_dataset=rows, mix="1:1")
    found = trainer.evaluate()
    assert len(trainer.train_dataset) > 8 > len(trainer.eval_dataset["train"])
    for name, part in named.items():
        expected = trainer.evaluate(part)
        assert found[f"eval_{name}_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    with pytest.raises(ValueError, match="train dataset has the columns"):
        build(tmp_path, pair, tokenizer, Dataset.from_list([{"question": "a"}]), named)
    with pytest.raises(ValueError, match=r"names none of the evaluation sets \['train', 'mix'\]"):
        trainer.evaluate("openai/gsm8k")


@pytest.mark.parametrize("form", ["live", "cached"])
def test_a_dict_and_prepared_rows_are_evaluated_as_the_rows_are(tmp_path, pair, tokenizer, form):
    """Rows prepared twice: transformers hands each data set of a dict to `evaluate` again. They lost what they say of
    their writer, and with it block efficiency, or were refused as lacking distributions.
    """
    draft, target = pair
    rows = alignment_rows(target, tokenizer, count=4)
    if form == "cached":
        rows, target = cache_target_distributions(rows, target, top_k=8), None
    trainer = build(tmp_path, (draft, target), tokenizer, eval_rows=rows)
    expected = trainer.evaluate(rows)["eval_block_efficiency"]
    assert trainer.evaluate({"a": rows})["eval_a_block_efficiency"] == expected
    assert trainer.evaluate(trainer.eval_dataset)["eval_block_efficiency"] == expected


def test_a_stream_alone_is_evaluated_as_its_rows_are(tmp_path, pair, tokenizer):
    """`max_steps` asked for where nothing is trained."""
    rows = alignment_rows(pair[1], tokenizer, count=4)
    found, expected = (
        DraftDistillTrainer(
            *pair,
            args=DraftDistillConfig(str(tmp_path), report_to="none"),
            eval_dataset=dataset,
            processing_class=tokenizer,
        ).evaluate()
        for dataset in (rows.to_iterable_dataset(), rows)
    )
    for name in ("eval_loss", "eval_block_efficiency"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6)


# Temperatures --------------------------------------------------------------------------------------------------------


def test_block_efficiency_at_a_temperature_is_that_of_the_texts_written_at_it(tmp_path, pair, tokenizer):
    """Greedy text that says something about temperature 1, or groups that take each other's sums."""
    rows = written_at(pair[1], tokenizer, *ALL).shuffle(seed=3)
    callbacks = [AcceptanceCallback([3], temperatures=ALL)]
    found = build(tmp_path, pair, tokenizer, eval_rows=rows, callbacks=callbacks).evaluate()
    usual = build(tmp_path, pair, tokenizer, eval_rows=rows)
    for temperature in ALL:
        alone = usual.evaluate(rows.filter(lambda row, t=temperature: row["temperature"] == t))
        for name in ("eval_block_efficiency", "eval_block_efficiency_at_3"):
            assert found[f"{name}_t{temperature:g}"] == pytest.approx(alone[name], rel=1e-6)
    assert len({found[f"eval_block_efficiency_t{t:g}"] for t in ALL}) == 3
    everything = usual.evaluate()
    assert found["eval_block_efficiency"] == pytest.approx(everything["eval_block_efficiency"], rel=1e-6)
    # By default greedy decoding and plain sampling are looked at.
    assert "eval_block_efficiency_t0.7" not in everything
    assert everything["eval_block_efficiency_t1"] == pytest.approx(found["eval_block_efficiency_t1"], rel=1e-6)


def test_acceptance_at_any_temperature_is_the_definition_on_any_text(tmp_path, pair, tokenizer):
    """One temperature for draft and another for target, or the loss temperature in place of either."""
    rows = alignment_rows(pair[1], tokenizer, count=4)
    expected = dict.fromkeys(ALL, 0.0)
    tokens = 0
    for row in rows:
        q, p = (logits(model, row) for model in pair)
        tokens += len(q)
        for temperature in ALL:
            if temperature == 0:
                expected[0] += int((q.argmax(-1) == p.argmax(-1)).sum())
            else:
                shares = torch.minimum((q / temperature).softmax(-1), (p / temperature).softmax(-1))
                expected[temperature] += float(shares.sum())
    callbacks = [AcceptanceCallback(temperatures=ALL)]
    found = build(tmp_path, pair, tokenizer, eval_rows=rows, callbacks=callbacks, loss_temperature=2.0).evaluate()
    assert found["eval_acceptance_rate"] == pytest.approx(expected[1] / tokens, rel=1e-5)
    assert found["eval_acceptance_rate_t0"] == pytest.approx(expected[0] / tokens, rel=1e-6)
    assert found["eval_acceptance_rate_t0.7"] == pytest.approx(expected[0.7] / tokens, rel=1e-5)
    assert "eval_acceptance_rate_t1" not in found


def test_a_cache_tells_what_it_can(tmp_path, pair, tokenizer):
    """A rate at a temperature that was never cached; a bound where the likeliest token is known exactly."""
    rows = written_at(pair[1], tokenizer, 0, 1)
    callbacks = [AcceptanceCallback(temperatures=ALL)]
    live = build(tmp_path, pair, tokenizer, eval_rows=rows, callbacks=callbacks).evaluate()
    for temperature in (1.0, 0.7):
        data = cache_target_distributions(rows, pair[1], top_k=4, loss_temperature=temperature, dtype="float32")
        options = {"callbacks": [AcceptanceCallback(temperatures=ALL)], "loss_temperature": temperature}
        trainer = build(tmp_path, (pair[0], None), tokenizer, eval_rows=data, **options)
        if temperature == 1:
            found = trainer.evaluate()
            assert found["eval_block_efficiency_t1"] == pytest.approx(live["eval_block_efficiency_t1"], rel=1e-5)
            assert found["eval_acceptance_rate_upper_bound"] > live["eval_acceptance_rate"]
        else:
            with pytest.warns(UserWarning, match="left out: 3 evaluation rows"):
                found = trainer.evaluate()
            assert found["eval_acceptance_rate_upper_bound_t0.7"] > live["eval_acceptance_rate_t0.7"]
            assert "eval_acceptance_rate_upper_bound" not in found
        # Greedy text needs no distribution.
        assert found["eval_block_efficiency_t0"] == live["eval_block_efficiency_t0"]
        assert found["eval_acceptance_rate_t0"] == pytest.approx(live["eval_acceptance_rate_t0"], rel=1e-6)


def test_rows_of_others_leave_the_figures_of_a_setting_alone(tmp_path, pair, tokenizer):
    """One foreign row among greedy ones: no metric of all rows, but still one of those it is exact for."""
    rows = written_at(pair[1], tokenizer, 0)
    foreign = alignment_rows(pair[1], tokenizer, count=2, name="another/target")
    trainer = build(tmp_path, pair, tokenizer, eval_rows=concatenate_datasets([foreign, rows]))
    with pytest.warns(UserWarning, match="2 evaluation rows"):
        found = trainer.evaluate()
    alone = trainer.evaluate(rows)
    assert "eval_block_efficiency" not in found
    assert found["eval_block_efficiency_t0"] == alone["eval_block_efficiency"]


def test_a_recorded_setting_survives_the_precision_of_the_batch():
    """0.7 becomes 0.699999988 in float32: another temperature. In float64 the batch cannot go to every device."""
    row = {"input_ids": [0, 5, 6], "labels": [-100, 5, 6], SETTING_COLUMN: [0.7, 0.95, 50.0, 1.05]}
    batch = DraftDistillCollator(pad_token_id=2)([row, row | {SETTING_COLUMN: [1 / 3, 1.0, 0.0, 1.0]}])
    assert all(value.dtype != torch.float64 for value in batch.values())
    assert next(iter(rows_by_setting(batch["decoding"]))) == DecodingSetting(0.7, 0.95, 50, 1.05)


@pytest.mark.parametrize("temperature", [-1, float("nan"), float("inf"), "1", True])
def test_temperatures_are_numbers(temperature):
    with pytest.raises(ValueError, match="`temperatures` must be a number"):
        AcceptanceCallback(temperatures=[0, temperature])


# A chunk at a time ---------------------------------------------------------------------------------------------------


class _Largest(TorchDispatchMode):
    """The most numbers that any tensor of logits made meanwhile holds."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [
            leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.shape[-1:] == (300,)
        ]
        self.numel = max(self.numel, *sizes, 0)
        return result


@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
def test_chunks_change_no_figure_and_bound_memory(tmp_path, pair, tokenizer, cached, monkeypatch):
    """Prefixes, cached columns or settings that slip where a chunk ends in the middle of a text."""
    rows = written_at(pair[1], tokenizer, *ALL)
    penalised = rows.select(range(3)).map(lambda row: {"repetition_penalty": 1.3})
    rows = concatenate_datasets([rows, penalised])
    target = None if cached else pair[1]
    if cached:
        rows = cache_target_distributions(rows.select(range(3)), pair[1], top_k=4)
    trainer = build(tmp_path, (pair[0], target), tokenizer, eval_rows=rows, per_device_eval_batch_size=12)
    whole = trainer.evaluate()
    monkeypatch.setattr(chunked, "_CPU_CHUNK", 1)
    with _Largest() as largest:
        found = trainer.evaluate()
    assert largest.numel <= 16 * 300
    assert sum(map(len, rows["completion_ids"])) > 2 * 16
    timing = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")
    for name in whole.keys() - set(timing):
        assert found[name] == pytest.approx(whole[name], rel=1e-6), name
    # As from logits of all positions, which some models have to give.
    trainer.head_arithmetic = None
    assert trainer.evaluate()["eval_block_efficiency"] == pytest.approx(whole["eval_block_efficiency"], rel=1e-6)


def test_in_half_precision_the_draft_proposes_what_it_would_propose_decoding(tmp_path, tokenizer):
    """Logits of bf16 models are rounded, so that the first of two equal ones is taken: sharper ones take another."""
    draft, target = (model.bfloat16() for model in tiny_pair("llama"))
    rows = alignment_rows(target, tokenizer, count=6, max_new_tokens=24)
    found = build(tmp_path, (draft, target), tokenizer, eval_rows=rows).evaluate()
    agrees = tokens = 0
    for row in rows:
        agrees += int((logits(draft, row).argmax(-1) == logits(target, row).argmax(-1)).sum())
        tokens += len(row["completion_ids"])
    assert found["eval_acceptance_rate_t0"] == pytest.approx(agrees / tokens, rel=1e-6)


def test_logits_that_have_to_be_whole_are_said_to_be(tmp_path, tokenizer, caplog):
    """A path that takes many times the memory, taken without a word."""
    whole = "logits of the draft are held for all completion tokens"
    with caplog.at_level(logging.WARNING, "hf_draftkd"):
        build(tmp_path, tiny_pair("llama"), tokenizer)
    assert "are held" not in caplog.text
    draft, target = tiny_pair("llama")
    # As accelerate does where weights lie elsewhere.
    draft.lm_head.forward = draft.lm_head.forward
    with caplog.at_level(logging.WARNING, "hf_draftkd"):
        build(tmp_path, (draft, target), tokenizer, max_steps=2).train()
    assert caplog.text.count(whole) == 1
    assert "not a plain linear layer's (an adapter" in caplog.text
    caplog.clear()
    draft, target = tiny_pair("llama")
    target.lm_head.forward = target.lm_head.forward
    with caplog.at_level(logging.WARNING, "hf_draftkd"):
        build(tmp_path, (draft, target), tokenizer, max_steps=2).train()
    assert caplog.text.count("logits of the target are held") == 1


def test_one_process_says_that_logits_are_whole(monkeypatch, pair, caplog):
    """Of the target every process said it."""
    monkeypatch.setattr(PartialState, "is_main_process", False)
    with caplog.at_level(logging.WARNING, "hf_draftkd"):
        LiveTarget(pair[1], 300, sharded=True)
    assert not caplog.text


# Choosing by them ----------------------------------------------------------------------------------------------------


def test_training_stops_early_by_block_efficiency(tmp_path, pair, tokenizer):
    """The name has to reach transformers' early stopping, and a greater value has to be the better one."""
    rows = alignment_rows(pair[1], tokenizer)
    trainer = build(
        tmp_path,
        pair,
        tokenizer,
        rows,
        rows,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model="eval_block_efficiency_t0",
        load_best_model_at_end=True,
        max_steps=8,
        learning_rate=1e-9,
    )
    trainer.train()
    evaluated = [entry["eval_block_efficiency_t0"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == trainer.state.global_step == 3
    assert trainer.state.best_metric == evaluated[0]


def test_the_plot_is_drawn_from_losses_alone(tmp_path, pair, tokenizer):
    """Black box on text that nobody knows the setting of: a plot without panels, or none at all."""
    rows = Dataset.from_list([{"prompt_ids": [0, 9], "completion_ids": [7, 1]}] * 4)
    options = {"divergence": "cross_entropy", "eval_strategy": "steps", "eval_steps": 2}
    trainer = build(tmp_path, (pair[0], None), tokenizer, rows, rows, plot=True, **options)
    trainer.train()
    assert not any("acceptance" in name or "block" in name for entry in trainer.state.log_history for name in entry)
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_acceptance_rate_is_the_definition_at_temperature_one(tmp_path, pair, tokenizer):
    """Rates averaged over batches, prompt tokens counted, or the loss temperature used."""
    rows = alignment_rows(pair[1], tokenizer, count=5)
    total = tokens = 0
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        q, p = (torch.softmax(model(ids).logits[0].double(), -1).detach() for model in pair)
        for t in range(len(row["prompt_ids"]), ids.shape[1]):
            total += float(torch.minimum(p[t - 1], q[t - 1]).sum())
            tokens += 1
    trainer = build(tmp_path, pair, tokenizer, eval_rows=rows, loss_temperature=2.0)
    assert trainer.evaluate()["eval_acceptance_rate"] == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.parametrize("gamma", [1, 3])
def test_block_efficiency_equals_counting_assisted_generation(tmp_path, pair, tokenizer, gamma):
    """The metric that picks the checkpoint must be the one decoding gives: tokens ÷ target calls."""
    draft, target = pair
    rows = alignment_rows(target, tokenizer, count=6, max_new_tokens=16)
    draft.generation_config.num_assistant_tokens = gamma
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    calls = tokens = 0

    def count(*_):
        nonlocal calls
        calls += 1

    handle = target.register_forward_hook(count)
    for row in rows:
        ids = torch.tensor([row["prompt_ids"]])
        out = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, assistant_model=draft)
        assert out[0, ids.shape[1] :].tolist() == row["completion_ids"]
        tokens += len(row["completion_ids"])
    handle.remove()
    trainer = build(tmp_path, pair, tokenizer, eval_rows=rows, eval_num_assistant_tokens=gamma)
    assert trainer.evaluate()["eval_block_efficiency"] == tokens / calls


def test_figures_do_not_depend_on_the_evaluation_batch_size(tmp_path, pair, tokenizer):
    rows = alignment_rows(pair[1], tokenizer, count=7, temperature=0.7)
    metrics = [
        build(tmp_path, pair, tokenizer, eval_rows=rows, per_device_eval_batch_size=size).evaluate() for size in (1, 3)
    ]
    for name in ("eval_loss", "eval_acceptance_rate", "eval_block_efficiency"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-5)


@pytest.mark.parametrize("change", [{"target": "another/target"}, {"ids_source": "retokenized"}])
def test_no_block_efficiency_for_text_the_target_did_not_write(tmp_path, pair, tokenizer, change):
    """A metric that looks exact, from text it does not apply to: left out, with one warning."""
    rows = Dataset.from_list([row | change for row in alignment_rows(pair[1], tokenizer, count=3)])
    trainer = build(tmp_path, pair, tokenizer, eval_rows=rows)
    with pytest.warns(UserWarning, match="eval_block_efficiency is left out: 3 evaluation rows"):
        metrics = trainer.evaluate()
    assert "eval_block_efficiency" not in metrics
    assert 0 < metrics["eval_acceptance_rate"] < 1


@pytest.mark.parametrize(("name", "reason"), [("tuned", "trained further in place"), ("", "another model")])
def test_rows_of_other_weights_under_the_same_name_are_not_this_targets(
    tmp_path, pair, tokenizer, caplog, name, reason
):
    """A target trained on in its own folder, and a second one made in code, passed for the one that wrote the rows."""
    target = pair[1]
    target.config.name_or_path = target.name_or_path = name
    wrote = dict(zip(AUTHOR_COLUMNS, identity_of(target), strict=False))
    rows = Dataset.from_list([row | wrote for row in alignment_rows(target, tokenizer, count=3)])
    assert "eval_block_efficiency" in build(tmp_path, pair, tokenizer, eval_rows=rows).evaluate()
    with torch.no_grad():
        target.lm_head.weight.mul_(1.001)
    with caplog.at_level(logging.WARNING, "hf_draftkd"):
        trainer = build(tmp_path, pair, tokenizer, rows, rows)
    (said,) = (record.getMessage() for record in caplog.records if "count for no block efficiency" in record.msg)
    assert reason in said
    assert trainer.data_facts["completions"] == "data"
    with pytest.warns(UserWarning, match="3 evaluation rows"):
        assert "eval_block_efficiency" not in trainer.evaluate()


def test_a_draft_that_is_its_target_is_accepted_entirely(tmp_path, tokenizer):
    rows = alignment_rows(tiny_llama(), tokenizer, count=4, max_new_tokens=12)
    lengths = [len(row["completion_ids"]) for row in rows]
    metrics = build(tmp_path, (tiny_llama(), tiny_llama()), tokenizer, eval_rows=rows).evaluate()
    assert metrics["eval_acceptance_rate"] == 1.0
    assert metrics["eval_block_efficiency"] == sum(lengths) / sum(-(-length // 6) for length in lengths)


def test_best_checkpoint_by_block_efficiency(tmp_path, pair, tokenizer):
    """The name has to reach transformers' own choice of the best checkpoint."""
    rows = alignment_rows(pair[1], tokenizer)
    trainer = build(
        tmp_path,
        pair,
        tokenizer,
        rows,
        rows,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        metric_for_best_model="eval_block_efficiency",
        load_best_model_at_end=True,
    )
    trainer.train()
    best = max(entry["eval_block_efficiency"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert trainer.state.best_metric == best
