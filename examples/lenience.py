"""Lossy decoding on the demo pair: what accepting more than the target would buys in time, and costs in the task.

    python examples/lenience.py [--model DRAFT] [--strengths 0.7 0.4 0.1] [--prompts 100] [--output_dir lenience]

Every query is answered by the target alone, by the draft alone, losslessly with the draft, and with each form of
lenience (linear, square, exponential: DistillSpec, https://arxiv.org/abs/2310.08461; the ensemble weight of
transformers) at each strength, all in turn, at temperature 1. An answer is right where it is the reference call.
Queries are written down in groups of ten; the same command resumes behind the last group. Intervals (95%) resample
queries; differences are paired, lossy minus lossless.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from demo_pair.evaluation import call_figures, read_rows
from shared import cell, claim, write_json
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_draftkd import SpeculativeDecoding, load_draft, load_target, load_tokenizer
from hf_draftkd.acceptance import (
    LENIENCE_FORMS,
    AcceptanceCounts,
    bootstrap_paired_ratio_difference,
    bootstrap_paired_ratio_quotient,
    bootstrap_ratio,
)
from hf_draftkd.models.demo import demo_path

TARGET, DRAFT, LOSSLESS = "target alone", "draft alone", "lossless"
GROUP = 10  # queries a file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=demo_path("draft"), help="the draft; the demo pair's stock draft by default")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.7, 0.4, 0.1], help="ε, or the weight w")
    parser.add_argument("--num_assistant_tokens", type=int, default=4)
    parser.add_argument("--max_new_tokens", type=int, default=112)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("lenience"))
    options = parser.parse_args()
    claim(options.output_dir, argparse.Namespace(**vars(options), threads=torch.get_num_threads()))

    tokenizer = load_tokenizer(demo_path("target"))
    target = load_target(demo_path("target"), dtype="float32")
    draft = load_draft(options.model, dtype="float32")
    gamma = options.num_assistant_tokens
    ways: dict[str, tuple[PreTrainedModel, SpeculativeDecoding | None]] = {
        TARGET: (target, None),
        DRAFT: (draft, None),
        LOSSLESS: (target, SpeculativeDecoding(draft, gamma)),
    }
    for form in LENIENCE_FORMS:
        for strength in options.strengths:
            decoding = SpeculativeDecoding(draft, gamma, lenience=strength, lenience_form=form)
            ways[f"{form} {strength:g}"] = (target, decoding)

    rows = read_rows(demo_path("test.jsonl"))[: options.prompts]
    answers: list[dict[str, dict[str, float]]] = []
    is_warm = False
    for start in range(0, len(rows), GROUP):
        path = options.output_dir / f"queries-{start:04d}.json"
        if not path.exists():
            if not is_warm:  # the first calls of a process are slower
                answer_in_every_way(ways, tokenizer, rows[start], start, options)
                is_warm = True
            group = [
                answer_in_every_way(ways, tokenizer, row, number, options)
                for number, row in enumerate(rows[start : start + GROUP], start)
            ]
            write_json(path, group)
        answers += json.loads(path.read_text(encoding="utf-8"))
    print(table(answers))


def answer_in_every_way(
    ways: dict[str, tuple[PreTrainedModel, SpeculativeDecoding | None]],
    tokenizer: PreTrainedTokenizerBase,
    row: dict[str, Any],
    number: int,
    options: argparse.Namespace,
) -> dict[str, dict[str, float]]:
    """Tokens, target calls, seconds and what is right (0 or 1) of one query, by way; each time another comes first."""
    inputs = tokenizer.apply_chat_template(
        row["prompt"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    prompt_length = inputs["input_ids"].shape[1]
    names, found = list(ways), {}
    first = number % len(names)
    for name in names[first:] + names[:first]:
        model, decoding = ways[name]
        extra = {}
        if decoding is not None:
            decoding.counts = AcceptanceCounts()
            extra["custom_generate"] = decoding
        torch.manual_seed(options.seed * 100_000 + number)
        started = time.perf_counter()
        output = model.generate(
            **inputs, max_new_tokens=options.max_new_tokens, do_sample=True, temperature=1.0, top_k=0, **extra
        )
        seconds = time.perf_counter() - started
        ids = output[0, prompt_length:].tolist()
        figures = call_figures(tokenizer, [row], [([], ids)])
        found[name] = {
            "tokens": len(ids),
            "calls": len(ids) if decoding is None else decoding.counts.num_spec_steps,
            "seconds": seconds,
            **{kind: figures[kind] for kind in ("valid_json", "right_function", "exact_call")},
        }
    return found


def table(answers: list[dict[str, dict[str, float]]]) -> str:
    """One row for each way of decoding."""

    def column(name: str, kind: str) -> list[float]:
        return [answer[name][kind] for answer in answers]

    ones = [1.0] * len(answers)
    lines = [
        f"{len(answers)} queries at temperature 1",
        "| decoding | tokens per target call | times the plain speed | exact call | exact call, minus lossless | "
        "right function | valid JSON |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in answers[0]:
        tokens, seconds = column(name, "tokens"), column(name, "seconds")
        speed = bootstrap_paired_ratio_quotient(tokens, seconds, column(TARGET, "tokens"), column(TARGET, "seconds"))
        exact = column(name, "exact_call")
        difference = bootstrap_paired_ratio_difference(exact, ones, column(LOSSLESS, "exact_call"), ones)
        cells = [
            name,
            "" if name in (TARGET, DRAFT) else cell(bootstrap_ratio(tokens, column(name, "calls")).to_dict()),
            "1" if name == TARGET else cell(speed.to_dict()),
            cell(bootstrap_ratio(exact, ones).to_dict()),
            "" if name == LOSSLESS else cell(difference.to_dict()),
            *(f"{sum(column(name, kind)) / len(answers):.2f}" for kind in ("right_function", "valid_json")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
