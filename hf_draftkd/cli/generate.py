"""`draftkd generate`: alignment data from user queries, from domain text, or from nothing."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from datasets import Dataset
from huggingface_hub import is_offline_mode
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_draftkd.cli.errors import UsageError, usage_errors
from hf_draftkd.cli.options import new_directory, parse, required
from hf_draftkd.data.curation import curate_prompts
from hf_draftkd.data.filters import QueryFilter
from hf_draftkd.data.generation import (
    SCENARIOS,
    check_prompts,
    generate_alignment_data,
    require_at_least_one,
)
from hf_draftkd.data.prompts import load_prompts
from hf_draftkd.data.shards import StoppedError, check_shard_folder, this_process
from hf_draftkd.data.synthesis import check_synthesis, synthesize_prompts
from hf_draftkd.data.target_cache import check_cache_options
from hf_draftkd.data.targets import served_context
from hf_draftkd.decoding.setting import settings_at
from hf_draftkd.hub.access import check_repo_id, writing_token
from hf_draftkd.hub.dataset_card import push_alignment_data, write_card
from hf_draftkd.models.context import context_length
from hf_draftkd.models.loading import load_target, load_tokenizer
from hf_draftkd.models.resolve import resolve
from hf_draftkd.models.tokenizers import tokenizer_size
from hf_draftkd.utils.text import printable

# Options that are arguments of `generate_alignment_data` by the same name.
_SAME = (
    *(
        "max_new_tokens",
        "temperatures",
        "top_p",
        "top_k",
        "repetition_penalty",
        "num_completions",
        "batch_size",
        "seed",
    ),
    *("scenario", "shard_size", "skip_too_long", "context_length", "continuous_batching", "endpoint"),
)


# Options that say something about one kind of run, by the option that asks for it.
_ONLY_WITH = {
    "--dataset": ("dataset_config", "dataset_split", "max_prompts"),
    "--scenario queries": ("prompt_column", "drop_last_answer", "skip_invalid"),
    "--scenario curated": ("text_column", "question_column", "opening_tokens", "instruction"),
    "--scenario synthetic": (
        *("num_prompts", "query_max_new_tokens", "query_temperature", "query_top_p", "system_prompt"),
        *("min_characters", "max_characters", "script"),
    ),
    "--endpoint": ("tokenizer", "concurrency", "timeout", "max_retries", "send_ids"),
    "--cache_distributions": ("cache_temperature", "cache_dtype"),
    "--push_to_hub": ("private",),
}


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class GenerateOptions:
    """The target, the prompts, how it answers, and where the answers go."""

    target_model: str | None = _option(None, "The target: a Hub id or a local path; with --endpoint, its name there.")
    target_model_revision: str | None = _option(None, "Revision of the target.")
    dataset: str | None = _option(None, "Prompts or domain text: a Hub id, a file or a folder. Not for synthetic.")
    dataset_config: str | None = _option(None, "Configuration (subset) of a Hub dataset.")
    dataset_split: str | None = _option(None, "Split of the dataset; `train` where there are several.")
    output_dir: str | None = _option(None, "Folder for the shards; a killed run goes on in it.")
    scenario: str = field(
        default="queries",
        metadata={
            "help": "queries: answer prompts; curated: cut domain text into prompts; synthetic: the target asks.",
            "choices": list(SCENARIOS),
        },
    )
    prompt_column: str = _option("prompt", "Column with the prompts: strings or lists of messages.")
    max_prompts: int | None = _option(None, "Take only the first so many rows of the dataset.")
    drop_last_answer: bool = _option(False, "Take the last answer off a conversation, for the target to answer anew.")
    skip_invalid: bool = _option(False, "Leave out empty and malformed prompts instead of refusing them.")
    skip_too_long: bool = _option(False, "Leave out prompts that do not fit into the context instead of refusing them.")
    context_length: int | None = _option(None, "Longest text the target takes, in tokens; by default its config's.")
    max_new_tokens: int = _option(256, "Longest completion, in tokens.")
    temperatures: list[float] = field(
        default_factory=lambda: [0.0], metadata={"help": "One completion a prompt for each; 0 is greedy."}
    )
    top_p: float = _option(1.0, "Nucleus sampling at temperatures above 0.")
    top_k: int = _option(0, "Top-k sampling at temperatures above 0; 0 keeps every token.")
    repetition_penalty: float = _option(1.0, "As in transformers; 1 is none.")
    num_completions: int = _option(1, "Completions a prompt at each temperature above 0.")
    batch_size: int = _option(8, "Prompts decoded together.")
    shard_size: int | None = _option(None, "Prompts a shard; by default a sixteenth of them, 4 batches to 256.")
    seed: int = _option(0, "Seed of the whole data set.")
    continuous_batching: bool = _option(False, "transformers' continuous batching; sampled rows cannot be repeated.")
    cache_distributions: str | None = _option(None, "Keep the target's distributions: top_k=64 or sampled=50.")
    cache_temperature: float = _option(1.0, "Loss temperature of the kept distributions; train at the same one.")
    cache_dtype: str = field(
        default="float16", metadata={"help": "Type of the log-probabilities.", "choices": ["float16", "float32"]}
    )
    text_column: str = _option("text", "curated: column with documents.")
    question_column: str | None = _option(None, "curated: column with questions; documents are then not cut.")
    opening_tokens: int = _option(64, "curated: tokens of a document's opening.")
    instruction: str | None = _option(None, "curated: a user's message around the opening, with {text} where it goes.")
    num_prompts: int = _option(1000, "synthetic: queries to keep.")
    query_max_new_tokens: int = _option(128, "synthetic: longest query, in tokens.")
    query_temperature: float = _option(1.0, "synthetic: sampling temperature of the queries.")
    query_top_p: float = _option(0.99, "synthetic: nucleus sampling of the queries.")
    system_prompt: str | None = _option(None, "synthetic: a system message in front, to name the domain.")
    min_characters: int | None = _option(None, "synthetic: shortest query to keep.")
    max_characters: int | None = _option(None, "synthetic: longest query to keep.")
    script: str | None = _option(None, "synthetic: Unicode script that a query must be written in, such as latin.")
    endpoint: str | None = _option(None, "An OpenAI-compatible server that runs the target. Key: OPENAI_API_KEY.")
    tokenizer: str | None = _option(None, "The target's tokenizer, where --target_model is only a name at an endpoint.")
    concurrency: int = _option(16, "endpoint: requests in flight.")
    timeout: float = _option(600.0, "endpoint: seconds to wait for one answer.")
    max_retries: int = _option(8, "endpoint: further attempts after 429, 5xx, a time-out or a lost connection.")
    send_ids: bool = _option(False, "endpoint: send token ids instead of text.")
    dtype: str = _option("auto", "dtype the target is loaded in.")
    device_map: str | None = _option(None, "Device map of the target, such as auto; by default one device a process.")
    trust_remote_code: bool = _option(False, "Run code that a model repository brings.")
    push_to_hub: str | None = _option(None, "Publish the finished data under this dataset id.")
    private: bool = _option(False, "Publish it as a private dataset.")


def run(argv: list[str]) -> int:
    """`draftkd generate *argv`; returns the exit code."""
    description = "Have the target answer prompts: the data that a draft learns from."
    (options,) = parse("generate", (GenerateOptions,), argv, description)
    required(target_model=options.target_model, output_dir=options.output_dir)
    if options.scenario != "synthetic":
        required(dataset=options.dataset)
    elif options.dataset is not None:
        raise UsageError("the scenario `synthetic` takes no --dataset: the target writes the queries itself.")
    elif options.endpoint is not None:
        raise UsageError("a target behind --endpoint cannot be fed an open turn exactly; synthesize with a local one.")
    _refuse_what_would_do_nothing(options)
    start = perf_counter()
    with usage_errors():
        tokenizer, prompts, counts, cache = _look_at_everything(options)
    try:
        rows = _answer(options, tokenizer, prompts, counts, cache)
    except (
        ValueError,
        ImportError,
    ) as error:  # settings that the folder or the endpoint refuses; the work itself raises none
        raise UsageError(str(error)) from error
    except StoppedError as error:  # a full disk, or a server that stopped answering: finished shards stay
        print(f"draftkd generate: {printable(error)}", file=sys.stderr)
        return 1
    if this_process().is_main_process:
        try:
            write_card(Path(options.output_dir), rows)
        except ValueError as error:  # what somebody wrote into the card cannot be read
            raise UsageError(str(error)) from error
        _print_summary(rows, options, perf_counter() - start)
        if options.push_to_hub:
            return _publish(options, rows)
    return 0


def _refuse_what_would_do_nothing(options: GenerateOptions) -> None:
    """A system prompt that no query is written under, or a tokenizer beside a target that has its own."""
    defaults = GenerateOptions()
    for wanted, names in _ONLY_WITH.items():
        name, _, value = wanted.removeprefix("--").partition(" ")
        asked = getattr(options, name)
        if asked == value if value else asked is not None:
            continue
        for idle in names:
            if getattr(options, idle) != getattr(defaults, idle):
                raise UsageError(f"`--{idle}` would do nothing without `{wanted}`. Leave it out, or add that.")


def _look_at_everything(
    options: GenerateOptions,
) -> tuple[PreTrainedTokenizerBase, Dataset | None, dict[str, int] | None, dict[str, Any] | None]:
    """Read and check all there is, before the target is loaded."""
    settings_at(
        options.temperatures,
        top_p=options.top_p,
        top_k=options.top_k,
        repetition_penalty=options.repetition_penalty,
    )
    require_at_least_one(
        max_new_tokens=options.max_new_tokens, num_completions=options.num_completions, batch_size=options.batch_size
    )
    check_shard_folder(new_directory(str(options.output_dir), overwrite=True))
    if options.push_to_hub:
        _check_publishing(options.push_to_hub)
    trusted = {"trust_remote_code": options.trust_remote_code}
    context = None
    if options.endpoint is None:
        target = resolve(options.target_model, revision=options.target_model_revision, **trusted)
        context = context_length(target.config)
    name = options.tokenizer or options.target_model
    revision = None if options.tokenizer else options.target_model_revision
    tokenizer = load_tokenizer(name, revision=revision, **trusted)
    if options.endpoint is not None:
        context = served_context(str(options.target_model), tokenizer)
    if options.context_length is not None:
        context = options.context_length
    cache = parse_cache(options)
    if cache is not None:
        check_cache_options(
            cache.get("top_k"),
            cache.get("sampled"),
            options.cache_temperature,
            options.cache_dtype,
            tokenizer_size(tokenizer),
        )
    if options.scenario == "synthetic":
        _, start = check_synthesis(
            tokenizer, options.num_prompts, temperature=options.query_temperature, system=options.system_prompt
        )
        QueryFilter(min_characters=options.min_characters, max_characters=options.max_characters, script=options.script)
        _check_room(options, len(start), context)
        return tokenizer, None, None, cache
    source: dict[str, Any] = {
        "split": options.dataset_split,
        "config": options.dataset_config,
        "limit": options.max_prompts,
    }
    counts = None
    if options.scenario == "curated":
        prompts, counts = curate_prompts(
            options.dataset,
            tokenizer,
            text_column=options.text_column,
            question_column=options.question_column,
            opening_tokens=options.opening_tokens,
            instruction=options.instruction,
            **source,
        )
    else:
        prompts = load_prompts(
            options.dataset,
            column=options.prompt_column,
            drop_last_answer=options.drop_last_answer,
            skip_invalid=options.skip_invalid,
            **source,
        )
    prompts, _ = check_prompts(prompts, tokenizer, context, options.max_new_tokens, skip_too_long=options.skip_too_long)
    return tokenizer, prompts, counts, cache


def _check_room(options: GenerateOptions, opening: int, context: int | None) -> None:
    longest = opening + options.query_max_new_tokens
    if context is not None and longest + options.max_new_tokens > context:
        raise ValueError(
            f"A query may have {longest} tokens ({opening} open the turn, --query_max_new_tokens "
            f"{options.query_max_new_tokens}) and its answer {options.max_new_tokens} (--max_new_tokens), but the "
            f"target reads at most {context}. Lower one of them."
        )


def parse_cache(options: GenerateOptions) -> dict[str, Any] | None:
    """`top_k=64` or `sampled=50`, with the temperature and type of the other two options."""
    if options.cache_distributions is None:
        return None
    name, _, number = options.cache_distributions.partition("=")
    if name not in ("top_k", "sampled") or not number.isdigit():
        raise ValueError(
            f"`--cache_distributions` is written as top_k=64 or sampled=50, got {options.cache_distributions!r}."
        )
    if options.endpoint is not None:
        return {name: int(number), "loss_temperature": options.cache_temperature}
    return {name: int(number), "loss_temperature": options.cache_temperature, "dtype": options.cache_dtype}


def _answer(
    options: GenerateOptions,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset | None,
    counts: dict[str, int] | None,
    cache: dict[str, Any] | None,
) -> Dataset:
    folder = Path(options.output_dir)  # type: ignore[arg-type]
    target: PreTrainedModel | str = str(options.target_model)
    endpoint_options = None
    if options.endpoint is None:
        target = _load(options)
    else:
        names = ("concurrency", "timeout", "max_retries", "send_ids")
        endpoint_options = {name: getattr(options, name) for name in names}
    if prompts is None:
        assert not isinstance(target, str)
        prompts, counts = synthesize_prompts(
            target,
            tokenizer,
            options.num_prompts,
            max_new_tokens=options.query_max_new_tokens,
            temperature=options.query_temperature,
            top_p=options.query_top_p,
            batch_size=options.batch_size,
            seed=options.seed,
            system=options.system_prompt,
            min_characters=options.min_characters,
            max_characters=options.max_characters,
            script=options.script,
            output_dir=folder / ".queries",
        )
    return generate_alignment_data(
        target,
        tokenizer,
        prompts,
        output_dir=folder,
        cache_distributions=cache,
        endpoint_options=endpoint_options,
        target_revision=options.target_model_revision,
        prompt_counts=counts,
        source=options.dataset,
        **{name: getattr(options, name) for name in _SAME},
    )


def _load(options: GenerateOptions) -> PreTrainedModel:
    device = this_process().device
    device_map: Any = options.device_map
    if device_map is None and device.type != "cpu":
        device_map = {"": device}  # each process its own device
    return load_target(
        options.target_model,
        revision=options.target_model_revision,
        dtype=options.dtype,
        device_map=device_map,
        trust_remote_code=options.trust_remote_code,
    )


def _check_publishing(repo_id: str) -> None:
    check_repo_id(repo_id)
    if is_offline_mode():
        raise ValueError("`--push_to_hub` needs the Hub, but HF_HUB_OFFLINE is set. Unset it, or leave the option out.")
    writing_token()


def _publish(options: GenerateOptions, rows: Dataset) -> int:
    # Without the option the organisation's default decides.
    private = options.private or None
    try:
        address = push_alignment_data(options.output_dir, options.push_to_hub, rows=rows, private=private)  # type: ignore[arg-type]
    except ConnectionError as error:
        print(f"draftkd generate: {printable(error)}", file=sys.stderr)
        return 1
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(f"Published at {address}")
    return 0


def _print_summary(rows: Dataset, options: GenerateOptions, seconds: float) -> None:
    tokens = sum(len(ids) for ids in rows["completion_ids"])
    stopped = sum(reason == "stop" for reason in rows["finish_reason"])
    print(
        f"{len(rows)} completions, {tokens} tokens ({tokens / len(rows):.1f} each; {stopped} ended by themselves) in "
        f"{options.output_dir}, {seconds:.0f} s in all.\n"
        f"Train on them: draftkd train --model DRAFT --target_model {options.target_model} "
        f"--dataset {options.output_dir} --output_dir OUT"
    )
