"""The row of alignment data: what the target read and wrote, and under which setting."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from hf_draftkd.data.backends import Completion, cut_completion
from hf_draftkd.data.prompts import clean_message, render_prompt, tool_schemas
from hf_draftkd.data.sources import unknown
from hf_draftkd.data.target_cache import CACHE_COLUMNS, TEMPERATURE_COLUMN
from hf_draftkd.decoding.setting import DecodingSetting


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
    # Prompts may come from older alignment data: its distributions are of completions that are now written anew.
    left_behind = {*own, *CACHE_COLUMNS, TEMPERATURE_COLUMN}
    return Features({**own, **{name: kind for name, kind in prompt_features.items() if name not in left_behind}})


def with_token_ids(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, **template_options: Any) -> Dataset:
    """Give text that exists the token columns of alignment data, encoded once (`ids_source` "retokenized").

    The tokens are those the tokenizer makes of the text, which need not be those that its writer read and wrote: such
    rows serve training and caches, not block efficiency.

    Args:
        dataset: Rows with `prompt` and `completion`, strings or lists of messages, and `tools` and
            `chat_template_kwargs` as in `render_prompts`; or with `text`, of which the first token becomes the prompt
            and all others, each predicted by those before it, the completion.
        tokenizer: The target's tokenizer.
        **template_options: Further arguments of the chat template.

    Returns:
        The dataset with `prompt_ids`, `completion_ids` (with the end token) and `ids_source`.

    Raises:
        ValueError: A column is missing, or the chat template does not continue the prompt with the completion.
    """
    is_text = "text" in dataset.column_names and not {"prompt", "completion"} <= set(dataset.column_names)
    for name in () if is_text else ("prompt", "completion"):
        if name not in dataset.column_names:
            raise ValueError(unknown("column", name, dataset.column_names))
    features = Features(
        {**dataset.features, **{name: List(Value("int32")) for name in ("prompt_ids", "completion_ids")}}
        | {"ids_source": Value("string")}
    )

    def encode(row: dict[str, Any], number: int) -> dict[str, Any]:
        if is_text:
            end = str(tokenizer.eos_token or "")
            ids = tokenizer(row["text"] if row["text"].endswith(end) else row["text"] + end)["input_ids"]
            return {**row, "prompt_ids": ids[:1], "completion_ids": ids[1:], "ids_source": "retokenized"}
        options = {**template_options, **(row.get("chat_template_kwargs") or {})}
        prompt_ids = render_prompt(row["prompt"], tokenizer, tools=row.get("tools"), **options)
        if isinstance(row["prompt"], str):
            ids = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
            ids = ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]
        else:
            messages = [clean_message(message) for message in [*row["prompt"], *row["completion"]]]
            tools = tool_schemas(row.get("tools"))
            whole = tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False, **options)
            if whole[: len(prompt_ids)] != prompt_ids:
                raise ValueError(
                    f"Row {number} (counted from 0): the chat template does not continue the rendered prompt when the "
                    "completion is added, so there are no completion tokens. Generate the data with the target instead."
                )
            # Templates put a line break behind the end token, which no target writes.
            ends = frozenset() if tokenizer.eos_token_id is None else frozenset([tokenizer.eos_token_id])
            ids, _ = cut_completion(whole[len(prompt_ids) :], ends)
        return {**row, "prompt_ids": prompt_ids, "completion_ids": ids, "ids_source": "retokenized"}

    return dataset.map(encode, with_indices=True, features=features, desc="Encoding text")
