"""The steps of an evaluation, in order: take texts, score drafts on them, time decoding, judge."""

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_draftkd.acceptance import LENIENCE_FORMS, bootstrap_ratio
from hf_draftkd.data.prompts import fitting_rows, load_prompts
from hf_draftkd.data.rows import render_prompts
from hf_draftkd.data.targets import ids_without_token
from hf_draftkd.decoding.setting import DecodingSetting, settings_at
from hf_draftkd.evaluation.checks import (
    PLAUSIBLE,
    by_this_target,
    check_ids,
    check_lengths,
    inherited_setting_warnings,
    own_penalty,
    plausibility_warnings,
    shared_context,
    suppressed_token_warnings,
)
from hf_draftkd.evaluation.estimates import (
    assisted_result,
    by_prompt,
    compare_with_prediction,
    paired_difference,
    select_texts,
    setting_result,
)
from hf_draftkd.evaluation.lossy import LENIENCE, lossy_values
from hf_draftkd.evaluation.provenance import content_hash, model_info
from hf_draftkd.evaluation.recommendation import (
    overall_draft_length,
    recommend,
    recommend_overall,
)
from hf_draftkd.evaluation.report import (
    AssistedResult,
    DraftResult,
    LossyPoint,
    PairedDifference,
    PromptInfo,
    SelfCheck,
    SettingResult,
)
from hf_draftkd.evaluation.self_check import CHECKED_LENGTHS, self_check
from hf_draftkd.evaluation.teacher_forced import AS_TRANSFORMERS, EXACT, PassResult, score_texts
from hf_draftkd.evaluation.texts import TextSet, generated_texts, is_recorded, other_texts, recorded_texts
from hf_draftkd.evaluation.timing import measure_latency, time_decoding
from hf_draftkd.models.context import context_length
from hf_draftkd.models.pairing import shared_vocab_size

_FEW_PROMPTS = 20
_DEFAULT_TEMPERATURES = (0.0, 1.0)
_DEFAULT_LENGTH = 5


