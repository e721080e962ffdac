"""Data for trainer tests: rows as the target would have left them, and the loss written from its definition."""

import copy

import torch
from datasets import Dataset

from hf_draftkd.models.identity import weights_fingerprint
from tests.tiny import tiny_prompts

_WRITTEN = {}


def alignment_rows(target, tokenizer, *, count=8, max_new_tokens=12, temperature=0.0, name=None):
    """Rows of design.md's format, written by `target` with plain `generate`; the same ones are made once."""
    written_by = weights_fingerprint(target), target.config._name_or_path, target.generation_config.to_json_string()
    key = (written_by, len(tokenizer), count, max_new_tokens, temperature, name)
    if key not in _WRITTEN:
        rows = Dataset.from_list(_written(target, tokenizer, count, max_new_tokens, temperature, name))
        _WRITTEN[key] = rows, torch.get_rng_state()
    rows, random_state = _WRITTEN[key]
    torch.set_rng_state(random_state)
    return copy.copy(rows)


def _written(target, tokenizer, count, max_new_tokens, temperature, name):
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
    return rows


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
