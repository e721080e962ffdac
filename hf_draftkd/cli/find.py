"""`draftkd find TARGET`: which drafts are there for a target, and how good are they?"""

import json
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_draftkd.cli.errors import usage_errors
from hf_draftkd.cli.options import parse, required
from hf_draftkd.hub.find import SPEEDUPS, FoundDraft, find_drafts
from hf_draftkd.utils.fields import option

_CAPTION = (
    "Metrics of the setting (T: temperature) in which a draft helps least; γ: tokens drafted per call; cost: time of a "
    "draft step ÷ target step; times: speed-up as measured by the author. All settings and the machine: --json."
)


@dataclass
class FindOptions:
    """What to look for."""

    target_model: str | None = option(None, "Hub id of the target (may stand first, alone).")
    revision: str | None = option(
        None, "Commit, branch or tag of the target the metrics should be about. Default: its latest commit."
    )
    include_base_models: bool = option(True, "Also list drafts of the models the target derives from.")
    limit: int = option(50, "At most this many drafts per target, the best.")
    json: bool = option(False, "Print JSON instead of a table.")


def run(argv: list[str]) -> int:
    if argv and not argv[0].startswith("-"):
        argv = ["--target_model", *argv]
    (options,) = parse("find", [FindOptions], argv, "Find draft models for a target on the Hugging Face Hub.", "TARGET")
    required(target_model=options.target_model)
    with usage_errors():
        found = find_drafts(
            options.target_model,
            revision=options.revision,
            include_base_models=options.include_base_models,
            limit=options.limit,
        )
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
    """The drafts as a table, with the metrics of the measured setting where a draft helps least.

    A terminal may have no more than 80 columns: numbers are never cut, so headings stand on two lines, words stand
    below the name, and the name alone is folded.
    """
    shown = Table(title=f"Drafts for {escape(target)}, best first", caption=_CAPTION, box=SIMPLE_HEAD)
    shown.add_column("draft", overflow="fold")
    for heading in ("accept-\nance", "tokens\nper call", "γ", "setting", "para-\nmeters", "down-\nloads"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for draft in found:
        typical, setting = draft.typical, "-"
        if typical is not None:
            setting = "greedy" if typical.decoding.is_greedy else f"T {typical.decoding.temperature:g}"
        cost = None if draft.relative_cost is None else f"cost {draft.relative_cost:.3f}"
        speeds = [
            f"{speedup:.2f} times by {way}"
            for way, name in SPEEDUPS.items()
            if (speedup := getattr(typical, name, None)) is not None
        ]
        details = "; ".join(filter(None, (draft.license, cost, *speeds, *draft.remarks)))
        shown.add_row(
            # Names and texts of strangers: square brackets are markup to rich.
            escape("\n".join(filter(None, (draft.repo_id, details)))),
            _text(draft.acceptance_rate, ".3f"),
            _text(draft.block_efficiency, ".2f"),
            _text(typical.num_assistant_tokens if typical else None, "d"),
            setting,
            _short(draft.num_parameters),
            _short(draft.downloads),
        )
    return shown


def _short(count: int | None) -> str:
    """A count in five characters: 1,234,567 is 1.23M."""
    if count is None:
        return "-"
    for power, sign in ((12, "T"), (9, "B"), (6, "M"), (3, "k")):
        # Three digits are shown: what they would round up to 1000 belongs to the next sign.
        if count >= 10**power * 0.9995:
            return f"{count / 10**power:.3g}{sign}"
    return str(count)


def _text(value: float | int | None, form: str) -> str:
    return "-" if value is None else format(value, form)
