"""Names as strangers may read them: no path of this machine is published."""

import os
import re
from dataclasses import replace

from hf_draftkd.evaluation.report import DraftResult, ModelInfo, SpeculationReport
from hf_draftkd.models.resolve import is_hub_id
from hf_draftkd.utils.text import one_line

# `/home/me/draft`, `~/draft`, `C:\\draft` inside a text; not the `/org/name` of an address or of `me/org/name`. Spaces
# are part of a path in quotes.
_PATH = re.compile(
    r"(?<=')(?:~?/|[A-Za-z]:[\\/])[^'\n]*\w[^'\n]*(?=')|"
    r"(?<![\w:/.~\\-])(?:~?/|[A-Za-z]:[\\/])[^\s'\"`,;:()]*\w[^\s'\"`,;:()]*"
)

# No repository of prompts is called so: a relative path, which may have existed elsewhere.
_DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst")


def public_name(name: str, is_local: bool | None = None) -> str:
    """A name as a stranger may read it: a Hub id as it is, a local path without the directories that lead to it.

    Args:
        name: Hub id or path.
        is_local: Whether it was a path where it was recorded. `models/draft0` may be either, and None can only look
            whether there is such a path here and now.
    """
    if is_hub_id(name) and not (os.path.exists(name) if is_local is None else is_local):
        return name
    # Both kinds of slash: a report may come from Windows.
    last = re.split(r"[\\/]", one_line(name).rstrip("\\/"))[-1]
    return f"path/to/{last or 'model'}"


def without_paths(text: str) -> str:
    """A text, or a command line, in which absolute paths tell no more than their last part."""
    return _PATH.sub(lambda match: public_name(match[0].rstrip(".")) + "." * match[0].endswith("."), text)


def is_public(name: str | None) -> bool:
    """Whether a name that went through `public_name` is a Hub id."""
    return is_hub_id(name) and not str(name).startswith("path/to/")


def public_source(source: str, is_local: bool | None = None) -> str:
    """As `public_name`, for what prompts come from: that may also be words ("given", "the demo's test queries")."""
    if not any(mark in source for mark in "/\\"):
        return one_line(source)
    if is_local is None and source.lower().endswith(_DATA_SUFFIXES):
        is_local = True
    return public_name(source, is_local)


def public_report(report: SpeculationReport) -> SpeculationReport:
    """The report without paths of this machine."""

    def named(model: ModelInfo) -> ModelInfo:
        return replace(model, name=public_name(model.name, model.is_local))

    def of_draft(result: DraftResult) -> DraftResult:
        return replace(result, draft=named(result.draft))

    results = [*filter(None, [report.baseline]), *(report.drafts or [])]
    public = {each.name: named(each).name for each in (report.target, report.draft, *(one.draft for one in results))}
    paths = [name for name in public if any(mark in name for mark in "/\\") and not is_public(public[name])]

    def said(warning: str) -> str:
        # A path with spaces ends nowhere in a sentence: first those that are known.
        for path in sorted(paths, key=len, reverse=True):
            warning = warning.replace(path, public[path])
        return without_paths(warning)

    prompts = report.prompts
    return replace(
        report,
        target=named(report.target),
        draft=named(report.draft),
        prompts=replace(prompts, source=public_source(prompts.source, prompts.is_local)),
        baseline=of_draft(report.baseline) if report.baseline else None,
        drafts=[of_draft(result) for result in report.drafts] if report.drafts else None,
        warnings=[said(warning) for warning in report.warnings],
    )
