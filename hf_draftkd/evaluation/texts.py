"""The texts to measure on: written by the target now, or recorded earlier together with how they were written."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_draftkd.data.backends import STOP
from hf_draftkd.data.generation import generate_alignment_data
from hf_draftkd.data.messages import turn_end_id
from hf_draftkd.data.prompts import fitting_rows, load_prompts
from hf_draftkd.data.rows import authors, other_authors, render_prompts, with_token_ids
from hf_draftkd.data.sources import row_numbers
from hf_draftkd.decoding.setting import SETTING_COLUMNS, DecodingSetting, end_token_ids, left_out_warning, own_penalty
from hf_draftkd.evaluation.config import EvaluationConfig
from hf_draftkd.evaluation.report import PromptInfo
from hf_draftkd.evaluation.scoring import Text
from hf_draftkd.models.identity import ModelIdentity, identity_of
from hf_draftkd.models.pairing import context_length
from hf_draftkd.models.parallel import parallel_draft
from hf_draftkd.utils.fields import given_fields
from hf_draftkd.utils.hashing import sha256

# Below this share of tokens that the target could have written, a text was written by something else: rounding in
# low precision moves a few in a hundred at most.
PLAUSIBLE = 0.95
_GROUP_COLUMNS = ("domain", "category")
_FEW_PROMPTS = 20


@dataclass(frozen=True)
class TextSet:
    """Texts the target wrote under one setting.

    Attributes:
        setting: How they were decoded.
        texts: Prompts and completions.
        prompts: For each text, which prompt it answers.
        groups: For each text its domain or category, None for a row without one, where the data has such a column.
        written_by: Every target that the rows name.
        is_exact: Whether the texts are the target's own under this setting. Otherwise block efficiency means nothing.
    """

    setting: DecodingSetting
    texts: list[Text]
    prompts: list[int]
    groups: list[str | None] | None = None
    written_by: frozenset[ModelIdentity] = frozenset()
    is_exact: bool = True


@dataclass(frozen=True)
class MeasuredTexts:
    """Everything that an evaluation measures on.

    Attributes:
        sets: One for each decoding setting.
        info: Which prompts were answered.
        max_new_tokens: Longest completion, in tokens: as asked for, or the longest recorded one.
        end_ids: What ends a text: the target's own end tokens, and the end of turn where recorded answers stop at it.
        warnings: What a reader must know about the texts.
    """

    sets: list[TextSet]
    info: PromptInfo
    max_new_tokens: int
    end_ids: list[int]
    warnings: list[str]


def take_texts(
    target_model: PreTrainedModel,
    draft_models: Sequence[PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Any,
    dataset: Dataset | None,
    settings: Sequence[DecodingSetting] | None,
    source: str | None,
    config: EvaluationConfig,
) -> MeasuredTexts:
    """Have the target answer the prompts, or take what it answered earlier. Arguments as in `evaluate_draft`.

    Raises:
        ValueError: Prompts or texts are missing, empty or too long for one of the models; or an option would do nothing
            beside recorded answers.
    """
    penalty, max_new_tokens = own_penalty(target_model), config.max_new_tokens
    asked = settings or config.settings(penalty)
    end_ids = end_token_ids(target_model)
    contents: Iterable[Any]
    warnings: list[str] = []
    if dataset is None:
        loaded = load_prompts(prompts)
        lengths = list(map(len, render_prompts(loaded, tokenizer)))
        for model in (target_model, *draft_models):
            fitting_rows(lengths, _longest_read(model), max_new_tokens)
        warnings += _turn_warning(loaded, tokenizer, end_ids)
        sets = [_text_set(answers(target_model, tokenizer, loaded, [each], config), each) for each in asked]
        # What tells prompts apart: their text, and what a chat template writes beside it.
        beside = [name for name in ("tools", "chat_template_kwargs") if name in loaded.column_names]
        contents = loaded.select_columns(["prompt", *beside]) if beside else loaded["prompt"]
        source = source or (str(prompts) if isinstance(prompts, str | Path) else None)
    else:
        dataset = dataset.with_format(None)  # lists, whatever a training loop takes
        sets, warnings = _given_texts(target_model, tokenizer, dataset, settings, asked, config)
        end_ids |= _stopped_at(dataset, turn_end_id(tokenizer))
        # Each prompt once, and only those whose answers are measured.
        contents = dict.fromkeys(tuple(text.prompt_ids) for texts in sets for text in texts.texts)
        max_new_tokens = max(len(text.completion_ids) for texts in sets for text in texts.texts)
    longest = max(sum(map(len, text)) for texts in sets for text in texts.texts)
    for model in (target_model, *draft_models):
        context = _longest_read(model)
        if context is not None and longest > context:
            raise ValueError(
                f"The longest text has {longest} tokens, but {model.name_or_path or type(model).__name__!r} reads at "
                f"most {context}. Leave such texts out."
            )
    if penalty != 1 and all(texts.setting.repetition_penalty == penalty for texts in sets):
        warnings.append(
            f"The target's generation config carries repetition_penalty={penalty:g}: applied to draft and target alike."
        )
    warnings += left_out_warning(target_model, [texts.setting for texts in sets])
    count = max(len(set(texts.prompts)) for texts in sets)
    if count < _FEW_PROMPTS:
        warnings.append(
            f"Only {count} prompt{'s' if count > 1 else ''}: intervals from fewer than {_FEW_PROMPTS} are too "
            "narrow to be trusted."
        )
    info = PromptInfo(
        source=source or "given",
        is_local=os.path.exists(source) if source else None,
        count=count,
        domain=config.domain,
        sha256=sha256(json.dumps(item, ensure_ascii=False, sort_keys=True) + "\n" for item in contents),
    )
    return MeasuredTexts(sets, info, max_new_tokens, sorted(end_ids), warnings)


def _longest_read(model: PreTrainedModel) -> int | None:
    """The longest text that a model can be scored on: its context, and of a parallel draft no more than its sliding
    window, out of which no mask token can look.
    """
    limits = [context_length(model)]
    if parallel_draft(model.config):
        limits.append(getattr(model.config.get_text_config(), "sliding_window", None))
    return min((limit for limit in limits if limit is not None), default=None)


def _given_texts(
    target_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    settings: Sequence[DecodingSetting] | None,
    asked: Sequence[DecodingSetting],
    config: EvaluationConfig,
) -> tuple[list[TextSet], list[str]]:
    """The texts of a data set, and what a reader of the report must know of them."""
    if not is_recorded(dataset):
        warning = (
            "The texts do not say under which setting the target wrote these very tokens, so only acceptance rates "
            "are given. Give prompts for block efficiency."
        )
        return other_texts(dataset, tokenizer, asked), [warning]
    as_recorded = settings is None and config.temperatures is None
    for name in given_fields(config, ("top_p", "top_k", "repetition_penalty")):
        # Recorded answers were written under the settings in their rows, whatever is asked for beside them.
        if as_recorded:
            raise ValueError(
                f"`{name}` would do nothing: the data records the settings its answers were written under. "
                "Leave it out, or let the target answer again (`--regenerate`, or give `prompts`)."
            )
    sets, warnings = by_this_target(target_model, recorded_texts(dataset, None if as_recorded else asked))
    left_out = sum(source != "generated" for source in dataset["ids_source"])
    if left_out:
        warnings.append(f"{left_out} of {len(dataset)} rows do not hold the very tokens that a target wrote: left out.")
    return sets, warnings


def _turn_warning(prompts: Dataset, tokenizer: PreTrainedTokenizerBase, end_ids: frozenset[int]) -> list[str]:
    """A warning where answers to messages run on behind the end of turn, which no user of a chat model sees."""
    turn_end = None if isinstance(prompts[0]["prompt"], str) else turn_end_id(tokenizer)
    if turn_end is None or turn_end in end_ids:
        return []
    return [
        f"The chat template ends a turn with {tokenizer.convert_ids_to_tokens(turn_end)!r} (id {turn_end}), which is "
        "no end token in the target's generation config: answers may run on behind it, and are measured as they are. "
        "Add the id there, or give rows made with `stop_at_turn_end`."
    ]


def _stopped_at(dataset: Dataset, turn_end: int | None) -> set[int]:
    """The end of turn, where recorded answers were made to stop there (`stop_at_turn_end`)."""
    if turn_end is None or not {"finish_reason", "completion_ids"} <= set(dataset.column_names):
        return set()
    rows = zip(dataset["finish_reason"], dataset["completion_ids"], strict=True)
    return {turn_end} if any(reason == STOP and ids[-1:] == [turn_end] for reason, ids in rows) else set()


def answers(
    target_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
    settings: Sequence[DecodingSetting],
    config: EvaluationConfig,
) -> Dataset:
    """Have the target answer every prompt once under settings that differ in temperature: alignment data."""
    sampled = max(settings, key=lambda setting: setting.temperature)
    return generate_alignment_data(
        target_model,
        tokenizer,
        prompts,
        max_new_tokens=config.max_new_tokens,
        temperatures=[setting.temperature for setting in settings],
        top_p=sampled.top_p,
        top_k=sampled.top_k,
        repetition_penalty=sampled.repetition_penalty,
        batch_size=config.batch_size,
        seed=config.seed,
    )


def recorded_texts(dataset: Dataset, settings: Sequence[DecodingSetting] | None = None) -> list[TextSet]:
    """Texts of alignment data, by the setting each row records: of the settings asked for, or of every one found.

    Rows whose ids were made from text again are left out.

    Raises:
        ValueError: A setting asked for is not there, or a row records none.
    """
    dataset = dataset.select([row for row, source in enumerate(dataset["ids_source"]) if source == "generated"])
    rows: dict[DecodingSetting, list[int]] = {}
    for row, columns in enumerate(dataset.select_columns(list(SETTING_COLUMNS))):
        rows.setdefault(DecodingSetting.from_row(columns), []).append(row)
    if settings is not None:
        absent = [setting for setting in settings if setting not in rows]
        if absent:
            raise ValueError(
                f"No row was written under {absent[0]}; the dataset has: {'; '.join(map(str, rows))}. Block efficiency "
                "holds only for text written under the very setting reported. Ask for one of these, or give prompts."
            )
        rows = {setting: rows[setting] for setting in settings}
    return [_text_set(dataset.select(indices), setting) for setting, indices in rows.items()]


def other_texts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, settings: Sequence[DecodingSetting]
) -> list[TextSet]:
    """Texts that do not record how they were written: they give acceptance rates, and nothing else.

    Rows hold `prompt` and `completion`, which are encoded with the end token, or `prompt_ids` and `completion_ids`.

    Raises:
        ValueError: The columns are missing, there are no rows, a prompt has no tokens, or a chat template renders a
            conversation so that it does not begin with its own prompt.
    """
    if len(dataset) == 0:
        raise ValueError("The dataset holds no rows, so there is nothing to measure.")
    names = set(dataset.column_names)
    if not {"prompt_ids", "completion_ids"} <= names:
        if not {"prompt", "completion"} <= names:
            raise ValueError(
                f"The dataset has neither `prompt` and `completion` nor `prompt_ids` and `completion_ids` (columns: "
                f"{', '.join(dataset.column_names)}). Give texts with their prompts, or `prompts` for the target to "
                "answer here."
            )
        dataset = with_token_ids(dataset, tokenizer)
    if empty := [row for row, ids in enumerate(dataset["prompt_ids"]) if not ids]:
        raise ValueError(
            f"The prompts of {row_numbers(empty)} have no tokens, so nothing predicts the first token after them. "
            "Take them out, or begin them with some text."
        )
    return [replace(_text_set(dataset, setting), is_exact=False) for setting in settings]


def is_recorded(dataset: Dataset) -> bool:
    """Whether (some) rows hold the ids a target wrote, and the setting it wrote them under."""
    needed = {"prompt_ids", "completion_ids", "ids_source", *SETTING_COLUMNS}
    return needed <= set(dataset.column_names) and "generated" in dataset["ids_source"]


def _text_set(dataset: Dataset, setting: DecodingSetting) -> TextSet:
    rows = [row for row, completion in enumerate(dataset["completion_ids"]) if completion]
    if not rows:
        raise ValueError(f"Every completion written under {setting} is empty: there is nothing to measure.")
    dataset = dataset.select(rows)
    texts = [Text(*ids) for ids in zip(dataset["prompt_ids"], dataset["completion_ids"], strict=True)]
    by_prompt: dict[tuple[int, ...], int] = {}
    group = next((name for name in _GROUP_COLUMNS if name in dataset.column_names), None)
    return TextSet(
        setting=setting,
        texts=texts,
        prompts=[by_prompt.setdefault(tuple(text.prompt_ids), len(by_prompt)) for text in texts],
        groups=None if group is None else [None if name is None else str(name) for name in dataset[group]],
        written_by=frozenset(filter(None, authors(dataset))),
    )


def check_ids(texts: TextSet, vocab_size: int) -> None:
    """Refuse texts with an id outside the pair's shared vocabulary."""
    for number, text in enumerate(texts.texts):
        ids = [*text.prompt_ids, *text.completion_ids]
        if min(ids) < 0:
            raise ValueError(f"Text {number} holds {min(ids)}, which is no token. Take padding out of the ids.")
        if max(ids) >= vocab_size:
            raise ValueError(
                f"Text {number} holds token ids from {vocab_size} on, which the pair's shared vocabulary does not "
                "have. Was it written by another target?"
            )