class Measurement:
    """One evaluation under way: the texts, what every draft scored on them, and what a reader must be warned of."""

    def __init__(
        self,
        target_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        verification: Sequence[str],
        max_new_tokens: int,
        num_assistant_tokens: int | None,
        batch_size: int,
        seed: int,
    ) -> None:
        self.target_model, self.tokenizer = target_model, tokenizer
        self.verification, self.batch_size, self.seed = verification, batch_size, seed
        self.max_new_tokens = max_new_tokens
        self.asked_length = num_assistant_tokens
        self.reported_length = num_assistant_tokens or _DEFAULT_LENGTH
        self.suppressed = ids_without_token(target_model, tokenizer)
        self.context = sys.maxsize
        self.warnings: list[str] = []
        self.text_sets: list[TextSet] = []
        self.passes: list[PassResult] = []

    def take_texts(
        self,
        drafts: Sequence[PreTrainedModel],
        prompts: Any,
        dataset: Dataset | None,
        settings: list[DecodingSetting] | None,
        source: str | None,
    ) -> PromptInfo:
        """Have the target answer the prompts, or take what it answered earlier."""
        contents: Iterable[Any]
        defaults = settings_at(_DEFAULT_TEMPERATURES, repetition_penalty=own_penalty(self.target_model))
        if dataset is not None and is_recorded(dataset):
            self.text_sets = recorded_texts(dataset, settings)
            self.text_sets, found = by_this_target(self.target_model, self.text_sets)
            self.warnings += found
            left_out = sum(source != "generated" for source in dataset["ids_source"])
            if left_out:
                self.warnings.append(
                    f"{left_out} of {len(dataset)} rows do not hold the very tokens that a target wrote: left out."
                )
        elif dataset is not None:
            self.text_sets = other_texts(dataset, self.tokenizer, settings or defaults)
            self.warnings.append(
                "The texts do not say under which setting the target wrote these very tokens, so only acceptance rates "
                "are given. Give prompts for block efficiency."
            )
        else:
            loaded = load_prompts(prompts)
            lengths = list(map(len, render_prompts(loaded, self.tokenizer)))
            for model in (self.target_model, *drafts):
                fitting_rows(lengths, context_length(model), self.max_new_tokens)
            self.text_sets = generated_texts(
                self.target_model,
                self.tokenizer,
                loaded,
                settings or defaults,
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
                seed=self.seed,
            )
            contents = _contents(loaded)
            source = source or (str(prompts) if isinstance(prompts, str | Path) else None)
        if dataset is not None:
            # Each prompt once, and only those whose answers are measured.
            contents = dict.fromkeys(tuple(text.prompt_ids) for texts in self.text_sets for text in texts.texts)
            self.max_new_tokens = max(len(text.completion_ids) for texts in self.text_sets for text in texts.texts)
        for model in (self.target_model, *drafts):
            check_lengths(model, self.text_sets)
        self.context = shared_context(self.target_model, *drafts)
        self.warnings += inherited_setting_warnings(self.target_model, self.text_sets)
        count = max(len(set(texts.prompts)) for texts in self.text_sets)
        if count < _FEW_PROMPTS:
            self.warnings.append(
                f"Only {count} prompt{'s' if count > 1 else ''}: intervals from fewer than {_FEW_PROMPTS} are too "
                "narrow to be trusted."
            )
        return PromptInfo(
            source=source or "given",
            is_local=os.path.exists(source) if source else None,
            count=count,
            sha256=content_hash(contents),
        )

    def score(self, drafts: Sequence[PreTrainedModel], *, is_lossy: bool = False) -> list[DraftResult]:
        """One pass of target and drafts over every text set; `is_lossy` adds what `lossy_curve` needs."""
        vocab_size = min(shared_vocab_size(draft, self.target_model, self.tokenizer) for draft in drafts)
        self.warnings += suppressed_token_warnings(drafts, self.target_model, vocab_size)
        total = sum(len(texts.texts) for texts in self.text_sets)
        with logging.tqdm(total=total, desc="Scoring texts", unit="text") as bar:
            for texts in self.text_sets:
                check_ids(texts, vocab_size)
                scored = score_texts(
                    self.target_model,
                    drafts,
                    texts.texts,
                    texts.setting,
                    vocab_size=vocab_size,
                    verification=self.verification,
                    per_token=lossy_values if is_lossy and not texts.setting.is_greedy else None,
                    batch_size=self.batch_size,
                    on_texts=bar.update,
                )
                self.passes.append(scored)
                self.warnings += plausibility_warnings(self.target_model, texts, scored.share_plausible)
        return [
            DraftResult(draft=model_info(draft), settings=self._settings(index, draft))
            for index, draft in enumerate(drafts)
        ]

    def differences(self, index: int, baseline: int) -> list[PairedDifference]:
        """One draft minus another on the same texts, an entry for each of their settings."""
        return [
            paired_difference(
                texts.setting,
                rule,
                scored.drafts[index][rule],
                scored.drafts[baseline][rule],
                texts.prompts,
                has_blocks=_has_blocks(texts, scored),
            )
            for texts, scored in zip(self.text_sets, self.passes, strict=True)
            for rule in self._rules(texts)
        ]

    def groups(self, index: int, draft: PreTrainedModel) -> dict[str, list[SettingResult]] | None:
        """One draft's figures by domain or category; None where the data has no such column."""
        names = sorted({name for texts in self.text_sets for name in texts.groups or []})
        if not names:
            return None
        return {name: self._settings(index, draft, group=name) for name in names}

    def check_itself(self, draft: PreTrainedModel, num_prompts: int) -> SelfCheck:
        """Computed figures against counted ones, on a few of the prompts."""
        prompts = self._spread_prompts(num_prompts)
        settings = [texts.setting for texts in self.text_sets]
        total = len(prompts) * len(settings) * len(CHECKED_LENGTHS)
        with logging.tqdm(total=total, desc="Checking against real decoding", unit="text") as bar:
            found = self_check(
                self.target_model,
                draft,
                prompts,
                settings,
                vocab_size=shared_vocab_size(draft, self.target_model, self.tokenizer),
                max_new_tokens=self.max_new_tokens,
                suppress_tokens=self.suppressed,
                seed=self.seed,
                on_prompt=bar.update,
            )
        if not found.equal:
            self.warnings.append(
                "The self-check found computed figures that real decoding does not confirm (see `self_check`). In low "
                "precision near-ties do this; in float32 it is a fault worth reporting."
            )
        return found

    def lossy_curve(
        self, index: int, draft: PreTrainedModel, result: DraftResult, num_prompts: int
    ) -> list[LossyPoint]:
        """What lossy verification would gain and cost, for every sampled setting.

        Args:
            index: Which of the scored drafts.
            draft: The draft.
            result: Its figures; where it was timed, so is real decoding with `assistant_ensemble_weight`.
            num_prompts: Prompts for real decoding.
        """
        points = []
        for texts, scored in zip(self.text_sets, self.passes, strict=True):
            if texts.setting.is_greedy:
                continue
            tokens = next(iter(scored.drafts[index].values())).num_tokens
            for form in LENIENCE_FORMS:
                for lenience in LENIENCE:
                    acceptance, distance = (
                        bootstrap_ratio(
                            *by_prompt(texts.prompts, scored.extra[index][f"{name} {form} {lenience}"], tokens)
                        )
                        for name in ("acceptance", "distance")
                    )
                    point = LossyPoint(
                        decoding=texts.setting,
                        form=form,
                        lenience=lenience,
                        acceptance_rate=acceptance,
                        distance=distance,
                    )
                    if form == "ensemble" and lenience < 1 and result.latency is not None:
                        point.assisted = self._time_ensemble(draft, texts, result, lenience, num_prompts)
                    points.append(point)
        return points

    def _time_ensemble(
        self, draft: PreTrainedModel, texts: TextSet, result: DraftResult, weight: float, num_prompts: int
    ) -> AssistedResult:
        length = _timed_length(result) or self.reported_length
        prompts = self._spread_prompts(num_prompts)
        with logging.tqdm(total=len(prompts), desc=f"Timing ensemble weight {weight}", unit="prompt") as bar:
            times = time_decoding(
                self.target_model,
                draft,
                prompts,
                texts.setting,
                max_new_tokens=self.max_new_tokens,
                num_assistant_tokens=length,
                suppress_tokens=self.suppressed,
                seed=self.seed,
                on_prompt=bar.update,
                assistant_ensemble_weight=weight,
            )
        return assisted_result(times, length)

    def time(self, draft: PreTrainedModel, result: DraftResult, num_prompts: int) -> None:
        """Time steps and real decoding of one draft, and judge it; fills in `result`."""
        prompts = self._spread_prompts(num_prompts)
        result.latency = measure_latency(
            self.target_model,
            draft,
            prompts,
            max_new_tokens=self.max_new_tokens,
            suppress_tokens=self.suppressed,
            seed=self.seed,
        )
        length = self.asked_length or overall_draft_length(result.settings, result.latency) or _DEFAULT_LENGTH
        # Real decoding is transformers': it says nothing about a rule of another engine.
        timed = [
            (setting, texts.setting)
            for texts in self.text_sets
            for setting in result.settings
            if setting.is_transformers_rule and setting.decoding == texts.setting
        ]
        with logging.tqdm(total=len(prompts) * len(timed), desc="Timing decoding", unit="prompt") as bar:
            for setting, decoding in timed:
                times = time_decoding(
                    self.target_model,
                    draft,
                    prompts,
                    decoding,
                    max_new_tokens=self.max_new_tokens,
                    num_assistant_tokens=length,
                    suppress_tokens=self.suppressed,
                    seed=self.seed,
                    on_prompt=bar.update,
                )
                setting.assisted = assisted_result(times, length)
                compare_with_prediction(setting, result.latency)
        for setting in result.settings:
            setting.recommendation = recommend(setting, result.latency)
        result.recommendation = recommend_overall(result.settings, result.latency)

    def _settings(self, index: int, draft: PreTrainedModel, group: str | None = None) -> list[SettingResult]:
        ratio = draft.num_parameters() / self.target_model.num_parameters()
        results = []
        for texts, scored in zip(self.text_sets, self.passes, strict=True):
            sums, prompts = scored.drafts[index], texts.prompts
            if group is not None:
                chosen = [text for text, name in enumerate(texts.groups or []) if name == group]
                if not chosen:
                    continue
                sums = {rule: select_texts(of_rule, chosen) for rule, of_rule in sums.items()}
                prompts = [prompts[text] for text in chosen]
            results += [
                setting_result(
                    texts.setting,
                    rule,
                    sums[rule],
                    prompts,
                    num_assistant_tokens=self.reported_length,
                    parameter_ratio=ratio,
                    as_transformers=sums.get(AS_TRANSFORMERS) if rule == "rejection_sampling" else None,
                    has_blocks=_has_blocks(texts, scored),
                )
                for rule in self._rules(texts)
            ]
        return results

    def _rules(self, texts: TextSet) -> Sequence[str]:
        return (EXACT,) if texts.setting.is_greedy else self.verification

    def _spread_prompts(self, count: int) -> list[Sequence[int]]:
        """Prompts at even distances, so that sorted data is not timed on one kind of prompt alone."""
        found = {tuple(text.prompt_ids): text.prompt_ids for text in self.text_sets[0].texts}
        # Recorded prompts need not leave room for the longest recorded completion.
        unique = [prompt for prompt in found.values() if len(prompt) + self.max_new_tokens <= self.context]
        if not unique:
            raise ValueError(
                f"No prompt leaves room for {self.max_new_tokens} new tokens in a context of {self.context}, so "
                "decoding cannot be timed. Turn `measure_speed` and `verify` off."
            )
        count = min(count, len(unique))
        return [unique[place * len(unique) // count] for place in range(count)]


def _contents(prompts: Dataset) -> Iterable[Any]:
    """What tells prompts apart: their text, and what a chat template writes beside it."""
    beside = [name for name in ("tools", "chat_template_kwargs") if name in prompts.column_names]
    return prompts.select_columns(["prompt", *beside]) if beside else prompts["prompt"]


def _has_blocks(texts: TextSet, scored: PassResult) -> bool:
    """Whether the target itself wrote these texts under the setting they are reported for."""
    return texts.is_exact and scored.share_plausible >= PLAUSIBLE


def _timed_length(result: DraftResult) -> int | None:
    """The draft length real decoding was timed with, if it was."""
    lengths = [setting.assisted.num_assistant_tokens for setting in result.settings if setting.assisted is not None]
    return lengths[0] if lengths else None
