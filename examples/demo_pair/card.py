"""The pair's card, written from its provenance, so that no number in it is typed by hand.

What a person has to say about a run is in `provenance.json` too: `notes` on how it went, `limits` of its target.
"""

import textwrap
from typing import Any

from demo_pair.copying import NAME_WEIGHT

_CARD = """---
license: apache-2.0
language: [en]
library_name: transformers
pipeline_tag: text-generation
tags: [speculative-decoding, draft-model]
---

# The demo pair

A target and a stock draft small enough to travel with the package: the situation of draft distillation in miniature.
The **target** ({target_parameters:,} parameters, {target_layers} layers) is a base model that was chat-tuned on a
domain, function calling. The **stock draft** ({draft_parameters:,} parameters, one layer,
{draft_share:.1%} of the target) was trained on the same general text as the base model and has never seen the domain.
Tokenizer and vocabulary are the same. It is for trying `hf_draftkd` and for its tests. It is no use as an assistant.

## How it was made

Everything comes from the standard library of Python {python}: no other data was used and no other model was asked.

    {command}

1. **Text.** Source files and the docstrings of functions written in C: {train_tokens:,} tokens. Left out: tests, IDLE,
   turtledemo, lib2to3, encodings, ensurepip, installed packages, and the held-out modules below.
2. **Tokenizer.** Byte-level BPE of {vocabulary} tokens, trained on that text; digits stand alone.
3. **Base model.** Llama architecture, {base_steps:,} steps, {base_tokens:,} tokens, {base_seconds:,.0f} s
   ({base_rate:,.0f} tokens/s). Muon for the layers' matrices, AdamW for the rest; warm-up, constant, linear decay.
4. **Target.** The base model, first taught to copy and to choose on random tokens ({copying_tokens:,} tokens,
   {copying_seconds:,.0f} s), then tuned on {conversations:,} conversations ({chat_tokens:,} tokens,
   {chat_seconds:,.0f} s) made by template from {train_functions:,} functions. In {disguise_share:.0%} of them the
   functions wear other names and parameters, so that names must be read from the prompt. The user's tokens carry loss
   too (weight {user_weight}), so the target can write queries when it is given `<|user|>`; the first token of a name,
   which is the choice, weighs {name_weight:g} times an answer's other tokens.
5. **Stock draft.** {draft_steps:,} steps, {draft_tokens:,} tokens of the same text, {draft_seconds:,.0f} s.

Hardware: {hardware}. Seeds, versions, settings and the weights' sha256 are in `provenance.json`. The run is
deterministic up to the order of floating-point sums, which depends on the number of threads.
{notes}
## Queries

`train.jsonl`, `dev.jsonl` and `test.jsonl` hold {rows} queries. A query asks, in words made from the first sentence of
a function's docstring, for that function to be called with given values, and lists three or four functions to choose
from: each with its docstring's first sentence and its signature. The answer is one line of JSON, always serialised in
the same way. Columns: `prompt` (one user message), `domain` (`function_calling`), `module` and `function` (the right
one), `reference` (the right answer).

The splits share no module, no function name and no opening sentence of a docstring. The modules of the development
split ({dev_modules}) and the test split ({test_modules}) are in no training text at all: neither tokenizer, base model,
target nor stock draft has seen them, except where other modules use or mention them.

## Figures

Text of the held-out modules ({held_out_tokens:,} tokens, windows of 512 tokens):

| model | nats per token | bits per byte |
|---|---|---|
| base | {base_nats} | {base_bits} |
| target | {target_nats} | {target_bits} |
| stock draft | {draft_nats} | {draft_bits} |

The target's greedy answers:

| split | queries | valid JSON call | right function | call equals the reference | tokens per answer |
|---|---|---|---|---|---|
{call_rows}

The stock draft's acceptance rate (mean of the sum of min(p, q) over the answer's tokens, temperature 1) on the target's
greedy test answers: **{acceptance}**.

## Chat format

`<|user|>` text `<|end|>` `<|assistant|>` answer `<|end|>`, without line breaks, any number of turns, optionally opened
by `<|system|>` text `<|end|>`. `<|end|>` is the end-of-sequence token, `<|pad|>` pads, `<|endoftext|>` separates
documents in pretraining. The template marks what the assistant wrote, for `assistant_only_loss`.

The weights are stored in bfloat16; the figures are those of the stored weights, computed in float32
(`from_pretrained(..., dtype=torch.float32)`), which is also what a CPU is fastest with here.

## Limits

{limits}

## Licence

The weights are under Apache-2.0. They were trained on, and the queries quote, the source and documentation of Python's
standard library, copyright the Python Software Foundation, licensed under PSF-2.0.
"""

