"""The trainer, on tiny models: each test names the fault it would catch."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, TrainerCallback

from hf_draftkd import AcceptanceCallback, DraftDistillTrainer, load_draft
from tests.tiny import tiny_llama, tiny_pair, tiny_tokenizer
from tests.training.rows import alignment_rows, reference_forward_kl
from tests.training.trainers import assert_same, build, config, weights

# The loss ------------------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_over_completion_tokens_of_the_definition(tmp_path, pair, tokenizer):
    """Prompt tokens counted, logits shifted by one, a mean over rows instead of tokens: all show here."""
    rows = alignment_rows(pair[1], tokenizer, count=5)
    expected = reference_forward_kl(*pair, rows)
    trainer = build(tmp_path, pair, tokenizer, eval_rows=rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_first_logged_training_loss_is_the_same_figure(tmp_path, pair, tokenizer):
    """A training loss divided by accumulation steps or batches instead of tokens."""
    rows = alignment_rows(pair[1], tokenizer, count=8)
    expected = reference_forward_kl(*pair, rows)
    trainer = build(tmp_path, pair, tokenizer, rows, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


# The divisor stands outside every divergence; text alone takes a way of its own.
@pytest.mark.parametrize("divergence", ["forward_kl", "cross_entropy"])
def test_batch_times_accumulation_does_not_change_the_trajectory(tmp_path, tokenizer, divergence):
    """A loss normalised per micro-batch (trl#6478): rows differ in length, so the two runs would part."""
    rows = alignment_rows(tiny_pair("llama")[1], tokenizer, count=8)
    runs = []
    for batch, accumulation in ((8, 1), (2, 4)):
        trainer = build(
            tmp_path,
            tiny_pair("llama"),
            tokenizer,
            rows,
            divergence=divergence,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            optim="sgd",
            learning_rate=0.1,
        )
        trainer.train()
        runs.append(weights(trainer.model))
    assert_same(*runs, atol=2e-5)


@pytest.mark.parametrize(
    "divergence",
    [
        "forward_kl",
        "reverse_kl",
        "generalized_jsd",
        "total_variation",
        "tvd_plus_plus",
        "negative_log_acceptance",
        "lk_hybrid",
        "cross_entropy",
    ],
)
def test_every_divergence_raises_acceptance_and_moves_every_parameter(tmp_path, pair, tokenizer, divergence):
    """A divergence that is wired with the wrong sign or options, or a parameter that gets no gradient."""
    rows = alignment_rows(pair[1], tokenizer)
    before = weights(pair[0])
    options = {"max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 3e-3}
    trainer = build(tmp_path, pair, tokenizer, rows, divergence=divergence, **options)
    # Cross-entropy sees nothing but the written tokens: what it raises is their acceptance in greedy decoding.
    metric = "eval_block_efficiency" if divergence == "cross_entropy" else "eval_acceptance_rate"
    stock = trainer.evaluate(rows)[metric]
    trainer.train()
    assert trainer.evaluate(rows)[metric] > stock
    still = [name for name, value in weights(pair[0]).items() if torch.equal(value, before[name])]
    assert not still


def test_equal_models_have_no_loss_and_no_gradient(tmp_path, tokenizer):
    """Forward KL that is really cross-entropy: it must vanish for equal models."""
    target = tiny_llama()
    trainer = build(tmp_path, (tiny_llama(), target), tokenizer, max_steps=1, optim="sgd", learning_rate=1.0)
    before = weights(trainer.model)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0, abs=1e-6)
    assert_same(before, weights(trainer.model), atol=1e-5)


def test_temperature_reaches_the_loss(tmp_path, pair, tokenizer):
    """A loss temperature that is accepted and never used (GKD's fault)."""
    rows = alignment_rows(pair[1], tokenizer, count=4)
    losses = [
        build(tmp_path, pair, tokenizer, eval_rows=rows, loss_temperature=t).evaluate()["eval_loss"] for t in (1.0, 3.0)
    ]
    assert losses[1] < 0.7 * losses[0]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, while tracing
def test_a_compiled_draft_learns_the_same(tmp_path, tokenizer):
    """No test took `torch_compile`, under which the draft is wrapped and keeps no head for the loss to work in. The
    backend traces forward and backward as inductor does, and spares its minute of C++.
    """
    found = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        trainer = build(tmp_path, tiny_pair(num_layers=1), tokenizer, max_steps=1, **compiled)
        trainer.train()
        (step,) = (entry for entry in trainer.state.log_history if "loss" in entry)
        found.append([step["loss"], step["grad_norm"], step["acceptance_rate"]])
        trainer.save_model()
        assert weights(load_draft(tmp_path)).keys() == weights(tiny_pair(num_layers=1)[0]).keys()
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_target_is_bit_identical_after_training_and_gets_no_gradient(tmp_path, pair, tokenizer):
    """The target updated by accident (trl#6769)."""
    before = copy.deepcopy(pair[1].state_dict())
    trainer = build(tmp_path, pair, tokenizer)
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in pair[1].state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in pair[1].parameters())
    assert not pair[1].training


