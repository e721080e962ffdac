"""The papers behind a draft: those of the methods that were used, and no others."""

import re
from functools import cache
from importlib.resources import files

from hf_draftkd.evaluation.report import SpeculationReport
from hf_draftkd.hub.provenance import TrainingSummary

# These losses need no target. All others are distillation as DistillSpec describes it.
_PLAIN = (None, "cross_entropy")


@cache
def papers() -> dict[str, str]:
    """Key to BibTeX entry, as in `templates/papers.bib`."""
    text = files("hf_draftkd.hub").joinpath("templates", "papers.bib").read_text(encoding="utf-8")
    return {match[1]: match[0] for match in re.finditer(r"^@\w+\{(\w+),.*?^\}", text, re.MULTILINE | re.DOTALL)}


def papers_used(training: TrainingSummary | None, report: SpeculationReport | None = None) -> list[str]:
    """Keys of `papers()` for the methods of a training (None: speculative decoding alone), without repetition.

    A report whose metrics are quoted brings the papers that define them.
    """
    used = ["leviathan2023", "chen2023", *(_of_training(training) if training else ())]
    if report is not None and any(setting.mbsu for setting in report.settings):
        used.append("goel2024")
    return list(dict.fromkeys(used))


def _of_training(training: TrainingSummary) -> list[str]:
    options = training.hyperparameters or {}
    completions, divergence = training.completions, training.divergence
    found = {
        "hong2025": True,
        "zhou2024": completions in ("draft", "mixed", "data_and_draft") or divergence not in _PLAIN,
        "kim2016": completions == "target" and options.get("seq_kd"),
        "lin2020": completions == "data_and_draft" and divergence == "forward_kl",
        "wen2023": completions == "mixed" and divergence == "total_variation",
        "agarwal2024": training.lmbda,
        "xu2025": training.skd_top_k is not None,
        "hu2025": options.get("token_selection") == "adaspec",
        "goel2024": divergence == "tvd_plus_plus",
        "an2025": (options.get("parallel_tokens") or 1) > 1,
        "samarin2026": divergence in ("negative_log_acceptance", "lk_hybrid"),
        "xu2024": "synthetic" in (training.scenarios or ()),
        "liu2023": training.online,
        "anshumann2025": training.signal == "cached",
    }
    return [key for key, applies in found.items() if applies]
