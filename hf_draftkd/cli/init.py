"""`draftkd init`: a draft that fits a target, made from the target, from a config, or from a stock draft."""

import shlex
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import AutoConfig

from hf_draftkd.cli.errors import UsageError, usage_errors
from hf_draftkd.cli.options import new_directory, parse, required, target_words, trust_words
from hf_draftkd.models.building import build_draft, check_plan
from hf_draftkd.models.loading import extract_text_model, load_draft, load_target, load_without_weights
from hf_draftkd.models.pairing import align_vocabulary, check_tokenizers
from hf_draftkd.models.resolve import resolve
from hf_draftkd.models.sizing import loaded_parameters
from hf_draftkd.utils.fields import option


@dataclass
class InitOptions:
    """Give exactly one of `model`, `num_layers`, `layers`, `share`, `draft_config` and `text_of`."""

    target_model: str | None = option(None, "The target: a Hub id or a local path.")
    target_model_revision: str | None = option(None, "Revision of the target.")
    gguf_file: str | None = option(None, "Read the target from this GGUF file among its files.")
    output_dir: str | None = option(None, "Where the draft is written.")
    model: str | None = option(None, "A stock draft to repair: it gets the target's vocabulary size and special ids.")
    num_layers: int | None = option(None, "Copy this many of the target's layers, evenly spread.")
    layers: list[int] | None = option(None, "Copy these layers of the target, from 0.")
    share: float | None = option(None, "A new draft of this share of the target's parameters, such as 0.0164.")
    draft_config: str | None = option(None, "A new draft from this config: an id or a path.")
    text_of: str | None = option(
        None, "A multimodal model: write its text model alone, as a target to give to other commands."
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "dtype it is written in; by default float32, and with `text_of` that of the model."
    )
    seed: int = option(42, "Seed of new weights.")
    trust_remote_code: bool = option(False, "Run code that a model repository brings.")
    overwrite_output_dir: bool = option(False, "Write into a directory that is not empty.")


def run(argv: list[str]) -> int:
    usage = "--target_model TARGET (--num_layers N | --share S | --model DRAFT | ...) --output_dir NEW_DRAFT"
    (options,) = parse("init", (InitOptions,), argv, "Make a draft that fits a target.", usage)
    ways = ("model", "num_layers", "layers", "share", "draft_config", "text_of")
    chosen = [name for name in ways if getattr(options, name) is not None]
    if len(chosen) != 1:
        given = f"got {', '.join(f'--{name}' for name in chosen)}" if chosen else "got none"
        raise UsageError(f"give exactly one of {', '.join(f'--{name}' for name in ways)}; {given}")
    if options.text_of is not None and options.target_model is not None:
        raise UsageError("`--text_of` makes a target; leave out `--target_model`.")
    if options.text_of is not None and options.gguf_file is not None:
        raise UsageError("`--text_of` reads a whole multimodal model, not a GGUF file; leave out `--gguf_file`.")
    source = options.text_of or options.target_model
    required(target_model=source, output_dir=options.output_dir)
    trusted = {"trust_remote_code": options.trust_remote_code}
    with usage_errors():
        directory = new_directory(options.output_dir, overwrite=options.overwrite_output_dir, target_model=source)
        at = {"revision": options.target_model_revision, "gguf_file": options.gguf_file}
        checkpoint = resolve(source, **at, **trusted)
        if options.text_of is not None:
            text = extract_text_model(checkpoint, dtype=options.dtype or "auto")
            text.save_pretrained(directory)
            checkpoint.tokenizer.save_pretrained(directory)
            print(f"Wrote {directory}: the text model of {checkpoint.name}, {text.num_parameters():,} parameters.")
            return 0
        dtype = options.dtype or "float32"
        if options.model is not None:
            stock = resolve(options.model, **trusted)
            check_tokenizers(stock.tokenizer, checkpoint.tokenizer)
            draft = load_draft(stock, dtype=dtype)
            target = load_without_weights(checkpoint)
            align_vocabulary(draft, target, checkpoint.tokenizer)
        else:
            plan = {name: getattr(options, name) for name in ("num_layers", "layers", "share")}
            if options.draft_config is not None:
                plan["config"] = AutoConfig.from_pretrained(options.draft_config, **trusted)
            check_plan(checkpoint.config, **plan)
            target = load_target(checkpoint)
            how = {"tokenizer": checkpoint.tokenizer, "dtype": getattr(torch, dtype), "seed": options.seed}
            draft = build_draft(target, **plan, **how)
    draft.save_pretrained(directory)
    checkpoint.tokenizer.save_pretrained(directory)
    share = draft.num_parameters() / loaded_parameters(target)
    whole = target_words(options.target_model, options.target_model_revision, options.gguf_file)
    print(
        f"Wrote {directory}: {draft.num_parameters():,} parameters, {share:.2%} of the target's. Next:\n"
        f"  draftkd train --model {shlex.quote(str(directory))} {whole} --dataset DATA --output_dir OUT"
        f"{trust_words(options.trust_remote_code)}"
    )
    return 0