def test_padded_vocabularies_of_different_size_are_compared_on_the_shared_part(tmp_path, tokenizer):
    """Rows that stand for no token given real probability, or a shape error between 304 and 320."""
    padded = tiny_pair("qwen3", draft_vocab_size=304, target_vocab_size=320, real_vocab_size=300)
    rows = alignment_rows(padded[1], tokenizer, count=4)
    target_rows = padded[1].get_output_embeddings().weight
    assert (target_rows[300:] == 0).all()
    trainer = build(tmp_path, padded, tokenizer, rows, max_steps=1)
    expected = _reference_on_real_rows(*padded, rows, real=300)
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.train()
    assert trainer.model.config.vocab_size == 320


def _reference_on_real_rows(draft, target, rows, real):
    total = tokens = 0
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        with torch.no_grad():
            q = torch.softmax(draft(ids).logits[0, :, :real].double(), -1)
            p = torch.softmax(target(ids).logits[0, :, :real].double(), -1)
        for t in range(len(row["prompt_ids"]), ids.shape[1]):
            total += float((p[t - 1] * (p[t - 1] / q[t - 1]).log()).sum())
            tokens += 1
    return total / tokens


@pytest.mark.parametrize("divergence", ["forward_kl", "tvd_plus_plus", "cross_entropy"])
def test_the_loss_inside_the_head_is_that_of_whole_logits(tmp_path, tokenizer, divergence):
    """A path that never makes all logits, and learns another loss: padded vocabularies, LoRA, custom losses."""

    class Own(DraftDistillTrainer):
        def token_loss(self, draft_logits, target_logits):
            return (draft_logits.softmax(-1) - target_logits.softmax(-1)).pow(2).sum(-1)

    options = {"draft_vocab_size": 304, "target_vocab_size": 320, "real_vocab_size": 300}
    rows = alignment_rows(tiny_pair("qwen3", **options)[1], tokenizer, count=3)
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    more = {"tvd_estimator": "full"} if divergence == "tvd_plus_plus" else {}
    kinds = [(DraftDistillTrainer, None), (DraftDistillTrainer, adapter)]
    if divergence == "forward_kl":
        kinds.append((Own, None))  # the same whatever divergence it stands for
    for trainer_class, peft in kinds:
        trainer = build(
            tmp_path,
            tiny_pair("qwen3", **options),
            tokenizer,
            rows,
            trainer_class=trainer_class,
            peft=peft,
            divergence=divergence,
            **more,
        )
        assert trainer.head_arithmetic is not None
        batch = trainer.data_collator(list(trainer.train_dataset))
        found = []
        for arithmetic in (trainer.head_arithmetic, None):
            trainer.head_arithmetic = arithmetic
            trainer.model.eval().zero_grad()
            loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
            gradients = [p.grad.clone() for p in trainer.model.parameters() if p.requires_grad]
            found.append((loss.item(), gradients))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-4, abs=1e-5)
        torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=1e-3)


def test_a_loss_of_ones_own(tmp_path, pair, tokenizer):
    """`token_loss` is the one method to override, and what it returns is what is trained on."""

    class Squared(DraftDistillTrainer):
        def token_loss(self, draft_logits, target_logits):
            assert draft_logits.shape == target_logits.shape
            return (draft_logits.softmax(-1) - target_logits.softmax(-1)).pow(2).sum(-1)

    trainer = build(tmp_path, pair, tokenizer, trainer_class=Squared, max_steps=8)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] < 2


def test_a_subclass_may_ask_for_the_outputs(tmp_path, pair, tokenizer):
    """The usual line of a subclass of `Trainer`, which failed with "iteration over a 0-d tensor"."""

    class Scaled(DraftDistillTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            assert outputs["loss"] is loss
            return (2 * loss, outputs) if return_outputs else 2 * loss

    rows = alignment_rows(pair[1], tokenizer)
    losses = [
        build(tmp_path, tiny_pair("llama"), tokenizer, rows, trainer_class=kind, max_steps=1).train().training_loss
        for kind in (DraftDistillTrainer, Scaled)
    ]
    assert losses[1] == pytest.approx(2 * losses[0])


def test_acceptance_is_logged_while_training(tmp_path, pair, tokenizer):
    """TVD++'s own value has no meaning: without acceptance beside it nobody sees whether it learns."""
    rows = alignment_rows(pair[1], tokenizer)
    options = {"divergence": "tvd_plus_plus", "per_device_train_batch_size": 8, "max_steps": 3}
    trainer = build(tmp_path, pair, tokenizer, rows, **options)
    stock = trainer.evaluate(rows)["eval_acceptance_rate"]
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0]["acceptance_rate"] == pytest.approx(stock, rel=1e-5)
    assert logged[-1]["num_tokens"] == 3 * sum(len(row["prompt_ids"] + row["completion_ids"]) for row in rows)


