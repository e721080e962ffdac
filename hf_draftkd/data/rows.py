"""The row of alignment data: what the target read and wrote, and under which setting."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from hf_draftkd.data.backends import Completion
from hf_draftkd.data.decoding import DecodingSetting


def alignment_rows(
    prompts: Dataset,
    prompt_ids: list[list[int]],
    answers: Mapping[DecodingSetting, Sequence[Sequence[Completion]]],
    tokenizer: PreTrainedTokenizerBase,
    origin: dict[str, Any],
    brought: Features | None = None,
) -> Dataset:
    """Assemble alignment data, one row a completion, in the order of prompts, then settings.

    Args:
        prompts: The prompts and the columns carried along, P rows.
        prompt_ids: Their tokens, P lists.
        answers: Per decoding setting P lists of completions, one list a prompt.
        tokenizer: Decodes the completions, without special tokens.
        origin: `scenario`, `target`, `target_revision` and `seed` of every row.
        brought: Columns that each completion brings along as its `distributions`.
    """
    features = Features({**alignment_features(prompts.features), **(brought or {})})
    columns: dict[str, list[Any]] = {name: [] for name in features}
    for number, (row, ids) in enumerate(zip(prompts, prompt_ids, strict=True)):
        for setting, completion in ((s, each) for s, lists in answers.items() for each in lists[number]):
            text = completion.text
            if text is None:
                text = tokenizer.decode(
                    completion.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
            values = {
                **row,
                **origin,
                **setting.to_dict(),
                "completion": text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}],
                "prompt_ids": ids,
                "completion_ids": completion.token_ids,
                "ids_source": completion.ids_source,
                "finish_reason": completion.finish_reason,
                **(completion.distributions or dict.fromkeys(brought or {})),
            }
            for name, column in columns.items():
                column.append(values[name])
    return Dataset.from_dict(columns, features=features)


def alignment_features(prompt_features: Features) -> Features:
    """The columns of alignment data and their types, for prompts of the given features."""
    text = Value("string")
    is_text = prompt_features["prompt"] == text or prompt_features["prompt"] == Value("large_string")
    own = {
        "prompt": prompt_features["prompt"],
        "completion": text if is_text else List({"role": text, "content": text}),
        "prompt_ids": List(Value("int32")),
        "completion_ids": List(Value("int32")),
        "ids_source": text,
        "scenario": text,
        "target": text,
        "target_revision": text,
        "temperature": Value("float64"),
        "top_p": Value("float64"),
        "top_k": Value("int64"),
        "repetition_penalty": Value("float64"),
        "seed": Value("int64"),
        "finish_reason": text,
    }
    return Features({**own, **{name: kind for name, kind in prompt_features.items() if name not in own}})
