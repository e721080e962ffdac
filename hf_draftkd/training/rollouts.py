"""Who writes the completions that a draft learns from: the data, the target, the draft, or draft and target together.

Before each optimizer step one writer is drawn for all its rows: the draft with probability `lmbda`. The rows of the
whole accumulation window, on every process, are then written in one go, by the weights as they are before that step:
so a step does not depend on how it was cut into batches, and the draft is never a mixture of before and after. The
choice follows from `args.seed` and the number of the step, so a resumed run makes it again.

`examples/guides/papers.md` says which settings are SeqKD, ImitKD, f-Distill, GKD, DistillSpec and SKD. Text that the
target wrote once and keeps (`generate_alignment_data`) costs its seconds once; `seq_kd` costs them in every epoch. What
the papers do besides: SeqKD takes beam search, ImitKD lowers its share of data while it trains. Here text is greedy or
sampled and shares stay as they are; gradients stop at the text, as in GKD.

Only prompts are taken from the data: all that stands before a row's last answer. Rows without a prompt, such as plain
text that was mixed in, stay as they are, and so does the text that `evaluate()` reads.
"""

import random
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase
from trl.distributed import DistributedBackend
from trl.models import unwrap_model_for_generation

from hf_draftkd.data.backends import LENGTH, cut_completion
from hf_draftkd.data.columns import column_values, is_transformed
from hf_draftkd.decoding.setting import UNFILTERED, DecodingSetting, end_token_ids
from hf_draftkd.decoding.texts import left_padded
from hf_draftkd.models.forward import evaluating, seeded, unwrapped
from hf_draftkd.models.tokenizers import pad_id
from hf_draftkd.training.config import DraftDistillConfig
from hf_draftkd.training.correcting import CorrectedByTarget

DATA, TARGET, DRAFT = "data", "target", "draft"
# What is counted between two log entries, in this order.
_COUNTED = ("rows", "by_draft", "completions", "tokens", "cut", "seconds")


def who_writes(args: DraftDistillConfig, step: int) -> str:
    """Who writes the completions of an optimizer step (counted from 0): `data`, `target` or `draft`.

    The same on every process, and the same whenever the step is taken again.
    """
    otherwise = TARGET if args.seq_kd else DATA
    # `random()` lies in [0, 1): a share of 0 or 1 leaves nothing to chance.
    return DRAFT if random.Random(f"{args.seed}/{step}").random() < args.lmbda else otherwise


def last_prompt(labels: list[int]) -> int:
    """How many tokens stand before the last completion of a row (`labels` -100 where a token is not learned from).

    0 where there is none, as in plain text: it answers nothing, so it cannot be rewritten.
    """
    position = len(labels)
    while position and labels[position - 1] == -100:
        position -= 1
    while position and labels[position - 1] != -100:
        position -= 1
    return position


def check_writer(args: DraftDistillConfig, *, has_target: bool) -> None:
    """Refuse, before anything is loaded, completions written while training without a target to write or judge them."""
    if args.writes_completions and not has_target:
        raise ValueError(
            f"{_asked(args)} has completions written while training, which only the target can write or judge, but "
            "`target_model` is None. Give the target, or leave it out and learn from the text of the data."
        )


def check_writing(trainer: Any, context: int, columns: Collection[str]) -> None:
    """Refuse runs whose completions cannot be written: the data has no prompts (neither a stream nor what a
    transform makes is read ahead), or the models are sharded.

    `context` is the longest text that both models read, in tokens; `columns` are those of the rows as they were given.
    """
    args, dataset = trainer.args, trainer.train_dataset
    if (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled) and args.skd_top_k is not None:
        # In `generate`, a process whose texts have ended keeps calling the draft for the others, but not the
        # processors that call the target.
        raise ValueError(
            "`skd_top_k` needs the whole target on each process, but FSDP or DeepSpeed shard it, and processes would "
            "wait for each other forever. Train on one device or with DDP, or leave `skd_top_k` out."
        )
    if not (args.writes_completions and isinstance(dataset, Dataset)) or is_transformed(dataset):
        return
    longest = max(map(last_prompt, column_values(dataset, "labels")), default=0)
    if longest == 0:
        instead = "Give rows with `prompt` and `completion`, chats, or what `draftkd generate` writes."
        if not args.assistant_only_loss and "messages" in columns:
            instead = "Set `assistant_only_loss=True`: then the last answer of each chat is rewritten."
        raise ValueError(
            f"{_asked(args)} has completions written while training, but no row of the train dataset has a prompt to "
            f"complete: all its tokens are learned from. {instead}"
        )
    check_room(longest, args, context)


def _asked(args: DraftDistillConfig) -> str:
    return f"`lmbda={args.lmbda:g}`" if args.lmbda else "`seq_kd=True`"


def check_room(longest: int, args: DraftDistillConfig, context: int) -> None:
    """Raise a `ValueError` for a prompt of `longest` tokens if its completion would not fit."""
    if longest + args.max_new_tokens > context:
        raise ValueError(
            f"The longest prompt has {longest} tokens, and `max_new_tokens={args.max_new_tokens}` are to be written "
            f"after it, but the models read {context} at most. Lower `max_new_tokens`, or leave out such rows."
        )


