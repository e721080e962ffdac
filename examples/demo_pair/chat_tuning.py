"""Turns the base model into the target: function-calling conversations, with loss on both sides of them."""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from demo_pair.pretraining import autocast, optimizers, set_learning_rates, write_atomically
from demo_pair.queries import Query

SYSTEM_PROMPTS = ("You call Python functions.", "Answer with a function call in JSON.")

Encoded = tuple[list[int], list[int]]  # token ids, and 1 where the assistant wrote them


@dataclass(frozen=True)
class TuningPass:
    """One pass over conversations made for it: warm-up, then a linear decay to zero.

    The loss on the user's tokens is what lets the target write queries itself when given `<|user|>` alone. It weighs
    less than that on the answers, which are what the target is for.
    """

    conversations: int
    distractor_counts: tuple[int, ...]
    disguise_share: float
    warmup_steps: int = 20
    batch_size: int = 24
    user_weight: float = 0.2
    matrix_learning_rate: float = 0.01
    other_learning_rate: float = 0.002

    @property
    def steps(self) -> int:
        """Updates in the pass."""
        return self.conversations // self.batch_size

    def scale(self, step: int) -> float:
        """Factor on both learning rates at `step`."""
        return min((step + 1) / self.warmup_steps, (self.steps - step) / (self.steps - self.warmup_steps))


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


def encode(tokenizer: PreTrainedTokenizerFast, dialogues: Sequence[list[dict[str, str]]]) -> list[Encoded]:
    """Token ids and assistant masks, as the chat template's generation marks give them."""
    encoded = tokenizer.apply_chat_template(
        list(dialogues), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(zip(encoded["input_ids"], encoded["assistant_masks"], strict=True))


def batches(encoded: Sequence[Encoded], size: int, seed: int) -> list[list[Encoded]]:
    """Batches of conversations of like length, in random order, so that little is spent on padding."""
    rng = random.Random(seed)
    shuffled = rng.sample(encoded, len(encoded))
    grouped = []
    for start in range(0, len(shuffled), size * 16):
        block = sorted(shuffled[start : start + size * 16], key=lambda row: len(row[0]))
        grouped += [block[first : first + size] for first in range(0, len(block) - size + 1, size)]
    rng.shuffle(grouped)
    return grouped


def collate(rows: Sequence[Encoded], user_weight: float) -> tuple[Tensor, Tensor]:
    """Token ids and loss weights [B, T], padded on the right, where causal attention needs no mask."""
    length = max(len(ids) for ids, _ in rows)
    ids, weights = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length)
    for row, (tokens, written) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        weights[row, : len(tokens)] = torch.tensor([1.0 if mark else user_weight for mark in written])
    return ids, weights


def chat_tune(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    queries: Sequence[Query],
    schedule: TuningPass,
    directory: Path,
    *,
    seed: int,
    batch_seed: int,
) -> dict[str, Any]:
    """Tune `model` in place on conversations made of `queries`; return seconds and token counts."""
    directory.mkdir(parents=True, exist_ok=True)
    encoded = encode(tokenizer, conversations(queries, schedule.conversations, seed))
    pair = optimizers(model, weight_decay=0.01)
    model.train()
    tokens, began, running, answer_running = 0, time.perf_counter(), math.nan, math.nan
    for step, rows in enumerate(batches(encoded, schedule.batch_size, batch_seed)):
        ids, weights = collate(rows, schedule.user_weight)
        tokens += sum(len(row) for row, _ in rows)
        with autocast():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        weight = weights[:, 1:].flatten()
        loss = (losses * weight).sum() / weight.sum()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"The chat-tuning loss at step {step} is {loss.item()}.")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = schedule.scale(step)
        set_learning_rates(pair, scale * schedule.matrix_learning_rate, scale * schedule.other_learning_rate)
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        answer = losses.detach()[weight == 1].mean().item()
        running = loss.item() if math.isnan(running) else 0.9 * running + 0.1 * loss.item()
        answer_running = answer if math.isnan(answer_running) else 0.9 * answer_running + 0.1 * answer
        if (step + 1) % 10 == 0:
            elapsed = time.perf_counter() - began
            print(
                f"step {step + 1}/{schedule.steps} loss {running:.3f} answers {answer_running:.4f} {elapsed:.0f} s",
                flush=True,
            )
        if (step + 1) % 50 == 0:
            write_atomically(directory / "model.pt", model.state_dict())
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "conversations": schedule.steps * schedule.batch_size,
        "tokens": tokens,
        "schedule": asdict(schedule),
    }
