"""NaN and Inf: stopped before they reach the weights or a file, with the cause named."""

import pytest
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_draftkd import DraftDistillTrainer
from hf_draftkd.training.finite import StopOnNonFiniteGradient, held_here
from tests.processes import in_two_processes
from tests.tiny import tiny_pair, tiny_tokenizer
from tests.training.rows import alignment_rows
from tests.training.trainers import assert_same, build, weights


class NoGradient(DraftDistillTrainer):
    """A loss that is finite, and from the third step on has a gradient that is not: the root of 0."""

    processes = (0, 1)

    def token_loss(self, draft_logits, target_logits):
        distance = (draft_logits.softmax(-1) - target_logits.softmax(-1)).pow(2).sum(-1)
        if self.state.global_step >= 2 and self.accelerator.process_index in self.processes:
            distance = distance - distance.detach()
        return distance.sqrt()


class AfterStep(TrainerCallback):
    """Does something to the draft when a step is done."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.act(model)


def ruin(model):
    held_here(list(model.parameters())[-1]).view(-1)[3] = float("inf")


SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 4}


# The gradient --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"max_grad_norm": 0.0}, {"gradient_accumulation_steps": 2}, {"peft": LoraConfig(target_modules="all-linear")}],
    ids=["clipped", "not clipped", "accumulated", "adapter"],
)
def test_a_gradient_that_is_not_finite_stops_before_the_weights(tmp_path, pair, tokenizer, options):
    """A checkpoint full of NaN in the good one's place, and a message that blames the batch after."""
    rows = alignment_rows(pair[1], tokenizer, count=6)
    kept = []
    trainer = build(
        tmp_path,
        pair,
        tokenizer,
        rows,
        trainer_class=NoGradient,
        callbacks=[AfterStep(2, lambda model: kept.append(weights(model)))],
        **SAVING | options,
    )
    with pytest.raises(
        FloatingPointError, match=r"gradient is not finite in optimizer step 3.*rows that begin with \['"
    ) as stop:
        trainer.train()
    batches = options.get("gradient_accumulation_steps", 1)
    assert str(stop.value).count("<s>") == 2 * batches, "all rows of the step, and no others"
    assert_same(weights(trainer.model), kept[0])
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    (saved,) = (tmp_path / "checkpoint-2").glob("*.safetensors")
    assert all(value.isfinite().all() for value in load_file(saved).values())


class Scaled(DraftDistillTrainer):
    """As in fp16: gradients are scaled, and steps whose gradients overflow are skipped."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = object()


@pytest.mark.parametrize(("kind", "stops"), [(DraftDistillTrainer, True), (Scaled, False)])
def test_steps_that_a_scaler_skips_are_left_to_it(tmp_path, pair, tokenizer, kind, stops):
    """fp16's scaler meets such gradients every few hundred steps: the run would end at the first."""
    callbacks = build(tmp_path, pair, tokenizer, trainer_class=kind).callback_handler.callbacks
    assert any(isinstance(callback, StopOnNonFiniteGradient) for callback in callbacks) == stops


def stop_alike(out):
    """Two processes, of which the second alone has the bad gradient."""
    NoGradient.processes = (1,)
    pair = tiny_pair("llama")
    rows = alignment_rows(pair[1], tiny_tokenizer(), count=8)
    trainer = build(out, pair, tiny_tokenizer(), rows, trainer_class=NoGradient, use_cpu=True, **SAVING)
    assert trainer.accelerator.num_processes == 2
    with pytest.raises(FloatingPointError, match=f"step 3.*Process {trainer.accelerator.process_index} "):
        trainer.train()
    assert all(value.isfinite().all() for value in pair[0].parameters())


def test_all_processes_stop_at_the_same_gradient(tmp_path):
    """One that continues waits for the others until the launcher gives up."""
    in_two_processes(tmp_path, __name__, "stop_alike", tmp_path / "out")
    assert (tmp_path / "out" / "checkpoint-2").is_dir()


# The weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peft", [None, LoraConfig(target_modules="all-linear")], ids=["whole", "adapter"])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, pair, tokenizer, peft):
    """The last step of a run: no further loss would have shown it."""
    rows = alignment_rows(pair[1], tokenizer, count=6)
    trainer = build(tmp_path, pair, tokenizer, rows, peft=peft, callbacks=[AfterStep(3, ruin)], **SAVING)
    with pytest.raises(FloatingPointError, match=r"Nothing is saved.*after optimizer step 3 \(.*weight\)"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    with pytest.raises(FloatingPointError, match="Nothing is saved"):
        trainer.save_model(str(tmp_path / "draft"))
    assert not (tmp_path / "draft").exists()


def test_a_run_does_not_end_well_with_weights_that_are_not_finite(tmp_path, pair, tokenizer):
    """An exploding learning rate without checkpoints: `train()` returned as if all were well."""
    trainer = build(tmp_path, pair, tokenizer, learning_rate=1e39, max_steps=1, lr_scheduler_type="constant")
    with pytest.raises(FloatingPointError, match=r"an update has ruined them.*Lower `learning_rate`"):
        trainer.train()


def test_a_batch_is_not_blamed_for_weights_that_an_update_ruined(tmp_path, pair, tokenizer):
    trainer = build(tmp_path, pair, tokenizer, learning_rate=1e39, lr_scheduler_type="constant")
    with pytest.raises(FloatingPointError, match=r"not to blame: the draft's weights .* after optimizer step 1"):
        trainer.train()


@pytest.mark.parametrize("whose", ["draft", "target"])
def test_evaluation_alone_speaks_of_no_step(tmp_path, pair, tokenizer, whose):
    """Nothing is trained, so no step failed and no update was held back."""
    rows = alignment_rows(pair[1], tokenizer, count=4)
    ruin(pair[whose == "target"])
    with pytest.raises(FloatingPointError, match=r"in evaluation after 0 optimizer steps.*rows begin with") as stop:
        build(tmp_path, pair, tokenizer, eval_rows=rows).evaluate()
    cause = {"draft": "came with weights that are not finite", "target": "its own or the target's"}[whose]
    assert cause in str(stop.value)
    assert "not updated" not in str(stop.value)
