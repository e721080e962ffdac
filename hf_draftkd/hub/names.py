"""Reports as strangers may read them: no path of this machine is published."""

from collections.abc import Mapping
from typing import Any

from hf_draftkd.evaluation.report import SpeculationReport
from hf_draftkd.hub.public_names import public_name, public_source, without_paths

Json = Mapping[str, Any]


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
        prompts = known["prompts"]
        known["prompts"] = dict(prompts) | {"source": public_source(prompts["source"], prompts.get("is_local"))}
    known["warnings"] = list(map(without_paths, known.get("warnings", ())))
    return known


def _public_model(model: Json) -> dict[str, Any]:
    return dict(model) | {"name": public_name(model["name"], model.get("is_local"))}