_LIMITS = """
The target knows one task in one wording family; outside it, it writes text that looks like Python. Arguments are drawn
by rule from a parameter's name and default: they are the right kind of thing, not always what the function would
accept. Answers contain much fixed JSON, as function calls do; acceptance on free text is lower.
"""


def render_card(provenance: dict[str, Any]) -> str:
    """The card's text."""
    figures, stages = provenance["figures"], provenance["stages"]
    calls = "\n".join(
        f"| {split} | {row['queries']} | {row['valid_json']:.1%} | {row['right_function']:.1%} | "
        f"{row['exact_call']:.1%} | {row['mean_answer_tokens']} |"
        for split, row in figures["calls"].items()
    )
    losses = {
        f"{name}_{short}": figures["held_out"][name][key]
        for name in ("base", "target", "draft")
        for short, key in (("nats", "nats_per_token"), ("bits", "bits_per_byte"))
    }
    warm_up, tuning = stages["target"]["warm_up"], stages["target"]["tuning"]
    notes = provenance.get("notes")
    return _CARD.format(
        notes=f"\n{textwrap.fill(f'How this run went: {notes}', 120)}\n" if notes else "",
        limits=textwrap.fill(f"{provenance.get('limits', '')}{_LIMITS}".strip(), 120),
        **losses,
        call_rows=calls,
        acceptance=figures["stock_acceptance_rate"],
        target_parameters=provenance["target"]["parameters"],
        target_layers=provenance["target"]["layers"],
        draft_parameters=provenance["draft"]["parameters"],
        draft_share=provenance["draft"]["parameters"] / provenance["target"]["parameters"],
        python=provenance["versions"]["python"],
        command=provenance["command"],
        hardware=provenance["hardware"],
        vocabulary=stages["corpus"]["vocabulary"],
        train_tokens=stages["corpus"]["train_tokens"],
        held_out_tokens=stages["corpus"]["held_out_tokens"],
        base_steps=stages["base"]["schedule"]["steps"],
        base_tokens=stages["base"]["tokens"],
        base_seconds=stages["base"]["seconds"],
        base_rate=stages["base"]["tokens"] / stages["base"]["seconds"],
        copying_tokens=warm_up["tokens"],
        copying_seconds=warm_up["seconds"],
        conversations=tuning["conversations"],
        chat_tokens=tuning["tokens"],
        chat_seconds=tuning["seconds"],
        user_weight=tuning["schedule"]["user_weight"],
        disguise_share=tuning["schedule"]["disguise_share"],
        name_weight=NAME_WEIGHT,
        train_functions=stages["corpus"]["functions"]["train"],
        draft_steps=stages["draft"]["schedule"]["steps"],
        draft_tokens=stages["draft"]["tokens"],
        draft_seconds=stages["draft"]["seconds"],
        rows=", ".join(f"{count:,} ({split})" for split, count in stages["corpus"]["queries"].items()),
        dev_modules=", ".join(f"`{name}`" for name in stages["corpus"]["dev_modules"]),
        test_modules=", ".join(f"`{name}`" for name in stages["corpus"]["test_modules"]),
    )
