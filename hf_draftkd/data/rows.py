"""Rows: from what users bring to the token ids that the target reads, and from its answers to alignment data.

Prompts and texts become token ids here and nowhere else.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from hf_draftkd.data.backends import REFUSED, Completion, cut_completion
from hf_draftkd.data.columns import distinct
from hf_draftkd.data.kept_distributions import CACHE_COLUMNS, TEMPERATURE_COLUMN, VOCAB_COLUMN, as_stored
from hf_draftkd.data.messages import TemplateForm, read_messages, read_options, read_tools, template_form, turn_end_id
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.models.identity import ModelIdentity
from hf_draftkd.utils.checks import one_of
from hf_draftkd.utils.hashing import list_hash

Prompt = str | list[dict[str, Any]]
# Who wrote a row: the fields of its `ModelIdentity`, in order.
AUTHOR_COLUMNS = ("target", "target_revision", "target_weights")
# How a chat template asks for the date.
_CLOCK = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<form>.*?)(?P=quote)\s*\)""")


def _render_text(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = tokenizer(prompt)["input_ids"]
    # A tokenizer that closes every text would close the prompt before the target could continue it.
    if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(str(tokenizer.eos_token)):
        ids = ids[:-1]
    # Text that was already rendered brings its own beginning-of-text token.
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos] and not prompt.startswith(str(tokenizer.bos_token) * 2):
        ids = ids[1:]
    return ids


def render_prompts(
    prompts: "Dataset | Sequence[Prompt]",
    tokenizer: PreTrainedTokenizerBase,
    *,
    first_row: int = 0,
    **template_options: Any,
) -> list[list[int]]:
    """Turn prompts into the token ids that the target reads, once and for all.

    Messages go through the tokenizer's chat template with `add_generation_prompt=True` and receive no further special
    tokens. Strings are encoded as plain text, with the special tokens the tokenizer puts in front of a text.

    Args:
        prompts: Strings and message lists; or a dataset with a `prompt` column and, if it likes, `tools` (schemas or
            their JSON) and `chat_template_kwargs` as in TRL, all read as `messages.py` says.
        tokenizer: The target's tokenizer.
        first_row: Number of the first prompt, for messages.
        **template_options: Further arguments of the chat template, such as `enable_thinking=False`.

    Raises:
        ValueError: Messages are given and the tokenizer has no chat template, the template refuses them, or they hold
            what a draft cannot read, such as images.
    """
    rows: Iterable[Mapping[str, Any]]
    rows = prompts if isinstance(prompts, Dataset) else ({"prompt": prompt} for prompt in prompts)
    rendered, form = [], None
    for number, row in enumerate(rows, start=first_row):
        if isinstance(row["prompt"], str):
            rendered.append(_render_text(row["prompt"], tokenizer))
            continue
        if form is None:
            require_chat_template(tokenizer)
            form = template_form(tokenizer)
        try:
            messages, options = read_messages(row["prompt"], form), _template_options(row, template_options)
            rendered.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options))
        except Exception as error:
            # Templates raise whatever their author chose; all of it is about this row.
            raise ValueError(f"The chat template cannot render prompt {number} (from 0): {error}") from error
    return rendered


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a `ValueError` if `tokenizer` cannot render messages."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"The prompts are chat messages, but the tokenizer {tokenizer.name_or_path!r} has no chat template. Give "
            "the prompts as plain strings, or use a chat-tuned target, or set `tokenizer.chat_template`."
        )


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A hash of the chat template; None where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return None if not template else list_hash([json.dumps(template, sort_keys=True)])


