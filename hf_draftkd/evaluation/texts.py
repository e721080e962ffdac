"""The texts to measure on: written by the target now, or recorded earlier together with how they were written."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_draftkd.data.generation import generate_alignment_data
from hf_draftkd.data.rows import with_token_ids
from hf_draftkd.decoding.setting import SETTING_COLUMNS, DecodingSetting
from hf_draftkd.evaluation.teacher_forced import Text

_GROUP_COLUMNS = ("domain", "category")


@dataclass(frozen=True)
class TextSet:
    """Texts the target wrote under one setting.

    Attributes:
        setting: How they were decoded.
        texts: Prompts and completions.
        prompts: For each text, which prompt it answers.
        groups: For each text its domain or category, where the data has such a column.
        written_by: Every target that the rows name, each with the commit they name beside it, or None.
        is_exact: Whether the texts are the target's own under this setting. Otherwise block efficiency means nothing.
    """

    setting: DecodingSetting
    texts: list[Text]
    prompts: list[int]
    groups: list[str] | None = None
    written_by: frozenset[tuple[str, str | None]] = frozenset()
    is_exact: bool = True


def generated_texts(
    target_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
    settings: Sequence[DecodingSetting],
    *,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> list[TextSet]:
    """Have the target answer every prompt once under each setting."""
    return [
        _text_set(
            generate_alignment_data(
                target_model,
                tokenizer,
                prompts,
                max_new_tokens=max_new_tokens,
                temperatures=(setting.temperature,),
                top_p=setting.top_p,
                top_k=setting.top_k,
                repetition_penalty=setting.repetition_penalty,
                batch_size=batch_size,
                seed=seed,
            ),
            setting,
        )
        for setting in settings
    ]


def recorded_texts(dataset: Dataset, settings: Sequence[DecodingSetting] | None = None) -> list[TextSet]:
    """Texts of alignment data, by the setting each row records.

    Args:
        dataset: Alignment data whose rows `is_recorded`; those whose ids were made from text again are left out.
        settings: Settings to take; by default every one found.

    Raises:
        ValueError: A setting asked for is not there, or a row records none.
    """
    dataset = dataset.select([row for row, source in enumerate(dataset["ids_source"]) if source == "generated"])
    columns = zip(*(dataset[name] for name in SETTING_COLUMNS), strict=True)
    rows: dict[DecodingSetting, list[int]] = {}
    for row, values in enumerate(columns):
        found = DecodingSetting.from_row(dict(zip(SETTING_COLUMNS, values, strict=True)))
        rows.setdefault(found, []).append(row)
    if settings is not None:
        absent = [setting for setting in settings if setting not in rows]
        if absent:
            raise ValueError(
                f"No row was written under {absent[0]}; the dataset has: "
                f"{'; '.join(map(str, rows))}. Block efficiency holds only for text written "
                "under the very setting reported. Ask for one of these, or give prompts."
            )
        rows = {setting: rows[setting] for setting in settings}
    return [_text_set(dataset.select(indices), setting) for setting, indices in rows.items()]


def other_texts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, settings: Sequence[DecodingSetting]
) -> list[TextSet]:
    """Texts that do not record how they were written: they give acceptance rates, and nothing else.

    Args:
        dataset: Rows with `prompt` and `completion`, or with `prompt_ids` and `completion_ids`.
        tokenizer: Encodes the former, with the end token.
        settings: Settings to report acceptance under.

    Raises:
        ValueError: The columns are missing, there are no rows, or a chat template renders a conversation so that it
            does not begin with its own prompt.
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
    return [replace(_text_set(dataset, setting), is_exact=False) for setting in settings]


def is_recorded(dataset: Dataset) -> bool:
    """Whether (some) rows hold the ids a target wrote, and the setting it wrote them under."""
    needed = {"prompt_ids", "completion_ids", "ids_source", *SETTING_COLUMNS}
    return needed <= set(dataset.column_names) and "generated" in dataset["ids_source"]


def group_column(column_names: Sequence[str]) -> str | None:
    """The column that groups prompts, if there is one."""
    return next((name for name in _GROUP_COLUMNS if name in column_names), None)


def _text_set(dataset: Dataset, setting: DecodingSetting) -> TextSet:
    by_prompt: dict[tuple[int, ...], int] = {}
    texts, prompts, kept = [], [], []
    for row, (prompt, completion) in enumerate(zip(dataset["prompt_ids"], dataset["completion_ids"], strict=True)):
        if completion:
            texts.append(Text(prompt, completion))
            prompts.append(by_prompt.setdefault(tuple(prompt), len(by_prompt)))
            kept.append(row)
    if not texts:
        raise ValueError(f"Every completion written under {setting} is empty: there is nothing to measure.")
    group = group_column(dataset.column_names)
    return TextSet(
        setting=setting,
        texts=texts,
        prompts=prompts,
        groups=None if group is None else [str(dataset[group][row]) for row in kept],
        written_by=frozenset((name, commit) for name, commit in _authors(dataset.select(kept)) if name is not None),
    )


def _authors(dataset: Dataset) -> Iterable[tuple[str | None, str | None]]:
    names, commits = (
        dataset[name] if name in dataset.column_names else [None] * len(dataset)
        for name in ("target", "target_revision")
    )
    return zip(names, commits, strict=True)
