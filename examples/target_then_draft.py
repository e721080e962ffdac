"""Chains: distil a smaller target from a larger one, then a draft from that smaller target (DistillSpec).

    python examples/target_then_draft.py --output_dir target_then_draft

(about nine minutes on two cores; started again with the same options, it does only what is left)

Speculative decoding makes a target faster and never worse. Where a little quality may be given up, the target itself
can be made smaller first: https://arxiv.org/abs/2310.08461 distils it from a larger one, then a draft from *it*, and
reports 6 to 10 times less latency. Here the large target is the demo target, the smaller one starts as some of its
layers, and both get the stock draft, and one distilled for them:

    large ──► its layers, distilled: small ──► stock draft, distilled from small
      └─────► stock draft, distilled from large

Every way answers held-out queries, in turn for each query, so that none has the quieter machine. A draft does not
change what its target says (how many answers are the same is counted), so quality belongs to the target and
latency to the way.

Prints latency and quality of each way, with 95% intervals over queries, and the seconds that making the models took;
writes `target_then_draft.json`.
"""

import argparse
import time
from pathlib import Path

import torch
from demo_pair.queries import parse_call
from shared import cell, claim, read_seconds, write_json
from transformers.utils import logging

from hf_draftkd import (
    DraftDistillConfig,
    DraftDistillTrainer,
    build_draft,
    count_acceptance,
    generate_alignment_data,
    load_draft,
    load_target,
)
from hf_draftkd.acceptance import bootstrap_paired_ratio_quotient, bootstrap_ratio
from hf_draftkd.data.prompts import load_prompts
from hf_draftkd.data.rows import render_prompts
from hf_draftkd.evaluation.assisted import fixed_draft_length
from hf_draftkd.models.demo import demo_path
from hf_draftkd.models.loading import load_tokenizer

# How each answer comes about: its target, and the draft that helps, if one does.
WAYS = {
    "large": ("large", None),
    "large + stock draft": ("large", "stock"),
    "large + draft distilled from it": ("large", "draft_of_large"),
    "small": ("small", None),
    "small + stock draft": ("small", "stock"),
    "small + draft distilled from it": ("small", "draft_of_small"),
}


class Chain:
    """The models of the chain, each made once and kept in the run's folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, options.output_dir
        self.tokenizer = load_tokenizer(demo_path("target"))
        self.large = load_target(demo_path("target"), dtype="float32")
        self.stock = load_draft(demo_path("draft"), dtype="float32")

    def answers(self, target, name):
        """What `target` writes to the training queries: greedily, as it is asked below, and once sampled."""
        return generate_alignment_data(
            target,
            self.tokenizer,
            load_prompts(demo_path("train.jsonl"), limit=self.options.prompts),
            temperatures=(0.0, 1.0),
            max_new_tokens=self.options.max_new_tokens,
            batch_size=32,
            output_dir=self.folder / f"answers_of_{name}",
        )

    def distilled(self, name, start, target, target_name, num_epochs, learning_rate):
        """`start` distilled from `target`, in evaluation mode; or what an earlier call left."""
        folder, made = self.folder / name, self.folder / f"{name}.json"
        if not made.exists():
            began = time.perf_counter()
            rows = self.answers(target, target_name)
            args = DraftDistillConfig(
                output_dir=str(self.folder / f"training_{name}"),
                num_train_epochs=num_epochs,
                per_device_train_batch_size=self.options.batch_size,
                learning_rate=learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=0.05,
                save_strategy="no",
                logging_steps=20,
                report_to=[],
                seed=self.options.seed,
            )
            trainer = DraftDistillTrainer(
                model=start, target_model=target, args=args, train_dataset=rows, processing_class=self.tokenizer
            )
            trainer.train()
            trainer.save_model(str(folder))
            write_json(made, {"seconds": time.perf_counter() - began})  # last: without it, the model is made again
        return load_target(str(folder), dtype="float32")

    def models(self):
        """Every model of `WAYS` by its name."""
        options = self.options
        short = build_draft(self.large, num_layers=options.layers, tokenizer=self.tokenizer)
        small = self.distilled("small", short, self.large, "large", options.target_epochs, options.target_learning_rate)
        found = {"large": self.large, "stock": self.stock, "small": small}
        for name, target in (("large", self.large), ("small", small)):
            start = load_draft(demo_path("draft"), dtype="float32")
            found[f"draft_of_{name}"] = self.distilled(
                f"draft_of_{name}", start, target, name, options.draft_epochs, options.draft_learning_rate
            )
        return found


@torch.inference_mode()
def decode(models, prompts, options):
    """Every way on every prompt, in turn: ids, seconds and target calls by way."""
    found = {way: {"answers": [], "seconds": [], "calls": [], "same_as_alone": []} for way in WAYS}
    # A first call sets up what later ones find ready.
    for prompt in [prompts[0], *prompts]:
        ids = torch.tensor([prompt])
        request = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": options.max_new_tokens}
        by_target = {}
        for way, (target_name, draft_name) in WAYS.items():
            target = models[target_name]
            with count_acceptance(target) as counts:
                start = time.perf_counter()
                if draft_name is None:
                    output = target.generate(**request, do_sample=False)
                else:
                    draft = models[draft_name]
                    with fixed_draft_length(draft, options.num_assistant_tokens):
                        output = target.generate(**request, do_sample=False, assistant_model=draft)
                seconds = time.perf_counter() - start
            answer = output[0, ids.shape[1] :].tolist()
            found[way]["same_as_alone"].append(by_target.setdefault(target_name, answer) == answer)
            found[way]["answers"].append(answer)
            found[way]["seconds"].append(seconds)
            found[way]["calls"].append(len(answer) if draft_name is None else counts.num_spec_steps)
    return {way: {name: column[1:] for name, column in of.items()} for way, of in found.items()}


def quality(answers, wanted, rows, tokenizer):
    """Shares of answers, with intervals: valid calls, calls of the function asked for, the large target's very words.

    `same_tokens` is a share of tokens: how far an answer goes with the large target's before it leaves it.
    """
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    calls, ones = [parse_call(text) for text in texts], [1] * len(texts)
    common = [
        next((place for place, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]),
             min(len(ours), len(theirs)))
        for ours, theirs in zip(answers, wanted, strict=True)
    ]  # fmt: skip
    right = [call is not None and call[0] == name for call, name in zip(calls, rows["function"], strict=True)]
    shares = {
        "valid": ([call is not None for call in calls], ones),
        "right_function": (right, ones),
        "same_answer": ([ours == theirs for ours, theirs in zip(answers, wanted, strict=True)], ones),
        "same_tokens": (common, [len(ids) for ids in wanted]),
    }
    return {
        name: bootstrap_ratio([float(count) for count in counts], of).to_dict() for name, (counts, of) in shares.items()
    }


def measured(found, rows, tokenizer, models):
    """Each way's latency, and the quality of its target."""
    plain, ones = found["large"], [1] * len(rows)
    result = {}
    for way, (target_name, _) in WAYS.items():
        of = found[way]
        tokens = [len(ids) for ids in of["answers"]]
        result[way] = {
            "target_parameters": models[target_name].num_parameters(),
            "seconds_an_answer": bootstrap_ratio(of["seconds"], ones).to_dict(),
            "tokens_per_target_call": bootstrap_ratio(tokens, of["calls"]).to_dict(),
            # Whole answers, as a user waits for them; a smaller target's may be longer or shorter.
            "times_faster": bootstrap_paired_ratio_quotient(ones, of["seconds"], ones, plain["seconds"]).to_dict(),
            # Rounding may decide between two tokens that are equally likely; anything more would be a fault.
            "same_as_target_alone": sum(of["same_as_alone"]),
            **quality(of["answers"], plain["answers"], rows, tokenizer),
        }
    return result


