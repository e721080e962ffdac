"""Turns the base model into the target: copying tasks first, then conversations, with loss on both sides of them."""

import math
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from demo_pair.copying import NAME_WEIGHT, CopyingTasks, Row, WarmUp
from demo_pair.pretraining import autocast
from demo_pair.queries import ANSWER_OPENING, Query

SYSTEM_PROMPTS = ("You call Python functions.", "Answer with a function call in JSON.")


@dataclass(frozen=True)
class TuningPass:
    """One pass over conversations made for it.

    The loss on the user's tokens is what lets the target write queries itself when given `<|user|>` alone. It weighs
    less than that on the answers, which are what the target is for.
    """

    conversations: int
    distractor_counts: tuple[int, ...]
    disguise_share: float
    warmup_steps: int = 20
    batch_size: int = 24
    user_weight: float = 0.2
    learning_rate: float = 5e-4

    @property
    def steps(self) -> int:
        """Updates in the pass."""
        return self.conversations // self.batch_size


def conversations(queries: Sequence[Query], count: int, seed: int) -> list[list[dict[str, str]]]:
    """`count` conversations of one query, some of two, some opened by a system turn."""
    rng = random.Random(seed)
    dialogues = []
    for place in range(count):
        messages = list(queries[place % len(queries)].messages())
        if rng.random() < 0.08:
            messages += rng.choice(queries).messages()
        if rng.random() < 0.08:
            messages.insert(0, {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        dialogues.append(messages)
    return dialogues


def encode(
    tokenizer: PreTrainedTokenizerFast, dialogues: Sequence[list[dict[str, str]]], user_weight: float
) -> list[Row]:
    """Token ids and their weights: what the assistant wrote is told by the chat template's generation marks."""
    encoded = tokenizer.apply_chat_template(
        list(dialogues), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    opening = len(tokenizer(ANSWER_OPENING, add_special_tokens=False)["input_ids"])
    rows = []
    for ids, written in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        weights = [1.0 if mark else user_weight for mark in written]
        for place, mark in enumerate(written):
            if mark and not written[place - 1]:
                weights[place + opening] = NAME_WEIGHT
        rows.append((ids, weights))
    return rows


def batches(encoded: Sequence[Row], size: int, seed: int) -> list[list[Row]]:
    """Batches of conversations of like length, in random order, so that little is spent on padding."""
    rng = random.Random(seed)
    shuffled = rng.sample(encoded, len(encoded))
    grouped = []
    for start in range(0, len(shuffled), size * 16):
        block = sorted(shuffled[start : start + size * 16], key=lambda row: len(row[0]))
        grouped += [block[first : first + size] for first in range(0, len(block) - size + 1, size)]
    rng.shuffle(grouped)
    return grouped


def collate(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Token ids and loss weights [B, T], padded on the right, where causal attention needs no mask."""
    length = max(len(ids) for ids, _ in rows)
    ids, weights = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length)
    for row, (tokens, weight) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        weights[row, : len(weight)] = torch.tensor(weight)
    return ids, weights


def tune(model: LlamaForCausalLM, steps: Iterable[list[Row]], schedule: WarmUp | TuningPass) -> dict[str, Any]:
    """Train `model` in place on the rows of each step: warm-up, then a linear decay to zero.

    The log gives the loss and the share of right predictions for the first token of a name.
    """
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    tokens, began = 0, time.perf_counter()
    seen: list[Tensor] = []  # weight, loss and hit of each predicted token since the last line of the log
    for step, rows in enumerate(steps):
        ids, weights = collate(rows)
        tokens += sum(len(row) for row, _ in rows)
        weighted = weights[:, 1:] > 0
        with autocast():
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            logits = model.lm_head(hidden[weighted])
        labels, weight = ids[:, 1:][weighted], weights[:, 1:][weighted]
        losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        loss = (losses * weight).sum() / weight.sum()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"The tuning loss at step {step} is {loss.item()}.")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = min((step + 1) / schedule.warmup_steps, (schedule.steps - step) / schedule.steps)
        for group in optimizer.param_groups:
            group["lr"] = scale * schedule.learning_rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen.append(torch.stack([weight, losses.detach(), (logits.argmax(-1) == labels).float()]))
        if (step + 1) % 10 == 0:
            weight, losses, hits = torch.cat(seen, dim=1)
            name = weight == NAME_WEIGHT
            print(
                f"step {step + 1}/{schedule.steps} loss {(losses * weight).sum() / weight.sum():.3f} "
                f"names {losses[name].mean():.3f}, {hits[name].mean():.1%} right "
                f"{time.perf_counter() - began:.0f} s",
                flush=True,
            )
            seen.clear()
    seconds = round(time.perf_counter() - began, 1)
    return {"seconds": seconds, "tokens": tokens, "schedule": asdict(schedule)}


def warm_up(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, schedule: WarmUp, *, seed: int
) -> dict[str, Any]:
    """Train `model` in place on copying tasks, at first with one distractor, then with up to three."""
    tasks = CopyingTasks(tokenizer, seed)
    steps = (tasks.batch(schedule, 1 if step < schedule.steps // 2 else 3) for step in range(schedule.steps))
    return tune(model, steps, schedule)


def chat_tune(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    queries: Sequence[Query],
    schedule: TuningPass,
    *,
    seed: int,
) -> dict[str, Any]:
    """Tune `model` in place on conversations made of `queries`."""
    rows = encode(tokenizer, conversations(queries, schedule.conversations, seed), schedule.user_weight)
    figures = tune(model, batches(rows, schedule.batch_size, seed), schedule)
    return {**figures, "conversations": schedule.steps * schedule.batch_size}
