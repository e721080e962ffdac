"""Who writes the completions: the right model, from the right prompts, in the right share, learned from as written."""

import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file

from hf_draftkd import DraftDistillTrainer
from hf_draftkd.training.rollouts import check_writing, last_prompt, who_writes
from hf_draftkd.training.run_provenance import describe_run
from tests.processes import in_two_processes
from tests.tiny import tiny_pair, tiny_tokenizer
from tests.training.rows import alignment_rows, reference_forward_kl
from tests.training.trainers import assert_same, build, config, weights

GREEDY = {"generation_temperature": 0.0, "max_new_tokens": 6}


class Recording(DraftDistillTrainer):
    """Keeps what was learned from, as prompt and completion."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), inputs["labels"], strict=True)
        for ids, mask, labels in rows:
            learned = labels[mask] != -100
            row = (tuple(ids[mask][~learned].tolist()), tuple(ids[mask][learned].tolist()))
            self.__dict__.setdefault("seen", []).append((self.state.global_step, *row))
        return super().compute_loss(model, inputs, *args, **kwargs)


def greedy(model, prompt, end_ids, count=6) -> tuple[int, ...]:
    """The likeliest token again and again, without a cache, a mask or `generate`."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + count:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in end_ids:
                break
    return tuple(ids[len(prompt) :])


# Whose turn it is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lmbda", "seq_kd", "writers"), [(0.0, False, "data"), (0.0, True, "target"), (1.0, False, "draft")]
)
def test_shares_of_nothing_and_all_leave_nothing_to_chance(tmp_path, lmbda, seq_kd, writers):
    """A share compared with <= where < was meant."""
    args = config(tmp_path, lmbda=lmbda, seq_kd=seq_kd)
    assert {who_writes(args, step) for step in range(1000)} == {writers}


def test_share_is_that_of_the_steps_and_follows_from_the_seed(tmp_path):
    """A share of everything but the draft's steps, or other steps after a resume or on another process."""
    args = config(tmp_path, lmbda=0.3, seq_kd=True)
    turns = [who_writes(args, step) for step in range(4000)]
    assert set(turns) == {"draft", "target"}
    assert turns.count("draft") / 4000 == pytest.approx(0.3, abs=0.03)
    assert turns == [who_writes(args, step) for step in range(4000)]
    assert turns != [who_writes(config(tmp_path, lmbda=0.3, seq_kd=True, seed=43), step) for step in range(4000)]


@pytest.mark.parametrize(
    ("labels", "length"),
    [
        ([-100, -100, 5, 6], 2),
        ([-100, 5, -100, -100, 7, 8], 4),  # a chat: the last answer
        ([-100, 5, 6, -100], 1),  # what the template puts behind an answer
        ([4, 5, 6], 0),  # plain text
        ([-100, -100], 0),
        ([], 0),
    ],
)
def test_prompt_is_what_stands_before_the_last_answer(labels, length):
    """A chat whose first answer is rewritten and the rest thrown away, or text that loses its beginning."""
    assert last_prompt(labels) == length


# What is written -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["draft", "target"])
@pytest.mark.parametrize("ends", ["one", "several", "none", "pad"])
def test_text_is_what_the_model_says_one_prompt_at_a_time(tmp_path, who, ends):
    """Right padding, an end token lost where it pads, pads learned as text, an end invented where length ran out."""
    tokenizer = tiny_tokenizer(pad_is_eos=ends == "pad")
    pair = tiny_pair("llama", eos_scale=2.0)
    for model in pair:
        model.generation_config.eos_token_id = {"one": 1, "several": [1, 44], "none": None, "pad": 1}[ends]
        model.generation_config.pad_token_id = {"pad": 1}.get(ends, 2)
        model.config.eos_token_id = model.generation_config.eos_token_id
        # What a published model says of sampling, which must not get in.
        model.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=2, min_new_tokens=4)
    end_ids = {"several": {1, 44}, "none": set()}.get(ends, {1})
    rows = alignment_rows(tiny_pair("llama")[1], tokenizer, count=8)
    writing = pair[who == "target"]
    expected = {tuple(row["prompt_ids"]): greedy(writing, row["prompt_ids"], end_ids) for row in rows}
    options = {"lmbda": 1.0} if who == "draft" else {"seq_kd": True}
    trainer = build(
        tmp_path,
        pair,
        tokenizer,
        rows,
        trainer_class=Recording,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=1,
        **options,
        **GREEDY,
    )
    trainer.train()
    assert {prompt: completion for _, prompt, completion in trainer.seen} == expected
    if ends in ("one", "several"):
        assert any(len(text) < 6 for text in expected.values()), "some text must end early"
    assert any(len(text) == 6 for text in expected.values())


