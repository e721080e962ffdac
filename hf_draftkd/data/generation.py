"""The target answers the prompts: alignment data, one row a completion, with the exact tokens it read and wrote."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_draftkd.data.backends import Backend, Completion, continuous_backend, pipeline_backend
from hf_draftkd.data.decoding import DecodingSetting
from hf_draftkd.data.prompts import context_length, fitting_rows, load_prompts, render_prompts
from hf_draftkd.data.provenance import package_versions, plain, template_hash, text_hash, weights_fingerprint
from hf_draftkd.data.rows import alignment_rows
from hf_draftkd.data.shards import (
    load_shards,
    open_folder,
    remove_leftovers,
    unfinished_shards,
    wait_for_shards,
    write_shard,
)

logger = logging.get_logger(__name__)

SCENARIOS = ("queries", "curated", "synthetic")
_LARGEST_SHARD = 256
_CHUNK = 1000  # prompts rendered at a time while checking


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
    output_dir: "str | Path | None" = None,
    shard_size: int | None = None,
    skip_too_long: bool = False,
    continuous_batching: bool = False,
    template_options: dict[str, Any] | None = None,
) -> Dataset:
    """Have the target answer every prompt.

    The rows follow from the arguments alone: prompts are cut into fixed shards, and each shard is seeded from `seed`,
    its number and the decoding setting. With `output_dir` each shard is written as soon as it is done, and the same
    call goes on where a killed one was. Started by `accelerate launch` or `torchrun`, every process takes whole shards.

    Args:
        target_model: The target, where it is to run.
        tokenizer: Its tokenizer.
        prompts: Anything that `load_prompts` takes. Further columns (such as `domain`) are carried along, unless the
            row format has a column of that name.
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
        output_dir: A folder for Parquet shards and their manifest. Without it the rows stay in memory.
        shard_size: Prompts a shard. By default a sixteenth of the prompts, at most 256.
        skip_too_long: Leave out prompts that do not fit into the context, and warn, instead of refusing them.
        continuous_batching: Use transformers' continuous batching; sampled rows can then not be repeated.
        template_options: Further arguments of the chat template.

    Returns:
        One row a completion, ordered by prompt, temperature and number: `prompt`, `completion`, `prompt_ids`,
        `completion_ids`, `ids_source`, `scenario`, `target`, `target_revision`, `temperature`, `top_p`, `top_k`,
        `repetition_penalty`, `seed`, `finish_reason`, and the further columns of the prompts.

    Raises:
        ValueError: A value is out of range; prompts are unusable (see `load_prompts` and `render_prompts`); or
            `output_dir` holds something else.
        RuntimeError: The disk is full. Finished shards stay valid.
    """
    settings = decoding_settings(temperatures, top_p=top_p, top_k=top_k, repetition_penalty=repetition_penalty)
    _require_at_least_one(max_new_tokens=max_new_tokens, num_completions=num_completions, batch_size=batch_size)
    if scenario not in SCENARIOS:
        raise ValueError(f"`scenario` must be one of {', '.join(SCENARIOS)}, got {scenario!r}.")
    template_options = template_options or {}
    source = str(prompts) if isinstance(prompts, str | Path) else type(prompts).__name__
    prompts, prompts_hash = check_prompts(
        load_prompts(prompts),
        tokenizer,
        context_length(target_model.config),
        max_new_tokens,
        skip_too_long=skip_too_long,
        template_options=template_options,
    )
    shards = cut_shards(len(prompts), batch_size, shard_size)
    requests = {setting: 1 if setting.is_greedy else num_completions for setting in settings}
    suppressed = ids_without_token(target_model, tokenizer)
    backend: Backend
    if continuous_batching:
        backend = continuous_backend(target_model, max_new_tokens=max_new_tokens, suppress_tokens=suppressed)
    else:
        backend = pipeline_backend(
            target_model, tokenizer, max_new_tokens=max_new_tokens, batch_size=batch_size, suppress_tokens=suppressed
        )
    origin = {
        "scenario": scenario,
        "target": target_model.name_or_path,
        "target_revision": getattr(target_model.config, "_commit_hash", None),
        "seed": seed,
    }
    manifest = {
        "schema_version": 1,
        **origin,
        "target_weights": weights_fingerprint(target_model),
        "target_dtype": str(target_model.dtype),
        "chat_template": template_hash(tokenizer),
        "template_options": template_options,
        "prompts": {"source": source, "count": len(prompts), "sha256": prompts_hash},
        "settings": [{**setting.to_dict(), "num_completions": count} for setting, count in requests.items()],
        "max_new_tokens": max_new_tokens,
        "suppressed_tokens": suppressed,
        "backend": "continuous batching" if continuous_batching else "pipeline",
        "batch_size": batch_size,
        "shard_size": len(shards[0]),
        "num_shards": len(shards),
        "versions": package_versions(),
    }

    def make_shard(number: int, on_finished: Callable[[Completion], None]) -> Dataset:
        part = prompts.select(shards[number])
        ids = render_prompts(part, tokenizer, **template_options)
        return answer_shard(part, ids, requests, backend, tokenizer, origin, shard=number, on_finished=on_finished)

    sizes = [len(shard) * sum(requests.values()) for shard in shards]
    return run_shards(make_shard, sizes, manifest, None if output_dir is None else Path(output_dir))


def run_shards(
    make_shard: Callable[[int, Callable[[Completion], None]], Dataset],
    sizes: Sequence[int],
    manifest: dict[str, Any],
    output_dir: Path | None,
) -> Dataset:
    """Make every shard that is not there yet, this process's share of them, and return all rows.

    Args:
        make_shard: (number of the shard, what to call after each completion) -> its rows.
        sizes: Completions of each shard.
        manifest: Everything that decides the rows.
        output_dir: Where the shards go; None keeps them in memory.
    """
    count = len(sizes)
    state = PartialState()
    if output_dir is None:
        if state.num_processes > 1:
            raise ValueError("Several processes meet in a folder: give an `output_dir` that all of them can write to.")
        with completion_progress(sum(sizes)) as on_finished:
            return concatenate_datasets([make_shard(number, on_finished) for number in range(count)])
    open_folder(output_dir, manifest, write=state.is_main_process)
    unfinished = unfinished_shards(output_dir, count)
    if len(unfinished) < count:
        logger.warning(f"{output_dir} holds {count - len(unfinished)} of {count} shards; going on with the others.")
    mine = [number for number in unfinished if number % state.num_processes == state.process_index]
    with completion_progress(sum(sizes[number] for number in mine), not state.is_main_process) as on_finished:
        for number in mine:
            write_shard(output_dir, number, count, make_shard(number, on_finished))
    wait_for_shards(output_dir, count)
    if state.is_main_process:
        remove_leftovers(output_dir)
    return load_shards(output_dir, count)


def check_prompts(
    prompts: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    max_new_tokens: int,
    *,
    skip_too_long: bool = False,
    template_options: dict[str, Any] | None = None,
) -> tuple[Dataset, str]:
    """Render every prompt once, before anything runs: those that fit, and a hash of them and their tokens.

    The ids themselves are not kept, or memory would grow with the number of prompts; shards render theirs again.
    """
    lengths, digests = [], []
    for start in range(0, len(prompts), _CHUNK):
        part = prompts.select(range(start, min(start + _CHUNK, len(prompts))))
        ids = render_prompts(part, tokenizer, first_row=start, **(template_options or {}))
        lengths += [len(each) for each in ids]
        # Hashing rows and ids covers the source, the template and the tokenizer at once.
        digests.append(text_hash(plain([row, each]) for row, each in zip(part, ids, strict=True)))
    fitting = fitting_rows(lengths, context, max_new_tokens, skip_too_long=skip_too_long)
    return (prompts.select(fitting) if len(fitting) < len(prompts) else prompts), text_hash(digests)


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


@contextmanager
def completion_progress(total: int, disable: bool = False) -> Iterator[Callable[[Completion], None]]:
    """A progress bar over completions that shows tokens per second and the time left."""
    tokens, start = 0, perf_counter()
    with logging.tqdm(total=total, desc="Target answers", unit="completion", disable=disable) as bar:

        def on_finished(completion: Completion) -> None:
            nonlocal tokens
            tokens += len(completion.token_ids)
            bar.update(1)
            bar.set_postfix_str(f"{tokens / (perf_counter() - start):.0f} tokens/s", refresh=False)

        yield on_finished


def _seed(seed: int, shard: int, setting: DecodingSetting) -> int:
    digest = hashlib.sha256(repr((seed, shard, setting)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # below 2**63, as torch wants it


def _require_at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
