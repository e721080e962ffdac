"""The measurement checked: computed block efficiency beside what real decoding counts, on the user's own pair."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_draftkd.acceptance import DRAFT_LENGTHS, bootstrap_ratio
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.evaluation.assisted import count_acceptance, fixed_draft_length
from hf_draftkd.evaluation.recommendation import ASSISTANT_MODEL, PARALLEL, SPECULATIVE
from hf_draftkd.evaluation.report import Comparison, SelfCheck
from hf_draftkd.evaluation.scoring import AS_TRANSFORMERS, EXACT, Text, in_one_pass, score_texts
from hf_draftkd.evaluation.statistics import sampled_agree
from hf_draftkd.evaluation.timing import generate_text, single_text_config, way_options
from hf_draftkd.models.parallel import parallel_draft

CHECKED_LENGTHS = (1, 3, 5)
# Sampled numbers are compared over at least this many texts: an interval from a handful means nothing.
_SAMPLED_TEXTS = 32
# Several comparisons are made; at 95% one in a few runs would raise a false alarm.
_CONFIDENCE = 0.99


def checked_decodings(ways: Sequence[str], draft_model: PreTrainedModel) -> list[tuple[str, int]]:
    """Each way of decoding with each draft length that is checked; a parallel draft has a longest one."""
    parallel = parallel_draft(draft_model.config)
    return [
        (way, length)
        for way, length in product(ways, CHECKED_LENGTHS)
        if way != PARALLEL or (parallel is not None and length <= parallel.num_tokens)
    ]


@torch.inference_mode()
def self_check(
    target_model: PreTrainedModel,
    draft_model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[DecodingSetting],
    *,
    ways: Sequence[str],
    listed: Sequence[int] | None,
    vocab_size: int,
    max_new_tokens: int,
    seed: int,
    on_prompt: Callable[[], Any],
    **overrides: Any,
) -> SelfCheck:
    """Write texts plainly, compute block efficiency from them, and count it again with real decoding in each way.

    Greedy numbers must be equal to the last digit; sampled ones agree where their 99% intervals overlap, as
    `sampled_agree` says. Few prompts are answered several times over when sampling. Arguments as in `time_decoding` and
    `score_texts`; `listed` are the ids that the draft records, where it does. `on_prompt` is called after every prompt
    of every setting, however often it was answered: once written plainly, and once for each of `checked_decodings`.
    """
    comparisons = []
    for setting in settings:
        config = single_text_config(target_model, setting, max_new_tokens, **overrides)
        repeats = 1 if setting.is_greedy else -(-_SAMPLED_TEXTS // len(prompts))
        runs = [prompt for prompt in prompts for _ in range(repeats)]
        texts = []
        for number, prompt in enumerate(runs):
            texts.append(Text(prompt, generate_text(target_model, prompt, config, seed=seed + number)[0]))
            if (number + 1) % repeats == 0:
                on_prompt()
        scored = score_texts(
            target_model,
            [draft_model],
            texts,
            setting,
            vocab_size=vocab_size,
            draft_vocabularies=[] if listed is None else [(0, listed)],
        )
        rule = EXACT if setting.is_greedy else "rejection_sampling"
        (sums,) = scored.drafts
        (with_list,) = scored.listed or [sums]
        computed = {
            # For transformers' own loop its warping of the draft is what is computed.
            ASSISTANT_MODEL: sums.get(AS_TRANSFORMERS, sums[rule]),
            SPECULATIVE: with_list[rule],
            PARALLEL: with_list.get(in_one_pass(rule), with_list[rule]),
        }
        for way, length in checked_decodings(ways, draft_model):
            options, per_text = way_options(way, draft_model, length), []
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
            agree = expected.value == counted.value
            if not setting.is_greedy:
                agree = sampled_agree(expected, counted, *map(sum, zip(*per_text, strict=True)))
            comparisons.append(
                Comparison(
                    decoding=setting,
                    num_assistant_tokens=length,
                    way=way,
                    computed=expected,
                    counted=counted,
                    agree=agree,
                )
            )
    return SelfCheck(prompts=len(prompts), equal=all(each.agree for each in comparisons), comparisons=comparisons)