def test_loss_is_that_of_the_new_text(tmp_path, pair, tokenizer):
    """Tokens counted on the old text, or the target asked about it."""
    rows = alignment_rows(pair[1], tokenizer, count=8)
    written = [dict(row, completion_ids=list(greedy(pair[0], row["prompt_ids"], {1}))) for row in rows]
    expected = reference_forward_kl(*pair, written)
    trainer = build(tmp_path, pair, tokenizer, rows, gradient_accumulation_steps=4, max_steps=1, lmbda=1.0, **GREEDY)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_batch_times_accumulation_does_not_change_what_is_written(tmp_path, tokenizer):
    """Text written between the batches of a step, by weights or for a writer that changed meanwhile."""
    rows = alignment_rows(tiny_pair("llama")[1], tokenizer, count=8)
    runs = []
    for batch, accumulation in ((4, 1), (1, 4)):
        trainer = build(
            tmp_path,
            tiny_pair("llama"),
            tokenizer,
            rows,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=4,
            optim="sgd",
            learning_rate=0.1,
            lmbda=0.5,
            seq_kd=True,
            **GREEDY,
        )
        trainer.train()
        runs.append(weights(trainer.model))
    assert_same(*runs, atol=2e-5)


def test_a_resumed_run_writes_what_the_whole_one_wrote(tmp_path, tokenizer):
    """Random numbers that follow from how often the run was started."""
    options = {"lmbda": 0.5, "seq_kd": True, "max_new_tokens": 6, "save_strategy": "steps", "save_steps": 2}
    rows = alignment_rows(tiny_pair("llama")[1], tokenizer, count=8)
    whole = build(tmp_path / "1", tiny_pair("llama"), tokenizer, rows, trainer_class=Recording, **options)
    whole.train()
    resumed = build(tmp_path / "2", tiny_pair("llama"), tokenizer, rows, trainer_class=Recording, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "1" / "checkpoint-2"))
    assert resumed.seen == [row for row in whole.seen if row[0] >= 2]
    assert_same(weights(whole.model), weights(resumed.model))


def test_text_is_written_without_dropout_and_the_mode_comes_back(tmp_path, tokenizer):
    """A draft that writes with dropout on, or learns with it off afterwards; a cache that checkpointing turned off."""
    pair = tiny_pair("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    rows = alignment_rows(pair[1], tokenizer, count=4)
    expected = {tuple(row["prompt_ids"]): greedy(pair[0], row["prompt_ids"], {1}) for row in rows}
    trainer = build(
        tmp_path,
        pair,
        tokenizer,
        rows,
        trainer_class=Recording,
        per_device_train_batch_size=4,
        max_steps=1,
        lmbda=1.0,
        activation_checkpointing=True,
        **GREEDY,
    )
    modes = []
    learns = trainer.compute_loss
    trainer.compute_loss = lambda model, *rest, **named: modes.append(model.training) or learns(model, *rest, **named)
    trainer.train()
    assert {prompt: completion for _, prompt, completion in trainer.seen} == expected
    assert modes == [True]
    assert trainer.model.is_activation_checkpointing
    assert not trainer.target_model.training


def test_an_adapter_writes_too(tmp_path, pair, tokenizer):
    """Text written by the draft as it was before its adapter."""
    rows = alignment_rows(pair[1], tokenizer, count=4)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = build(
        tmp_path, pair, tokenizer, rows, trainer_class=Recording, peft=lora, per_device_train_batch_size=4,
        max_steps=1, lmbda=1.0, **GREEDY,
    )  # fmt: skip
    before = {greedy(trainer.model, row["prompt_ids"], {1}) for row in rows}
    with torch.no_grad():
        for name, value in trainer.model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    expected = {greedy(trainer.model, row["prompt_ids"], {1}) for row in rows}
    assert before != expected
    trainer.train()
    assert {completion for _, _, completion in trainer.seen} == expected


def test_mixed_in_text_stays_and_a_chat_gets_a_new_last_answer(tmp_path, pair, tokenizer):
    """Plain text whose beginning is taken for a prompt; a chat that loses its first turns."""
    chat = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And a dog?"},
        {"role": "assistant", "content": "The lazy dog."},
    ]
    rows = Dataset.from_list([{"messages": chat}] * 2)
    trainer = build(
        tmp_path, pair, tokenizer, rows, trainer_class=Recording, per_device_train_batch_size=16, max_steps=1,
        lmbda=1.0, assistant_only_loss=True, mix="1:1", **GREEDY,
        mix_dataset=Dataset.from_list([{"text": "over the lazy dog, and"}]),
    )  # fmt: skip
    trainer.train()
    context = tuple(tokenizer.apply_chat_template(chat[:3], add_generation_prompt=True, return_dict=False))
    answers = [completion for _, prompt, completion in trainer.seen if prompt == context]
    assert answers == [greedy(tiny_pair("llama")[0], context, {1})] * 2
    text = tuple(tokenizer("over the lazy dog, and").input_ids)
    others = [(prompt + rest)[: len(text)] for _, prompt, rest in trainer.seen if prompt != context]
    assert set(others) == {text}


