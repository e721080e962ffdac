"""A server whose traffic changes halfway: a draft that learns from it, beside the same draft frozen.

    python examples/online_serving.py --output_dir online_serving

(about five minutes on two cores; started again with the same options, it resumes where it was killed)

The demo target serves function-calling queries and then, from one request to the next, documentation to be continued.
Every request is decoded twice, with a draft that an `OnlineDraftDistiller` trains and with one that stays as it is;
equal texts are counted (rounding may decide between two tokens that are equally likely). The first server's time
includes learning, measuring each update before it is kept, and saving the state.

Prints a table by window of requests and one by domain; writes `online_serving.json`, and `online_serving.png` if
matplotlib is installed.
"""

import argparse
import copy
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from alignment_data import docstrings
from datasets import Dataset
from shared import cell, claim, write_json
from transformers.utils import logging

from hf_draftkd import OnlineDistillConfig, OnlineDraftDistiller, count_acceptance, load_draft, load_target
from hf_draftkd.acceptance import bootstrap_paired_ratio_difference, bootstrap_ratio
from hf_draftkd.data.curation import curate_prompts
from hf_draftkd.data.prompts import load_prompts
from hf_draftkd.data.rows import render_prompts
from hf_draftkd.models.demo import demo_path
from hf_draftkd.models.draft_length import draft_length_settings, store_draft_settings
from hf_draftkd.models.loading import load_tokenizer

DOMAINS = ("function calls", "documentation")


@dataclass
class Traffic:
    """What one server did, by request."""

    tokens: list[int] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)

    def add(self, tokens, calls, seconds):
        self.tokens.append(tokens)
        self.calls.append(calls)
        self.seconds.append(seconds)


