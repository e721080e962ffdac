"""Wall-clock of real decoding: plainly and with a draft in each way, in one run.

The ways of decoding take turns prompt by prompt, so that a machine that slows down slows all of them. Ratios are
paired: their interval comes from resampling prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from hf_draftkd.acceptance import AcceptanceCounts
from hf_draftkd.data.backends import cut_completion
from hf_draftkd.decoding.processors import logits_processors, process_logits
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.decoding.speculative import SpeculativeDecoding
from hf_draftkd.decoding.texts import left_padded
from hf_draftkd.evaluation.assisted import count_acceptance, fixed_draft_length, synchronize_accelerator
from hf_draftkd.evaluation.recommendation import ASSISTANT_MODEL, PARALLEL, SPECULATIVE, real_decoding
from hf_draftkd.evaluation.report import DecodingDifference, SettingResult
from hf_draftkd.models.forward import seeded
from hf_draftkd.models.tokenizers import listed_ids, pad_id

PLAIN = "plain"


@dataclass
class DecodingRun:
    """Decoding in one way, one list entry for each prompt (or batch of them).

    Attributes:
        num_prompts: How many were decoded.
        tokens: Tokens written.
        seconds: Wall-clock, reading the prompt included.
        counts: What was drafted and accepted; all 0 for plain decoding.
        num_identical: Prompts whose text equals that of plain decoding, token by token. None when sampling.
        differences: The first difference of each other prompt. Empty when sampling.
    """

    num_prompts: int = 0
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    counts: AcceptanceCounts = field(default_factory=AcceptanceCounts)
    num_identical: int | None = None
    differences: list[DecodingDifference] = field(default_factory=list)


@torch.inference_mode()
def time_decoding(
    target_model: PreTrainedModel,
    draft_model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    setting: DecodingSetting,
    *,
    max_new_tokens: int,
    ways: Sequence[str] = (ASSISTANT_MODEL, SPECULATIVE),
    num_assistant_tokens: int = 5,
    batch_size: int = 1,
    seed: int = 0,
    **overrides: Any,
) -> dict[str, DecodingRun]:
    """Decode every prompt (token ids) plainly and with the draft in each way, in turns, and time it.

    The draft, which has the target's vocabulary, proposes exactly `num_assistant_tokens` tokens a step. Each prompt
    starts with another way, so that none always runs on the other's warm caches; the first prompts are decoded once
    before the clock runs. Greedy texts are compared with the plain ones, token by token. `batch_size` prompts are
    decoded together, and what does not fill a batch is left out (`assistant_model=` takes none); sampled batches are
    seeded one by one with `seed` and their number. `overrides` are as in `single_text_config`.

    Raises:
        ValueError: A way refuses to decode these models.
    """
    config = single_text_config(target_model, setting, max_new_tokens, **overrides)
    options = {way: way_options(way, draft_model, num_assistant_tokens) for way in ways} | {PLAIN: {}}
    names = [PLAIN, *ways]
    groups = [prompts[at : at + batch_size] for at in range(0, len(prompts) - batch_size + 1, batch_size)]
    runs = {way: DecodingRun() for way in names}
    texts: dict[str, list[list[int]]] = {way: [] for way in names}
    with fixed_draft_length(draft_model, num_assistant_tokens):
        for way in names:
            generate_texts(target_model, groups[0], config, seed=seed, **options[way])
        for number, group in enumerate(logging.tqdm(groups, desc=f"Timing {', '.join(ways)}", unit="batch")):
            first = number % len(names)
            for way in names[first:] + names[:first]:
                with count_acceptance(target_model) as counts:
                    written, seconds = generate_texts(target_model, group, config, seed=seed + number, **options[way])
                run = runs[way]
                run.counts += counts
                run.num_prompts += len(group)
                run.tokens.append(sum(map(len, written)))
                run.seconds.append(seconds)
                texts[way] += written
    if setting.is_greedy:
        for way in ways:
            runs[way].differences = [
                _first_difference(target_model, setting, number, prompts[number], *pair)
                for number, pair in enumerate(zip(texts[PLAIN], texts[way], strict=True))
                if pair[0] != pair[1]
            ]
            runs[way].num_identical = len(texts[way]) - len(runs[way].differences)
    return runs


def way_options(way: str, draft_model: PreTrainedModel, num_assistant_tokens: int) -> dict[str, Any]:
    """What `generate` is given to decode with a draft in one of the ways."""
    if way == ASSISTANT_MODEL:
        return {"assistant_model": draft_model}
    return {"custom_generate": SpeculativeDecoding(draft_model, num_assistant_tokens, parallel=way == PARALLEL)}


def refused_by_speculative_decoding(
    target_model: PreTrainedModel, draft_model: PreTrainedModel, prompts: Sequence[Sequence[int]]
) -> str | None:
    """Why `SpeculativeDecoding` cannot decode these prompts together, tried on one token; None where it can."""
    config = single_text_config(target_model, DecodingSetting(), 1)
    try:
        generate_texts(target_model, prompts, config, custom_generate=SpeculativeDecoding(draft_model, 1))
    except ValueError as error:
        return str(error)
    return None


def single_text_config(
    target_model: PreTrainedModel, setting: DecodingSetting, max_new_tokens: int, **overrides: Any
) -> GenerationConfig:
    """The generation config for decoding one prompt at a time, plainly or with a draft.

    `overrides` are its fields: `suppress_tokens` are never written, such as padded rows of the vocabulary, and
    `eos_token_id` ends texts in the place of the target's own.

    Nothing that is read is padding then, so the pad id is set to the end token: transformers drops a mask of ones, and
    the draft's `generate` would guess a new one by taking every pad id *inside* the text for padding (transformers
    5.23).
    """
    ends = sorted(listed_ids(overrides.get("eos_token_id", target_model.generation_config.eos_token_id)))
    pad = pad_id(target_model, *ends) if ends else None
    return setting.generation_config(target_model, max_new_tokens, **{"pad_token_id": pad, **overrides})


def generate_text(
    model: PreTrainedModel, prompt: Sequence[int], config: GenerationConfig, *, seed: int = 0, **options: Any
) -> tuple[list[int], float]:
    """One `generate` call for one prompt: `generate_texts` with one."""
    (text,), seconds = generate_texts(model, [prompt], config, seed=seed, **options)
    return text, seconds


def generate_texts(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    seed: int = 0,
    **options: Any,
) -> tuple[list[list[int]], float]:
    """The completions of prompts that are decoded together, and the seconds of that `generate` call.

    The config is as `single_text_config` makes it. The global random state is left alone.
    """
    inputs = left_padded(prompts, pad_id(model, config.pad_token_id), model.device)
    with seeded(seed, model.device):
        synchronize_accelerator()
        started = perf_counter()
        output = model.generate(**inputs, generation_config=config, **options)
        synchronize_accelerator()
        elapsed = perf_counter() - started
    ends, texts = frozenset(listed_ids(config.eos_token_id)), output[:, inputs["input_ids"].shape[1] :].tolist()
    return [cut_completion(text, ends)[0] for text in texts], elapsed


def difference_warnings(setting: SettingResult, draft_model: PreTrainedModel) -> list[str]:
    """A warning for each way of decoding with a draft that did not write the plain greedy texts."""
    found = []
    for way, run in real_decoding(setting):
        if run.differences:
            gap = max(each.logit_gap for each in run.differences)
            found.append(
                f"{len(run.differences)} of {run.num_prompts} texts that {draft_model.name_or_path or 'the draft'} "
                f"helped to write ({setting.words}, {way}) are not the plain ones: where they part, the target's logit "
                f"of the plain token is larger by {gap:.2g} at most. Near 0 that is rounding; clearly more is a fault "
                "worth reporting."
            )
    return found


def _first_difference(
    target_model: PreTrainedModel,
    setting: DecodingSetting,
    number: int,
    prompt: Sequence[int],
    plain: list[int],
    assisted: list[int],
) -> DecodingDifference:
    """Where two greedy texts part, and how close the target itself thought the two tokens were."""
    # Where one text merely continues after the other ended, the shorter one's last token is the one in question.
    shorter = min(len(plain), len(assisted))
    position = next((place for place in range(shorter) if plain[place] != assisted[place]), shorter - 1)
    ids = torch.tensor([[*prompt, *plain[:position]]], device=target_model.device)
    logits = target_model(input_ids=ids).logits[:, -1].float()
    lengths = torch.tensor([ids.shape[1]], device=ids.device)
    logits = process_logits(logits, ids, lengths, logits_processors(setting, target_model))[0]
    return DecodingDifference(
        prompt=number,
        position=position,
        plain_token=plain[position],
        assisted_token=assisted[position],
        logit_gap=float(logits[plain[position]] - logits[assisted[position]]),
    )
