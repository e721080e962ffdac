"""Drafts that could not learn, or would be saved as another model than was trained: refused before training."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate import ParallelismConfig
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.integrations.peft import MIN_PEFT_VERSION
from trl import SFTConfig

from hf_draftkd import (
    AcceptanceCallback,
    DraftDistillConfig,
    DraftDistillTrainer,
    cache_target_distributions,
    load_target,
)
from hf_draftkd.models.pairing import check_weights_apart
from hf_draftkd.models.resolve import resolve
from hf_draftkd.training import setup
from tests.tiny import tiny_llama, tiny_pair, tiny_tokenizer
from tests.training.rows import alignment_rows
from tests.training.trainers import build, config, weights

LORA = LoraConfig(target_modules=["q_proj"])


def test_a_frozen_draft_is_refused_where_it_is_to_learn(tmp_path, pair, tokenizer):
    """The first backward failed, in torch's words."""
    rows = alignment_rows(pair[1], tokenizer, count=2)
    pair[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"Every parameter of the draft .* is frozen"):
        build(tmp_path, pair, tokenizer, rows)
    assert build(tmp_path, pair, tokenizer, eval_rows=rows).evaluate()["eval_loss"] > 0
    build(tmp_path, pair, tokenizer, rows, peft=LORA).train()


def test_models_the_wrong_way_round_are_said(tmp_path, tokenizer, caplog):
    """Fault: the target was trained, in silence, to speak like its draft."""
    rows = alignment_rows(tiny_llama(), tokenizer, count=2)
    for draft_layers, target_layers in ((1, 3), (3, 1)):
        pair = tiny_llama(num_layers=draft_layers), tiny_llama(num_layers=target_layers)
        build(tmp_path, pair, tokenizer, rows)
        assert ("the wrong way round" in caplog.text) is (draft_layers == 3)


def test_a_draft_that_shares_weights_with_its_target_is_refused(tmp_path, pair, tokenizer):
    """Freezing the target froze the draft's head in silence; were it not frozen, the target would be trained."""
    draft, target = pair
    rows = alignment_rows(target, tokenizer, count=2)
    draft.lm_head = target.lm_head
    with pytest.raises(ValueError, match=r"Draft and target share weights \(lm_head.weight\)"):
        build(tmp_path, pair, tokenizer, rows)
    assert draft.lm_head.weight.requires_grad, "refused before anything was changed"
    # What an adapter stands on stays as it is.
    build(tmp_path, pair, tokenizer, rows, peft=LORA)


def test_the_same_numbers_below_two_parameters_are_shared_too(pair):
    draft, target = pair
    check_weights_apart(draft, target)
    draft.model.norm.weight.data = target.model.norm.weight.data
    with pytest.raises(ValueError, match=r"\(model\.norm\.weight\)"):
        check_weights_apart(draft, target)


def test_a_reference_that_shares_weights_with_the_draft_is_refused(tmp_path, pair, tokenizer):
    """It is frozen, and the draft with it."""
    reference = copy.deepcopy(pair[0])
    reference.lm_head = pair[0].lm_head
    with pytest.raises(ValueError, match="Draft and `reference_model` share weights"):
        build(tmp_path, pair, tokenizer, reference_model=reference, token_selection="adaspec")


def test_a_draft_in_half_precision_warns_once(tmp_path, pair, tokenizer):
    """At 1e-5 99% of its weights stayed what they were, without a word."""
    rows = alignment_rows(pair[1], tokenizer, count=2)
    draft = pair[0].bfloat16()
    with pytest.warns() as said:
        build(tmp_path, (draft, pair[1]), tokenizer, rows)
    lost = [str(each.message) for each in said if "in which small updates are lost" in str(each.message)]
    assert len(lost) == 1
    assert lost[0].startswith("The draft's weights are bfloat16")
    # Warnings are errors: none where nothing learns, or where the adapter does, which is float32.
    build(tmp_path, (draft, pair[1]), tokenizer, eval_rows=rows)
    build(tmp_path, (draft, pair[1]), tokenizer, rows, peft=LORA)


