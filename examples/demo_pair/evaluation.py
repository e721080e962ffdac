"""Figures for the pair's card: held-out loss, how good the target's calls are, how far the stock draft agrees."""

import json
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from demo_pair.pretraining import held_out_loss
from demo_pair.queries import parse_call

MAX_NEW_TOKENS = 112

Row = dict[str, object]


def text_figures(model: LlamaForCausalLM, stream: np.ndarray, num_bytes: int) -> dict[str, float]:
    """Held-out loss in nats per token and, free of the tokenizer, in bits per byte."""
    nats = held_out_loss(model, stream)
    return {
        "nats_per_token": round(nats, 4),
        "bits_per_byte": round(nats / math.log(2) * len(stream) / num_bytes, 4),
    }


@torch.no_grad()
def answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], batch_size: int = 50
) -> list[tuple[list[int], list[int]]]:
    """Each row's prompt ids and the ids of the greedy answer, its end token included."""
    model.eval()
    prompts = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        for row in rows
    ]
    written = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        inputs = tokenizer.pad({"input_ids": part}, padding_side="left", return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        for prompt, ids in zip(part, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            stop = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
            written.append((prompt, ids[:stop]))
    return written


def call_figures(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], written: Sequence[tuple[list[int], list[int]]]
) -> dict[str, float]:
    """Shares of answers that are JSON of the right shape, name the right function, and equal the reference."""
    valid = right = exact = 0
    for row, (_, ids) in zip(rows, written, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        call = parse_call(text)
        valid += call is not None
        right += call is not None and call[0] == row["function"]
        exact += text == row["reference"]
    lengths = [len(ids) for _, ids in written]
    return {
        "queries": len(rows),
        "valid_json": round(valid / len(rows), 4),
        "right_function": round(right / len(rows), 4),
        "exact_call": round(exact / len(rows), 4),
        "mean_answer_tokens": round(sum(lengths) / len(lengths), 1),
    }


@torch.no_grad()
def answer_logits(model: LlamaForCausalLM, prompt: list[int], answer: list[int]) -> Tensor:
    """Logits [T, V] that predict the T tokens of `answer` after `prompt`, in float32."""
    logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].float()


def acceptance_rate(
    target: LlamaForCausalLM, draft: LlamaForCausalLM, written: Sequence[tuple[list[int], list[int]]]
) -> float:
    """Mean over answer tokens of sum_v min(p_v, q_v): how likely the target is to accept a token the draft samples."""
    total, count = 0.0, 0
    for prompt, answer in written:
        p = answer_logits(target, prompt, answer).softmax(-1)
        q = answer_logits(draft, prompt, answer).softmax(-1)
        total += float(torch.minimum(p, q).sum())
        count += len(answer)
    return round(total / count, 4)


def read_rows(path: str) -> list[Row]:
    """The lines of a JSONL file."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
