"""The whole trainer with sharded weights, in two real processes: FSDP2, and DeepSpeed where it is installed."""

import functools
import importlib.util
import json
import os
from types import SimpleNamespace

import pytest
import torch
from accelerate import state
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor

from hf_draftkd import DraftDistillTrainer, load_draft
from hf_draftkd.training.saving import check_saving, merged
from tests.processes import in_two_processes
from tests.tiny import tiny_pair, tiny_tokenizer
from tests.training.rows import alignment_rows
from tests.training.test_finite import AfterStep, NoGradient, ruin
from tests.training.trainers import build, weights

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    # Only the first process reads the weights.
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
ZERO = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
GATHERED = {"stage3_gather_16bit_weights_on_model_save": True}
SAVING = {"save_strategy": "steps", "save_steps": 1}
# What is trained -> options.
RUNS = {
    "whole": SAVING,
    "lora": {"lora": True, "save_strategy": "steps", "save_steps": 2},
    "the draft writes": {"lmbda": 1.0, "max_new_tokens": 6, "generation_temperature": 0.0},
}


def offer_fsdp_on_cpu() -> None:
    """FSDP is offered by accelerate to processes with an accelerator alone. What it does then works on CPUs as well."""
    original = state.PartialState.__init__

    def as_if_with_gpus(self, cpu=False, **options):
        original(self, cpu=True, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    state.PartialState.__init__ = as_if_with_gpus
    os.environ.update(FSDP)


@functools.cache
def written_rows():
    return alignment_rows(tiny_pair("llama")[1], tiny_tokenizer(), max_new_tokens=6)


def train(folder, out, world, *, lora=False, resume=None, **options):
    """Two steps of four rows, a plain draft at the end. Returns the losses."""
    trainer = build(
        out,
        (str(folder / "draft"), str(folder / "target")),
        tiny_tokenizer(),
        written_rows(),
        peft=LoraConfig(target_modules="all-linear", lora_dropout=0.0) if lora else None,
        per_device_train_batch_size=4 // world,
        learning_rate=0.01,
        max_steps=2,
        use_cpu=True,
        **options,
    )
    assert trainer.accelerator.num_processes == world
    if "ACCELERATE_USE_FSDP" in os.environ:
        assert trainer.is_fsdp_enabled
        kinds = {isinstance(parameter, DTensor) for parameter in trainer.target_model.parameters()}
        assert kinds == {trainer.args.shard_target}
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(out))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def stop_alike(folder, out, **options):
    """A share of one process holds an infinity, or its rows have no gradient: none may save, or continue alone."""
    second = torch.distributed.get_rank() == 1
    NoGradient.processes = (1,)
    stops = [(DraftDistillTrainer, AfterStep(1, ruin if second else weights), "Nothing is saved")]
    if "deepspeed" not in options:
        stops.append((NoGradient, AfterStep(1, weights), "gradient is not finite in optimizer step 3"))
    pair = (str(folder / "draft"), str(folder / "target"))
    for kind, callback, message in stops:
        options |= {"use_cpu": True, "trainer_class": kind} | (SAVING if kind is DraftDistillTrainer else {})
        trainer = build(out / kind.__name__, pair, tiny_tokenizer(), written_rows(), callbacks=[callback], **options)
        with pytest.raises(FloatingPointError, match=message):
            trainer.train()


def train_sharded(folder, kind, options):
    if kind == "fsdp":
        offer_fsdp_on_cpu()
    losses = {}
    for name, more in RUNS.items():
        if (kind, name) == ("fsdp", "lora"):
            more = more | {"shard_target": False}
        losses[name] = train(folder, folder / kind / name, 2, **more, **options)
    checkpoint = str(folder / kind / "whole" / "checkpoint-1")
    losses["resumed"] = train(folder, folder / kind / "resumed", 2, resume=checkpoint, **options)
    stop_alike(folder, folder / kind / "stopped", **options)
    assert torch.distributed.get_world_size() == 2
    if torch.distributed.get_rank() == 0:
        (folder / f"{kind}.json").write_text(json.dumps(losses))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The pair on disk, and what one process makes of it with the same batches."""
    folder = tmp_path_factory.mktemp("pair")
    for name, model in zip(("draft", "target"), tiny_pair("llama"), strict=True):
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder, {name: train(folder, folder / "alone" / name, 1, **more) for name, more in RUNS.items()}


def launch(folder, kind, options, **environment):
    in_two_processes(folder, __name__, "train_sharded", folder, kind, options, **environment)
    return json.loads((folder / f"{kind}.json").read_text())


def compare(alone, kind, found, tolerance):
    """Same losses, and plain drafts on disk with the same weights: of shards, of a resumed run, of merged adapters."""
    folder, expected = alone
    for name, losses in found.items():
        reference = name if name in expected else "whole"
        begin = 1 if name == "resumed" else 0
        assert losses[-len(expected[reference][begin:]) :] == pytest.approx(expected[reference][begin:], abs=tolerance)
        draft, other = (load_draft(str(folder / where)) for where in (f"{kind}/{name}", f"alone/{reference}"))
        for (key, value), wanted in zip(draft.state_dict().items(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(
                value, wanted, atol=tolerance, rtol=0, msg=lambda m, k=key, n=name: f"{n} {k}: {m}"
            )


def test_fsdp(alone):
    compare(alone, "fsdp", launch(alone[0], "fsdp", {}), 1e-5)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(alone, stage):
    config = ZERO | {"zero_optimization": {"stage": stage} | (GATHERED if stage == 3 else {})}
    found = launch(alone[0], f"zero{stage}", {"deepspeed": config}, DS_ACCELERATOR="cpu")
    compare(alone, f"zero{stage}", found, 1e-3)


# Saving --------------------------------------------------------------------------------------------------------------


def test_an_adapter_is_merged_from_gathered_weights():
    """Where the model holds only a share of them, merging what it holds would save a torso."""
    tied = tiny_pair("llama", tie_word_embeddings=True)[0]
    draft = get_peft_model(tied, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    gathered = {name: value.clone() for name, value in draft.state_dict().items()}
    expected = merged(draft).state_dict()
    for parameter in draft.parameters():
        parameter.data = torch.empty(0)
    plain = merged(draft, gathered)
    assert plain.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("kind", ["fsdp", "zero"])
def test_weights_that_would_stay_sharded_are_refused(kind):
    """Training would go to its end, and then shards alone would be written, or nothing at all."""

    def trainer(whole):
        settings = SimpleNamespace(is_true=lambda name: name.endswith("on_model_save") and whole)
        plugins = {
            "fsdp_plugin": SimpleNamespace(state_dict_type="FULL_STATE_DICT" if whole else "SHARDED_STATE_DICT"),
            "deepspeed_plugin": SimpleNamespace(zero_stage=3, hf_ds_config=settings),
        }
        accelerator = SimpleNamespace(state=SimpleNamespace(**plugins))
        kinds = {"is_fsdp_enabled": kind == "fsdp", "is_deepspeed_enabled": kind == "zero"}
        return SimpleNamespace(accelerator=accelerator, **kinds)

    check_saving(trainer(whole=True))
    with pytest.raises(ValueError, match="its weights stay sharded under"):
        check_saving(trainer(whole=False))
