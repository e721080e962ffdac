"""Is this draft worth using? One call: the target's own text, exact rates, measured times, a recommendation."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_draftkd.acceptance import DRAFT_LENGTHS
from hf_draftkd.data.targets import ids_without_token
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.evaluation.config import EvaluationConfig
from hf_draftkd.evaluation.environment import dtype_name, hardware_info, model_info
from hf_draftkd.evaluation.latency import measure_latency
from hf_draftkd.evaluation.recommendation import (
    ASSISTANT_MODEL,
    PARALLEL,
    SPECULATIVE,
    overall_draft_lengths,
    recommend,
    recommend_overall,
)
from hf_draftkd.evaluation.report import (
    Answer,
    AssistedResult,
    DraftResult,
    PairedDifference,
    SelfCheck,
    SettingResult,
    SpeculationReport,
    VocabularyResult,
)
from hf_draftkd.evaluation.scoring import EXACT, PassResult, TextSums, score_texts
from hf_draftkd.evaluation.self_check import checked_decodings, self_check
from hf_draftkd.evaluation.statistics import assisted_result, compare_with_prediction, paired_difference, setting_result
from hf_draftkd.evaluation.tables import estimate_text
from hf_draftkd.evaluation.texts import (
    PLAUSIBLE,
    MeasuredTexts,
    TextSet,
    check_ids,
    plausibility_warnings,
    suppressed_token_warnings,
    take_texts,
)
from hf_draftkd.evaluation.timing import PLAIN, difference_warnings, refused_by_speculative_decoding, time_decoding
from hf_draftkd.evaluation.tokens import add_token_results, show_answers, token_kinds
from hf_draftkd.evaluation.vocabulary import lists_to_report, predict_by_size
from hf_draftkd.models.forward import evaluating
from hf_draftkd.models.identity import loaded_checksum
from hf_draftkd.models.loading import require_loaded
from hf_draftkd.models.pairing import align_vocabulary, check_own_tokenizer, shared_context, shared_vocab_size
from hf_draftkd.models.parallel import parallel_draft
from hf_draftkd.models.sizing import is_mixture, larger_than_target, loaded_parameters
from hf_draftkd.models.tokenizers import require_tokenizer
from hf_draftkd.utils.versions import package_versions

_DEFAULT_LENGTH = 5


def evaluate_draft(
    draft_model: PreTrainedModel | Sequence[PreTrainedModel],
    target_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: "Dataset | str | Path | Sequence[Any] | None" = None,
    *,
    dataset: Dataset | None = None,
    baseline: PreTrainedModel | None = None,
    settings: Sequence[DecodingSetting] | None = None,
    source: str | None = None,
    config: EvaluationConfig | None = None,
    **options: Any,
) -> SpeculationReport:
    """Measure how often a draft is right, how much faster it makes its target here, and whether it is worth using.

    Give `prompts`, and the target answers them under every setting; or `dataset`, alignment data whose rows record the
    setting the target wrote them under. One pass of each model over these texts gives the exact rates; then, with
    `measure_speed`, step times are taken and real decoding is timed: plainly, with `assistant_model=draft` and with
    `custom_generate=SpeculativeDecoding(draft)`, in turns.

    Example:
    ```python
    report = evaluate_draft(draft, target, tokenizer, "prompts.jsonl", baseline=stock_draft, max_new_tokens=128)
    print(report.recommendation.reason)
    print(report.settings[0].acceptance_rate)
    report.save("report.json")
    ```

    Args:
        draft_model: The draft, or several: they are ranked, each with its difference to the best, and the report's
            own results are those of the best. A draft whose vocabulary is only padded differently is aligned in place,
            as assisted decoding needs (see `align_vocabulary`).
        target_model: The target.
        tokenizer: Their tokenizer.
        prompts: Anything that `load_prompts` takes: a path, a Hub id, a `Dataset`, a list of strings or conversations.
            A `domain` or `category` column gives results by group.
        dataset: Alignment data, instead of prompts. Rows that do not record a setting give acceptance rates alone.
        baseline: Another draft to compare with on the same texts, usually the undistilled one.
        settings: Whole decoding settings, instead of the `temperatures` of the config.
        source: Where the prompts come from, for the report.
        config: What to measure, and how.
        **options: Fields of `EvaluationConfig`, such as `temperatures`, `max_new_tokens`, `measure_speed` or
            `batch_size`; they take precedence over those of `config`.

    Returns:
        The report: `print(report.to_json())`, `report.save("report.json")`, `rich.print(ReportTable(report))`.

    Raises:
        ValueError: The pair does not fit, or is to be timed on two kinds of devices; prompts are missing, empty or too
            long; settings contradict themselves; an option is out of range; or the texts do not belong to the pair's
            vocabulary.
    """
    is_list = isinstance(draft_model, Sequence) and not isinstance(draft_model, str)
    candidates = list(draft_model) if is_list else [draft_model]
    drafts = [*candidates, *([] if baseline is None else [baseline])]
    require_loaded(target_model, *drafts)
    require_tokenizer(tokenizer)
    config = replace(config or EvaluationConfig(), **options)
    _check_arguments(prompts, dataset, settings, config)
    _check_models(drafts, target_model, tokenizer, config)
    # Before a vocabulary is padded: that is the draft as it lies in its folder.
    checksums = [loaded_checksum(draft) for draft in drafts]
    for draft in drafts:
        align_vocabulary(draft, target_model, tokenizer)
    vocab_size = shared_vocab_size(drafts[0], target_model, tokenizer)  # of every draft, now that they are aligned
    listed = []
    for index, draft in enumerate(drafts):
        sizes = config.draft_vocabulary_sizes if index < len(candidates) else None  # none are asked of the baseline
        listed += [(index, ids) for ids in lists_to_report(draft, sizes, vocab_size)]
    with evaluating(target_model, *drafts):
        texts = take_texts(target_model, drafts, tokenizer, prompts, dataset, settings, source, config)
        evaluation = _Evaluation(target_model, drafts, tokenizer, texts, config, listed, vocab_size)
        results = evaluation.score()
        for result, checksum in zip(results, checksums, strict=True):
            result.draft.weights_sha256 = checksum
        if config.measure_speed:
            for draft, result in zip(drafts, results, strict=True):
                evaluation.time(draft, result)
        ranking = _ranking(results[: len(candidates)], evaluation.reported_length)
        best = ranking[0]
        first = results[best]
        for index in ranking[1:]:
            results[index].paired_difference = evaluation.differences(index, best)
        return SpeculationReport(
            target=model_info(target_model),
            draft=first.draft,
            prompts=texts.info,
            hardware=hardware_info(target_model),
            versions=package_versions(),
            num_assistant_tokens=evaluation.reported_length,
            max_new_tokens=texts.max_new_tokens,
            settings=first.settings,
            latency=first.latency,
            recommendation=first.recommendation,
            baseline=results[-1] if baseline is not None else None,
            paired_difference=evaluation.differences(best, len(drafts) - 1) if baseline is not None else None,
            groups=evaluation.groups(best),
            drafts=[results[index] for index in ranking] if len(candidates) > 1 else None,
            self_check=evaluation.check_itself(drafts[best]) if config.verify else None,
            answers=evaluation.answers(best),
            warnings=evaluation.warnings,
        )


def _check_arguments(
    prompts: Any, dataset: Any, settings: Sequence[DecodingSetting] | None, config: EvaluationConfig
) -> None:
    """Refuse arguments of `evaluate_draft` that contradict each other."""
    if settings is not None and config.temperatures is not None:
        raise ValueError("Give either `temperatures` or `settings`, not both: a setting has its own temperature.")
    if settings is not None and (not settings or len(set(settings)) < len(settings)):
        raise ValueError("`settings` must name at least one decoding setting, and none twice.")
    if (prompts is None) == (dataset is None):
        raise ValueError("Give `prompts` for the target to answer, or a `dataset` it wrote: one of them, not both.")
    if dataset is not None and not isinstance(dataset, Dataset):
        raise ValueError(
            f"`dataset` must be one `datasets.Dataset`, got {type(dataset).__name__}: load it, or a split."
        )


def _check_models(
    drafts: Sequence[PreTrainedModel],
    target_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
) -> None:
    """Refuse models of another tokenizer, and those whose speed on two kinds of devices would say nothing."""
    if not drafts:
        raise ValueError("`draft_model` is an empty list: give at least one draft.")
    context = shared_context(target_model, *drafts)
    if config.measure_speed and context <= DRAFT_LENGTHS[-1] + 1:
        raise ValueError(
            f"Target and drafts read {context} tokens at most, but passes over {DRAFT_LENGTHS[-1] + 1} behind a text "
            "are to be timed. Leave speed out, `measure_speed=False`."
        )
    for draft in drafts:
        places = {draft.device.type, target_model.device.type} - {"meta"}  # parts of a model may be offloaded
        if config.measure_speed and len(places) > 1:
            raise ValueError(
                f"The draft {draft.name_or_path!r} is on {draft.device} and the target on {target_model.device}: its "
                f"speed there says nothing. Move it, `draft.to({str(target_model.device)!r})`, or leave speed out, "
                "`measure_speed=False`."
            )
        check_own_tokenizer(draft, tokenizer)
    check_own_tokenizer(target_model, tokenizer, is_target=True)


class _Evaluation:
    """One evaluation under way: what every draft scored on the texts, and what a reader must be warned of."""

    def __init__(
        self,
        target_model: PreTrainedModel,
        drafts: Sequence[PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        texts: MeasuredTexts,
        config: EvaluationConfig,
        listed: Sequence[tuple[int, list[int]]],
        vocab_size: int,
    ) -> None:
        self.listed = listed  # (draft, ids): the lists by which its vocabulary is cut
        self.target_model, self.drafts, self.tokenizer = target_model, drafts, tokenizer
        self.texts, self.config, self.vocab_size = texts, config, vocab_size
        size = loaded_parameters(target_model)
        self.parameter_ratios = [loaded_parameters(draft) / size for draft in drafts]
        self.reported_length = config.num_assistant_tokens or _DEFAULT_LENGTH
        # What real decoding of this target needs, whatever it is decoded for.
        self.decoding: dict[str, Any] = {
            "max_new_tokens": texts.max_new_tokens,
            "suppress_tokens": ids_without_token(target_model, tokenizer),
            "eos_token_id": texts.end_ids or None,
            "seed": config.seed,
        }
        self.warnings = texts.warnings
        self.warnings += [warning for draft in drafts if (warning := larger_than_target(draft, target_model))]
        if is_mixture(target_model.config):
            self.warnings.append(
                "The target is a mixture of experts, which reads only some of its parameters for a token. MBSU counts "
                "them all, so that a draft looks cheaper than it is: go by measured speed."
            )
        self.scored: list[tuple[TextSet, PassResult]] = []
        for each in texts.sets:
            check_ids(each, vocab_size)
        if config.measure_speed or config.verify:
            self._spread_prompts(1)  # raises before the work where there is none
        self.kinds = [[token_kinds(tokenizer, text.completion_ids) for text in each.texts] for each in texts.sets]

    def score(self) -> list[DraftResult]:
        """One pass of target and drafts over every text set."""
        self.warnings += suppressed_token_warnings(self.drafts, self.target_model, self.vocab_size)
        total = sum(len(texts.texts) for texts in self.texts.sets)
        with logging.tqdm(total=total, desc="Scoring texts", unit="text") as bar:
            for texts in self.texts.sets:
                scored = score_texts(
                    self.target_model,
                    self.drafts,
                    texts.texts,
                    texts.setting,
                    vocab_size=self.vocab_size,
                    verification=self.config.verification,
                    draft_vocabularies=self.listed,
                    batch_size=self.config.batch_size,
                    on_texts=bar.update,
                )
                self.warnings += plausibility_warnings(self.target_model, texts, scored.share_plausible)
                is_exact = texts.is_exact and scored.share_plausible >= PLAUSIBLE
                self.scored.append((replace(texts, is_exact=is_exact), scored))
        return [
            DraftResult(draft=model_info(draft), settings=self._settings(index))
            for index, draft in enumerate(self.drafts)
        ]

    def differences(self, index: int, baseline: int) -> list[PairedDifference]:
        """One draft minus another on the same texts, an entry for each of their settings."""
        found = []
        for texts, scored in self.scored:
            for rule in self._rules(texts):
                both = scored.drafts[index], scored.drafts[baseline]
                found.append(paired_difference(texts.setting, rule, *both, texts.prompts, has_blocks=texts.is_exact))
        return found

    def groups(self, index: int) -> dict[str, list[SettingResult]] | None:
        """One draft's results by domain or category; None where the data has no such column."""
        found: dict[str, list[SettingResult]] = {}
        named = {name for texts in self.texts.sets for name in texts.groups or [] if name is not None}
        for name in sorted(named):
            found[name] = []
            for texts, scored in self.scored:
                chosen = [text for text, group in enumerate(texts.groups or []) if group == name]
                if chosen:
                    sums = {key: TextSums.joined([of], chosen) for key, of in scored.drafts[index].items()}
                    prompts = [texts.prompts[text] for text in chosen]
                    found[name] += [self._result(index, texts, rule, sums, prompts) for rule in self._rules(texts)]
        return found or None

    def answers(self, index: int) -> list[Answer] | None:
        """A few texts of the first setting that the target wrote itself, token by token for one draft."""
        for texts, scored in self.scored:
            if self.config.num_answers and texts.is_exact:
                rule = self._rules(texts)[0]
                models = self.drafts[index], self.target_model, self.tokenizer
                sums = scored.drafts[index][rule]
                return show_answers(self.config.num_answers, *models, texts, rule, sums, self.vocab_size)
        return None

    def time(self, draft: PreTrainedModel, result: DraftResult) -> None:
        """Time steps and real decoding of one draft, and judge it; fills in `result`."""
        if draft.dtype.itemsize > self.target_model.dtype.itemsize:
            self.warnings.append(
                f"The draft {draft.name_or_path!r} is in {dtype_name(draft)}, the target in "
                f"{dtype_name(self.target_model)}: load it with `dtype={self.target_model.dtype}`, or its steps take "
                "longer than they need."
            )
        prompts = self._spread_prompts(self.config.num_speed_prompts)
        ways = self._ways(draft, prompts[0])
        lists = [ids for index, ids in self.listed if self.drafts[index] is draft]
        latency = measure_latency(self.target_model, draft, prompts, ways=ways, lists=lists, **self.decoding)
        result.latency = latency
        lengths = overall_draft_lengths(result.settings, latency)
        length = self.config.num_assistant_tokens or lengths.get(ASSISTANT_MODEL, _DEFAULT_LENGTH)
        # Real decoding is transformers': it does not apply to a rule of another engine.
        timed = [setting for setting in result.settings if setting.is_transformers_rule]
        asked = self.config.speed_batch_sizes if SPECULATIVE in ways else []
        if asked and len(prompts) > 1:
            refusal = refused_by_speculative_decoding(self.target_model, draft, prompts[:2])
            if refusal is not None:  # most targets with a sliding window are refused
                self._warn(f"No batch was timed, since SpeculativeDecoding refuses batches of this pair: {refusal}")
                asked = []
        sizes = [size for size in asked if size <= len(prompts)]
        for size in asked:
            if size > len(prompts):  # there are few, or some are alike, or too long to be timed
                self.warnings.append(f"No batch of {size} was timed: there are {len(prompts)} prompts for it.")
        for setting in timed:
            measure = partial(self._decode, draft, prompts, setting.decoding)
            found = measure(length, [way for way in ways if way != PARALLEL])
            setting.assisted, setting.speculative = found[ASSISTANT_MODEL], found.get(SPECULATIVE)
            if PARALLEL in lengths and setting.parallel is not None:
                setting.parallel.speculative = measure(lengths[PARALLEL], [PARALLEL])[PARALLEL]
            batches = {size: measure(length, [SPECULATIVE], size)[SPECULATIVE] for size in sizes}
            setting.speculative_batches = batches or None
            compare_with_prediction(setting, latency)
            self.warnings += difference_warnings(setting, draft)
        for setting in result.settings:
            setting.recommendation = recommend(setting, latency)
        predict_by_size(result.settings, latency)
        result.recommendation = recommend_overall(result.settings, latency)

    def _decode(
        self,
        draft: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        setting: DecodingSetting,
        length: int,
        ways: Sequence[str],
        batch_size: int = 1,
    ) -> dict[str, AssistedResult]:
        """Time real decoding in some ways, beside plain decoding."""
        how: dict[str, Any] = {"ways": ways, "num_assistant_tokens": length, "batch_size": batch_size}
        runs = time_decoding(self.target_model, draft, prompts, setting, **how, **self.decoding)
        return {way: assisted_result(runs[way], runs[PLAIN], length) for way in ways}

    def check_itself(self, draft: PreTrainedModel) -> SelfCheck:
        """Computed against counted numbers, on a few of the prompts."""
        prompts = self._spread_prompts(self.config.verify)
        settings = [texts.setting for texts in self.texts.sets]
        ways = self._ways(draft, prompts[0])
        total = len(prompts) * len(settings) * (1 + len(checked_decodings(ways, draft)))
        with logging.tqdm(total=total, desc="Checking against real decoding", unit="text") as bar:
            how = {"ways": ways, "vocab_size": self.vocab_size, "on_prompt": bar.update}
            # The whole of its list is the last.
            listed = next((ids for index, ids in reversed(self.listed) if self.drafts[index] is draft), None)
            found = self_check(self.target_model, draft, prompts, settings, listed=listed, **how, **self.decoding)
        if wrong := [each for each in found.comparisons if not each.agree]:
            first, texts = wrong[0], [estimate_text(each) for each in (wrong[0].computed, wrong[0].counted)]
            self.warnings.append(
                f"The self-check found {len(wrong)} of {len(found.comparisons)} computed numbers that real decoding "
                f"does not confirm, first the tokens per call for {first.decoding} by {first.way} with γ = "
                f"{first.num_assistant_tokens}: computed {texts[0]}, counted {texts[1]}. In low precision near-ties do "
                "this; in float32 it is a fault worth reporting."
            )
        return found

    def _ways(self, draft: PreTrainedModel, prompt: Sequence[int]) -> list[str]:
        """How transformers can decode with this draft; a warning says where SpeculativeDecoding cannot."""
        refusal = refused_by_speculative_decoding(self.target_model, draft, [prompt])
        if refusal is None:
            return [ASSISTANT_MODEL, SPECULATIVE, *([PARALLEL] if parallel_draft(draft.config) else [])]
        self._warn(f"SpeculativeDecoding was left out, since it refuses this pair: {refusal}")
        return [ASSISTANT_MODEL]

    def _warn(self, warning: str) -> None:
        if warning not in self.warnings:
            self.warnings.append(warning)

    def _settings(self, index: int) -> list[SettingResult]:
        """One draft's results on all texts, an entry for each setting and rule."""
        results = []
        for (texts, scored), kinds in zip(self.scored, self.kinds, strict=True):
            sums = scored.drafts[index]
            for rule in self._rules(texts):
                found = self._result(index, texts, rule, sums, texts.prompts)
                found.draft_vocabulary = self._by_size(index, texts, scored, found)
                if found.block_efficiency:
                    add_token_results(found, sums[rule], texts, kinds)
                results.append(found)
        return results

    def _by_size(
        self, index: int, texts: TextSet, scored: PassResult, whole: SettingResult
    ) -> list[VocabularyResult] | None:
        """The results of one draft by its lists, the `whole` vocabulary last; None where it records no list."""
        found = [
            (len(ids), self._result(index, texts, whole.verification, sums, texts.prompts))
            for (draft, ids), sums in zip(self.listed, scored.listed, strict=True)
            if draft == index
        ]
        if not found:
            return None
        found.append((self.drafts[index].config.get_text_config().vocab_size, whole))
        return [
            VocabularyResult(
                size=size,
                acceptance_rate=of.acceptance_rate,
                block_efficiency=of.block_efficiency,
                parallel_block_efficiency=of.parallel.block_efficiency if of.parallel else None,
            )
            for size, of in found
        ]

    def _result(
        self, index: int, texts: TextSet, rule: str, sums: dict[str, TextSums], prompts: Sequence[int]
    ) -> SettingResult:
        """One draft's result on some of the texts of a set, which answer these prompts."""
        return setting_result(
            texts.setting,
            rule,
            sums,
            prompts,
            num_assistant_tokens=self.reported_length,
            parameter_ratio=self.parameter_ratios[index],
            has_blocks=texts.is_exact,
        )

    def _rules(self, texts: TextSet) -> Sequence[str]:
        return (EXACT,) if texts.setting.is_greedy else self.config.verification

    def _spread_prompts(self, count: int) -> list[Sequence[int]]:
        """Prompts at even distances, so that sorted data is not timed on one kind of prompt alone."""
        found = {tuple(text.prompt_ids): text.prompt_ids for text in self.texts.sets[0].texts}
        context = shared_context(self.target_model, *self.drafts)
        # Recorded prompts need not leave room for the longest recorded completion.
        unique = [prompt for prompt in found.values() if len(prompt) <= context - self.texts.max_new_tokens]
        if not unique:
            raise ValueError(
                f"No prompt leaves room for {self.texts.max_new_tokens} new tokens in a context of {context}, so "
                "decoding cannot be timed. Turn `measure_speed` and `verify` off."
            )
        count = min(count, len(unique))
        return [unique[place * len(unique) // count] for place in range(count)]


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