def test_what_the_last_steps_read_is_logged(tmp_path, pair, tokenizer):
    """After the last evaluation the draft is in evaluation mode: what was read since the last entry was never told."""
    rows = alignment_rows(pair[1], tokenizer)
    options = {"per_device_train_batch_size": 8, "max_steps": 3, "logging_steps": 2, "eval_steps": 3}
    trainer = build(tmp_path, pair, tokenizer, rows, rows, eval_strategy="steps", **options)
    trainer.train()
    _, evaluated, last = trainer.state.log_history
    assert "eval_loss" in evaluated
    assert "acceptance_rate" not in evaluated
    assert last["num_tokens"] == 3 * sum(len(row["prompt_ids"] + row["completion_ids"]) for row in rows)
    assert 0 < last["acceptance_rate"] < 1


class InterruptedOnce(TrainerCallback):
    """After the first step, as from the keyboard."""

    def __init__(self):
        self.interrupts = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.interrupts:
            self.interrupts = False
            raise KeyboardInterrupt


def test_a_run_that_is_started_again_counts_anew(tmp_path, tokenizer):
    """What was read and written before an interruption, or before memory ran out, stood in the next run's entry."""
    rows = alignment_rows(tiny_pair("llama")[1], tokenizer, count=4)
    options = {"lmbda": 0.5, "seed": 1, "max_new_tokens": 4, "max_steps": 2, "logging_steps": 2}
    entries = []
    for callbacks in ([], [InterruptedOnce()]):
        trainer = build(tmp_path, tiny_pair("llama"), tokenizer, rows, callbacks=callbacks, **options)
        for _ in callbacks:
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        trainer.train()
        entries.append(trainer.state.log_history[0])
    assert entries[0]["completions/draft_share"] == 0.5
    for name in ("num_tokens", "completions/draft_share"):
        assert entries[1][name] == entries[0][name]


@pytest.mark.parametrize("reduce", [lambda each: each.mean(), lambda each: each.sum(-1, keepdim=True)])
def test_a_custom_loss_of_another_shape_is_refused(tmp_path, pair, tokenizer, reduce):
    """`[n, 1]` was logged N times too large; a mean failed in words about concatenation."""

    class Custom(DraftDistillTrainer):
        def token_loss(self, draft_logits, target_logits):
            return reduce((draft_logits.softmax(-1) - target_logits.softmax(-1)).abs())

    with pytest.raises(ValueError, match=r"`token_loss`\) must return one value for each position, \(\d+,\), got \("):
        build(tmp_path, pair, tokenizer, trainer_class=Custom).train()


# The data ------------------------------------------------------------------------------------------------------------


def test_exact_ids_are_trained_on_as_they_are(tmp_path, pair, tokenizer):
    """An alignment row tokenised a second time: these ids are not what the tokenizer makes of their text."""
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "model"]
    assert tokenizer("model")["input_ids"] != letters
    row = alignment_rows(pair[1], tokenizer, count=1)[0] | {"completion_ids": [*letters, tokenizer.eos_token_id]}
    trainer = build(tmp_path, pair, tokenizer, Dataset.from_list([row]))
    prepared = trainer.train_dataset[0]
    assert prepared["input_ids"] == row["prompt_ids"] + row["completion_ids"]
    assert prepared["labels"] == [-100] * len(row["prompt_ids"]) + row["completion_ids"]


def test_end_of_sequence_is_learned_where_pad_equals_it(tmp_path, pair):
    """The end masked by id because pad is the same token (trl#6357)."""
    tokenizer = tiny_tokenizer(pad_is_eos=True)
    rows = Dataset.from_list(
        [{"prompt_ids": [0, 9, 8], "completion_ids": [7, 6, 1]}, {"prompt_ids": [0, 9], "completion_ids": [7, 1]}]
    )
    trainer = build(tmp_path, pair, tokenizer, rows)
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"] == 1).sum() == 2
    assert (batch["labels"] != -100).sum() == 5