def table(result, seconds, num_queries):
    names = ("seconds_an_answer", "times_faster", "tokens_per_target_call", "valid", "right_function", "same_tokens")
    lines = [
        f"| way | {' | '.join(name.replace('_', ' ') for name in names)} |",
        f"|---|{'---|' * len(names)}",
        *(
            f"| {way} | {' | '.join(cell(of[name], 3 if name == names[0] else 2) for name in names)} |"
            for way, of in result.items()
        ),
        "",
        "Answers that a draft left as they were, of "
        + f"{num_queries} each: {', '.join(str(of['same_as_target_alone']) for of in result.values())}.",
        "Making them took, the target's answers included where they were not there yet: "
        + ", ".join(f"{name.replace('_', ' ')} {took:.0f} s" for name, took in seconds.items())
        + ".",
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("target_then_draft"))
    parser.add_argument("--prompts", type=int, default=320, help="training queries, each answered twice")
    parser.add_argument("--queries", type=int, default=48, help="held-out queries that everything is measured on")
    parser.add_argument("--max_new_tokens", type=int, default=112)
    parser.add_argument("--num_assistant_tokens", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4, help="of the large target's, which the small one starts as")
    parser.add_argument("--target_epochs", type=float, default=3)
    parser.add_argument("--draft_epochs", type=float, default=4)
    parser.add_argument("--target_learning_rate", type=float, default=1e-3)
    parser.add_argument("--draft_learning_rate", type=float, default=2e-3)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    settings = claim(options.output_dir, options)
    # transformers' assisted decoding warns of how it calls the draft.
    logging.set_verbosity_error()
    chain = Chain(options)
    models = chain.models()
    rows = load_prompts(demo_path("test.jsonl"), limit=options.queries)
    found = decode(models, render_prompts(rows, chain.tokenizer), options)
    result = measured(found, rows, chain.tokenizer, models)
    seconds = {
        name: read_seconds(options.output_dir / f"{name}.json")
        for name in ("small", "draft_of_large", "draft_of_small")
    }
    print(table(result, seconds, len(rows)))
    write_json(
        options.output_dir / "target_then_draft.json", {"settings": settings, "ways": result, "seconds": seconds}
    )


if __name__ == "__main__":
    main()