def test_who_wrote_is_logged_timed_and_on_the_card(tmp_path, pair, tokenizer):
    """A card that says the target wrote what the draft did; seconds that nobody counted."""
    rows = alignment_rows(pair[1], tokenizer, count=8)
    trainer = build(
        tmp_path, pair, tokenizer, rows, trainer_class=Recording, max_steps=6, logging_steps=6, lmbda=0.5,
        seq_kd=True, skd_top_k=5, max_new_tokens=6,
    )  # fmt: skip
    seconds = trainer.train().metrics["train_runtime"]
    by_draft = sum(who_writes(trainer.args, step) == "draft" for step in range(6))
    assert 0 < by_draft < 6
    entry = trainer.state.log_history[0]
    lengths = [len(completion) for _, _, completion in trainer.seen]
    assert entry["completions/draft_share"] == pytest.approx(by_draft / 6)
    assert entry["completions/mean_length"] == pytest.approx(sum(lengths) / len(lengths))
    assert entry["completions/cut_share"] == pytest.approx(sum(length == 6 for length in lengths) / len(lengths))
    assert 0 < entry["completions/seconds"] < seconds
    provenance = describe_run(trainer)
    training = provenance.training
    assert provenance.hardware.startswith("1 process on ")
    assert (training.completions, training.lmbda) == ("mixed", 0.5)
    assert training.skd_top_k == 5
    assert training.num_tokens is None, "the tokens of the data were not learned from"


# The papers' methods -------------------------------------------------------------------------------------------------

METHODS = {
    "SeqKD": ({"divergence": "cross_entropy", "seq_kd": True}, {"target"}),
    "supervised KD": ({"divergence": "forward_kl"}, {"data"}),
    "ImitKD": ({"divergence": "forward_kl", "lmbda": 0.5}, {"data", "draft"}),
    "f-Distill": ({"divergence": "total_variation", "lmbda": 0.5, "seq_kd": True}, {"target", "draft"}),
    "on-policy GKD": ({"divergence": "generalized_jsd", "beta": 0.9, "lmbda": 1.0}, {"draft"}),
    "GKD, mixed": ({"divergence": "reverse_kl", "lmbda": 0.5}, {"data", "draft"}),
    "SKD": ({"lmbda": 1.0, "skd_top_k": 2}, {"corrected"}),
}


@pytest.mark.parametrize("method", METHODS)
def test_settings_of_a_method_do_what_its_paper_says(tmp_path, tokenizer, method):
    """A row of the table whose settings have other texts written."""
    options, writers = METHODS[method]
    rows = alignment_rows(tiny_pair("llama", seed=5)[1], tokenizer, count=4)
    given = {tuple(row["prompt_ids"]): tuple(row["completion_ids"]) for row in rows}
    pair = tiny_pair("llama", agreement=0.5)
    writing = GREEDY if writers != {"data"} else {}
    trainer = build(
        tmp_path, pair, tokenizer, rows, trainer_class=Recording, per_device_train_batch_size=4,
        # Two writers take turns by chance.
        max_steps=6 if len(writers) == 2 else 1,
        # So small a rate that the draft stays who it is.
        learning_rate=1e-12, optim="sgd", **options, **writing,
    )  # fmt: skip
    trainer.train()
    texts = {prompt: {"data": completion, **written_by_each(prompt)} for prompt, completion in given.items()}
    found = {
        frozenset(who for who, text in texts[prompt].items() if text == completion)
        for _, prompt, completion in trainer.seen
    }
    assert all(found), "a text that nobody should have written"
    # Of the writers that a text cannot tell apart, the ones asked for.
    assert {who for whos in found for who in whos & writers} == writers
    if len(writers) == 1:
        assert all(writers <= whos for whos in found)


