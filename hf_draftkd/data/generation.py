"""The target answers the prompts: alignment data, one row per completion, with the exact tokens it read and wrote."""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import ContinuousBatchingConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_draftkd.data.backends import Backend, Completion, PromptFailedError
from hf_draftkd.data.config import AlignmentDataConfig
from hf_draftkd.data.curation import curate_prompts
from hf_draftkd.data.filters import QueryFilter
from hf_draftkd.data.journal import Journal
from hf_draftkd.data.prompts import fitting_rows, load_prompts
from hf_draftkd.data.rows import AUTHOR_COLUMNS, alignment_rows, dated, render_prompts, template_hash
from hf_draftkd.data.shards import (
    DAY,
    StoppedError,
    alone_in,
    check_processes,
    check_shard_folder,
    cut_shards,
    day_begun,
    run_shards,
)
from hf_draftkd.data.synthesis import check_synthesis, synthesize_prompts
from hf_draftkd.data.targets import local_target, missing_turn_end, remote_target, served_context
from hf_draftkd.decoding.setting import DecodingSetting, left_out_warning, own_penalty
from hf_draftkd.models.loading import load_draft, load_target, require_loaded
from hf_draftkd.models.pairing import align_vocabulary, check_own_tokenizer, context_length
from hf_draftkd.models.resolve import Checkpoint
from hf_draftkd.models.tokenizers import require_tokenizer, tokenizer_size
from hf_draftkd.utils.hashing import derived_seed, list_hash
from hf_draftkd.utils.versions import package_versions

logger = logging.get_logger(__name__)

_CHUNK = 1000  # prompts rendered at a time while checking


