"""The target answers the prompts: alignment data, one row a completion, with the exact tokens it read and wrote."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_draftkd.data.backends import Backend, Completion, continuous_backend, pipeline_backend
from hf_draftkd.data.decoding import DecodingSetting
from hf_draftkd.data.prompts import context_length, fitting_rows, load_prompts, render_prompts

logger = logging.get_logger(__name__)

SCENARIOS = ("queries", "curated", "synthetic")
_LARGEST_SHARD = 256


def generate_alignment_data(
    target_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: "Dataset | str | Path | Sequence[Any]",
    *,
    max_new_tokens: int = 256,
    temperatures: Sequence[float] = (0.0,),
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    num_completions: int = 1,
    batch_size: int = 8,
    seed: int = 0,
    scenario: str = "queries",
    shard_size: int | None = None,
    skip_too_long: bool = False,
    continuous_batching: bool = False,
    template_options: dict[str, Any] | None = None,
) -> Dataset:
    """Have the target answer every prompt.

    The rows follow from the arguments alone: prompts are cut into fixed shards, and each shard is seeded from `seed`,
    its number and the decoding setting.

    Args:
        target_model: The target, where it is to run.
        tokenizer: Its tokenizer.
        prompts: Anything that `load_prompts` takes. Further columns (such as `domain`) are carried along.
        max_new_tokens: Longest completion, in tokens.
        temperatures: One completion a prompt for each; 0 is greedy. The paper of the Llama 2 chat drafter
            (https://arxiv.org/abs/2403.00858) uses 0, 0.3, 0.7 and 1.0 with `top_p` 0.95.
        top_p: Nucleus sampling at the temperatures above 0.
        top_k: Top-k sampling at the temperatures above 0; 0 keeps every token.
        repetition_penalty: As in transformers; 1 is none.
        num_completions: Completions a prompt at each temperature above 0. Greedy decoding gives one.
        batch_size: Prompts decoded together. Sampled completions depend on it.
        seed: Seed of the whole data set.
        scenario: Where the prompts come from: `queries`, `curated` or `synthetic`.
        shard_size: Prompts a shard. By default a sixteenth of the prompts, at most 256.
        skip_too_long: Leave out prompts that do not fit into the context, and warn, instead of refusing them.
        continuous_batching: Use transformers' continuous batching; sampled rows can then not be repeated.
        template_options: Further arguments of the chat template.

    Returns:
        One row a completion, ordered by prompt, temperature and number: `prompt`, `completion`, `prompt_ids`,
        `completion_ids`, `ids_source`, `scenario`, `target`, `target_revision`, `temperature`, `top_p`, `top_k`,
        `repetition_penalty`, `seed`, `finish_reason`, and the further columns of the prompts.

    Raises:
        ValueError: A value is out of range, or prompts are unusable (see `load_prompts` and `render_prompts`).
    """
    settings = decoding_settings(temperatures, top_p=top_p, top_k=top_k, repetition_penalty=repetition_penalty)
    _require_at_least_one(max_new_tokens=max_new_tokens, num_completions=num_completions, batch_size=batch_size)
    if scenario not in SCENARIOS:
        raise ValueError(f"`scenario` must be one of {', '.join(SCENARIOS)}, got {scenario!r}.")
    prompts = load_prompts(prompts)
    template_options = template_options or {}
    lengths = [len(ids) for ids in _render_in_chunks(prompts, tokenizer, template_options)]
    fitting = fitting_rows(lengths, context_length(target_model.config), max_new_tokens, skip_too_long=skip_too_long)
    prompts = prompts.select(fitting) if len(fitting) < len(prompts) else prompts

    suppressed = ids_without_token(target_model, tokenizer)
    if continuous_batching:
        backend = continuous_backend(target_model, max_new_tokens=max_new_tokens, suppress_tokens=suppressed)
    else:
        backend = pipeline_backend(
            target_model, tokenizer, max_new_tokens=max_new_tokens, batch_size=batch_size, suppress_tokens=suppressed
        )
    requests = {setting: 1 if setting.is_greedy else num_completions for setting in settings}
    origin = {
        "scenario": scenario,
        "target": target_model.name_or_path,
        "target_revision": getattr(target_model.config, "_commit_hash", None),
        "seed": seed,
    }
    shards = []
    with completion_progress(len(prompts) * sum(requests.values())) as on_finished:
        for number, rows in enumerate(cut_shards(len(prompts), batch_size, shard_size)):
            part = prompts.select(rows)
            shards.append(
                answer_shard(
                    part,
                    render_prompts(part, tokenizer, **template_options),
                    requests,
                    backend,
                    tokenizer,
                    origin,
                    shard=number,
                    on_finished=on_finished,
                )
            )
    return concatenate_datasets(shards)


def decoding_settings(
    temperatures: Sequence[float], *, top_p: float = 1.0, top_k: int = 0, repetition_penalty: float = 1.0
) -> list[DecodingSetting]:
    """One setting a temperature; the sampling filters apply above 0 only."""
    if not temperatures:
        raise ValueError("`temperatures` is empty. Give at least one, such as 0 for greedy decoding.")
    if len(set(temperatures)) < len(temperatures):
        raise ValueError(
            f"`temperatures` repeats a value: {list(temperatures)}. Use `num_completions` for several completions."
        )
    filters = {"top_p": top_p, "top_k": top_k}
    DecodingSetting(temperature=1.0, **filters)  # type: ignore[arg-type]  # a bad filter is refused even if unused
    return [
        DecodingSetting(temperature=value, repetition_penalty=repetition_penalty, **({} if value == 0 else filters))  # type: ignore[arg-type]
        for value in temperatures
    ]


def ids_without_token(target_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Rows of a padded vocabulary that stand for no token, and what the target suppresses itself; None if none."""
    vocab_size = target_model.get_output_embeddings().weight.shape[0]
    own = target_model.generation_config.suppress_tokens or []
    ids = sorted({*own, *range(len(tokenizer), vocab_size)})
    return ids or None


def cut_shards(num_prompts: int, batch_size: int, shard_size: int | None = None) -> list[range]:
    """The prompts of each shard: a function of their number and the batch size, never of who does the work."""
    if shard_size is None:
        shard_size = min(-(-num_prompts // 16), _LARGEST_SHARD)
    if shard_size < 1:
        raise ValueError(f"`shard_size` must be at least 1, got {shard_size}.")
    shard_size = -(-shard_size // batch_size) * batch_size  # whole batches
    return [range(start, min(start + shard_size, num_prompts)) for start in range(0, num_prompts, shard_size)]


def answer_shard(
    prompts: Dataset,
    prompt_ids: list[list[int]],
    requests: Mapping[DecodingSetting, int],
    backend: Backend,
    tokenizer: PreTrainedTokenizerBase,
    origin: dict[str, Any],
    *,
    shard: int,
    on_finished: Callable[[Completion], None],
) -> Dataset:
    """The rows of one shard: every prompt answered as often as each setting asks."""
    answers = {}
    for setting, count in requests.items():
        repeated = [ids for ids in prompt_ids for _ in range(count)]
        # The setting and not its position is hashed, so that one more temperature leaves the others' rows alone.
        completions = backend(repeated, setting, _seed(origin["seed"], shard, setting), on_finished)
        answers[setting] = [completions[start : start + count] for start in range(0, len(completions), count)]
    return alignment_rows(prompts, prompt_ids, answers, tokenizer, origin)


def alignment_rows(
    prompts: Dataset,
    prompt_ids: list[list[int]],
    answers: Mapping[DecodingSetting, Sequence[Sequence[Completion]]],
    tokenizer: PreTrainedTokenizerBase,
    origin: dict[str, Any],
) -> Dataset:
    """Assemble alignment data, one row a completion, in the order of prompts, then settings.

    Args:
        prompts: The prompts and the columns carried along, P rows.
        prompt_ids: Their tokens, P lists.
        answers: Per decoding setting P lists of completions, one list a prompt.
        tokenizer: Decodes the completions, without special tokens.
        origin: `scenario`, `target`, `target_revision` and `seed` of every row.
    """
    features = alignment_features(prompts.features)
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


@contextmanager
def completion_progress(total: int, disable: bool = False) -> Iterator[Callable[[Completion], None]]:
    """A progress bar over completions that shows tokens per second and the time left."""
    tokens = 0
    with logging.tqdm(total=total, desc="Target answers", unit="completion", disable=disable) as bar:

        def on_finished(completion: Completion) -> None:
            nonlocal tokens
            tokens += len(completion.token_ids)
            bar.update(1)
            elapsed = bar.format_dict["elapsed"] if hasattr(bar, "format_dict") else 0
            if elapsed:
                bar.set_postfix_str(f"{tokens / elapsed:.0f} tokens/s", refresh=False)

        yield on_finished


def _render_in_chunks(
    prompts: Dataset, tokenizer: PreTrainedTokenizerBase, template_options: dict[str, Any]
) -> Iterable[list[int]]:
    # All ids at once would make memory grow with the number of prompts; shards render theirs again when it is due.
    for start in range(0, len(prompts), 1000):
        part = prompts.select(range(start, min(start + 1000, len(prompts))))
        yield from render_prompts(part, tokenizer, first_row=start, **template_options)


def _seed(seed: int, shard: int, setting: DecodingSetting) -> int:
    digest = hashlib.sha256(repr((seed, shard, setting)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # below 2**63, as torch wants it


def _require_at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
