"""Trainers for tests: two models, a few rows, four steps."""

import torch

from hf_draftkd import AcceptanceCallback, DraftDistillConfig, DraftDistillTrainer
from tests.training.rows import alignment_rows


def config(path, **options) -> DraftDistillConfig:
    defaults = {
        "output_dir": str(path),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": 128,
        "logging_steps": 1,
    }
    return DraftDistillConfig(**defaults | options)


def build(
    path,
    pair,
    tokenizer,
    rows=None,
    eval_rows=None,
    *,
    trainer_class=DraftDistillTrainer,
    peft=None,
    reference_model=None,
    callbacks=None,
    formatting_func=None,
    mix_dataset=None,
    plot=False,
    **options,
):
    draft, target = pair
    if rows is None and eval_rows is None:
        rows = alignment_rows(target, tokenizer)
    trainer = trainer_class(
        model=draft,
        target_model=target,
        args=config(path, **options),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=peft,
        reference_model=reference_model,
        callbacks=callbacks,
        formatting_func=formatting_func,
        mix_dataset=mix_dataset,
    )
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, AcceptanceCallback):
            callback.plot = plot  # drawing takes longer than training here
    return trainer


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], atol: float = 0.0) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
