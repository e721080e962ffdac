"""`draftkd generate`: alignment data from user queries, from domain text, or from nothing."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from huggingface_hub import is_offline_mode
from huggingface_hub.utils import validate_repo_id

from hf_draftkd.cli.errors import UsageError, usage_errors
from hf_draftkd.cli.options import new_directory, parse, required, target_words, trust_words
from hf_draftkd.data.config import AlignmentDataConfig
from hf_draftkd.data.generation import generate_alignment_data
from hf_draftkd.data.shards import StoppedError, this_process
from hf_draftkd.hub.access import writing_token
from hf_draftkd.hub.dataset_card import push_alignment_data, write_card
from hf_draftkd.models.pairing import check_own_tokenizer
from hf_draftkd.models.resolve import resolve
from hf_draftkd.utils.fields import option
from hf_draftkd.utils.text import printable


@dataclass
class GenerateOptions:
    """What `draftkd generate` adds to the config of the data: how the target is loaded, and what is published."""

    target_model: str | None = option(None, "The target: a Hub id or a local path; with --endpoint, its name there.")
    target_model_revision: str | None = option(None, "Revision of the target.")
    tokenizer: str | None = option(
        None, "endpoint: the target's tokenizer, where --target_model is only a name at the server."
    )
    gguf_file: str | None = option(None, "Read the target from this GGUF file among its files.")
    dtype: str = option("auto", "dtype the target is loaded in.")
    device_map: str | None = option(None, "Device map of the target, such as auto; by default one device per process.")
    trust_remote_code: bool = option(False, "Run code that a model repository brings.")
    push_to_hub: str | None = option(None, "Publish the finished data under this dataset id.")
    private: bool = option(False, "Publish it as a private dataset.")


def run(argv: list[str]) -> int:
    options, config = parse(
        "generate",
        (GenerateOptions, AlignmentDataConfig),
        argv,
        "Have the target answer prompts: the data that a draft learns from. Every field of AlignmentDataConfig is an "
        "option.",
        "--target_model TARGET --dataset PROMPTS --output_dir DATA",
    )
    _check(options, config)
    start = perf_counter()
    with usage_errors():
        # Behind an endpoint the target is only a name, unless it is where the tokenizer comes from.
        checkpoint = resolve(
            options.tokenizer or options.target_model,
            revision=None if options.tokenizer else options.target_model_revision,
            trust_remote_code=options.trust_remote_code,
            gguf_file=options.gguf_file,
        )
        draft = None
        if config.draft_model is not None:
            draft = resolve(config.draft_model, trust_remote_code=options.trust_remote_code)
            check_own_tokenizer(draft, checkpoint.tokenizer)
    device, device_map = this_process().device, options.device_map
    if device_map is None and device.type != "cpu":
        device_map = {"": device}  # each process its own device
    try:
        rows = generate_alignment_data(
            str(options.target_model) if config.endpoint else checkpoint,
            checkpoint.tokenizer,
            config=config,
            draft_model=draft,
            loading={"dtype": options.dtype, "device_map": device_map},
        )
    except (ValueError, ImportError) as error:  # the work itself raises none
        raise UsageError(str(error)) from error
    except StoppedError as error:  # a full disk, or a server that stopped answering: finished shards stay
        print(f"draftkd generate: {printable(error)}", file=sys.stderr)
        return 1
    if not this_process().is_main_process:
        return 0
    with usage_errors():  # what somebody wrote into the card cannot be read
        write_card(Path(str(config.output_dir)), rows)
    tokens, stopped = sum(map(len, rows["completion_ids"])), list(rows["finish_reason"]).count("stop")
    learns_from = " " + target_words(options.target_model, options.target_model_revision, options.gguf_file)
    if config.cache is not None:
        learns_from = ""
    elif config.endpoint is not None:
        learns_from = " --divergence cross_entropy"
    folder = shlex.quote(str(config.output_dir))
    print(
        f"{len(rows)} completions, {tokens} tokens ({tokens / len(rows):.1f} each; {stopped} ended on their own) in "
        f"{config.output_dir}, {perf_counter() - start:.0f} s in all.\n"
        f"Train on them: draftkd train --model DRAFT{learns_from} --dataset {folder} --output_dir OUT"
        f"{trust_words(options.trust_remote_code)}"
    )
    if options.push_to_hub:
        with usage_errors():
            how = {"rows": rows, "private": options.private or None}  # without it the organisation's default decides
            address = push_alignment_data(str(config.output_dir), options.push_to_hub, **how)
        print(f"Published at {address}")
    return 0


def _check(options: GenerateOptions, config: AlignmentDataConfig) -> None:
    required(target_model=options.target_model, output_dir=config.output_dir)
    if config.scenario != "synthetic":
        required(dataset=config.dataset)
    endpoint = config.endpoint is not None
    for idle, is_given, why in (
        ("tokenizer", options.tokenizer and not endpoint, "without `endpoint`"),
        ("private", options.private and not options.push_to_hub, "without `push_to_hub`"),
        ("dtype", options.dtype != "auto" and endpoint, "beside `endpoint`, which loads the target itself"),
        ("device_map", options.device_map and endpoint, "beside `endpoint`, which loads the target itself"),
        ("target_model_revision", options.target_model_revision and options.tokenizer, "beside `tokenizer`"),
    ):
        if is_given:
            raise UsageError(f"`{idle}` would do nothing {why}. Leave it out.")
    with usage_errors():
        new_directory(str(config.output_dir), overwrite=True)
        if options.push_to_hub is not None:
            validate_repo_id(options.push_to_hub)
            if is_offline_mode():
                raise ValueError("`--push_to_hub` needs the Hub, but HF_HUB_OFFLINE is set. Unset it, or leave it out.")
            writing_token()
