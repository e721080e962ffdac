"""`draftkd find TARGET`: which drafts are there for a target, and how good are they?"""

import json
import sys
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_draftkd.cli.errors import UsageError
from hf_draftkd.cli.options import parse, required
from hf_draftkd.hub.discovery import FoundDraft, find_drafts


@dataclass
class FindOptions:
    """What to look for."""

    target_model: str | None = field(default=None, metadata={"help": "Hub id of the target (may stand first, alone)."})
    revision: str | None = field(
        default=None,
        metadata={"help": "Commit, branch or tag of the target the figures should be about. Default: its latest commit."},
    )
    include_base_models: bool = field(
        default=True, metadata={"help": "Also list drafts of the models the target derives from."}
    )
    limit: int = field(default=50, metadata={"help": "At most so many drafts per target."})
    json: bool = field(default=False, metadata={"help": "Print JSON instead of a table."})


def run(argv: list[str]) -> int:
    """Run `draftkd find *argv`."""
    if argv and not argv[0].startswith("-"):
        argv = ["--target_model", *argv]
    (options,) = parse("find", [FindOptions], argv, "Find draft models for a target on the Hugging Face Hub.")
    required(target_model=options.target_model)
    try:
        found = find_drafts(
            options.target_model,
            revision=options.revision,
            include_base_models=options.include_base_models,
            limit=options.limit,
        )
    except ConnectionError as error:
        print(f"draftkd find: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        raise UsageError(str(error)) from error
    if options.json:
        print(json.dumps([draft.to_dict() for draft in found], indent=2, ensure_ascii=False))
    elif not found:
        print(
            f"No draft on the Hub is tagged for {options.target_model}. `draftkd init` and `draftkd train` make one, "
            "`draftkd push` shares it."
        )
    else:
        Console().print(table(found, options.target_model))
    return 0


def table(found: list[FoundDraft], target: str) -> Table:
    """The drafts as a table; figures are those of the measured setting where a draft helps least."""
    shown = Table(title=f"Drafts for {escape(target)}, best first")
    shown.add_column("draft", overflow="fold")
    for heading in ("acceptance", "tokens per call", "γ", "setting", "parameters", "cost", "downloads"):
        shown.add_column(heading, justify="right" if heading != "setting" else "left")
    shown.add_column("licence")
    shown.add_column("remarks", overflow="fold")
    for draft in found:
        figure = draft.typical
        setting = "-"
        if figure is not None:
            setting = "greedy" if figure.temperature == 0 else f"temperature {_text(figure.temperature, 'g')}"
        shown.add_row(
            escape(draft.repo_id),
            _text(draft.acceptance_rate, ".3f"),
            _text(draft.block_efficiency, ".2f"),
            _text(figure.num_assistant_tokens if figure else None, "d"),
            setting,
            _text(draft.num_parameters, ","),
            _text(draft.relative_cost, ".3f"),
            _text(draft.downloads, ","),
            # Names and texts of strangers: square brackets are markup to rich.
            escape(draft.license or "-"),
            escape("; ".join(draft.remarks)),
        )
    return shown


def _text(value: float | int | None, form: str) -> str:
    return "-" if value is None else format(value, form)
