"""`draftkd init`: a draft that fits a target, made from the target, from a config, or from a stock draft."""

from dataclasses import dataclass, field

import torch
from transformers import AutoConfig

from hf_draftkd.cli.errors import UsageError, usage_errors
from hf_draftkd.cli.options import new_directory, parse, required
from hf_draftkd.models.building import build_draft, check_plan
from hf_draftkd.models.loading import load_draft, load_target
from hf_draftkd.models.pairing import align_vocabulary, check_tokenizers
from hf_draftkd.models.resolve import resolve


@dataclass
class InitOptions:
    """Give exactly one of `model`, `num_layers`, `layers`, `share` and `draft_config`."""

    target_model: str | None = field(default=None, metadata={"help": "The target: a Hub id or a local path."})
    target_model_revision: str | None = field(default=None, metadata={"help": "Revision of the target."})
    output_dir: str | None = field(default=None, metadata={"help": "Where the draft is written."})
    model: str | None = field(
        default=None,
        metadata={"help": "A stock draft to repair: it gets the target's vocabulary size and special ids."},
    )
    num_layers: int | None = field(
        default=None, metadata={"help": "Copy so many of the target's layers, evenly spread."}
    )
    layers: list[int] | None = field(default=None, metadata={"help": "Copy these layers of the target, from 0."})
    share: float | None = field(
        default=None, metadata={"help": "A new draft of this share of the target's parameters, such as 0.0164."}
    )
    draft_config: str | None = field(default=None, metadata={"help": "A new draft from this config: an id or a path."})
    dtype: str = field(
        default="float32",
        metadata={"help": "dtype the draft is written in.", "choices": ["float32", "bfloat16", "float16"]},
    )
    seed: int = field(default=42, metadata={"help": "Seed of new weights."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a model repository brings."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Write into a directory that is not empty."})


def run(argv: list[str]) -> int:
    """`draftkd init *argv`; returns the exit code."""
    (options,) = parse("init", (InitOptions,), argv, "Make a draft that fits a target.")
    required(target_model=options.target_model, output_dir=options.output_dir)
    ways = ("model", "num_layers", "layers", "share", "draft_config")
    chosen = [name for name in ways if getattr(options, name) is not None]
    if len(chosen) != 1:
        given = f"got {', '.join(f'--{name}' for name in chosen)}" if chosen else "got none"
        raise UsageError(f"give exactly one of {', '.join(f'--{name}' for name in ways)}; {given}")
    trusted = {"trust_remote_code": options.trust_remote_code}
    with usage_errors():
        directory = new_directory(
            options.output_dir, overwrite=options.overwrite_output_dir, target_model=options.target_model
        )
        checkpoint = resolve(options.target_model, revision=options.target_model_revision, **trusted)
        if options.model is not None:
            stock = resolve(options.model, **trusted)
            check_tokenizers(stock.tokenizer, checkpoint.tokenizer)
            draft = load_draft(stock, dtype=options.dtype)
            target = load_target(checkpoint)
            align_vocabulary(draft, target, checkpoint.tokenizer)
        else:
            plan = {name: getattr(options, name) for name in ("num_layers", "layers", "share")}
            if options.draft_config is not None:
                plan["config"] = AutoConfig.from_pretrained(options.draft_config, **trusted)
            check_plan(checkpoint.config, **plan)
            target = load_target(checkpoint)
            dtype = getattr(torch, options.dtype)
            draft = build_draft(target, **plan, tokenizer=checkpoint.tokenizer, dtype=dtype, seed=options.seed)
    draft.save_pretrained(directory)
    checkpoint.tokenizer.save_pretrained(directory)
    share = draft.num_parameters() / target.num_parameters()
    print(
        f"Wrote {directory}: {draft.num_parameters():,} parameters, {share:.2%} of the target's. Next:\n"
        f"  draftkd train --model {directory} --target_model {options.target_model} --dataset DATA --output_dir OUT"
    )
    return 0
