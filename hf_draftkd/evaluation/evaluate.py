"""Is this draft worth using? One call: the target's own text, exact rates, measured times, a recommendation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_draftkd.acceptance import VERIFICATION_RULES
from hf_draftkd.acceptance.blocks import DRAFT_LENGTHS
from hf_draftkd.decoding.setting import DecodingSetting, settings_at
from hf_draftkd.evaluation.checks import own_penalty
from hf_draftkd.evaluation.measurement import Measurement
from hf_draftkd.evaluation.provenance import hardware_info, model_info
from hf_draftkd.evaluation.report import DraftResult, SpeculationReport
from hf_draftkd.models.forward import evaluating
from hf_draftkd.models.identity import loaded_checksum
from hf_draftkd.models.loading import require_loaded
from hf_draftkd.models.pairing import align_vocabulary, check_own_tokenizer
from hf_draftkd.utils.checks import one_of, whole_number
from hf_draftkd.utils.versions import package_versions


def evaluate_draft(
    draft_model: PreTrainedModel | Sequence[PreTrainedModel],
    target_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: "Dataset | str | Path | Sequence[Any] | None" = None,
    *,
    dataset: Dataset | None = None,
    baseline: PreTrainedModel | None = None,
    temperatures: Sequence[float] | None = None,
    settings: Sequence[DecodingSetting] | None = None,
    verification: Sequence[str] = ("rejection_sampling",),
    max_new_tokens: int = 128,
    num_assistant_tokens: int | None = None,
    measure_speed: bool = True,
    num_speed_prompts: int = 16,
    verify: int = 0,
    lossy: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    source: str | None = None,
    domain: str | None = None,
) -> SpeculationReport:
    """Measure how often a draft is right, how much faster it makes its target here, and whether it is worth using.

    Give `prompts`, and the target answers them under every setting; or `dataset`, alignment data whose rows record the
    setting the target wrote them under. One pass of each model over these texts gives the exact figures; then, with
    `measure_speed`, step times are taken and real `generate(assistant_model=draft)` is timed against plain decoding.

    Args:
        draft_model: The draft, or several: they are ranked, each with its difference to the best, and the report's
            own figures are those of the best. A draft whose vocabulary is only padded differently is aligned in place,
            as assisted decoding needs (see `align_vocabulary`).
        target_model: The target.
        tokenizer: Their tokenizer.
        prompts: Anything that `load_prompts` takes: a path, a Hub id, a `Dataset`, a list of strings or conversations.
            A `domain` or `category` column gives figures by group.
        dataset: Alignment data, instead of prompts. Rows that do not record a setting give acceptance rates alone.
        baseline: Another draft to compare with on the same texts, usually the undistilled one.
        temperatures: Sampling temperatures, 0 for greedy; by default 0 and 1, or whatever `dataset` holds. The
            target's own repetition penalty is applied to both models, and stated.
        settings: Whole decoding settings, instead of `temperatures`.
        verification: Rules for sampled text, of `VERIFICATION_RULES`. Greedy text is always verified exactly.
        max_new_tokens: Longest completion, in tokens. With `dataset` it is the longest one found there.
        num_assistant_tokens: Draft length γ to decode with and to report figures by position for. By default real
            decoding uses the best one found, and positions are reported for 5.
        measure_speed: Take step times, time real decoding, and recommend. Without it these parts are absent. Real
            decoding verifies by rejection sampling: sampled settings are timed where `verification` names that rule,
            and the overall recommendation is about it.
        num_speed_prompts: Prompts decoded both ways for each setting.
        verify: On how many prompts to check the computed figures against counted ones; 0 for none.
        lossy: Add the curve of lossy decoding at the sampled settings: acceptance against distance from the target.
        batch_size: Texts a forward pass.
        seed: Of the target's sampling.
        source: Where the prompts come from, for the report.
        domain: What they are about, for the report.

    Returns:
        The report: `print(report.to_json())`, `rich.print(report.table())`, `report.save("report.json")`.

    Raises:
        ValueError: The pair does not fit; prompts are missing, empty or too long; settings contradict themselves; a
            rule does not exist; or the texts do not belong to the pair's vocabulary.
    """
    is_list = isinstance(draft_model, Sequence) and not isinstance(draft_model, str)
    candidates = list(draft_model) if is_list else [draft_model]
    drafts = [*candidates, *([] if baseline is None else [baseline])]
    require_loaded(target_model, *drafts)
    asked = _settings(target_model, temperatures, settings)
    check_options(
        verification, max_new_tokens, num_assistant_tokens, num_speed_prompts, batch_size=batch_size, verify=verify
    )
    if lossy and asked is not None and all(setting.is_greedy for setting in asked):
        raise ValueError("`lossy` is about sampled text, and every setting here is greedy. Add a temperature above 0.")
    _check(drafts, target_model, tokenizer, prompts, dataset)
    if measure_speed or verify:
        _check_cache(target_model)
    # Before a vocabulary is padded: that is the draft as it lies in its folder.
    checksums = [loaded_checksum(draft) for draft in drafts]
    for draft in drafts:
        align_vocabulary(draft, target_model, tokenizer)
    with evaluating(target_model, *drafts):
        measured = Measurement(
            target_model,
            tokenizer,
            verification=verification,
            max_new_tokens=max_new_tokens,
            num_assistant_tokens=num_assistant_tokens,
            batch_size=batch_size,
            seed=seed,
        )
        info = measured.take_texts(drafts, prompts, dataset, asked, source)
        info.domain = domain
        results = measured.score(drafts, is_lossy=lossy)
        for result, checksum in zip(results, checksums, strict=True):
            result.draft.weights_sha256 = checksum
        if measure_speed:
            for draft, result in zip(drafts, results, strict=True):
                measured.time(draft, result, num_speed_prompts)
        ranking = _ranking(results[: len(candidates)], measured.reported_length)
        best = ranking[0]
        first = results[best]
        for index in ranking[1:]:
            results[index].paired_difference = measured.differences(index, best)
        return SpeculationReport(
            target=model_info(target_model),
            draft=first.draft,
            prompts=info,
            hardware=hardware_info(target_model),
            versions=package_versions(),
            num_assistant_tokens=measured.reported_length,
            max_new_tokens=measured.max_new_tokens,
            settings=first.settings,
            latency=first.latency,
            recommendation=first.recommendation,
            baseline=results[-1] if baseline is not None else None,
            paired_difference=measured.differences(best, len(drafts) - 1) if baseline is not None else None,
            groups=measured.groups(best, drafts[best]),
            drafts=[results[index] for index in ranking] if len(candidates) > 1 else None,
            self_check=measured.check_itself(drafts[best], verify) if verify else None,
            lossy=(measured.lossy_curve(best, drafts[best], first, num_speed_prompts) or None) if lossy else None,
            warnings=measured.warnings,
        )


def _ranking(results: Sequence[DraftResult], length: int) -> list[int]:
    """Indices from the best draft on: by predicted speed-up, or without times by tokens per target call."""

    def worth(index: int) -> tuple[float, float]:
        found = results[index]
        speedup = 0.0 if found.recommendation is None else found.recommendation.predicted_speedup
        rates = [
            setting.acceptance_rate.value if not setting.block_efficiency else setting.block_efficiency[length].value
            for setting in found.settings
        ]
        return speedup, sum(rates) / len(rates)

    return sorted(range(len(results)), key=worth, reverse=True)


def _settings(
    target_model: PreTrainedModel, temperatures: Sequence[float] | None, settings: Sequence[DecodingSetting] | None
) -> list[DecodingSetting] | None:
    """The settings asked for; None where the data decides."""
    if settings is not None:
        if temperatures is not None:
            raise ValueError("Give either `temperatures` or `settings`, not both: a setting has its own temperature.")
        if len(set(settings)) < len(settings) or not settings:
            raise ValueError("`settings` must name at least one decoding setting, and none twice.")
        return list(settings)
    if temperatures is None:
        return None
    return settings_at(temperatures, repetition_penalty=own_penalty(target_model))


def _check(
    drafts: Sequence[PreTrainedModel],
    target_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Any,
    dataset: Dataset | None,
) -> None:
    """Everything that can be known to be wrong before any long work."""
    if (prompts is None) == (dataset is None):
        raise ValueError("Give `prompts` for the target to answer, or a `dataset` it wrote: one of them, not both.")
    if dataset is not None and not isinstance(dataset, Dataset):
        raise ValueError(
            f"`dataset` must be one `datasets.Dataset`, got {type(dataset).__name__}: load it, or a split."
        )
    if not drafts:
        raise ValueError("`draft_model` is an empty list: give at least one draft.")
    for draft in drafts:
        if draft.config.is_encoder_decoder:
            raise ValueError(f"{draft.name_or_path!r} is an encoder-decoder model; a draft must be a causal LM.")
        check_own_tokenizer(draft, tokenizer)
    check_own_tokenizer(target_model, tokenizer, is_target=True)


def _check_cache(target_model: PreTrainedModel) -> None:
    kind = target_model.generation_config.cache_implementation or ""
    if "static" in kind:
        raise ValueError(
            f"The target's generation config asks for a {kind!r} cache, with which transformers does not decode with a "
            "draft. Set `target_model.generation_config.cache_implementation = None`, or leave out real decoding: "
            "`measure_speed=False` and `verify=0`."
        )


def check_options(
    verification: Sequence[str],
    max_new_tokens: int,
    num_assistant_tokens: int | None,
    num_speed_prompts: int,
    *,
    batch_size: int = 1,
    verify: int = 0,
) -> None:
    """What can be known to be wrong before a model is loaded.

    Raises:
        ValueError: An option is out of range, or a rule does not exist.
    """
    if not verification:
        raise ValueError("`verification` is empty: name at least one rule, such as rejection_sampling.")
    if isinstance(verification, str):
        raise ValueError(f"`verification` must be a list of rules, got the string {verification!r}: put it in a list.")
    for rule in verification:
        one_of("verification rule", rule, VERIFICATION_RULES)
    if len(set(verification)) < len(verification):
        raise ValueError(f"`verification` names a rule twice: {', '.join(verification)}.")
    whole_number("max_new_tokens", max_new_tokens)
    whole_number("batch_size", batch_size)
    if verify < 0:
        raise ValueError(f"`verify` must be at least 0, got {verify}: a number of prompts, or 0 for no check.")
    # 3.0 is equal to 3, and counts nothing.
    if num_assistant_tokens is not None and (
        num_assistant_tokens not in DRAFT_LENGTHS or not isinstance(num_assistant_tokens, int)
    ):
        raise ValueError(f"`num_assistant_tokens` must be a whole number between 1 and 16, got {num_assistant_tokens}.")
    if num_speed_prompts < 1:
        raise ValueError(
            f"`num_speed_prompts` must be at least 1, got {num_speed_prompts}. To leave out timing, set "
            "`measure_speed=False`."
        )