@pytest.mark.parametrize(
    "row",
    [
        {"text": "The quick brown fox jumps."},
        {"prompt": "The quick", "completion": " brown fox"},
        {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"input_ids": [0, 5, 6, 7], "completion_mask": [0, 0, 1, 1]},
        {"input_ids": [0, 5, 6, 7], "labels": [-100, -100, 6, 7]},
    ],
    ids=["text", "prompt-completion", "conversational", "messages", "completion_mask", "labels"],
)
def test_every_format_sft_trainer_takes(tmp_path, pair, tokenizer, row):
    """SFTTrainer ignores the mask that comes with `input_ids` and would train on the prompt."""
    trainer = build(tmp_path, pair, tokenizer, Dataset.from_list([row] * 2))
    (batch,) = trainer.get_train_dataloader()
    assert torch.isfinite(trainer.compute_loss(trainer.model, batch))
    if "input_ids" in row:
        assert trainer.train_dataset[0]["labels"] == [-100, -100, 6, 7]


def test_packed_and_padding_free_batches_give_the_padded_loss(tmp_path, tokenizer):
    """Texts that see each other in a packed row, or a first token predicted from the text before it."""
    rows = alignment_rows(tiny_pair("llama")[1], tokenizer, count=4)
    # Of unequal lengths.
    rows = rows.map(lambda row, at: {"completion_ids": row["completion_ids"][: 12 - 3 * at]}, with_indices=True)
    losses, gradients = [], []
    for extra in ({}, {"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}):
        # In float64 a difference is a leak, not rounding.
        pair = [model.double() for model in tiny_pair("llama")]
        trainer = build(tmp_path, pair, tokenizer, rows, **extra)
        batch = trainer.data_collator(list(trainer.train_dataset))
        assert batch["input_ids"].shape[0] == (4 if not extra else 1)
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: value.grad for name, value in trainer.model.named_parameters()})
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-12)
    for found in gradients[1:]:
        assert_same(gradients[0], found, atol=1e-12)


@pytest.mark.parametrize("writes", [{"seq_kd": True}, {"lmbda": 1.0}], ids=["target", "draft"])
def test_whatever_id_pads_the_draft_learns_the_same(tmp_path, tokenizer, writes):
    """Checkpoints without a pad id, with -1 or with an added one that has no row died in the embedding, or unsaved."""
    rows = alignment_rows(tiny_pair("llama")[1], tokenizer, count=4)
    writes = {**writes, "max_new_tokens": 4, "max_steps": 2}
    expected = build(tmp_path / "usual", tiny_pair("llama"), tokenizer, rows, **writes)
    expected.train()
    for pad in (None, 300) if "seq_kd" in writes else (-1, 300):
        assert_padding_changes_nothing(tmp_path / str(pad), rows, writes, pad, weights(expected.model))


def assert_padding_changes_nothing(path, rows, writes, pad, expected):
    pair, tokenizer = tiny_pair("llama"), tiny_tokenizer()
    for model in pair:
        model.config.pad_token_id = model.generation_config.pad_token_id = pad
    if pad == 300:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    elif pad is None:
        tokenizer.pad_token = None
    trainer = build(path, pair, tokenizer, rows, **writes)
    trainer.train()
    assert_same(weights(trainer.model), expected)
    trainer.save_model()
    assert load_draft(path).config.pad_token_id is None


# Saving --------------------------------------------------------------------------------------------------------------


