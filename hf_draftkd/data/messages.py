"""Messages and tools as a chat template reads them: one way for rows to train on, prompts, and texts to measure on.

Arrow gives every message, tool and argument the keys of all others, with null for a value, and a template prints those.
Templates also differ in what they take: content as text or as a list of parts, arguments as an object or as JSON.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

_MEDIA = ("image", "audio", "video", "file")
_PROBE, _ARGUMENT = "zebra", "walrus"
_USER = {"role": "user", "content": "x"}
_CALL = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {_ARGUMENT: 1}}}
# A conversation in which a message of each role may stand: what comes before it, and after it.
_AROUND: dict[str, tuple[list[Any], list[Any]]] = {
    "system": ([], [_USER]),
    "user": ([], []),
    "assistant": ([_USER], []),
    "tool": ([_USER, {"role": "assistant", "content": "", "tool_calls": [_CALL]}], []),
}


@dataclass(frozen=True)
class TemplateForm:
    """The form in which a chat template takes messages.

    `part_roles` are the roles whose content it reads as a list of parts; of `only_parts` it leaves out content that is
    text, without a word. It writes the `arguments` of a tool call from an `object` or from `text` (their JSON); None
    where it shows none. The `source` names the kinds of parts it knows.
    """

    part_roles: tuple[str, ...]
    only_parts: tuple[str, ...]
    arguments: str | None
    source: str


def template_form(tokenizer: PreTrainedTokenizerBase) -> TemplateForm:
    """Find the form by rendering small conversations: nothing else tells what a template does."""

    def rendered(messages: list[Any]) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception:  # templates raise whatever their author chose: it does not take this form
            return ""

    parts = [{"type": "text", "text": _PROBE}]
    part_roles, only_parts = [], []
    for role, (before, after) in sorted(_AROUND.items()):
        text = rendered([*before, {"role": role, "content": parts}, *after])
        # In quotes the list itself was printed.
        if _PROBE in text and f"'{_PROBE}'" not in text and f'"{_PROBE}"' not in text:
            part_roles.append(role)
            if _PROBE not in rendered([*before, {"role": role, "content": _PROBE}, *after]):
                only_parts.append(role)
    as_object = rendered([_USER, {"role": "assistant", "content": "", "tool_calls": [_CALL]}])
    call = {**_CALL, "function": {"name": "f", "arguments": json.dumps({_ARGUMENT: 1})}}
    as_text = rendered([_USER, {"role": "assistant", "content": "", "tool_calls": [call]}])
    arguments = None
    if _ARGUMENT in as_object and f"'{_ARGUMENT}'" not in as_object:
        arguments = "object"
    elif json.dumps({_ARGUMENT: 1}) in as_text:
        arguments = "text"
    # Not a set: `datasets` finds what it has cached by the pickle of what made it, which differs between processes.
    return TemplateForm(tuple(part_roles), tuple(only_parts), arguments, str(tokenizer.chat_template))


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that a chat template puts right behind an answer; None where it puts none."""
    messages = [_USER, {"role": "assistant", "content": _PROBE}]
    try:
        messages = read_messages(messages, template_form(tokenizer))
        behind = str(tokenizer.apply_chat_template(messages, tokenize=False)).rpartition(_PROBE)[2]
    except Exception:  # templates raise whatever their author chose
        return None
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((each for each in tokenizer(behind, add_special_tokens=False)["input_ids"] if each in special), None)


def read_messages(messages: Iterable[Mapping[str, Any]], form: TemplateForm) -> list[dict[str, Any]]:
    """Messages in the form that a template takes, without the nulls that Arrow adds.

    Nulls go from tool calls as well, where one that was meant cannot be told from one of Arrow's: arguments given as
    JSON keep theirs. Parts of text are joined, without anything between them, where the template does not read parts. A
    `ValueError` if a part is an image, audio or video, which no draft reads, or of a kind that the template does not
    know.
    """
    return [_read_message(message, form) for message in messages]


def read_tools(tools: Any) -> Any:
    """A row's `tools`: read from their JSON, and without the keys that Arrow adds."""
    return _read_json("tools", tools) or None


def read_options(template_kwargs: Any) -> dict[str, Any]:
    """A row's `chat_template_kwargs`, read like its tools, without those of other rows."""
    return _read_json("chat_template_kwargs", template_kwargs) or {}


def _read_json(column: str, value: Any) -> Any:
    if not isinstance(value, str):
        return without_nulls(value)
    try:
        return json.loads(value) if value.strip() else None
    except json.JSONDecodeError as error:
        raise ValueError(f"its `{column}` are text that is no JSON: {value[:60]!r}") from error


def without_nulls(value: Any) -> Any:
    """A value without the keys whose value is null, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list | tuple) else value


def _read_message(message: Mapping[str, Any], form: TemplateForm) -> dict[str, Any]:
    made = without_nulls(message)
    if "content" in message:  # templates look at it without asking whether it is there
        made["content"] = content = without_nulls(message["content"])
        role = str(message.get("role"))
        if isinstance(content, str) and role in form.only_parts:
            content = [content]
        if isinstance(content, list):
            made["content"] = _read_parts(content, role, form)
    for call in made.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, dict) else {}
        if "arguments" in function:
            function["arguments"] = _read_arguments(function["arguments"], form)
    return made


def _read_parts(parts: list[Any], role: str, form: TemplateForm) -> Any:
    made = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    reads_parts = role in form.part_roles
    for part in made:
        kind = str(part.get("type", "text" if "text" in part else None)) if isinstance(part, Mapping) else None
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise ValueError(f"the message of the {role} holds a part of type 'text' without a text. Take it out.")
            continue
        if kind is None or any(medium in kind for medium in _MEDIA):
            raise ValueError(
                f"the message of the {role} holds a part of type {kind!r}, but drafts read text only. Take it out if "
                "the answers do not depend on it."
            )
        if not (reads_parts and kind in form.source):
            raise ValueError(
                f"the message of the {role} holds a part of type {kind!r}, which the chat template does not read. "
                "Give its content as text."
            )
    return made if reads_parts else "".join(part["text"] for part in made)


def _read_arguments(arguments: Any, form: TemplateForm) -> Any:
    if form.arguments == "object" and isinstance(arguments, str):
        try:
            read = json.loads(arguments)
        except json.JSONDecodeError:
            return arguments
        return read if isinstance(read, dict) else arguments
    if form.arguments == "text" and isinstance(arguments, Mapping):
        return json.dumps(arguments, ensure_ascii=False)
    return arguments
