"""The target answers the prompts: alignment data, one row a completion, with the exact tokens it read and wrote."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import ContinuousBatchingConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_draftkd.data.backends import Backend, Completion, PromptFailedError
from hf_draftkd.data.fingerprints import plain, template_hash, text_hash
from hf_draftkd.data.prompts import dated, fitting_rows, load_prompts, render_prompts
from hf_draftkd.data.rows import alignment_rows
from hf_draftkd.data.shards import DAY, StoppedError, cut_shards, day_begun, run_shards
from hf_draftkd.data.target_cache import add_cache_columns
from hf_draftkd.data.targets import ids_without_token as ids_without_token  # evaluation leaves out the same ids
from hf_draftkd.data.targets import local_target, remote_target, served_context
from hf_draftkd.decoding.setting import DecodingSetting, settings_at
from hf_draftkd.models.context import context_length as model_context
from hf_draftkd.models.resolve import is_hub_id
from hf_draftkd.utils.hashing import derived_seed
from hf_draftkd.utils.versions import package_versions

SCENARIOS = ("queries", "curated", "synthetic")
_CHUNK = 1000  # prompts rendered at a time while checking


def generate_alignment_data(
    target_model: "PreTrainedModel | str",
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
    continuous_batching: "bool | ContinuousBatchingConfig" = False,
    cache_distributions: dict[str, Any] | None = None,
    endpoint: str | None = None,
    endpoint_options: dict[str, Any] | None = None,
    target_revision: str | None = None,
    template_options: dict[str, Any] | None = None,
    source: str | None = None,
    prompt_counts: dict[str, int] | None = None,
    context_length: int | None = None,
) -> Dataset:
    """Have the target answer every prompt.

    The rows follow from the arguments alone: prompts are cut into fixed shards, and each shard is seeded from `seed`,
    its number and the decoding setting. With `output_dir` each shard is written as soon as it is done, and the same
    call goes on where a killed one was. Started by `accelerate launch` or `torchrun`, every process takes whole shards.

    Args:
        target_model: The target, where it is to run; with `endpoint`, the name by which the server knows it.
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
        shard_size: Prompts a shard. By default a sixteenth of the prompts, at least four batches, at most 256.
        skip_too_long: Leave out prompts that do not fit into the context, and warn, instead of refusing them.
        continuous_batching: Use transformers' continuous batching, with a config if one is given. Its ids are exact;
            sampled rows can not be repeated, and its cache takes most of the free memory unless the config says less.
        cache_distributions: Also keep the target's distributions, with these options of `cache_target_distributions`:
            `{"top_k": 64}` or `{"sampled": 50}`, and `loss_temperature` and `dtype`. With `endpoint`, `{"top_k": 5}`
            keeps the top log-probabilities that the server returns.
        endpoint: An OpenAI-compatible server (`http://localhost:8000/v1`) that runs the target.
        endpoint_options: Options of `endpoint_backend`: `api_key`, `concurrency`, `timeout`, `max_retries`.
        target_revision: The revision that the target was loaded at, if not the Hub's `main`: its commit is recorded.
        template_options: Further arguments of the chat template.
        source: What to record as the source of the prompts; by default what `prompts` says.
        prompt_counts: How many prompts fell to which filter (from `synthesize_prompts`, `curate_prompts`): recorded.
        context_length: The longest text that the target takes, prompt and completion together, in tokens. By default
            what its config says; with `endpoint`, what a config beside the tokenizer says, if there is one.

    Returns:
        One row a completion, ordered by prompt, temperature and number: `prompt`, `completion`, `prompt_ids`,
        `completion_ids`, `ids_source`, `scenario`, `target`, `target_revision`, `temperature`, `top_p`, `top_k`,
        `repetition_penalty`, `seed`, `finish_reason`, and the further columns of the prompts.

    Raises:
        ValueError: A value is out of range; prompts are unusable (see `load_prompts` and `render_prompts`); or
            `output_dir` holds something else; or an endpoint refuses the connection, the key or the model.
        StoppedError: The disk is full, or an endpoint stopped answering or refuses a prompt, which is named. Finished
            shards stay valid.
    """
    settings = settings_at(temperatures, top_p=top_p, top_k=top_k, repetition_penalty=repetition_penalty)
    require_at_least_one(max_new_tokens=max_new_tokens, num_completions=num_completions, batch_size=batch_size)
    if scenario not in SCENARIOS:
        raise ValueError(f"`scenario` must be one of {', '.join(SCENARIOS)}, got {scenario!r}.")
    if isinstance(target_model, str) and endpoint is None:
        raise ValueError(
            f"`target_model` is a name ({target_model!r}). Load it with `load_target`, or give `endpoint`."
        )
    template_options = template_options or {}
    day = day_begun(None if output_dir is None else Path(output_dir))
    clock = dated(tokenizer, day)
    if source is None:
        source = str(prompts) if isinstance(prompts, str | Path) else type(prompts).__name__
    if context_length is None:
        if isinstance(target_model, str):
            context_length = served_context(target_model, tokenizer)
        else:
            context_length = model_context(target_model)
    prompts, prompts_hash = check_prompts(
        load_prompts(prompts),
        tokenizer,
        context_length,
        max_new_tokens,
        skip_too_long=skip_too_long,
        template_options=clock | template_options,
    )
    if isinstance(target_model, str):
        answering = remote_target(
            target_model, tokenizer, str(endpoint), max_new_tokens, settings, cache_distributions, endpoint_options
        )
    else:
        cache = None if cache_distributions is None else {"seed": seed, **cache_distributions}
        answering = local_target(
            target_model, tokenizer, max_new_tokens, batch_size, continuous_batching, cache, target_revision
        )

    requests = {setting: 1 if setting.is_greedy else num_completions for setting in settings}
    shards = cut_shards(len(prompts), batch_size, shard_size)
    origin = {"scenario": scenario, "seed": seed}
    manifest = {
        "schema_version": 1,
        **origin,
        **answering.identity,
        "chat_template": template_hash(tokenizer),
        "template_options": template_options,
        "prompts": {"source": source, "count": len(prompts), "sha256": prompts_hash},
        "prompt_counts": prompt_counts,
        "settings": [{**setting.to_dict(), "num_completions": count} for setting, count in requests.items()],
        "max_new_tokens": max_new_tokens,
        "cache": cache_distributions,
        "batch_size": batch_size,
        "shard_size": len(shards[0]),
        "num_shards": len(shards),
        "versions": package_versions(),
    }
    if _is_folder_like_an_id(target_model, answering.identity["target"]):
        manifest["target_is_local"] = True
    if clock:
        manifest[DAY] = day
    origin |= {name: answering.identity[name] for name in ("target", "target_revision")}

    def make_shard(number: int, on_finished: Callable[[Completion], None]) -> Dataset:
        part = prompts.select(shards[number])
        ids = render_prompts(part, tokenizer, **(clock | template_options))
        try:
            answers = answer_shard(ids, requests, answering.backend, (seed, number), on_finished)
        except PromptFailedError as error:
            row = shards[number][error.number]
            raise StoppedError(_failed_prompt(error, row, prompts[row]["prompt"], len(prompts))) from None
        rows = alignment_rows(part, ids, answers, tokenizer, origin, answering.brought)
        return rows if answering.cache is None else add_cache_columns(rows, *answering.cache, batch_size)

    sizes = [len(shard) * sum(requests.values()) for shard in shards]
    return run_shards(make_shard, sizes, manifest, None if output_dir is None else Path(output_dir))


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
    fitting = fitting_rows(
        lengths,
        context,
        max_new_tokens,
        skip_too_long=skip_too_long,
        beginning=lambda row: _beginning(prompts[row]["prompt"]),
    )
    return (prompts.select(fitting) if len(fitting) < len(prompts) else prompts), text_hash(digests)


def answer_shard(
    prompt_ids: list[list[int]],
    requests: Mapping[DecodingSetting, int],
    backend: Backend,
    seed: tuple[int, ...],
    on_finished: Callable[[Completion], None],
) -> dict[DecodingSetting, list[list[Completion]]]:
    """Every prompt answered as often as each setting asks: per setting one list of completions a prompt."""
    answers = {}
    for setting, count in requests.items():
        repeated = [ids for ids in prompt_ids for _ in range(count)]
        # The setting and not its position is hashed, so that one more temperature leaves the others' rows alone.
        try:
            completions = backend(repeated, setting, derived_seed(*seed, setting), on_finished)
        except PromptFailedError as error:
            error.number //= count
            raise
        answers[setting] = [completions[start : start + count] for start in range(0, len(completions), count)]
    return answers


def _is_folder_like_an_id(target_model: Any, name: str) -> bool:
    """Whether a target's name is a local folder's that a card, written elsewhere, would take for an id on the Hub.

    Recorded for such names only: a further key would keep folders begun without it from going on.
    """
    return not isinstance(target_model, str) and is_hub_id(name) and Path(name).is_dir()


def _failed_prompt(error: PromptFailedError, row: int, prompt: Any, count: int) -> str:
    return (
        f"{str(error).rstrip('.')}. It was asked prompt {row} (from 0, of {count}), {_beginning(prompt)}. The same "
        "command would stop there again: take this prompt out, and name another folder, since other prompts make other "
        "shards."
    )


def _beginning(prompt: Any) -> str:
    """The first words, to know a prompt by: row numbers count what earlier filters have left."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
    return repr(text[:60]) + ("..." if len(text) > 60 else "")


def require_at_least_one(**values: int) -> None:
    """Refuse a count below 1, by its name."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