def test_an_adapter_that_no_plain_draft_can_hold_is_refused(tmp_path, pair, tokenizer):
    """Virtual tokens: training failed at a mask of another shape, and saving had nothing to merge."""
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="type PROMPT_TUNING cannot be merged"):
        build(tmp_path, pair, tokenizer, peft=prompt)


def test_a_compiled_draft_is_refused(tmp_path, pair, tokenizer):
    """Found when the trained draft was loaded: its weights were saved as `_orig_mod.model...`."""
    draft = torch.compile(pair[0], backend="eager")
    with pytest.raises(ValueError, match=r"The draft is compiled .* set `torch_compile=True`"):
        build(tmp_path, (draft, pair[1]), tokenizer)


def test_an_adapter_that_transformers_holds_is_refused(tmp_path, pair, tokenizer):
    """Found when the trained draft was to be saved: the folder had the adapter alone."""
    pytest.importorskip("peft", minversion=MIN_PEFT_VERSION)  # transformers 5.24 wants one that is not published yet
    pair[0].add_adapter(LoraConfig(r=2))
    with pytest.raises(ValueError, match="only the adapter would be saved, and no plain draft"):
        build(tmp_path, pair, tokenizer)


def test_an_adapter_whose_best_checkpoint_is_not_found_is_refused(tmp_path, pair, tokenizer):
    """With a warning transformers kept the last checkpoint; the card said that it was the best."""
    draft = get_peft_model(pair[0], LoraConfig(r=2, task_type="CAUSAL_LM"), adapter_name="mine")
    rows = alignment_rows(pair[1], tokenizer, count=4)
    best = {"load_best_model_at_end": True, "save_strategy": "epoch", "eval_strategy": "epoch"}
    with pytest.raises(ValueError, match="named 'default' alone, and the draft's is 'mine'"):
        build(tmp_path, (draft, pair[1]), tokenizer, rows, rows, **best)


# Adapters on tied weights --------------------------------------------------------------------------------------------


# peft's own doubts about tied weights, which need not be the user's last word on it.
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True", "ignore:You have requested `ensure_weight_tying`")
@pytest.mark.parametrize(
    ("architecture", "module", "ties"),
    [("qwen3", "embed_tokens", False), ("gpt2", "wte", False), ("gpt2", "wte", True)],
)
def test_an_adapter_on_one_of_two_tied_weights_is_refused(tmp_path, tokenizer, architecture, module, ties):
    """The saved draft's logits were off by 2.8: merged, the adapter changed the head as well."""
    pair = tiny_pair(architecture)
    lora = LoraConfig(target_modules=[module], ensure_weight_tying=ties)
    with pytest.raises(ValueError, match=f"The adapter changes '.*{module}'.*modules_to_save"):
        build(tmp_path, pair, tokenizer, peft=lora)
    wrapped = get_peft_model(tiny_pair(architecture)[0], lora)
    with pytest.raises(ValueError, match=f"The adapter changes '.*{module}'"):
        build(tmp_path, (wrapped, pair[1]), tokenizer)


def test_tying_the_adapters_instead_is_refused_by_trl(tmp_path, tokenizer):
    """Were it not, the refusal of an adapter on one of two tied weights should say that this is the way."""
    lora = LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True)
    with pytest.raises(ValueError, match="PEFT adapter to `lm_head` is not supported"):
        build(tmp_path, tiny_pair("qwen3"), tokenizer, peft=lora)


