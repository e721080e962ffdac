"""What exact evaluation saves: one pass over existing text, against counting `generate(assistant_model=...)`.

    python examples/benchmarks/exact_vs_counted.py [--num_texts 64] [--temperature 1.0] [--num_assistant_tokens 5]

Both measure tokens per target call of the demo pair (or of `--target_model` and `--model`) in one run. The target first
writes the text that both rest on. Exact evaluation then takes one pass of each model over it. Counting decodes the same
prompts with the draft, again and again with other random numbers, until its 95% interval is as narrow, or until
`--max_seconds` are over; in that case the time it would have needed follows from the width so far, which shrinks with
the root of the number of texts.
"""

import argparse
import time

import torch

from hf_draftkd.acceptance import DRAFT_LENGTHS, Estimate, bootstrap_ratio
from hf_draftkd.data.generation import generate_alignment_data
from hf_draftkd.data.prompts import load_prompts
from hf_draftkd.data.targets import ids_without_token
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.evaluation.assisted import count_acceptance, fixed_draft_length
from hf_draftkd.evaluation.scoring import AS_TRANSFORMERS, Text, score_texts
from hf_draftkd.evaluation.timing import generate_text, single_text_config
from hf_draftkd.models.demo import demo_path
from hf_draftkd.models.loading import load_draft, load_target, load_tokenizer
from hf_draftkd.models.pairing import align_vocabulary, shared_vocab_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target_model", help="the demo pair's by default")
    parser.add_argument("--model", help="the demo pair's stock draft by default")
    parser.add_argument("--dataset", help="prompts; the demo pair's test queries by default")
    parser.add_argument("--num_texts", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--num_assistant_tokens", type=int, default=5, choices=DRAFT_LENGTHS, metavar="LENGTH")
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_seconds", type=float, default=300.0)
    options = parser.parse_args()
    if options.num_texts < 2:
        parser.error(f"--num_texts must be 2 or more, since one text has no interval, got {options.num_texts}.")

    target_path = options.target_model or demo_path("target")
    tokenizer = load_tokenizer(target_path)
    target = load_target(target_path, dtype=torch.float32)
    draft = load_draft(options.model or demo_path("draft"), dtype=torch.float32)
    align_vocabulary(draft, target, tokenizer)
    setting = DecodingSetting(options.temperature)
    prompts = load_prompts(options.dataset or demo_path("test.jsonl"), limit=options.num_texts)
    rows = generate_alignment_data(
        target,
        tokenizer,
        prompts,
        max_new_tokens=options.max_new_tokens,
        temperatures=(options.temperature,),
        batch_size=options.batch_size,
    )
    texts = [Text(row["prompt_ids"], row["completion_ids"]) for row in rows]

    def exact() -> Estimate:
        scored = score_texts(
            target,
            [draft],
            texts,
            setting,
            vocab_size=shared_vocab_size(draft, target, tokenizer),
            batch_size=options.batch_size,
        ).drafts[0]
        # What `generate` does is counted below, so its way of warping the draft is computed here.
        sums = scored.get(AS_TRANSFORMERS) or next(iter(scored.values()))
        calls = sums.target_calls[:, DRAFT_LENGTHS.index(options.num_assistant_tokens)]
        return bootstrap_ratio(sums.num_tokens, calls)

    exact()  # warm-up
    started = time.perf_counter()
    computed = exact()
    exact_seconds = time.perf_counter() - started

    config = single_text_config(
        target, setting, options.max_new_tokens, suppress_tokens=ids_without_token(target, tokenizer)
    )
    counted, per_text, seconds = None, [], 0.0
    while seconds < options.max_seconds and not (counted and _width(counted) <= _width(computed)):
        for text in texts:
            with fixed_draft_length(draft, options.num_assistant_tokens), count_acceptance(target) as counts:
                _, elapsed = generate_text(target, text.prompt_ids, config, seed=len(per_text), assistant_model=draft)
            seconds += elapsed
            per_text.append((counts.num_tokens, counts.num_spec_steps))
        if setting.is_greedy:
            break  # decoding again would give the same text: both intervals are equal already
        counted = bootstrap_ratio(*zip(*per_text, strict=True))
    counted = bootstrap_ratio(*zip(*per_text, strict=True))
    is_as_narrow = _width(counted) <= _width(computed)
    needed = seconds if is_as_narrow else seconds * (_width(counted) / _width(computed)) ** 2

    print(f"tokens per target call at γ = {options.num_assistant_tokens}, temperature {options.temperature:g}")
    print(f"exact    {_show(computed)}  {len(texts)} existing texts, {exact_seconds:.2f} s (all 16 draft lengths)")
    print(f"counted  {_show(counted)}  {len(per_text)} decoded texts, {seconds:.1f} s (this draft length)")
    if needed > seconds * 1.001:
        print(f"         for an interval as narrow: {needed:.1f} s (extrapolated)")
    print(f"exact evaluation is {needed / exact_seconds:.0f} times as fast")


def _width(estimate: Estimate) -> float:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.high - estimate.low


def _show(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


if __name__ == "__main__":
    main()