def dated(tokenizer: PreTrainedTokenizerBase, day: str) -> dict[str, Any]:
    """Template options under which a template shows a given day (ISO) as today's; none where it shows no date.

    Those of Llama 3.2 and gpt-oss write the date into every prompt, so that a run resumed on the next day would read
    other tokens than it was begun with. transformers gives templates nothing but plain data, so the day stands in them.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str) or not _CLOCK.search(template):
        return {}
    moment = datetime.fromisoformat(day)
    return {"chat_template": _CLOCK.sub(lambda call: json.dumps(moment.strftime(call["form"])), template)}


def with_token_ids(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, **template_options: Any) -> Dataset:
    """Give text that exists the token columns of alignment data, encoded once (`ids_source` "retokenized").

    The tokens are those the tokenizer makes of the text, which need not be those that its writer read and wrote: such
    rows serve training and caches, not block efficiency.

    Rows have `prompt` and `completion`, strings or lists of messages, and `tools` and `chat_template_kwargs` as in
    `render_prompts`; or `text`, of which the first token becomes the prompt and all others, each predicted by those
    before it, the completion.

    Returns:
        The dataset with `prompt_ids`, `completion_ids` (with the end token) and `ids_source`.

    Raises:
        ValueError: A column is missing, a completion is not a single message, or the chat template does not continue
            the prompt with it.
    """
    is_text = "text" in dataset.column_names and not {"prompt", "completion"} <= set(dataset.column_names)
    if not is_text:
        for name in ("prompt", "completion"):
            one_of("column", name, dataset.column_names)
    features = Features(
        {**dataset.features, **{name: List(Value("int32")) for name in ("prompt_ids", "completion_ids")}}
        | {"ids_source": Value("string")}
    )

    talks = not is_text and len(dataset) > 0 and not isinstance(dataset[0]["prompt"], str)
    if talks:
        require_chat_template(tokenizer)
    form = template_form(tokenizer) if talks else None
    # Where the template ends no turn with the tokenizer's end token (Gemma), it has one of its own.
    ends: list[int | None] = [tokenizer.eos_token_id, turn_end_id(tokenizer)] if talks else []

    def encode(row: dict[str, Any], number: int) -> dict[str, Any]:
        try:
            if is_text:
                end = str(tokenizer.eos_token or "")
                ids = tokenizer(row["text"] if row["text"].endswith(end) else row["text"] + end)["input_ids"]
                prompt, completion = ids[:1], ids[1:]
            elif form is None:
                prompt = _render_text(row["prompt"], tokenizer)
                completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
                completion += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            else:
                prompt, completion = _answered_ids(row, form, ends, tokenizer, template_options)
        except ValueError as error:
            raise ValueError(f"Row {number} (counted from 0): {error}") from error
        return {**row, "prompt_ids": prompt, "completion_ids": completion, "ids_source": "retokenized"}

    return dataset.map(encode, with_indices=True, features=features, desc="Encoding text")


def _answered_ids(
    row: Mapping[str, Any],
    form: TemplateForm,
    ends: Sequence[int | None],
    tokenizer: PreTrainedTokenizerBase,
    template_options: Mapping[str, Any],
) -> tuple[list[int], list[int]]:
    """The tokens of a row's messages, and those by which its answer continues them up to one of `ends`."""
    answer = row["completion"]
    if isinstance(answer, str) or len(answer) != 1:
        got = "text" if isinstance(answer, str) else f"{len(answer)} messages"
        raise ValueError(
            f"the completion of messages must be one message, the answer, got {got}. Make a row of each answer, with "
            "all that comes before it in the prompt."
        )
    options = _template_options(row, template_options)
    messages = read_messages([*row["prompt"], *answer], form)
    whole = tokenizer.apply_chat_template(messages, **options)
    prompt = tokenizer.apply_chat_template(messages[: len(row["prompt"])], add_generation_prompt=True, **options)
    if whole[: len(prompt)] != prompt:
        raise ValueError(
            "the chat template does not continue the rendered prompt when the completion is added, so there are no "
            "completion tokens. Generate the data with the target instead."
        )
    completion = whole[len(prompt) :]
    # Templates put a line break behind the end token, which no target writes.
    if (last := next((each for each in ends if each in completion), None)) is not None:
        completion, _ = cut_completion(completion, frozenset([last]))
    return prompt, completion


def _template_options(row: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """How a row's messages are rendered to ids: as asked for everywhere, as the row asks, and with its tools."""
    options = {**given, **read_options(row.get("chat_template_kwargs")), "tools": read_tools(row.get("tools"))}
    return options | {"tokenize": True, "return_dict": False}


def alignment_rows(
    prompts: Dataset,
    prompt_ids: list[list[int]],
    answers: Mapping[DecodingSetting, Sequence[Sequence[Completion]]],
    tokenizer: PreTrainedTokenizerBase,
    origin: dict[str, Any],
    brought: Features | None = None,
) -> Dataset:
    """Assemble alignment data, one row per completion, in the order of prompts, then settings.

    Args:
        prompts: P prompts, with the columns to carry along.
        prompt_ids: The token ids of each.
        answers: For each decoding setting, the completions of each prompt.
        tokenizer: The target's tokenizer.
        origin: `scenario`, `seed` and `AUTHOR_COLUMNS` of every row.
        brought: Columns that each completion brings along as its `distributions`.
    """
    brought = brought or Features()
    features = Features({**alignment_features(prompts.features), **brought})
    columns: dict[str, list[Any]] = {name: [] for name in features}
    for number, (row, ids) in enumerate(zip(prompts, prompt_ids, strict=True)):
        for setting, completion in ((s, each) for s, lists in answers.items() for each in lists[number]):
            if completion.finish_reason == REFUSED:
                continue
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
                **as_stored(completion.distributions, brought),
            }
            for name, column in columns.items():
                column.append(values[name])
    return Dataset.from_dict(columns, features=features)


def author_of(row: Mapping[str, Any]) -> ModelIdentity | None:
    """The target that wrote a row, as far as the row (or the manifest of a folder of rows) says."""
    name, revision, weights = (row.get(name) for name in AUTHOR_COLUMNS)
    return None if name is None else ModelIdentity(name, revision, weights)


def authors(dataset: Dataset) -> set[ModelIdentity | None]:
    """Every target that rows name, and None if some of them name none."""
    named = [name for name in AUTHOR_COLUMNS if name in dataset.column_names]
    return {author_of(row) for row in distinct(dataset, named)} if named and len(dataset) else {None}


def other_authors(named: Iterable[ModelIdentity | None], target: ModelIdentity) -> list[str]:
    """The authors that are not the target in use, each with what differs from it, for messages."""
    differences = {each: each.difference(target) for each in named if each is not None}
    return sorted({f"{author} ({difference})" for author, difference in differences.items() if difference})


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
        **dict.fromkeys(AUTHOR_COLUMNS, text),
        "temperature": Value("float64"),
        "top_p": Value("float64"),
        "top_k": Value("int64"),
        "repetition_penalty": Value("float64"),
        "seed": Value("int64"),
        "finish_reason": text,
    }
    # Prompts may come from older alignment data: its distributions are of completions that are now replaced.
    left_behind = {*own, *CACHE_COLUMNS, TEMPERATURE_COLUMN, VOCAB_COLUMN}
    return Features({**own, **{name: kind for name, kind in prompt_features.items() if name not in left_behind}})
