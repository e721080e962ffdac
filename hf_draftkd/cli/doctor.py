"""`draftkd doctor TARGET [DRAFT]`: will this pair do, what will it take, and what next.

No weights are downloaded; only a GGUF file is, since it holds the config too.
"""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_draftkd.cli.errors import usage_errors
from hf_draftkd.cli.options import parse, required, target_words, trust_words
from hf_draftkd.hub.provenance import PairFacts
from hf_draftkd.hub.serving_commands import serving_commands
from hf_draftkd.models.examination import Examination, ModelFacts, examine
from hf_draftkd.models.resolve import Checkpoint, resolve
from hf_draftkd.utils.fields import option
from hf_draftkd.utils.processor import shared_cores
from hf_draftkd.utils.text import one_line, printable

_GB = 10**9
_WAYS = {
    "answering": "the target answers",
    "live": "training beside the target",
    "4 bits": "training beside the target in 4 bits",
    "cached": "training on its cached distributions",
}


@dataclass
class DoctorOptions:
    """What to look at."""

    target_model: str | None = option(None, "The target: a Hub id or a local path (may stand first, alone).")
    model: str | None = option(None, "A draft for it (may stand second).")
    target_model_revision: str | None = option(None, "Revision of the target.")
    model_revision: str | None = option(None, "Revision of the draft.")
    gguf_file: str | None = option(None, "Read the target from this GGUF file among its files, which is downloaded.")
    trust_remote_code: bool = option(False, "Run code that a model repository brings.")


