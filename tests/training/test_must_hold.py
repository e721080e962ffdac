"""What has to hold however a run is set up: over processes, special tokens, chats, and a batch that goes wrong."""

import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file

from hf_draftkd.training.callbacks import PLOT
from hf_draftkd.training.checkpoints import last_complete_checkpoint
from tests.processes import in_two_processes
from tests.tiny import CHAT_TEMPLATE, tiny_pair, tiny_tokenizer
from tests.training.rows import alignment_rows
from tests.training.trainers import assert_same, build, weights

RUNS = ("all", "after_first_rejection", "stream")

# Over processes ------------------------------------------------------------------------------------------------------


def train_twice(out, world):
    """On the same data in one process or in several; the first writes what came of it."""
    out, tokenizer = Path(out), tiny_tokenizer()
    target = tiny_pair("llama")[1]
    rows = alignment_rows(target, tokenizer, count=8)
    # An odd number, so that the last batch of two processes repeats a row.
    sampled = alignment_rows(target, tokenizer, count=3, temperature=1.0)
    held_out = concatenate_datasets([rows.select(range(4)), sampled])
    for name in RUNS:
        selection, data = name, rows
        if name == "stream":
            # Seven rows in three parts: by part, one process would have five and the other two.
            selection, data = "all", rows.select(range(7)).to_iterable_dataset(3).shuffle(seed=0, buffer_size=2)
        # Evaluated, saved and drawn alike, whatever was learned.
        is_watched = name == "all"
        watched = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 2}
        draft, target = tiny_pair("llama")
        before = {key: value.clone() for key, value in target.state_dict().items()}
        trainer = build(
            out / name,
            (draft, target),
            tokenizer,
            data,
            held_out if is_watched else None,
            per_device_train_batch_size=4 // world,
            gradient_accumulation_steps=2,
            max_steps=3,
            optim="sgd",
            learning_rate=0.1,
            token_selection=selection,
            plot=True,
            **watched if is_watched else {},
        )
        assert trainer.accelerator.num_processes == world
        trainer.train()
        assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())
        if trainer.is_world_process_zero():
            assert (out / name / PLOT).is_file() == is_watched
            trainer.state.save_to_json(str(out / f"{name}.json"))
            torch.save(draft.state_dict(), out / f"{name}.pt")
        else:
            assert "matplotlib.figure" not in sys.modules, "only one process may write the plot"


def test_two_processes_take_the_steps_of_one(tmp_path):
    """Losses normalised per process, rows counted twice, metrics of one process alone, a plot drawn by both; two that
    take themselves for the only one without `use_cpu`; a checkpoint named while another process still writes into it; a
    stream read part by part, of which one process has more and waits for the other forever.
    """
    train_twice(tmp_path / "1", 1)
    in_two_processes(tmp_path, __name__, "train_twice", tmp_path / "2", 2)
    saved = tmp_path / "2" / "all"
    assert last_complete_checkpoint(saved) == (str(saved / "checkpoint-3"), [])
    assert all((saved / "checkpoint-2" / f"rng_state_{rank}.pth").is_file() for rank in range(2))
    for name in RUNS:
        one, two = (torch.load(tmp_path / world / f"{name}.pt") for world in "12")
        assert_same(one, two, atol=2e-5)
        logs = [json.loads((tmp_path / world / f"{name}.json").read_text())["log_history"] for world in "12"]
        assert [len(log) for log in logs] == [5 if name == "all" else 4] * 2
        for left, right in zip(*logs, strict=True):
            for key, value in left.items():
                # A stream is filled up with rows that are read, though nothing is learned from them.
                if key.startswith(("loss", "acceptance", "num_tokens", "eval_loss", "eval_acc", "eval_block")) and (
                    name != "stream" or key != "num_tokens"
                ):
                    assert right[key] == pytest.approx(value, rel=1e-4), key
        if name == "all":
            assert {"eval_block_efficiency_t0", "eval_block_efficiency_at_3_t1"} <= logs[0][3].keys()


# Special tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [[5, 6], None], ids=["a list", "none"])
def test_several_ends_of_a_text_or_none(tmp_path, pair, tokenizer, ends):
    """`eos_token_id` may be a list, or None: read as one number, or filled in from the tokenizer."""
    draft, target = pair
    rows = alignment_rows(target, tokenizer, count=4)
    target.generation_config.eos_token_id = ends
    trainer = build(tmp_path, pair, tokenizer, rows, rows)
    trainer.train()
    assert draft.generation_config.eos_token_id == ends
    assert trainer.evaluate()["eval_block_efficiency"] >= 1
    ids = torch.tensor([rows[0]["prompt_ids"]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "pad_token_id": 2}
    plain = target.generate(ids, **options)
    assert torch.equal(target.generate(ids, assistant_model=draft, **options), plain)


# Chats ---------------------------------------------------------------------------------------------------------------

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "More"},
    {"role": "assistant", "content": "Yes"},
]
WITHOUT_MARKERS = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def learned(trainer, tokenizer) -> list[str]:
    return [tokenizer.decode([token]) for token in trainer.train_dataset[0]["labels"] if token != -100]