@pytest.mark.filterwarnings(
    "ignore:.*tie_word_embeddings=True", "ignore:Input and output embeddings are no longer tied"
)
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("qwen3", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
        ("qwen3", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ("qwen3", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]}),
    ],
    ids=["untied", "whole copy", "whole copy, tied by peft", "rows"],
)
def test_adapters_that_are_not_refused_are_saved_as_trained(tmp_path, tokenizer, architecture, options):
    pair = tiny_pair(architecture)
    rows = alignment_rows(pair[1], tokenizer, count=4)
    trainer = build(tmp_path, pair, tokenizer, rows, peft=LoraConfig(r=4, **options), learning_rate=0.03)
    trainer.train()
    trainer.save_model(str(tmp_path / "draft"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    ids = torch.tensor([rows[0]["prompt_ids"] + rows[0]["completion_ids"]])
    with torch.no_grad():
        trained, loaded = trainer.model.eval()(ids).logits, saved(ids).logits
        stock = tiny_pair(architecture)[0](ids).logits
    torch.testing.assert_close(loaded, trained, atol=1e-4, rtol=0)
    assert (trained - stock).abs().max() > 0.1, "nothing was trained"


def test_a_refusal_by_trl_leaves_the_arguments_as_they_were(tmp_path, saved_pair, tokenizer):
    """Set right and tried again, the draft was loaded without what `model_init_kwargs` asked for."""
    args = config(tmp_path, model_init_kwargs={"dtype": "bfloat16"}, assistant_only_loss=True)
    rows = Dataset.from_list([{"text": "a"}])
    with pytest.raises(ValueError, match="dataset is not conversational"):
        DraftDistillTrainer(*map(str, saved_pair), args=args, train_dataset=rows, processing_class=tokenizer)
    assert args.model_init_kwargs == {"dtype": "bfloat16"}


def test_arguments_serve_for_a_second_trainer(tmp_path, pair, tokenizer):
    """`eval_strategy` stayed "epoch", and the second one, without an `eval_dataset`, was refused."""
    rows, args = alignment_rows(pair[1], tokenizer, count=4), config(tmp_path)
    before = dict(vars(args))
    common = {"args": args, "train_dataset": rows, "processing_class": tokenizer}
    assert DraftDistillTrainer(*pair, eval_dataset=rows, **common).args.eval_strategy == "epoch"
    assert vars(args) == before
    assert DraftDistillTrainer(*pair, **common).args.eval_strategy == "no"


@pytest.mark.parametrize(
    ("options", "has_target", "why"),
    [
        ({"model_init_kwargs": {"dtype": "bfloat16"}}, True, "`model` is loaded already"),
        ({"target_model_init_kwargs": {"dtype": "bfloat16"}}, True, "`target_model` is loaded already"),
        ({"target_model_revision": "v2"}, True, "`target_model` is loaded already"),
        ({"target_model_revision": "v2", "divergence": "cross_entropy"}, False, "there is no `target_model`"),
    ],
    ids=str,
)
def test_how_to_load_what_is_not_loaded_here_is_refused(tmp_path, pair, tokenizer, options, has_target, why):
    """Dropped without a word: a target meant to be of revision v2 was whichever was at hand."""
    rows = Dataset.from_list([{"text": "a b"}])
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` would do nothing: {why}"):
        build(tmp_path, (pair[0], pair[1] if has_target else None), tokenizer, rows, **options)


@pytest.mark.parametrize("whose", ["model_init_kwargs", "target_model_init_kwargs"])
def test_what_a_model_is_looked_up_by_may_stand_among_its_options(tmp_path, saved_pair, tokenizer, monkeypatch, whose):
    """TRL's habit: `revision` was refused in words that no user could follow, `trust_remote_code` did nothing."""
    looked_up = []

    def resolved(name, **options):
        looked_up.append(options)
        return resolve(name)

    monkeypatch.setattr(setup, "resolve", resolved)
    args = config(tmp_path, **{whose: {"revision": "v2", "trust_remote_code": True}})
    rows = Dataset.from_list([{"text": "a b"}])
    DraftDistillTrainer(*map(str, saved_pair), args=args, train_dataset=rows, processing_class=tokenizer)
    wanted = looked_up[whose.startswith("target")]
    assert (wanted["revision"], wanted["trust_remote_code"]) == ("v2", True)
    assert [each["trust_remote_code"] for each in looked_up].count(True) == 1


@pytest.mark.parametrize("streamed", [False, True])
def test_data_to_evaluate_on_is_not_prepared_as_training_data_too(tmp_path, pair, tokenizer, caplog, streamed):
    """All rows were read twice, a warning told of a train dataset, and packing refused a stream's first row."""
    masked = {"input_ids": [0, 5, 6], "labels": [-100] * 3}
    rows = Dataset.from_list([masked, {"input_ids": [5, 6] * 99, "labels": [5, 6] * 99}])
    given = rows.to_iterable_dataset() if streamed else rows
    options = {"divergence": "cross_entropy", "packing": True}
    trainer = build(tmp_path, (pair[0], None), tokenizer, eval_rows=given, **options)
    assert trainer.train_dataset is None
    assert "train dataset" not in caplog.text
    assert ("of 2 rows of the eval dataset are longer" in caplog.text) is not streamed
    assert trainer.evaluate()["eval_loss"] > 0


def test_ids_alone_that_the_user_prepared(tmp_path, pair, tokenizer):
    """TRL's collator takes them; they failed with "Column name ['labels'] not in the dataset"."""
    rows = Dataset.from_list([{"input_ids": row["prompt_ids"]} for row in alignment_rows(pair[1], tokenizer, count=4)])
    losses = []
    for options in ({"dataset_kwargs": {"skip_prepare_dataset": True}}, {}):
        options |= {"divergence": "cross_entropy", "max_steps": 1}
        trainer = build(tmp_path, (pair[0], None), tokenizer, rows, rows, **options)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    trainer.train()


@pytest.mark.parametrize("split", [{"cp_size": 2}, {"sp_size": 2, "sp_backend": "deepspeed"}], ids=str)
def test_rows_split_over_processes_are_refused(tmp_path, pair, tokenizer, monkeypatch, split):
    """Each process shifted the labels of its own part: a loss without the tokens where rows are cut."""

    class Split(DraftDistillTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            monkeypatch.setattr(type(self.accelerator), "parallelism_config", ParallelismConfig(**split))

    with pytest.raises(ValueError, match=r"Context and sequence parallelism .* split each row over processes"):
        build(tmp_path, pair, tokenizer, trainer_class=Split)


def test_white_box_without_a_target_is_refused(tmp_path, pair, tokenizer):
    rows = alignment_rows(pair[1], tokenizer)
    with pytest.raises(ValueError, match="`target_model` is None"):
        build(tmp_path, (pair[0], None), tokenizer, rows)

    class Own(DraftDistillTrainer):
        def token_loss(self, draft_logits, target_logits):
            return super().token_loss(draft_logits, target_logits)

    with pytest.raises(ValueError, match=r'A custom `token_loss` compares .*"cross_entropy"` and without that method'):
        build(tmp_path, (pair[0], None), tokenizer, rows, trainer_class=Own, divergence="cross_entropy")


def test_black_box_needs_no_target(tmp_path, pair, tokenizer):
    rows = alignment_rows(pair[1], tokenizer)
    trainer = build(tmp_path, (pair[0], None), tokenizer, rows, divergence="cross_entropy", max_steps=6)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    found = trainer.evaluate(rows)
    assert "eval_loss" in found
    assert "eval_acceptance_rate" not in found


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "train dataset is empty"),
        ([{"question": "a", "answer": "b"}], r"columns \['question', 'answer'\], none of which can be trained on"),
        ([{"input_ids": [0, 1, 2], "labels": [-100, -100, -100]}], "Nothing is left to learn from in the train"),
        ([{"prompt_ids": [0] * 300, "completion_ids": [5]}], "Nothing is left to learn from in the train"),
    ],
)
def test_data_that_cannot_be_learned_from(tmp_path, pair, tokenizer, rows, message):
    columns = list(rows[0]) if rows else ["text"]
    dataset = Dataset.from_list(rows) if rows else Dataset.from_dict({name: [] for name in columns})
    with pytest.raises(ValueError, match=message):
        build(tmp_path, pair, tokenizer, dataset)