def generate_alignment_data(
    target_model: "PreTrainedModel | Checkpoint | str",
    tokenizer: PreTrainedTokenizerBase,
    prompts: "Dataset | str | Path | Sequence[Any] | None" = None,
    *,
    config: AlignmentDataConfig | None = None,
    draft_model: Any = None,
    loading: dict[str, Any] | None = None,
    template_options: dict[str, Any] | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    endpoint_options: dict[str, Any] | None = None,
    source: str | None = None,
    prompt_counts: dict[str, int] | None = None,
    **options: Any,
) -> Dataset:
    """Have the target answer every prompt.

    Example:
    ```python
    rows = generate_alignment_data(target, tokenizer, "prompts.jsonl", temperatures=(0.0, 1.0), max_new_tokens=128)
    rows = generate_alignment_data(target, tokenizer, prompts, cache_distributions="top_k=64", output_dir="data")
    ```

    The rows follow from the arguments alone: prompts are cut into fixed shards, and each shard is seeded from `seed`,
    its number and the decoding setting. With `output_dir` each shard is written as soon as it is done, and the same
    call resumes where a killed one stopped. Started by `accelerate launch` or `torchrun`, every process takes whole
    shards.

    Args:
        target_model: The target, where it is to run; a `Checkpoint` is loaded once all else is checked; with
            `endpoint`, the name by which the server knows it.
        tokenizer: Its tokenizer.
        prompts: Anything that `load_prompts` takes, read with the config's `prompt_column`, `drop_last_answer` and
            `skip_invalid`. Further columns (such as `domain`) are carried along, unless the row format has a column of
            that name. By default the prompts of the config: those of its `dataset`, or the ones that the target writes
            (`scenario="synthetic"`).
        config: How to make the data; [`AlignmentDataConfig`].
        draft_model: A draft that helps the target to write, loaded or as `load_draft` takes it; by default the
            config's. The rows are the target's all the same: see `local_backend`. It drafts as many tokens as its
            generation config records, otherwise 5.
        loading: Options of `load_target` for a `Checkpoint`.
        template_options: Further arguments of the chat template.
        continuous_batching_config: Size of the cache and the like, with `continuous_batching`; by default its cache
            takes most of the free memory.
        endpoint_options: Further options of `endpoint_backend`: `api_key`, `extra_body`, `end_ids`.
        source: What to record as the source of the prompts; by default what `prompts` says.
        prompt_counts: How many prompts fell to which filter (from `synthesize_prompts`, `curate_prompts`): recorded.
        **options: Fields of `AlignmentDataConfig`; they take precedence over those of `config`.

    Returns:
        One row per completion, ordered by prompt, temperature and number: the columns of `alignment_features`, and the
        further columns of the prompts.

    Raises:
        ValueError: A value is out of range or would do nothing; prompts are unusable (see `load_prompts` and
            `render_prompts`); `output_dir` holds something else, or another run is writing to it; or an endpoint
            refuses the connection, the key or the model.
        StoppedError: The disk is full, or an endpoint stopped answering or refuses a prompt, which is named. Finished
            shards stay valid.
    """
    config = AlignmentDataConfig(**options) if config is None else replace(config, **options)
    _check_arguments(target_model, config, endpoint_options, continuous_batching_config)
    if draft_model is not None:
        config.refuse_beside_draft()
    require_tokenizer(tokenizer)
    if isinstance(target_model, PreTrainedModel):
        require_loaded(target_model)
    if config.cache is not None:
        config.cache.within(tokenizer_size(tokenizer))
    folder = _folder_to_write(config)
    day = day_begun(folder)
    template_options = template_options or {}
    clock = dated(tokenizer, day)
    rendering = clock | template_options
    context = config.context_length
    if context is None:
        context = served_context(tokenizer) if isinstance(target_model, str) else context_length(target_model)
    if prompts is not None:
        config.refuse_beside_prompts()
        source = source or (str(prompts) if isinstance(prompts, str | Path) else type(prompts).__name__)
        prompts = _load_prompts(config, prompts)
    else:
        source = source or config.dataset or "the target itself"
        if config.scenario == "synthetic":
            _check_synthetic(config, target_model, tokenizer, context, rendering)
        else:
            prompts, prompt_counts = _read_prompts(config, tokenizer)
    # Whatever shows without the target is looked at before it is loaded.
    check = partial(_check_prompts, tokenizer, config, context, rendering)
    checked = None if prompts is None else check(prompts)
    if isinstance(target_model, Checkpoint):
        target_model = load_target(target_model, **(loading or {}))
    if config.repetition_penalty is None and not isinstance(target_model, str):
        config = replace(config, repetition_penalty=own_penalty(target_model))
    if checked is None:
        written, prompt_counts = _synthesized(config, target_model, tokenizer, template_options)
        checked = check(written)
    asked, prompts_hash = checked
    if isinstance(target_model, str):
        target = remote_target(target_model, tokenizer, config, endpoint_options)
    else:
        draft = _helping_draft(draft_model or config.draft_model, target_model, tokenizer)
        is_text = isinstance(asked[0]["prompt"], str)
        turn_end = missing_turn_end(target_model, tokenizer, is_text=is_text, wanted=config.stop_at_turn_end)
        for left_out in left_out_warning(target_model, list(config.requests)):
            logger.warning_once(left_out)
        target = local_target(target_model, tokenizer, config, continuous_batching_config, turn_end, draft)

    shards = cut_shards(len(asked), config.batch_size, config.shard_size)
    origin = {"scenario": config.scenario, "seed": config.seed}
    manifest = {
        "schema_version": 1,
        **origin,
        **target.identity,
        "chat_template": template_hash(tokenizer),
        "template_options": template_options,
        "prompts": {"source": source, "count": len(asked), "sha256": prompts_hash},
        "prompt_counts": prompt_counts,
        "settings": [{**each.to_dict(), "num_completions": count} for each, count in config.requests.items()],
        "max_new_tokens": config.max_new_tokens,
        "cache": None if config.cache is None else asdict(config.cache),
        "batch_size": config.batch_size,
        "shard_size": len(shards[0]),
        "num_shards": len(shards),
        "versions": package_versions(),
        **({DAY: day} if clock else {}),
    }
    origin |= dict(zip(AUTHOR_COLUMNS, target.author, strict=False))

    def make_shard(number: int, journal: Journal) -> Dataset:
        part = asked.select(shards[number])
        ids = render_prompts(part, tokenizer, **rendering)
        try:
            answers = answer_shard(ids, config.requests, target.backend, (config.seed, number), journal)
        except PromptFailedError as error:
            row = shards[number][error.number]
            raise StoppedError(
                f"{str(error).rstrip('.')}. It was asked prompt {row} (from 0, of {len(asked)}), "
                f"{_beginning(asked[row]['prompt'])}. The same command would stop there again: with `skip_refused` "
                "it goes on and leaves such prompts out."
            ) from None
        return alignment_rows(part, ids, answers, tokenizer, origin, target.brought)

    sizes = [len(shard) * sum(config.requests.values()) for shard in shards]
    return run_shards(make_shard, sizes, manifest, folder, target.brought)