def test_every_answer_of_a_chat_is_learned_and_nothing_else(tmp_path, pair):
    """Only the last turn, the user's words, or an answer without its end."""
    tokenizer = tiny_tokenizer()
    trainer = build(tmp_path, pair, tokenizer, Dataset.from_list([{"messages": CHAT}] * 4), assistant_only_loss=True)
    assert "".join(learned(trainer, tokenizer)) == "Hello</s>Yes</s>"
    trainer.train()


def test_without_markers_the_whole_chat_is_learned_or_the_markers_are_asked_for(tmp_path, pair):
    """A template that cannot tell the answers: all tokens masked, and a run that learns nothing without a word."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = WITHOUT_MARKERS
    rows = Dataset.from_list([{"messages": CHAT}] * 4)
    assert "Hi</s>" in "".join(learned(build(tmp_path, pair, tokenizer, rows), tokenizer))
    with pytest.raises(ValueError, match="generation %"):
        build(tmp_path, pair, tokenizer, rows, assistant_only_loss=True)
    # The prompt of a prompt-completion chat is known without markers.
    rows = Dataset.from_list([{"prompt": CHAT[:3], "completion": CHAT[3:]}] * 4)
    assert "".join(learned(build(tmp_path, pair, tokenizer, rows), tokenizer)) == "Yes</s>"


def test_a_chat_that_is_cut_before_its_first_answer_is_refused(tmp_path, pair):
    rows = Dataset.from_list([{"messages": CHAT}] * 4)
    with pytest.raises(ValueError, match="Nothing is left to learn from in the train dataset"):
        build(tmp_path, pair, tiny_tokenizer(), rows, assistant_only_loss=True, max_length=6)


# Number formats and recomputation ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The draft's weights are bfloat16")
def test_recomputed_activations_and_bf16_do_not_change_what_is_learned(tmp_path, tokenizer):
    """Positions chosen in front of the head that recomputation chooses again, or a loss summed in bf16."""
    rows = alignment_rows(tiny_pair("llama")[1], tokenizer, count=8)
    losses = {}
    for name, options in (
        ("plain", {}),
        ("recomputed", {"activation_checkpointing": True}),
        ("autocast", {"bf16": True, "use_cpu": True}),
        ("weights", {}),
    ):
        pair = [model.bfloat16() if name == "weights" else model for model in tiny_pair("llama")]
        trainer = build(tmp_path / name, pair, tokenizer, rows, optim="sgd", learning_rate=0.05, **options)
        trainer.train()
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses["recomputed"] == pytest.approx(losses["plain"], rel=1e-5)
    # bf16 keeps eight bits: two to three digits.
    assert losses["autocast"] == pytest.approx(losses["plain"], rel=0.02)
    assert losses["weights"] == pytest.approx(losses["plain"], rel=0.05)


# A batch that goes wrong ---------------------------------------------------------------------------------------------


def test_one_bad_batch_stops_the_run_before_it_harms_anything(tmp_path, tokenizer):
    """NaN from one row: later checkpoints without a number in them, or the good ones rotated away."""
    draft, target = tiny_pair("llama")
    rows = alignment_rows(target, tokenizer, count=6)
    seen = {token for row in rows for token in row["prompt_ids"] + row["completion_ids"]}
    bad = min(set(range(20, 300)) - seen)
    rows = Dataset.from_list([*rows, {**rows[0], "prompt_ids": [0, bad]}])
    with torch.no_grad():
        target.get_input_embeddings().weight[bad] = float("nan")
    options = {"per_device_train_batch_size": 1, "max_steps": 7, "save_strategy": "steps", "save_steps": 1}
    trainer = build(tmp_path, (draft, target), tokenizer, rows, save_total_limit=1, seed=1, **options)
    name = tokenizer.decode([0, bad])
    with pytest.raises(FloatingPointError) as stopped:
        trainer.train()
    step = trainer.state.global_step
    assert step > 0, "the bad row came first: choose another seed"
    assert f"optimizer step {step + 1}" in str(stopped.value)
    assert name in str(stopped.value)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    kept = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
    now = weights(trainer.model)
    assert all(torch.equal(value, now[key]) and value.isfinite().all() for key, value in kept.items())