def stream(tokenizer, requests):
    """Prompt ids of `requests` queries, and of as many openings of documentation after them."""
    queries = load_prompts(demo_path("test.jsonl"), limit=requests // 2)
    openings, _ = curate_prompts(docstrings(), tokenizer, opening_tokens=32)
    openings = openings.shuffle(seed=0).select(range(requests - len(queries)))
    parts = [Dataset.from_dict({"prompt": part["prompt"]}) for part in (queries, openings)]
    return [ids for part in parts for ids in render_prompts(part, tokenizer)], len(queries)


def serve(target, tokenizer, prompts, options):
    """Both servers, request by request, so that neither has the quieter machine."""
    # A fixed draft length: what changes is the draft alone.
    draft = load_draft(demo_path("draft"), dtype="float32")
    store_draft_settings(draft, draft_length_settings(options.num_assistant_tokens))
    frozen = copy.deepcopy(draft)
    distiller = OnlineDraftDistiller(
        draft,
        target,
        tokenizer,
        args=OnlineDistillConfig(
            update_every=options.update_every, learning_rate=options.learning_rate, seed=options.seed
        ),
    )
    # Saved by hand instead of by `output_dir`: the record of a request must be on disk before the state is, so that no
    # state ever includes a request without a record.
    state, records = str(options.output_dir / "state"), options.output_dir / "requests.json"
    online, still = Traffic(), Traffic()
    if distiller.resume(state):
        parts = json.loads(records.read_text(encoding="utf-8"))
        online, still = (
            Traffic(**{name: column[: distiller.num_requests] for name, column in part.items()}) for part in parts
        )
    for number in range(distiller.num_requests, len(prompts)):
        ids = torch.tensor([prompts[number]])
        request = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": options.max_new_tokens}
        with count_acceptance(target) as counts:
            start = time.perf_counter()
            wanted = target.generate(**request, assistant_model=frozen, do_sample=False)
            still.add(counts.num_tokens, counts.num_spec_steps, time.perf_counter() - start)
        before, start = distiller.counts, time.perf_counter()
        output = distiller.generate(**request, do_sample=False)
        seconds = time.perf_counter() - start
        made = distiller.counts
        online.add(made.num_tokens - before.num_tokens, made.num_spec_steps - before.num_spec_steps, seconds)
        online.same.append(torch.equal(output, wanted))
        if distiller.num_requests % options.update_every == 0 or distiller.num_requests == len(prompts):
            write_json(records, [asdict(online), asdict(still)])
            start = time.perf_counter()
            distiller.save(state)
            online.seconds[-1] += time.perf_counter() - start
            write_json(records, [asdict(online), asdict(still)])
    return online, still, distiller


def windows(online, still, history, size, change):
    """Tokens per target call in each window of `size` requests, and what the update at its end brought."""
    by_end = {entry["num_requests"]: entry for entry in history}
    rows = []
    for start in range(0, len(online.tokens), size):
        part = slice(start, start + size)
        end = min(start + size, len(online.tokens))
        row = {
            "requests": end,
            "domain": DOMAINS[start >= change],
            "frozen": sum(still.tokens[part]) / sum(still.calls[part]),
            "online": sum(online.tokens[part]) / sum(online.calls[part]),
        }
        entry = by_end.get(end, {})
        names = ("held_out_acceptance_rate_before", "held_out_acceptance_rate", "kept", "seconds")
        rows.append(row | {f"update_{name}": entry[name] for name in names if name in entry})
    return rows


def halves(online, still, change):
    """Each domain's metrics with intervals over requests, and the seconds of both servers."""
    metrics = {}
    for name, part in zip(DOMAINS, (slice(0, change), slice(change, None)), strict=True):
        columns = [column[part] for of in (online, still) for column in (of.tokens, of.calls)]
        metrics[name] = {
            "online": bootstrap_ratio(*columns[:2]).to_dict(),
            "frozen": bootstrap_ratio(*columns[2:]).to_dict(),
            "difference": bootstrap_paired_ratio_difference(*columns).to_dict(),
            "online_seconds": sum(online.seconds[part]),
            "frozen_seconds": sum(still.seconds[part]),
        }
    return metrics


def table(rows, metrics):
    lines = [
        "| requests | domain | frozen, tokens per target call | online | held-out acceptance, update before → after |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        update = ""
        if "update_held_out_acceptance_rate" in row:
            before, after = row["update_held_out_acceptance_rate_before"], row["update_held_out_acceptance_rate"]
            update = f"{before:.3f} → {after:.3f}{'' if row['update_kept'] else ', taken back'}"
        lines.append(f"| {row['requests']} | {row['domain']} | {row['frozen']:.2f} | {row['online']:.2f} | {update} |")
    lines += [
        "",
        "| domain | frozen [95%] | online [95%] | difference [95%] | seconds frozen | online, learning included |",
        "|---|---|---|---|---|---|",
    ]
    for name, of in metrics.items():
        cells = [cell(of[key]) for key in ("frozen", "online", "difference")]
        lines.append(f"| {name} | {' | '.join(cells)} | {of['frozen_seconds']:.1f} | {of['online_seconds']:.1f} |")
    return "\n".join(lines)


def plot(rows, change, path):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for name in ("online", "frozen"):
        axes.plot([row["requests"] for row in rows], [row[name] for row in rows], marker="o", label=f"{name} draft")
    axes.axvline(change, linestyle=":", color="grey")
    axes.set_xlabel("requests served")
    axes.set_ylabel("tokens per target call")
    axes.set_title(f"{DOMAINS[0]}, then {DOMAINS[1]}")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("online_serving"))
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--num_assistant_tokens", type=int, default=5)
    parser.add_argument("--update_every", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="a draft of 0.7M parameters takes a high one")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not 2 <= options.requests <= 400:
        parser.error(f"--requests must be 2 to 400, as many as both domains have, got {options.requests}.")
    settings = claim(options.output_dir, options)
    # transformers' assisted decoding warns of how it calls the draft.
    logging.set_verbosity_error()
    target, tokenizer = load_target(demo_path("target"), dtype="float32"), load_tokenizer(demo_path("target"))
    prompts, change = stream(tokenizer, options.requests)
    online, still, distiller = serve(target, tokenizer, prompts, options)

    rows = windows(online, still, distiller.history, options.update_every, change)
    metrics = halves(online, still, change)
    print(table(rows, metrics))
    print(f"\n{sum(online.same)} of {len(prompts)} texts are the same with both drafts.")
    print(f"{distiller.num_updates} of {len(distiller.history)} updates were kept.")
    result = {
        "settings": settings,
        "windows": rows,
        "domains": metrics,
        "same": sum(online.same),
        "history": list(distiller.history),
    }
    write_json(options.output_dir / "online_serving.json", result)
    plot(rows, change, options.output_dir / "online_serving.png")


if __name__ == "__main__":
    main()