def test_what_is_no_data_set_is_refused_by_name(tmp_path, pair, tokenizer):
    """A missing attribute instead of an answer, or the splits taken for columns."""
    rows = alignment_rows(pair[1], tokenizer, count=2)
    with pytest.raises(ValueError, match=r"train dataset must be .* got a `list`. Make one, with `Dataset.from_list`"):
        build(tmp_path, pair, tokenizer, rows.to_list())
    splits = DatasetDict(train=rows, test=rows)
    with pytest.raises(ValueError, match=r"got a `DatasetDict`. Choose one of its splits: 'train', 'test'"):
        build(tmp_path, pair, tokenizer, splits)
    # To evaluate on, several are welcome.
    assert "eval_test_loss" in build(tmp_path, pair, tokenizer, rows, splits).evaluate()


def test_a_row_longer_than_the_context_is_refused(tmp_path, pair, tokenizer):
    rows = Dataset.from_list([{"prompt_ids": [0] * 200, "completion_ids": [5] * 100}])
    with pytest.raises(ValueError, match="300 tokens, but the models read 256 at most"):
        build(tmp_path, pair, tokenizer, rows, max_length=512)


def test_rows_that_fill_no_batch_are_not_called_a_training(tmp_path, pair, tokenizer):
    """An untrained draft under a card that says how it was trained: transformers only warned."""
    rows = alignment_rows(pair[1], tokenizer, count=4)
    options = {"per_device_train_batch_size": 8, "dataloader_drop_last": True}
    trainer = build(tmp_path, pair, tokenizer, rows, **options)
    with pytest.raises(ValueError, match="No step was taken"):
        trainer.train()