def run(argv: list[str]) -> int:
    """Run `draftkd doctor *argv`; 2 where later commands would refuse the pair."""
    for place, name in ((0, "--target_model"), (2, "--model")):
        if len(argv) > place and not argv[place].startswith("-"):
            argv = [*argv[:place], name, *argv[place:]]
    about = "Look at a target, and at a draft for it, before anything is downloaded: do they fit, and what next?"
    (options,) = parse("doctor", [DoctorOptions], argv, about, "TARGET [DRAFT]")
    required(target_model=options.target_model)
    with usage_errors():
        trusted = {"trust_remote_code": options.trust_remote_code}
        at = {"revision": options.target_model_revision, "gguf_file": options.gguf_file}
        target = resolve(options.target_model, **at, **trusted)
        draft = None
        if options.model is not None:
            draft = resolve(options.model, revision=options.model_revision, **trusted)
        found = examine(target, draft)
    table = Table(box=SIMPLE, show_header=False, show_edge=False, padding=(0, 1), pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    free, where = _memory()
    for name, text in _rows(target, draft, found, free, where):
        # Messages may quote a stranger's files.
        table.add_row(name, "\n".join(escape(one_line(line)) for line in text.split("\n")))
    Console(highlight=False).print(table)
    print("next")
    for command in _next(target, draft, options, found, free):
        print(f"  {printable(command)}")
    return 2 if found.refused else 0


def _rows(
    target: Checkpoint, draft: Checkpoint | None, found: Examination, free: int, where: str
) -> Iterator[tuple[str, str]]:
    for name, checkpoint, facts in (("target", target, found.target), ("draft", draft, found.draft)):
        if checkpoint is not None:
            at = f" at {checkpoint.revision[:7]}" if checkpoint.revision else ""
            yield name, f"{checkpoint.name}{at}" + (f"\n{_model(facts)}" if facts else "")
    if draft is None and found.target and found.cut_layers:
        share = found.cut_parameters / found.target.num_parameters
        yield "draft", f"none; {found.cut_layers} of the target's layers: {_count(found.cut_parameters)} ({share:.1%})"
    if found.draft and found.target:
        yield "pair", "\n".join(_pair(found.draft, found.target, bool(found.refused)))
    if found.memory:
        lines = [f"{_size(free)} free on {where}; activations come on top"]
        for way, size in found.memory.items():
            lines.append(f"{_WAYS[way]}: {_size(size)}{'' if size <= free else ', too much'}")
        yield "memory", "\n".join(lines)
    if draft is not None and found.draft and found.target and not found.refused:
        yield "engines", _engines(draft, target, found.draft, found.target)
    if not torch.accelerator.is_available() and (advice := shared_cores()):
        yield "cores", advice
    yield "refused", "\n".join(found.refused) or "nothing that can be seen without the weights"


def _model(facts: ModelFacts) -> str:
    stored = f" in {', '.join(facts.stored)}" if facts.stored else ""
    tokens = "" if facts.num_tokens is None else f" for {facts.num_tokens:,} tokens"
    context = f"{facts.context:,} tokens" if facts.context else "not said"
    size = f"{facts.config.model_type}, {_count(facts.num_parameters)} parameters{stored}"
    return (
        f"{size}, {facts.table_share:.0%} of them in embedding and head\n"
        f"vocabulary: {facts.rows:,} rows{tokens}; context: {context}"
    )


def _pair(draft: ModelFacts, target: ModelFacts, refused: bool) -> Iterator[str]:
    share = draft.num_parameters / target.num_parameters
    swapped = ": are they the wrong way round? The target comes first" if share > 1 else ""
    yield f"the draft has {share:.1%} of the target's parameters{swapped}"
    if not refused:
        repair = "padded to other sizes: `train` and `init --model` repair the draft"
        yield f"the same tokenizer, {'the same number of rows' if draft.rows == target.rows else repair}"
    if draft.context and target.context and draft.context < target.context:
        yield f"texts beyond the draft's {draft.context:,} tokens cannot be trained on or measured"


def _engines(draft: Checkpoint, target: Checkpoint, draft_facts: ModelFacts, target_facts: ModelFacts) -> str:
    pair = PairFacts.from_configs(draft_facts.config, target_facts.config, target.tokenizer)

    def titles(pair: PairFacts) -> list[str]:
        commands = serving_commands(draft.name, target.name, target_revision=None, pair=pair, num_assistant_tokens=None)
        own = ["SpeculativeDecoding"] if pair.draft_vocab_size == pair.target_vocab_size else []
        return own + [command.title.replace("`", "") for command in commands if command.content]

    repaired = replace(pair, draft_vocab_size=pair.target_vocab_size, same_special_ids=True)
    now = titles(pair)
    later = ", ".join(title for title in titles(repaired) if title not in now)
    return "\n".join(filter(None, [", ".join(now), later and f"once the draft is repaired: {later}"]))


def _next(
    target: Checkpoint, draft: Checkpoint | None, options: DoctorOptions, found: Examination, free: int
) -> Iterator[str]:
    if found.target is None:
        yield "choose another target"
        return
    name, trusted = shlex.quote(target.name), trust_words(options.trust_remote_code)
    whole = target_words(target.name, options.target_model_revision, target.gguf_file)
    if found.draft is None or found.refused:
        if not target.is_local:
            yield f"draftkd find {name}"
        yield f"draftkd init {whole} --num_layers {found.cut_layers or 2} --output_dir DRAFT{trusted}"
    model = "--model DRAFT"
    if draft is not None and not found.refused:
        model = f"--model {shlex.quote(draft.name)}"
        if options.model_revision:
            model += f" --model_revision {shlex.quote(options.model_revision)}"
    answers_here = found.memory.get("answering", 0) <= free
    at, cache, learn = whole, "", f"{whole} "
    if not answers_here:
        at, learn = f"--endpoint URL --target_model SERVED_NAME --tokenizer {name}", "--divergence cross_entropy "
    elif found.memory.get("live", 0) > free:
        cache, learn = "--cache_distributions top_k=64 ", ""
    yield f"draftkd generate {at} --dataset PROMPTS {cache}--output_dir DATA{trusted}"
    yield f"draftkd train {model} {learn}--dataset DATA --output_dir OUT{trusted}"
    if answers_here:
        yield f"draftkd evaluate --model OUT {whole} --dataset OTHER_PROMPTS --output_dir REPORT{trusted}"


def _memory() -> tuple[int, str]:
    """Free bytes where models would be loaded, and where that is."""
    if torch.accelerator.is_available():
        return torch.accelerator.get_memory_info()[0], f"this {torch.accelerator.current_accelerator()}"
    import psutil  # comes with accelerate

    return psutil.virtual_memory().available, "this machine, without an accelerator"


def _count(parameters: int) -> str:
    return f"{parameters / _GB:.2f}B" if parameters >= _GB / 10 else f"{parameters / 10**6:.2f}M"


def _size(size: int) -> str:
    return f"{size / _GB:.1f} GB" if size >= _GB / 10 else f"{size / 10**6:.0f} MB"
