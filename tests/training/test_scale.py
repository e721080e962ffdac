"""Several processes: checkpoints that resume in another number of them, weights sharded over them, targets prepared."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_draftkd.losses import distillation_loss
from hf_draftkd.models.forward import head_arithmetic, in_head, predicting_positions
from hf_draftkd.training import setup
from tests.losses.selected import in_chunks_of
from tests.processes import in_two_processes
from tests.tiny import tiny_pair, tiny_tokenizer
from tests.training.rows import alignment_rows
from tests.training.trainers import assert_same, build

# Over processes ------------------------------------------------------------------------------------------------------


def train_steps(out, world, *, resume=None, evaluates=False):
    """Four steps of four rows in any number of processes; a checkpoint after the second. Returns the trainer.

    `evaluates`: by another trainer and by this one, before the draft is trained.
    """
    tokenizer, pair = tiny_tokenizer(), tiny_pair("llama")
    if resume is not None:
        # What it knows afterwards can only come from the checkpoint.
        for parameter in pair[0].parameters():
            nn.init.zeros_(parameter)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 0.01}
    batches = {"per_device_train_batch_size": 4 // (2 * world), "gradient_accumulation_steps": 2, "use_cpu": True}
    # Three steps an epoch: the run stops within the first and resumes into the second.
    rows = alignment_rows(pair[1], tokenizer, count=12)
    if evaluates:
        build(out, pair, tokenizer, eval_rows=rows, use_cpu=True).evaluate()
    trainer = build(out, pair, tokenizer, rows, **options, **batches)
    if evaluates:
        trainer.evaluate(rows)
    assert trainer.accelerator.num_processes == world
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == 4
    return trainer


def compare_streamed(trainer):
    """Figures of a stream, as it is and in parts that are not of one size, beside those of the same rows."""
    tokenizer, (_, target) = tiny_tokenizer(), tiny_pair("llama")
    rows = alignment_rows(target, tokenizer, count=5)
    expected = trainer.evaluate(rows)
    for num_shards in (1, 3):
        found = trainer.evaluate(rows.to_iterable_dataset(num_shards))
        for name in ("eval_loss", "eval_acceptance_rate", "eval_block_efficiency"):
            assert found[name] == pytest.approx(expected[name], rel=1e-6), (name, num_shards)


def loss_and_gradients(draft, target_logits, ids, labels, arithmetic):
    """The chunked loss, computed where the model would have projected its hidden states."""
    keep = predicting_positions(labels)

    def compute(source):
        with in_chunks_of(3):
            return (distillation_loss(source, target_logits, ids[:, 1:][keep[:, :-1]]).loss,) * 2

    loss = in_head(draft, {"input_ids": ids}, keep, arithmetic, target_logits.shape[-1], compute)
    loss.backward()
    return loss.detach()


def compare_sharded():
    """The draft sharded layer by layer and as a whole, beside the same draft in one piece."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    rank = torch.distributed.get_rank()
    whole, target = tiny_pair("llama")
    sharded, _ = tiny_pair("llama")
    sharded.load_state_dict(whole.state_dict())
    arithmetic = head_arithmetic(sharded)
    assert arithmetic is not None
    # Every process has its own rows.
    ids = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = -100
    with torch.no_grad():
        logits = target(ids).logits
    parts = [
        loss_and_gradients(whole, logits[rows][predicting_positions(labels[rows])], ids[rows], labels[rows], arithmetic)
        for rows in (slice(0, 2), slice(2, 4))
    ]
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    mine = slice(2 * rank, 2 * rank + 2)
    keep = predicting_positions(labels[mine])
    loss = loss_and_gradients(sharded, logits[mine][keep], ids[mine], labels[mine], arithmetic)
    torch.testing.assert_close(loss, parts[rank])
    reference = dict(whole.named_parameters())
    for name, parameter in sharded.named_parameters():
        assert isinstance(parameter, DTensor), name
        assert isinstance(parameter.grad, DTensor), name
        # fully_shard averages over processes.
        torch.testing.assert_close(parameter.grad.full_tensor(), reference[name].grad / 2, atol=1e-6, rtol=1e-4)


def of_two_processes(out, checkpoint):
    for name, resume in (("straight", None), ("resumed", str(checkpoint))):
        # accelerate took a draft that was evaluated first for one in DDP: each process trained its own.
        trainer = train_steps(out / name, 2, resume=resume, evaluates=resume is None)
        if trainer.is_world_process_zero():
            torch.save(trainer.accelerator.unwrap_model(trainer.model).state_dict(), out / f"{name}.pt")
    assert torch.distributed.get_world_size() == 2
    compare_streamed(trainer)
    compare_sharded()


def test_runs_go_on_in_another_number_of_processes_and_sharded_drafts_learn_the_same(tmp_path):
    """Rows seen twice or left out after resuming, an optimiser that starts again, gradients lost on a sharded head;
    rows of a stream that are evaluated twice to fill the last batch, or processes that wait for another one's.
    """
    one = train_steps(tmp_path / "one", 1)
    in_two_processes(tmp_path, __name__, "of_two_processes", tmp_path, tmp_path / "one" / "checkpoint-2")
    expected = one.model.state_dict()
    two = Path(tmp_path / "straight" / "checkpoint-2")
    back = train_steps(tmp_path / "back", 1, resume=str(two))
    for found in (*(torch.load(tmp_path / f"{name}.pt") for name in ("straight", "resumed")), back.model.state_dict()):
        assert_same(expected, found, atol=1e-4)


# Targets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp_shards_the_target_as_it_does_the_draft(monkeypatch, version):
    """`prepare_model` leaves a model for evaluation whole, and under FSDP where it was loaded: on the CPU."""
    seen = []

    def fsdp1(model, accelerator):
        seen.append((1, accelerator))
        return model

    def fsdp2(accelerator, model):
        seen.append((2, accelerator))
        return model

    monkeypatch.setattr(setup, "prepare_fsdp", fsdp1)
    monkeypatch.setattr(setup, "fsdp2_prepare_model", fsdp2)
    accelerator = SimpleNamespace(is_fsdp2=version == 2)
    args = SimpleNamespace(shard_target=True)
    trainer = SimpleNamespace(is_deepspeed_enabled=False, is_fsdp_enabled=True, accelerator=accelerator, args=args)
    target = nn.Linear(2, 2).train()
    assert setup.place_target(target, trainer) is target
    assert seen == [(version, accelerator)]
    assert not target.training


def test_deepspeed_prepares_the_target_for_evaluation(monkeypatch):
    monkeypatch.setattr(setup, "prepare_deepspeed", lambda model, accelerator: (model, accelerator))
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3)))
    args = SimpleNamespace(shard_target=True)
    trainer = SimpleNamespace(is_deepspeed_enabled=True, is_fsdp_enabled=False, accelerator=accelerator, args=args)
    target = nn.Linear(2, 2)
    assert setup.place_target(target, trainer) == (target, accelerator)
    args.shard_target = False
    with pytest.raises(ValueError, match="ZeRO-3 shards every model as it is loaded"):
        setup.place_target(target, trainer)