def test_resumed_training_gives_the_weights_of_an_uninterrupted_run(tmp_path, tokenizer):
    """An adapter, and tokens that are drawn; of whole drafts see test_checkpoints.py and test_rollouts.py."""
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = alignment_rows(tiny_pair("llama")[1], tokenizer)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "divergence": "tvd_plus_plus"}
    whole = build(tmp_path / "whole", tiny_pair("llama"), tokenizer, rows, peft=copy.deepcopy(peft), **options)
    whole.train()
    resumed = build(tmp_path / "part", tiny_pair("llama"), tokenizer, rows, peft=copy.deepcopy(peft), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same(weights(whole.model), weights(resumed.model))
    # It started again at 0.
    read = [[entry.get("num_tokens") for entry in trainer.state.log_history] for trainer in (whole, resumed)]
    assert read[0] == read[1]


@pytest.mark.parametrize(("shuffles", "accumulation"), [(True, 1), (False, 2)])
def test_a_stream_that_is_read_again_resumes_with_the_same_rows(tmp_path, tokenizer, shuffles, accumulation):
    """The pass after the checkpoint's began at its first row: transformers takes a stream for endless."""
    data = Dataset.from_list([{"prompt_ids": [0, 10 + n], "completion_ids": [11, 1]} for n in range(6)])
    data = data.to_iterable_dataset()
    data = data.shuffle(seed=1, buffer_size=4) if shuffles else data
    seen = []

    class Recording(DraftDistillTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(inputs["input_ids"][:, 1].tolist())
            return super().compute_loss(model, inputs, *args, **kwargs)

    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "trainer_class": Recording}
    options["gradient_accumulation_steps"] = accumulation
    build(tmp_path / "whole", tiny_pair("llama"), tokenizer, data, **options).train()
    # Three batches a pass, one of which is left over where two make a step: the fourth step is the first of the second
    # pass, or the only one of the fourth.
    after = seen[4:] if accumulation == 1 else seen[3 * 3 + 2 :]
    seen.clear()
    resumed = build(tmp_path / "part", tiny_pair("llama"), tokenizer, data, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert seen == after


@pytest.mark.parametrize("peft", [None, LoraConfig(r=2, task_type="CAUSAL_LM")])
def test_a_copy_of_the_draft_runs_itself(tmp_path, pair, tokenizer, peft):
    """TRL's fused head is bound to the model it was put on: a copy with other weights gave the original's logits."""
    trainer = build(tmp_path, pair, tokenizer, peft=peft, max_steps=1)
    trainer.train()
    twin = copy.deepcopy(trainer.model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert twin(torch.tensor([[0, 9, 8, 7]])).logits.abs().max() == 0


def test_lora_checkpoints_hold_the_adapter_and_the_saved_draft_is_plain(tmp_path, pair, tokenizer):
    """A pushed adapter that `assistant_model=` cannot use, or a checkpoint that cannot resume."""
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = build(tmp_path, pair, tokenizer, peft=peft, save_strategy="steps", save_steps=4)
    trainer.train()
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").is_file()
    before = weights(trainer.model)
    trainer.save_model(str(tmp_path / "final"))
    assert_same(before, weights(trainer.model))
    assert not (tmp_path / "final" / "adapter_model.safetensors").exists()
    assert "lm_head.weight" in load_file(tmp_path / "final" / "model.safetensors")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert saved.config.use_cache  # the Trainer's own default would publish a draft without one
    ids = torch.arange(20)[None]
    trainer.model.eval()
    torch.testing.assert_close(saved(ids).logits, trainer.model(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_mixture_of_experts_still_assists_once_it_was_trained(tmp_path, tokenizer):
    """SFTTrainer turns `output_router_logits` on. Saved so, a draft failed at any padded prompt."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_local_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}
    pair = [MixtralForCausalLM(MixtralConfig(vocab_size=300, **size, **heads)) for _ in range(2)]
    trainer = build(tmp_path, pair, tokenizer, max_steps=1)
    trainer.train()
    trainer.save_model()
    saved, prompt = load_draft(tmp_path), torch.tensor([[2, 0, 5, 6, 7]])
    options = {"attention_mask": (prompt != 2).long(), "max_new_tokens": 6, "do_sample": False}
    expected = pair[1].generate(prompt, **options)
    assert torch.equal(pair[1].generate(prompt, assistant_model=saved, **options), expected)


def test_the_card_says_how_the_draft_was_trained(tmp_path, saved_pair, tokenizer, pair):
    """TRL's own card would call it SFT, and name neither target nor divergence."""
    draft_path, target_path = map(str, saved_pair)
    rows = alignment_rows(pair[1], tokenizer, name=target_path)
    trainer = DraftDistillTrainer(
        model=draft_path,
        target_model=target_path,
        args=config(tmp_path, divergence="generalized_jsd", beta=0.25, max_steps=1),
        train_dataset=rows,
        callbacks=[AcceptanceCallback(plot=False)],
    )
    trainer.train()
    metrics = trainer.evaluate(rows)
    trainer.create_model_card()
    card, provenance = (tmp_path / "README.md").read_text(), json.loads((tmp_path / "provenance.json").read_text())
    training = provenance["training"]
    assert training["signal"] == "white_box"
    assert training["completions"] == "target"
    assert training["divergence_options"] == {"beta": 0.25}
    # Recorded, since a relative path could later be taken for an id on the Hub.
    assert (training["draft_is_local"], training["target_is_local"]) == (True, True)
    assert "dataset_is_local" not in training
    assert training["num_tokens"] == sum(map(len, rows["completion_ids"]))
    assert training["metrics"]["eval_acceptance_rate"] == metrics["eval_acceptance_rate"]
    assert training["hyperparameters"]["learning_rate"] == 0.01
    assert "generalized_jsd" in card
    assert "assistant_model=" in card
    assert str(tmp_path) not in card
