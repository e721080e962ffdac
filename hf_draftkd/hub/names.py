"""Names and reports as strangers may read them: no path of this machine is published."""

import os
import re
from collections.abc import Mapping
from typing import Any

from hf_draftkd.evaluation.report import SpeculationReport
from hf_draftkd.hub.markdown import is_hub_id, one_line

Json = Mapping[str, Any]
# `/home/me/draft`, `~/draft`, `C:\\draft` inside a text; not the `/org/name` of an address or of `me/org/name`.
_PATH = re.compile(r"(?<![\w:/.~\\-])(?:~?/|[A-Za-z]:[\\/])[^\s'\"`,;:()]*\w[^\s'\"`,;:()]*")


def public_name(name: str) -> str:
    """A name as a stranger may read it: a Hub id as it is, a local path without the directories that lead to it."""
    if is_hub_id(name) and not os.path.exists(name):
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


def public_report(report: Any) -> dict[str, Any]:
    """The report as a dictionary in which no name tells a path of this machine.

    Raises:
        ValueError: It is no report; the message names the key.
    """
    if report is None:
        return {}
    if not isinstance(report, (SpeculationReport, Mapping)):
        raise ValueError(
            f"A card is written from a SpeculationReport or the dictionary in its JSON, got {type(report).__name__}. "
            "`SpeculationReport.load(path)` reads a file."
        )
    checked = report if isinstance(report, SpeculationReport) else SpeculationReport.from_dict(dict(report))
    known = checked.to_dict()
    for key in ("target", "draft"):
        known[key] = _public_model(known[key])
    for other in (*known.get("drafts", ()), *([known["baseline"]] if "baseline" in known else [])):
        other["draft"] = _public_model(other["draft"])
    if "source" in known.get("prompts", {}):
        source = known["prompts"]["source"]
        # The source may also be words ("given", "the demo's test queries"); only a path could tell something.
        shown = public_name(source) if any(mark in source for mark in "/\\") else source
        known["prompts"] = dict(known["prompts"]) | {"source": shown}
    known["warnings"] = list(map(without_paths, known.get("warnings", ())))
    return known


def _public_model(model: Json) -> dict[str, Any]:
    return dict(model) | {"name": public_name(model["name"])}
