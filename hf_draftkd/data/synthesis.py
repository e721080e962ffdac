"""Prompts from nothing: the target writes the queries itself (Magpie, https://arxiv.org/abs/2406.08464).

An aligned target is fed only the tokens that open a user's turn in its own chat template, and continues with what users
say there. A base model continues from its beginning-of-text token.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_draftkd.data.backends import STOP, Completion, local_backend
from hf_draftkd.data.filters import QueryFilter
from hf_draftkd.data.rows import dated, template_hash
from hf_draftkd.data.shards import (
    DAY,
    alone_in,
    check_processes,
    day_begun,
    full_disk_is_reported,
    open_folder,
    wait_until,
)
from hf_draftkd.data.targets import ids_without_token
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.models.identity import weights_fingerprint
from hf_draftkd.utils.checks import whole_number
from hf_draftkd.utils.files import write_text
from hf_draftkd.utils.hashing import derived_seed
from hf_draftkd.utils.versions import package_versions

logger = logging.get_logger(__name__)

# Stand where the user's text would, to see what the template puts around it. They begin and end with different kinds
# of characters, so that no token can swallow the border unnoticed in all of them.
_PROBES = ("Alpha beta9", "42 zebrasQ", "?quiet!", "été Ж", "xyz")
_INSTEAD = "Give prompts instead (scenario queries or curated)."


@dataclass(frozen=True)
class OpenTurn:
    """What a chat template puts around a user's text: tokens before it and behind it, and the latter as text."""

    prefix_ids: list[int]
    suffix_ids: list[int]
    suffix: str


def open_user_turn(
    tokenizer: PreTrainedTokenizerBase, *, system: str | None = None, template_options: dict[str, Any] | None = None
) -> OpenTurn:
    """Open a user's turn in any chat template, by rendering it around different texts and keeping what stays."""
    refused = "The chat template cannot be opened for a user's turn"
    options = {"add_generation_prompt": False, **(template_options or {})}
    rendered, texts = [], []
    for probe in _PROBES:
        messages = _chat(probe, system)
        try:
            texts.append(tokenizer.apply_chat_template(messages, tokenize=False, **options))
            rendered.append(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options))
        except Exception as error:  # templates raise whatever their author chose
            raise ValueError(f"{refused}: {error}") from error
        if texts[-1].count(probe) != 1:
            raise ValueError(
                f"{refused}: it does not show the user's text once and as it is (it makes {texts[-1][:80]!r} of "
                f"{probe!r}). {_INSTEAD}"
            )
    prefix = _common_beginning(rendered)
    suffix_ids = _common_beginning([ids[::-1] for ids in rendered])[::-1]
    if not prefix:
        raise ValueError(f"{refused}: nothing stands in front of the user's text to start from. {_INSTEAD}")
    return OpenTurn(prefix, suffix_ids, texts[0].split(_PROBES[0])[1])