def test_different_tokenizers_are_refused_before_the_models_are_read(tmp_path, saved_pair):
    draft_path, target_path = saved_pair
    tiny_tokenizer(
        text=["Entirely other words make entirely other merges, so ids mean other things now." * 3]
    ).save_pretrained(draft_path)
    (target_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ValueError, match="token"):
        DraftDistillTrainer(
            model=str(draft_path),
            target_model=str(target_path),
            args=config(tmp_path),
            train_dataset=Dataset.from_list([{"text": "a"}]),
        )


@pytest.mark.parametrize("in_memory", [False, True])
def test_chats_are_put_in_the_targets_template_where_no_tokenizer_is_given(tmp_path, saved_pair, in_memory):
    """A stock draft has its own template, or none: it learned texts that its target is never asked to write."""
    draft_path, target_path = map(str, saved_pair)
    stock = tiny_tokenizer()
    stock.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    stock.save_pretrained(draft_path)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    trainer = DraftDistillTrainer(
        model=draft_path,
        target_model=load_target(target_path) if in_memory else target_path,
        args=config(tmp_path),
        train_dataset=Dataset.from_list([{"messages": chat}]),
    )
    text = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    assert text == "<s><|user|>a</s><|assistant|>b</s>"


def test_a_target_in_memory_may_come_from_where_no_tokenizer_lies(tmp_path, saved_pair):
    draft_path, target_path = saved_pair
    target = load_target(str(target_path))
    for path in target_path.glob("*token*"):
        path.unlink()
    rows = Dataset.from_list([{"text": "a few words"}])
    trainer = DraftDistillTrainer(model=str(draft_path), target_model=target, args=config(tmp_path), train_dataset=rows)
    assert trainer.processing_class.get_vocab() == tiny_tokenizer().get_vocab()


