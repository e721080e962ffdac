"""Our trainer and TRL's, built on the same models, rows and training arguments.

Every builder takes rows with `prompt`, `prompt_ids` and `completion_ids`, and gives its trainer the columns it reads.
The training arguments are equal for all; what a trainer would choose by itself (mixed precision, recomputing
activations, its learning rate) is set, so that only the trainers differ.
"""

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import Trainer, TrainerCallback

# Equal for every trainer. Recomputing activations would slow all of them down.
COMMON: dict[str, Any] = {
    "gradient_checkpointing": False,
    "bf16": False,
    "lr_scheduler_type": "constant",
    "max_steps": 10**6,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def ours(draft: Any, target: Any, tokenizer: Any, rows: Dataset, args: dict, callback: Any, **own: Any) -> Trainer:
    """`DraftDistillTrainer`; `own` are values of `DraftDistillConfig`. Without a target: from cached distributions."""
    from hf_draftkd import DraftDistillConfig, DraftDistillTrainer

    return DraftDistillTrainer(
        model=draft,
        target_model=target,
        args=DraftDistillConfig(**COMMON | {"max_length": None} | args | own),
        train_dataset=rows.remove_columns([name for name in ("prompt", "completion") if name in rows.column_names]),
        processing_class=tokenizer,
        callbacks=[callback],
    )


def sft(draft: Any, target: Any, tokenizer: Any, rows: Dataset, args: dict, callback: Any) -> Trainer:
    """`trl.SFTTrainer`: the draft alone, on the completions' tokens."""
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=draft,
        args=SFTConfig(**COMMON | {"max_length": None} | args),
        train_dataset=_whole(rows, with_labels=True),
        processing_class=tokenizer,
        callbacks=[callback],
    )


def gkd(
    draft: Any, target: Any, tokenizer: Any, rows: Dataset, args: dict, callback: Any, *, new_tokens: int, **own: Any
) -> Trainer:
    """`trl`'s `GKDTrainer`: logits of whole sequences; `own` are values of `GKDConfig`."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    generation = {"max_new_tokens": new_tokens, "temperature": 1.0}
    return GKDTrainer(
        model=draft,
        teacher_model=target,
        args=GKDConfig(**COMMON | {"max_length": 2**20, "beta": 0.0} | generation | args | own),
        train_dataset=_whole(rows, with_labels=False),
        processing_class=tokenizer,
        callbacks=[callback],
    )


def distillation(
    draft: Any,
    target: Any,
    tokenizer: Any,
    rows: Dataset,
    args: dict,
    callback: Any,
    *,
    new_tokens: int,
    given_text: bool = False,
    **own: Any,
) -> Trainer:
    """`trl.DistillationTrainer`: the draft writes every text; `own` are values of `DistillationConfig`.

    With `given_text` its generation is replaced by the rows' completions: a mode it does not have, which shows what its
    loss alone costs.
    """
    from trl import DistillationConfig, DistillationTrainer

    class GivenText(DistillationTrainer):
        def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
            return [completions[tuple(ids)] for ids in prompt_ids]

    completions = {tuple(row["prompt_ids"]): row["completion_ids"] for row in rows} if given_text else {}
    trainer = GivenText if given_text else DistillationTrainer
    return trainer(
        model=draft,
        teacher_model=target,
        args=DistillationConfig(**COMMON | {"beta": 0.0, "max_completion_length": new_tokens} | args | own),
        train_dataset=rows.select_columns(["prompt"]),
        processing_class=tokenizer,
        callbacks=[callback],
    )


def _whole(rows: Dataset, *, with_labels: bool) -> Dataset:
    """`input_ids`, with `labels` for SFTTrainer, or with `prompt` and `completion_mask` for GKDTrainer."""
    made: dict[str, list[Any]] = {"input_ids": [], "labels" if with_labels else "completion_mask": []}
    for prompt, completion in zip(rows["prompt_ids"], rows["completion_ids"], strict=True):
        made["input_ids"].append(prompt + completion)
        if with_labels:
            made["labels"].append([-100] * len(prompt) + completion)
        else:
            made["completion_mask"].append([0] * len(prompt) + [1] * len(completion))
    if not with_labels:
        # Only its presence counts where the ids are given.
        made["prompt"] = [""] * len(rows)
    return Dataset.from_dict(made)


BUILDERS: dict[str, Callable[..., Trainer]] = {"ours": ours, "sft": sft, "gkd": gkd, "distillation": distillation}


class StepClock(TrainerCallback):
    """Takes the time at the end of every step, and ends training after `num_steps`."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        import time

        self.ends.append(time.perf_counter())
        control.should_training_stop = len(self.ends) >= self.num_steps