def _check_arguments(
    target_model: "PreTrainedModel | Checkpoint | str",
    config: AlignmentDataConfig,
    endpoint_options: dict[str, Any] | None,
    continuous_batching_config: ContinuousBatchingConfig | None,
) -> None:
    """Refuse a target that is not where the config says, and options that would do nothing there."""
    if isinstance(target_model, str) and config.endpoint is None:
        raise ValueError(
            f"`target_model` is a name ({target_model!r}). Load it with `load_target`, or give `endpoint`."
        )
    if not isinstance(target_model, str) and config.endpoint is not None:
        raise ValueError(
            f"An `endpoint` answers for a target that it knows by name, got a {type(target_model).__name__}. Give that "
            "name as `target_model`, or leave out `endpoint`."
        )
    for name, given, wanted, there in (
        ("endpoint_options", endpoint_options, "endpoint", config.endpoint is not None),
        ("continuous_batching_config", continuous_batching_config, "continuous_batching", config.continuous_batching),
    ):
        if given and not there:
            raise ValueError(f"`{name}` would do nothing without `{wanted}`. Leave it out, or add that.")


def _folder_to_write(config: AlignmentDataConfig) -> Path | None:
    """The folder for the shards, once it is clear that this run may write there; queries are the first to go there."""
    folder = None if config.output_dir is None else Path(config.output_dir)
    if check_processes(folder).is_main_process and folder is not None:
        check_shard_folder(folder)
        if folder.is_dir():
            with alone_in(folder):  # asked now: the target is loaded before the folder is kept
                pass
    return folder


