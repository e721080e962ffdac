"""Real decoding in several ways, in turns for each query so that none has the quieter machine."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lab import Lab
from transformers import PreTrainedModel

from hf_draftkd import SpeculativeDecoding
from hf_draftkd.acceptance import AcceptanceCounts

QUERIES = 150


@dataclass(frozen=True)
class Way:
    """How an answer comes about: a model, and how it is decoded; plainly where `decoding` is None."""

    model: PreTrainedModel
    decoding: SpeculativeDecoding | None = None


def decode(
    lab: Lab, ways: Mapping[str, Way], temperature: float, seed: int, *, judge: bool = False
) -> dict[str, dict[str, list[float]]]:
    """Way -> columns by query: `tokens`, `calls` of the model, `seconds`; with `judge` also `valid` and `right`, 1
    where the answer is a JSON call, and where it names the right function.
    """
    from demo_pair.queries import parse_call

    rows = lab.questions("test").select(range(min(QUERIES, lab.sizes.test)))
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in ways}
    names = list(ways)
    for number in [0, *range(len(rows))]:  # the first calls of a process are slower: the first query twice
        inputs = lab.tokenizer.apply_chat_template(
            rows[number]["prompt"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        first = number % len(names)
        for name in names[first:] + names[:first]:
            way, extra = ways[name], {}
            if way.decoding is not None:
                way.decoding.counts = AcceptanceCounts()
                extra["custom_generate"] = way.decoding
            torch.manual_seed(seed * 100_000 + number)
            began = time.perf_counter()
            output = way.model.generate(
                **inputs,
                max_new_tokens=lab.sizes.answer_tokens,
                **(sampling if temperature else {"do_sample": False}),
                **extra,
            )
            seconds = time.perf_counter() - began
            ids = output[0, inputs["input_ids"].shape[1] :].tolist()
            measured = {
                "tokens": len(ids),
                "calls": len(ids) if way.decoding is None else way.decoding.counts.num_spec_steps,
                "seconds": round(seconds, 5),
            }
            if judge:
                call = parse_call(lab.tokenizer.decode(ids, skip_special_tokens=True))
                measured["valid"] = call is not None
                measured["right"] = call is not None and call[0] == rows[number]["function"]
            for key, value in measured.items():
                found[name].setdefault(key, []).append(float(value))
    return {name: {key: column[1:] for key, column in of.items()} for name, of in found.items()}


def decoded(results: Sequence[Mapping[str, Any]], setting: str, way: str, over: str, under: str | None) -> np.ndarray:
    """`[2, seeds, queries]` of stored decoding: a column over another, or over the number of queries."""
    tables = [result["decoded"][setting][way] for result in results]
    top = np.array([table[over] for table in tables])
    return np.stack([top, np.ones_like(top) if under is None else np.array([table[under] for table in tables])])