def by_this_target(target_model: PreTrainedModel, text_sets: Sequence[TextSet]) -> tuple[list[TextSet], list[str]]:
    """The text sets with `is_exact` false where a row names another target, commit or weights; and a warning of it.

    Texts of another target say nothing about this target's block efficiency.
    """
    own = identity_of(target_model)
    judged = [
        replace(texts, is_exact=texts.is_exact and not other_authors(texts.written_by, own)) for texts in text_sets
    ]
    named = {author for texts in text_sets for author in texts.written_by}
    if not (others := other_authors(named, own)):
        return judged, []
    warning = (
        f"The texts were written by {', '.join(others)}, the target here is {own}: acceptance rates are given, block "
        "efficiencies are not."
    )
    if any(author.has_weights_of(own) is None and not author.matches(own) for author in named):
        warning += " If it is the same model under another name, put that name into the column `target`."
    return judged, [warning]


def plausibility_warnings(target_model: PreTrainedModel, texts: TextSet, share: float) -> list[str]:
    """A warning where some tokens are not what the target would have written under their setting.

    `share` is the share of tokens that it could have written. Texts that are not exact anyway are not judged.
    """
    if not texts.is_exact or share == 1:
        return []
    if share < PLAUSIBLE:
        return [
            f"Only {share:.1%} of the tokens recorded under {texts.setting} could have been written by this target so: "
            "they come from another model or setting, or this architecture gives other logits in a batch than for a "
            "single text (try `batch_size=1`). Acceptance rates are given, block efficiencies are not."
        ]
    return [
        f"{1 - share:.2%} of the tokens written under {texts.setting} are not what one forward pass of the target "
        f"gives: near-ties that rounding in {target_model.dtype} decides."
    ]


def suppressed_token_warnings(
    draft_models: Sequence[PreTrainedModel], target_model: PreTrainedModel, vocab_size: int
) -> list[str]:
    """A warning for each draft whose generation config keeps `generate` from proposing some tokens.

    The numbers computed here take no notice of that.
    """
    targets = set(target_model.generation_config.suppress_tokens or ())
    found = []
    for draft in draft_models:
        own = {token for token in draft.generation_config.suppress_tokens or () if token < vocab_size} - targets
        if own:
            found.append(
                f"The generation config of {draft.name_or_path or 'the draft'} suppresses {len(own)} "
                f"token{'s' if len(own) > 1 else ''} of the vocabulary ({min(own)}{', ...' if len(own) > 1 else ''}), "
                "which transformers then never drafts: computed numbers are those of a draft that may propose them."
            )
    return found