def _helping_draft(
    draft_model: Any, target_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel | None:
    """The draft where the target is, with its vocabulary."""
    if draft_model is None:
        return None
    if not isinstance(draft_model, PreTrainedModel):
        draft_model = load_draft(draft_model, dtype=target_model.dtype).to(target_model.device)
    check_own_tokenizer(draft_model, tokenizer)
    return align_vocabulary(draft_model.eval(), target_model, tokenizer)


def _read_prompts(
    config: AlignmentDataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, dict[str, int] | None]:
    """The prompts of the config's dataset, and how many rows fell to which filter."""
    if config.dataset is None:
        raise ValueError(f"There are no prompts: the scenario {config.scenario!r} needs a `dataset`.")
    if config.scenario == "curated":
        return curate_prompts(
            config.dataset,
            tokenizer,
            text_column=config.text_column,
            question_column=config.question_column,
            opening_tokens=config.opening_tokens,
            instruction=config.instruction,
            split=config.dataset_split,
            config=config.dataset_config,
            limit=config.max_prompts,
        )
    return _load_prompts(config, config.dataset), None


def _load_prompts(config: AlignmentDataConfig, prompts: Any) -> Dataset:
    return load_prompts(
        prompts,
        column=config.prompt_column,
        split=config.dataset_split,
        config=config.dataset_config,
        limit=config.max_prompts,
        drop_last_answer=config.drop_last_answer,
        skip_invalid=config.skip_invalid,
    )


def _check_synthetic(
    config: AlignmentDataConfig,
    target_model: Any,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    template_options: dict[str, Any],
) -> None:
    """Refuse what shows before the target writes its first query."""
    if isinstance(target_model, str):
        raise ValueError(
            "A target behind an `endpoint` cannot be fed an open turn exactly: synthesize with a local one."
        )
    _, start = check_synthesis(
        tokenizer,
        config.num_prompts,
        temperature=config.query_temperature,
        system=config.system_prompt,
        template_options=template_options,
    )
    QueryFilter(min_characters=config.min_characters, max_characters=config.max_characters, script=config.script)
    longest = len(start) + config.query_max_new_tokens
    if context is not None and longest + config.max_new_tokens > context:
        raise ValueError(
            f"A query may have {longest} tokens ({len(start)} open the turn, `query_max_new_tokens` "
            f"{config.query_max_new_tokens}) and its answer {config.max_new_tokens} (`max_new_tokens`), but the "
            f"target reads at most {context}. Lower one of them."
        )


def _synthesized(
    config: AlignmentDataConfig, target_model: Any, tokenizer: PreTrainedTokenizerBase, template_options: dict[str, Any]
) -> tuple[Dataset, dict[str, int]]:
    return synthesize_prompts(
        target_model,
        tokenizer,
        config.num_prompts,
        max_new_tokens=config.query_max_new_tokens,
        temperature=config.query_temperature,
        top_p=config.query_top_p,
        batch_size=config.batch_size,
        seed=config.seed,
        system=config.system_prompt,
        min_characters=config.min_characters,
        max_characters=config.max_characters,
        script=config.script,
        output_dir=None if config.output_dir is None else Path(config.output_dir) / ".queries",
        template_options=template_options,
    )


def _check_prompts(
    tokenizer: PreTrainedTokenizerBase,
    config: AlignmentDataConfig,
    context: int | None,
    template_options: dict[str, Any],
    prompts: Dataset,
) -> tuple[Dataset, str]:
    """Render every prompt once, before anything runs: those that fit, and a hash of them and their tokens.

    The ids themselves are not kept, or memory would grow with the number of prompts; shards render theirs again.
    """
    lengths, digests = [], []
    for start in range(0, len(prompts), _CHUNK):
        part = prompts.select(range(start, min(start + _CHUNK, len(prompts))))
        ids = render_prompts(part, tokenizer, first_row=start, **template_options)
        lengths += [len(each) for each in ids]
        # Hashing rows and ids covers the source, the template and the tokenizer at once.
        rows = ([row, each] for row, each in zip(part, ids, strict=True))
        digests.append(list_hash(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str) for row in rows))
    fitting = fitting_rows(
        lengths,
        context,
        config.max_new_tokens,
        skip_too_long=config.skip_too_long,
        beginning=lambda row: _beginning(prompts[row]["prompt"]),
    )
    return (prompts.select(fitting) if len(fitting) < len(prompts) else prompts), list_hash(digests)


def answer_shard(
    prompt_ids: list[list[int]],
    requests: Mapping[DecodingSetting, int],
    backend: Backend,
    seed: tuple[int, ...],
    journal: Journal,
) -> dict[DecodingSetting, list[list[Completion]]]:
    """Every prompt answered as often as each setting asks: per setting one list of completions per prompt."""
    answers = {}
    for place, (setting, count) in enumerate(requests.items()):
        repeated = [ids for ids in prompt_ids for _ in range(count)]
        completions = journal.finished(place)
        # The setting and not its position is hashed, so that one more temperature leaves the others' rows alone.
        try:
            with closing(backend(repeated, setting, derived_seed(*seed, setting), frozenset(completions))) as groups:
                for group in groups:
                    journal.add(place, group)
                    completions |= group
        except PromptFailedError as error:
            error.number //= count  # each prompt was asked so often
            raise
        in_order = [completions[number] for number in range(len(repeated))]
        answers[setting] = [in_order[start : start + count] for start in range(0, len(repeated), count)]
    return answers


def _beginning(prompt: Any) -> str:
    """The first words, to know a prompt by: row numbers count what earlier filters have left."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
    return repr(text[:60]) + ("..." if len(text) > 60 else "")