@functools.cache
def written_by_each(prompt):
    draft, target = tiny_pair("llama", agreement=0.5)
    return {
        "target": greedy(target, prompt, {1}),
        "draft": greedy(draft, prompt, {1}),
        "corrected": corrected(draft, target, prompt, 2),
    }


def corrected(draft, target, prompt, top_k, count=6):
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + count:
            q, p = (model(torch.tensor([ids])).logits[0, -1] for model in (draft, target))
            ids.append(int(q.argmax()) if int((p > p[q.argmax()]).sum()) < top_k else int(p.argmax()))
            if ids[-1] == 1:
                break
    return tuple(ids[len(prompt) :])


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lmbda": 1.5}, r"`lmbda` must be a number in \[0, 1\]"),
        ({"lmbda": 1.0, "seq_kd": True}, "would do nothing"),
        ({"skd_top_k": 5}, "lets it write nothing"),
        ({"lmbda": 0.5, "skd_top_k": 0}, "`skd_top_k` must be"),
        ({"lmbda": 0.5, "max_new_tokens": 0}, "`max_new_tokens` must be"),
        ({"lmbda": 0.5, "divergence": "cross_entropy"}, "whatever it wrote"),
        ({"lmbda": 0.5, "cross_entropy_weight": 0.1}, "whatever it wrote"),
        ({"lmbda": 0.5, "packing": True}, "padded batches"),
        ({"seq_kd": True, "padding_free": True}, "padded batches"),
        ({"generation_temperature": -1.0}, "`generation_temperature`"),
        ({"generation_temperature": 0.0, "generation_top_p": 0.9}, "greedy decoding"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, options, message):
    """Settings that would silently do nothing, or teach the draft its own mistakes."""
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_correction_by_a_sharded_target_is_refused(tmp_path):
    """Processes that wait for each other for ever, once the texts of one have ended."""
    args = config(tmp_path, lmbda=1.0, skd_top_k=5)
    trainer = SimpleNamespace(args=args, train_dataset=None, is_fsdp_enabled=True)
    with pytest.raises(ValueError, match="wait for each other"):
        check_writing(trainer, 256, ())


def test_data_that_cannot_be_completed_are_refused(tmp_path, pair, tokenizer):
    """Hours of training on prompts that do not exist, or a failure in the middle of them."""
    with pytest.raises(ValueError, match="no row of the train dataset has a prompt"):
        build(tmp_path, pair, tokenizer, Dataset.from_dict({"text": ["the lazy dog"]}), lmbda=1.0)
    rows = alignment_rows(pair[1], tokenizer, count=2)
    with pytest.raises(ValueError, match=r"but the models read \d+ at most"):
        build(tmp_path, pair, tokenizer, rows, lmbda=1.0, max_new_tokens=100_000)
    with pytest.raises(ValueError, match="`target_model` is None"):
        build(tmp_path, (pair[0], None), tokenizer, rows, seq_kd=True, divergence="cross_entropy")


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_chat_learned_from_as_a_whole_says_how_to_learn_from_answers(tmp_path, pair, column):
    """Sent to look for chats where the data are chats."""
    keys = {"messages": ("role", "content"), "conversations": ("from", "value")}[column]
    turns = [dict(zip(keys, turn, strict=True)) for turn in (("user", "Hi"), ("assistant", "Hello"))]
    chats = Dataset.from_list([{column: turns}] * 4)
    with pytest.raises(ValueError, match="Set `assistant_only_loss=True`"):
        build(tmp_path, pair, tiny_tokenizer(), chats, lmbda=1.0)
    build(tmp_path, pair, tiny_tokenizer(), chats, lmbda=1.0, assistant_only_loss=True)


# Two processes -------------------------------------------------------------------------------------------------------


def train(out, world):
    """One run, in one process or in two, on the same rows."""
    tokenizer = tiny_tokenizer()
    draft, target = tiny_pair("llama")
    trainer = build(
        Path(out), (draft, target), tokenizer, alignment_rows(target, tokenizer, count=8),
        per_device_train_batch_size=4 // world, max_steps=5, optim="sgd", learning_rate=0.1, use_cpu=True,
        lmbda=0.5, seq_kd=True, **GREEDY,
    )  # fmt: skip
    assert trainer.accelerator.num_processes == world
    trainer.train()
    trainer.save_model()


def test_two_processes_write_what_one_does(tmp_path):
    """Processes of which one waits for the target while the other draws from the draft; rows written twice."""
    train(tmp_path / "1", 1)
    in_two_processes(tmp_path, __name__, "train", tmp_path / "2", 2)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("1", "2"))
    assert_same(one, two, atol=2e-5)
