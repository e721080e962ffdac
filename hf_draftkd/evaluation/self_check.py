"""The measurement checked: computed block efficiency beside what real decoding counts, on the user's own pair."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_draftkd.acceptance import DRAFT_LENGTHS, Estimate, bootstrap_ratio
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.decoding.speculative import SpeculativeDecoding
from hf_draftkd.evaluation.assisted import count_acceptance, fixed_draft_length
from hf_draftkd.evaluation.parallel import lengths_of
from hf_draftkd.evaluation.recommendation import ASSISTANT_MODEL, PARALLEL, SPECULATIVE
from hf_draftkd.evaluation.report import Comparison, SelfCheck
from hf_draftkd.evaluation.scoring import AS_TRANSFORMERS, EXACT, Text, score_texts
from hf_draftkd.evaluation.timing import generate_text, single_text_config

CHECKED_LENGTHS = (1, 3, 5)
# Sampled numbers are compared over at least so many texts: an interval from a handful means nothing.
_SAMPLED_TEXTS = 32
# Several comparisons are made; at 95% one in a few runs would raise a false alarm.
_CONFIDENCE = 0.99


@torch.inference_mode()
def self_check(
    target_model: PreTrainedModel,
    draft_model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[DecodingSetting],
    *,
    ways: Sequence[str] = (ASSISTANT_MODEL, SPECULATIVE),
    vocab_size: int,
    max_new_tokens: int,
    suppress_tokens: list[int] | None = None,
    seed: int = 0,
    on_prompt: Callable[[], Any] = lambda: None,
) -> SelfCheck:
    """Write texts plainly, compute block efficiency from them, and count it again with real decoding in each way.

    Args:
        target_model: The target.
        draft_model: The draft.
        prompts: Token ids of the prompts to check on.
        settings: Greedy numbers must be equal to the last digit; sampled ones agree where their 99% intervals overlap.
            Few prompts are answered several times over when sampling.
        ways: Ways of decoding with the draft.
        vocab_size: Shared vocabulary of the pair.
        max_new_tokens: Longest completion, in tokens.
        suppress_tokens: Ids never to write.
        seed: Of sampling.
        on_prompt: Called after every prompt of every setting, way and draft length, however often it was answered.
    """
    comparisons = []
    for setting in settings:
        config = single_text_config(target_model, setting, max_new_tokens, suppress_tokens=suppress_tokens)
        repeats = 1 if setting.is_greedy else -(-_SAMPLED_TEXTS // len(prompts))
        runs = [prompt for prompt in prompts for _ in range(repeats)]
        texts = []
        for number, prompt in enumerate(runs):
            tokens, _ = generate_text(target_model, prompt, config, seed=seed + number)
            texts.append(Text(prompt, tokens))
        found = score_texts(target_model, [draft_model], texts, setting, vocab_size=vocab_size)
        sums, rule = found.drafts[0], EXACT if setting.is_greedy else "rejection_sampling"
        exact = sums[rule]
        # For transformers' own loop its warping of the draft is what is computed.
        computed: dict[str, Any] = {ASSISTANT_MODEL: sums.get(AS_TRANSFORMERS, exact), SPECULATIVE: exact}
        computed[PARALLEL] = found.parallel[0].get(rule)
        for way, length in product(ways, CHECKED_LENGTHS):
            if way == PARALLEL and length not in lengths_of(computed[PARALLEL].counts.shape[1]):
                continue
            options: dict[str, Any] = {"assistant_model": draft_model}
            if way != ASSISTANT_MODEL:
                options = {"custom_generate": SpeculativeDecoding(draft_model, length, parallel=way == PARALLEL)}
            per_text = []
            # Other random numbers than the plain texts had: two independent samples are compared.
            for number, prompt in enumerate(runs, start=len(runs)):
                with fixed_draft_length(draft_model, length), count_acceptance(target_model) as counts:
                    generate_text(target_model, prompt, config, seed=seed + number, **options)
                per_text.append((counts.num_tokens, counts.num_spec_steps))
                if (number + 1) % repeats == 0:
                    on_prompt()
            calls = computed[way].target_calls[:, DRAFT_LENGTHS.index(length)]
            expected = bootstrap_ratio(computed[way].num_tokens, calls, confidence=_CONFIDENCE)
            counted = bootstrap_ratio(*zip(*per_text, strict=True), confidence=_CONFIDENCE)
            comparisons.append(
                Comparison(
                    decoding=setting,
                    num_assistant_tokens=length,
                    way=way,
                    computed=expected,
                    counted=counted,
                    agree=_agree(expected, counted, is_greedy=setting.is_greedy),
                )
            )
    return SelfCheck(
        prompts=len(prompts), equal=all(comparison.agree for comparison in comparisons), comparisons=comparisons
    )


def _agree(computed: Estimate, counted: Estimate, *, is_greedy: bool) -> bool:
    if is_greedy:
        return computed.value == counted.value
    # At least 32 texts: there always is an interval.
    return computed.low <= counted.high and counted.low <= computed.high  # type: ignore[operator]