def synthesize_prompts(
    target_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_prompts: int,
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 0.99,
    batch_size: int = 8,
    seed: int = 0,
    system: str | None = None,
    min_characters: int | None = None,
    max_characters: int | None = None,
    script: str | None = None,
    keep: Callable[[str], bool] | None = None,
    max_rounds: int | None = None,
    output_dir: "str | Path | None" = None,
    template_options: dict[str, Any] | None = None,
) -> tuple[Dataset, dict[str, int]]:
    """Have the target write the prompts: messages where its tokenizer has a chat template, else openings of text.

    `max_new_tokens`, `temperature`, `top_p`, `batch_size`, `seed`, `system`, `min_characters`, `max_characters` and
    `script` are what [`AlignmentDataConfig`] calls `query_max_new_tokens`, ..., `system_prompt` and so on. An aligned
    target's query that does not end within its length is left out; a base model's is an opening of that length. `keep`
    is any further test on a query's text, such as a language detector. After `max_rounds` of `2 * batch_size` queries
    it stops: by default ten times as many as needed. In `output_dir` each round is kept, so that a killed run resumes;
    several processes need it. `template_options` are further arguments of the chat template.

    Returns:
        The prompts (column `prompt`), and how many queries were `kept`, how many fell to each filter, and how many
        were `surplus`: good, but more than wanted, in the last round.

    Raises:
        ValueError: The template cannot be opened, or no query was kept.
    """
    folder = None if output_dir is None else Path(output_dir)
    day = day_begun(folder)
    clock = dated(tokenizer, day)
    options = clock | (template_options or {})
    turn, start = check_synthesis(
        tokenizer, num_prompts, temperature=temperature, system=system, template_options=options
    )
    accept = QueryFilter(min_characters=min_characters, max_characters=max_characters, script=script, keep=keep)
    setting = DecodingSetting(temperature=temperature, top_p=top_p)
    backend = local_backend(
        target_model,
        tokenizer,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        suppress_tokens=ids_without_token(target_model, tokenizer),
    )
    size = 2 * batch_size
    rounds = max_rounds if max_rounds is not None else 10 * -(-num_prompts // size)
    state = check_processes(folder)
    manifest: dict[str, Any] = {}
    if folder is not None:
        manifest = {
            "schema_version": 1,
            "target": target_model.name_or_path,
            "target_weights": weights_fingerprint(target_model),
            "chat_template": template_hash(tokenizer),
            "start_ids": start,
            "settings": {**setting.to_dict(), "max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": seed},
            "versions": package_versions(),
            **({DAY: day} if clock else {}),
        }

    def sample(number: int) -> list[tuple[str, bool]]:
        queries: dict[int, tuple[str, bool]] = {}
        for group in backend([start] * size, setting, derived_seed(seed, "queries", number), frozenset()):
            queries |= {place: query_text(completion, tokenizer, turn) for place, completion in group.items()}
        return [queries[place] for place in range(size)]

    kept: list[str] = []
    is_first = state.is_main_process
    with (
        alone_in(folder),
        logging.tqdm(total=num_prompts, desc="Target's queries", unit="query", disable=not is_first) as bar,
    ):
        if folder is not None:
            open_folder(folder, manifest, write=is_first)
        for queries in _in_turn(sample, rounds, folder, state):
            accepted = [query for query, finished in queries if accept(query, finished)]
            bar.update(min(len(accepted), num_prompts - len(kept)))
            kept += accepted
            if len(kept) >= num_prompts:
                break
    counts = dict(accept.counts)
    if (surplus := len(kept) - num_prompts) > 0:
        counts |= {"kept": num_prompts, "surplus": surplus}
    _report(len(kept), num_prompts, counts)
    kept = kept[:num_prompts]
    prompts = kept if turn is None else [_chat(query, system) for query in kept]
    return Dataset.from_dict({"prompt": prompts}), counts


def _in_turn(
    sample: Callable[[int], list[tuple[str, bool]]], rounds: int, folder: Path | None, state: PartialState
) -> Iterator[list[tuple[str, bool]]]:
    """The queries of each round, in order. Processes write rounds side by side, one each, and all read all of them."""
    for first in range(0, rounds, state.num_processes):
        if folder is None:
            yield sample(first)
            continue
        mine = first + state.process_index
        # Before anything is waited for: all write at the same time.
        if mine < rounds and not (path := _round_path(folder, mine)).exists():
            with full_disk_is_reported(f"round {mine} of the queries", folder):
                write_text(path, json.dumps(sample(mine), ensure_ascii=False))
        for number in range(first, min(first + state.num_processes, rounds)):
            path = _round_path(folder, number)
            wait_until(path.exists)
            yield [(text, finished) for text, finished in json.loads(path.read_text(encoding="utf-8"))]


def _round_path(folder: Path, number: int) -> Path:
    return folder / "data" / f"round-{number:05d}.json"


def check_synthesis(
    tokenizer: PreTrainedTokenizerBase,
    num_prompts: int,
    *,
    temperature: float,
    system: str | None,
    template_options: dict[str, Any],
) -> tuple[OpenTurn | None, list[int]]:
    """Refuse what can be refused before the target is loaded.

    Returns:
        The open turn (None without a chat template), and the tokens that the target starts from.

    Raises:
        ValueError: The template cannot be opened, there is nothing to start from, or a value is out of range.
    """
    whole_number("num_prompts", num_prompts)
    if temperature == 0:
        raise ValueError("At temperature 0 every query would be the same. Sample them at a temperature above 0.")
    if not getattr(tokenizer, "chat_template", None):
        # GPT-2's family begins and ends texts with one token and names it as both, or as the end only.
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if first is None:
            raise ValueError(
                "The tokenizer has neither a chat template nor a beginning-of-text token for the target to start from. "
                + _INSTEAD
            )
        return None, [first]
    turn = open_user_turn(tokenizer, system=system, template_options=template_options)
    return turn, turn.prefix_ids


def query_text(completion: Completion, tokenizer: PreTrainedTokenizerBase, turn: OpenTurn | None) -> tuple[str, bool]:
    """The query in what the target wrote, and whether it came to an end there."""
    ids, ends = completion.token_ids, turn is None  # an opening of text may break off anywhere
    end = turn.suffix_ids[:1] if turn is not None else []
    if end and end[0] in tokenizer.all_special_ids and end[0] in ids:
        # The token that closes a user's turn need not be one at which generation stops.
        ids, ends = ids[: ids.index(end[0])], True
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if turn is None or ends:
        return text.strip(), True
    closing = turn.suffix.strip()
    if closing and closing in text:  # templates that close a turn in plain text, such as [/INST]
        return text[: text.index(closing)].strip(), True
    return text.strip(), completion.finish_reason == STOP


def _report(kept: int, num_prompts: int, counts: dict[str, int]) -> None:
    total = sum(counts.values())
    fallen = ", ".join(f"{count} {reason}" for reason, count in counts.items() if reason != "kept") or "none"
    if not kept:
        raise ValueError(
            f"None of {total} queries was kept (left out: {fallen}). Does the target answer chats at all? If they are "
            "unfinished, allow longer queries: `query_max_new_tokens` (`max_new_tokens` of `synthesize_prompts`)."
        )
    logger.info(f"Kept {counts['kept']} of {total} queries; left out: {fallen}.")
    if kept < num_prompts:
        logger.warning(
            f"Only {kept} of {num_prompts} prompts could be synthesized from {total} queries (left out: {fallen}). For "
            "more, raise `query_max_new_tokens` where they are unfinished, else `query_temperature` (of "
            "`synthesize_prompts`: `max_new_tokens` and `temperature`, or `max_rounds`)."
        )


def _chat(query: str, system: str | None) -> list[dict[str, str]]:
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": query}]


def _common_beginning(lists: list[list[int]]) -> list[int]:
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*lists, strict=False))]