class CompletionWriter:
    """Has the completions of batches written before they are learned from, by the draft or the prepared target.

    `vocab_size` tokens are shared by the two, `context` is the longest text that both read, in tokens, and `vocabulary`
    are the ids that the draft may propose, and so writes (None for all).
    """

    def __init__(
        self,
        args: DraftDistillConfig,
        *,
        target: torch.nn.Module,
        accelerator: Any,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        context: int,
        vocabulary: Tensor | None = None,
    ) -> None:
        self._args = args
        self._target = target
        self._accelerator = accelerator
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._context = context
        self._vocabulary = vocabulary
        self._counts = dict.fromkeys(_COUNTED, 0.0)

    def rewrite(
        self, batches: list[dict[str, Any]], step: int, draft: torch.nn.Module, collator: Any
    ) -> list[dict[str, Any]]:
        """The padded batches of one accumulation window, with new completions unless it is the data's turn.

        `step` counts the optimizer steps taken before; the draft may be wrapped; `collator` makes a batch of rows with
        `input_ids` and `labels`.
        """
        who = who_writes(self._args, step)
        num_rows = sum(len(batch["input_ids"]) for batch in batches)
        self._count(rows=num_rows, by_draft=num_rows * (who == DRAFT))
        if who == DATA:
            return batches
        began = time.perf_counter()
        examples = [example for batch in batches for example in _examples(batch)]
        asked = [(example, start) for example in examples if (start := last_prompt(example["labels"]))]
        prompts = [example["input_ids"][:start] for example, start in asked]
        # Data sets were checked before training; a stream shows its prompts only now.
        check_room(max(map(len, prompts), default=0), self._args, self._context)
        written: list[tuple[list[int], str]] = []
        # A process without prompts writes all the same: the others may hold parts of the model it runs.
        if prompts or self._accelerator.num_processes > 1:
            written = self._write(prompts or [examples[0]["input_ids"][:1]], who, step, draft)[: len(prompts)]
        for (example, start), (completion, _) in zip(asked, written, strict=True):
            # Earlier answers of a chat are context: neither draft nor target wrote them here.
            example["input_ids"] = example["input_ids"][:start] + completion
            example["labels"] = [-100] * start + completion
        remaining = iter(examples)
        batches = [collator([next(remaining) for _ in batch["input_ids"]]) for batch in batches]
        self._count(
            completions=len(written),
            tokens=sum(len(completion) for completion, _ in written),
            cut=sum(reason == LENGTH for _, reason in written),
            seconds=time.perf_counter() - began,
        )
        return batches

    def close_log_entry(self) -> dict[str, float]:
        """What all processes wrote since this was last called.

        `completions/draft_share` is of all rows, `completions/mean_length` in tokens, `completions/cut_share` the share
        of those that `max_new_tokens` ended, `completions/seconds` the mean over processes.
        """
        counts = torch.tensor(list(self._counts.values()), dtype=torch.float32, device=self._accelerator.device)
        rows, by_draft, completions, tokens, cut, seconds = self._accelerator.reduce(counts).tolist()
        self._counts = dict.fromkeys(_COUNTED, 0.0)
        entry = {"completions/draft_share": by_draft / rows} if rows else {}
        if completions:
            entry["completions/mean_length"] = tokens / completions
            entry["completions/cut_share"] = cut / completions
            # Processes write side by side.
            entry["completions/seconds"] = seconds / self._accelerator.num_processes
        return entry

    def _count(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self._counts[name] += amount

    def _write(self, prompts: list[list[int]], who: str, step: int, draft: Any) -> list[tuple[list[int], str]]:
        """New tokens of each prompt, and why they end."""
        args, setting, device = self._args, self._args.generation_setting, self._accelerator.device
        model: Any = draft if who == DRAFT else self._target
        top_k = args.skd_top_k if who == DRAFT else None
        config = self._generation_config(unwrapped(model), setting, is_draft=who == DRAFT, corrected=top_k is not None)
        inputs = left_padded(prompts, config.pad_token_id, device)
        # Another seed for each process, or all would draw the same numbers for different rows.
        seed = random.Random(f"{args.seed}/{step}/{self._accelerator.process_index}").getrandbits(63)
        corrects = self._target if top_k is not None else None
        with self._generating(model) as writes, self._generating(corrects) as target, torch.no_grad():
            processors = LogitsProcessorList()
            if top_k is not None:
                mask = inputs["attention_mask"]
                processors.append(CorrectedByTarget(target, setting, top_k, self._vocab_size, mask))
            with seeded(seed, device):
                output = writes.generate(**inputs, generation_config=config, logits_processor=processors)
        ends = end_token_ids(unwrapped(model))
        return [cut_completion(row, ends) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]

    def _generation_config(
        self, model: Any, setting: DecodingSetting, *, is_draft: bool, corrected: bool
    ) -> GenerationConfig:
        if corrected and not setting.is_greedy:
            # What has been corrected is a finished distribution, from which `generate` only has to draw.
            setting = UNFILTERED
        # Padded rows of the vocabulary stand for no token.
        tokens = range(self._vocab_size) if self._vocabulary is None or not is_draft else self._vocabulary.tolist()
        unwritten = set(range(model.config.get_text_config().vocab_size)) - set(tokens)
        suppressed = sorted({*(model.generation_config.suppress_tokens or []), *unwritten})
        return setting.generation_config(
            model,
            self._args.max_new_tokens,
            suppress_tokens=suppressed or None,
            # Masked before a prompt, and cut off behind a completion.
            pad_token_id=pad_id(model, self._tokenizer.pad_token_id, self._tokenizer.eos_token_id),
        )

    @contextmanager
    def _generating(self, model: Any) -> Iterator[Any]:
        """The model as `generate` can run it: whole or sharded, without dropout and activation checkpointing."""
        if model is None:
            yield None
            return
        checkpointing = {"gradient_checkpointing_kwargs": self._args.gradient_checkpointing_kwargs}
        with (
            evaluating(model),
            unwrap_model_for_generation(model, self._accelerator, **checkpointing) as inner,
            DistributedBackend(self._accelerator).summon_full_params(model, recurse=False),
        ):
            yield inner


def _examples(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a padded batch as they went into the collator."""
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True):
        yield {"input_ids": ids[mask].tolist(), "labels": labels[mask].tolist()}