def test_the_configuration_of_another_trainer_is_refused_by_name(tmp_path, pair, tokenizer):
    """It failed at the first field of ours: no attribute 'mix'."""
    with pytest.raises(ValueError, match="must be a `DraftDistillConfig`, got a `SFTConfig`"):
        DraftDistillTrainer(
            model=pair[0],
            target_model=pair[1],
            args=SFTConfig(str(tmp_path), bf16=False, activation_checkpointing=False),
            train_dataset=alignment_rows(pair[1], tokenizer, count=2),
            processing_class=tokenizer,
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": None}, "`model` must be a model, or its id or path as text, got a `NoneType`"),
        ({"model": Path("draft")}, "`model` must be .* as text, got a `PosixPath`"),
        ({"target_model": DraftDistillConfig}, "got a `type`. Give `args` by name"),
        ({"processing_class": "org/target"}, "must be the tokenizer that .* got a `str`"),
        ({"processing_class": None}, "Neither model says where its tokenizer lies"),
    ],
    ids=str,
)
def test_an_argument_of_another_kind_is_refused_by_name(tmp_path, pair, tokenizer, arguments, message):
    """Fault: "no attribute 'config'", "no attribute 'get_vocab'", "a model needs a name, got ''"."""
    given = {"model": pair[0], "target_model": pair[1], "processing_class": tokenizer, **arguments}
    with pytest.raises(ValueError, match=message):
        DraftDistillTrainer(args=config(tmp_path), train_dataset=alignment_rows(pair[1], tokenizer, count=2), **given)


@pytest.mark.parametrize("why", ["vocabulary", "adapter"])
def test_an_optimizer_made_for_other_parameters_is_refused(tmp_path, tokenizer, why):
    """Fault: the head that replaced a shorter one was never trained, nor was an adapter, without a word."""
    draft, target = tiny_pair("llama", draft_vocab_size=304, target_vocab_size=304 if why == "adapter" else 320)
    given = {"train_dataset": alignment_rows(target, tokenizer, count=2), "processing_class": tokenizer}
    peft = LORA if why == "adapter" else None

    def trainer():
        optimizer = torch.optim.SGD(draft.parameters(), lr=0.1)
        return DraftDistillTrainer(
            draft, target, config(tmp_path), optimizers=(optimizer, None), peft_config=peft, **given
        )

    with pytest.raises(ValueError, match="The optimizer in `optimizers` was made before"):
        trainer()
    if why == "vocabulary":  # it fits now, and the same call trains all of it
        learned = trainer()
        before = weights(learned.model)
        learned.train()
        assert not any(torch.equal(before[name], after) for name, after in weights(learned.model).items())


@pytest.mark.parametrize("source", ["text", "cache"])
def test_a_draft_with_idle_sampling_settings_is_saved_without_a_target_too(tmp_path, pair, tokenizer, source):
    """Fault: transformers refused at the first checkpoint to save a temperature without `do_sample`."""
    draft, target = pair
    draft.generation_config.temperature = 0.6
    rows = alignment_rows(target, tokenizer, count=2)
    options = {"divergence": "cross_entropy"} if source == "text" else {}
    rows = rows if source == "text" else cache_target_distributions(rows, target, top_k=4)
    trainer = DraftDistillTrainer(
        draft, args=config(tmp_path, **options), train_dataset=rows, processing_class=tokenizer
    )
    trainer.save_model()
    assert GenerationConfig.from_pretrained(tmp_path).temperature is None


def test_models_given_by_path(tmp_path, saved_pair, pair, tokenizer):
    draft_path, target_path = map(str, saved_pair)
    rows = alignment_rows(pair[1], tokenizer, name=target_path)
    args, callbacks = config(tmp_path, max_steps=1), [AcceptanceCallback(plot=False)]
    trainer = DraftDistillTrainer(
        model=draft_path, target_model=target_path, args=args, train_dataset=rows, callbacks=callbacks
    )
    trainer.train()
    assert trainer.evaluate(rows)["eval_block_efficiency"] >= 1
