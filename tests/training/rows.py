"""Data for trainer tests: rows as the target would have left them, and the loss written from its definition."""

import torch
from datasets import Dataset

from tests.tiny import tiny_prompts


def alignment_rows(target, tokenizer, *, count=8, max_new_tokens=12, temperature=0.0, name=None):
    """Rows of design.md's format, written by `target` with plain `generate`."""
    rows = []
    for prompt in tiny_prompts(tokenizer, count):
        torch.manual_seed(len(rows))
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        output = target.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens, **sampling
        )
        completion = output[0, prompt.shape[1] :].tolist()
        rows.append(
            {
                "prompt": tokenizer.decode(prompt[0]),
                "completion": tokenizer.decode(completion, skip_special_tokens=True),
                "prompt_ids": prompt[0].tolist(),
                "completion_ids": completion,
                "ids_source": "generated",
                "scenario": "queries",
                "target": name if name is not None else target.config._name_or_path,
                "target_revision": None,
                "temperature": temperature,
                "top_p": 1.0,
                "top_k": 0,
                "repetition_penalty": 1.0,
                "seed": 0,
                "finish_reason": "length",
            }
        )
    return Dataset.from_list(rows)


def reference_forward_kl(draft, target, rows) -> float:
    """Mean over all completion tokens of Σ_v p log(p / q), one row at a time, in float64."""
    total, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        with torch.no_grad():
            q = torch.softmax(draft(ids).logits[0].double(), -1)
            p = torch.softmax(target(ids).logits[0].double(), -1)
        for t in range(len(row["prompt_ids"]), ids.shape[1]):
            total += float((p[t - 1] * (p[t - 1] / q[t - 1]).log()).sum())
            tokens += 1
    return total / tokens
