"""What the sections of a card say: everything the template needs, as plain values and finished tables."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

from hf_draftkd.hub import report_tables, serving_commands
from hf_draftkd.hub.citations import bibtex, papers_used
from hf_draftkd.hub.markdown import Markdown, code, dataset_link, estimate_text, fenced, model_link, table, text
from hf_draftkd.hub.provenance import COMPLETIONS, SIGNALS, PairFacts, Provenance, TrainingSummary
from hf_draftkd.hub.public_names import is_public, public_name
from hf_draftkd.utils.text import one_line

Json = Mapping[str, Any]


def card_context(
    report: Json,
    training: TrainingSummary | None,
    pair: PairFacts,
    provenance: Provenance,
    name: str | None,
    plots: Mapping[str, str],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Everything the template needs, by the names it uses.

    Args:
        report: As `public_report` gives it, empty where there is none.
        training: How the draft was trained, if that is known.
        pair: What decides which engines can run it.
        provenance: Where its files come from.
        name: Hub id under which the draft is published, or its path.
        plots: Caption to path within the repository.
        notes: Sentences for the top of the card.
    """
    target: str | None = report.get("target", {}).get("name")
    if target is None and training and training.target:
        target = training.public_name("target")
    revision = report.get("target", {}).get("revision") or (training.target_revision if training else None)
    shown = public_name(name) if name else report.get("draft", {}).get("name") or "path/to/draft"
    if "/" not in shown:
        # A draft that was given a name but no owner is not on the Hub: nobody could load it by that name.
        shown = f"path/to/{shown}"
    # What evaluation recommends wins over what a config still holds from before.
    length = report_tables.tuned_length(report) or pair.num_assistant_tokens
    commands = serving_commands.commands(
        shown,
        target or "path/to/target",
        target_revision=revision if is_public(target) and _is_commit(revision) else None,
        pair=pair,
        num_assistant_tokens=length,
    )
    parts = _parts(report)
    sizes = {pair.draft_vocab_size, pair.target_vocab_size}
    latency = report.get("latency", {})
    return {
        "name": shown,
        "title": shown if is_public(shown) else PurePath(shown).name,
        "target": target if is_public(target) else None,
        "pair": pair,
        "notes": notes,
        "summary": _summary(report, training, pair, target, revision, length),
        "recommendation": report.get("recommendation"),
        "commands": commands,
        "sizes_differ": None not in sizes and len(sizes) == 2,
        "has_engines": any(command.language == "bash" for command in commands),
        "draft_length": length,
        "untuned_length": serving_commands.UNTUNED_LENGTH,
        "prompts_text": _prompts(report.get("prompts", {})),
        "figures": parts,
        "has_stock": bool(report.get("baseline", {}).get("settings")),
        "stock": _model(report.get("baseline", {}).get("draft", {})),
        "speed": report_tables.speed_table(report.get("settings", ())),
        "hardware": report_tables.hardware_text(report.get("hardware")),
        "relative_cost": estimate_text(latency.get("relative_cost"), 3),
        "verdicts": report_tables.verdict_rows(report),
        "plots": [(caption, Markdown(quote(one_line(path)))) for caption, path in plots.items()],
        "training_metrics": _pairs(training.metrics if training else None, header=("Metric", "Value")),
        "training_table": _training(training),
        "hyperparameters": _pairs(training.hyperparameters if training else None, header=("Name", "Value")),
        "made_with": _made_with(provenance),
        "limits": _limits(report, training, target, revision),
        "citations": [fenced(bibtex(key), "bibtex") for key in papers_used(training, report)],
    }


def _is_commit(revision: Any) -> bool:
    return isinstance(revision, str) and len(revision) == 40 and all(digit in "0123456789abcdef" for digit in revision)


def _parts(report: Json) -> list[dict[str, Any]]:
    parts = []
    for index, (domain, settings) in enumerate(report_tables.domains(report)):
        acceptance = report_tables.acceptance_table(report, settings, is_whole=index == 0)
        lengths = report_tables.length_table(settings)
        if acceptance or lengths:
            parts.append({"title": domain, "acceptance": acceptance, "lengths": lengths})
    return parts


def _model(model: Json) -> Markdown:
    shown = model_link(model["name"]) if "name" in model else Markdown("not named")
    return Markdown(f"{shown} at {code(model['revision'])}") if model.get("revision") else shown


def _parameters(count: int | None) -> str | None:
    return None if count is None else f"{count:,}"


def _summary(
    report: Json,
    training: TrainingSummary | None,
    pair: PairFacts,
    target: str | None,
    revision: str | None,
    length: int | None,
) -> Markdown | None:
    own, other = report.get("draft", {}), report.get("target", {})
    draft_size = own.get("num_parameters", pair.draft_parameters)
    target_size = other.get("num_parameters", pair.target_parameters)
    share = Markdown(f" ({draft_size / target_size:.2%} of the target)") if draft_size and target_size else ""
    origin = None
    if training and training.draft:
        origin = _model({"name": training.public_name("draft"), "revision": training.draft_revision})
    elif training and training.built_from:
        origin = text(training.built_from)
    rows = [
        ("Target", _model({"name": target, "revision": revision}) if target else None),
        ("Started from", origin),
        ("Parameters", f"{_parameters(draft_size)}{share}" if draft_size else None),
        ("Parameters of the target", _parameters(target_size)),
        ("Tokenizer", code(pair.tokenizer_fingerprint) if pair.tokenizer_fingerprint else None),
        ("Tuned draft length", length),
    ]
    rows = [row for row in rows if row[1] is not None]
    return table(("", ""), rows) if rows else None


def _prompts(prompts: Json) -> Markdown:
    count = f"{prompts['count']} prompts" if "count" in prompts else "prompts"
    source = ""
    if "source" in prompts and prompts["source"] != "given":
        source = f" of {dataset_link(prompts['source']) if '/' in prompts['source'] else text(prompts['source'])}"
    digest = f" (sha256 {code(prompts['sha256'])})" if "sha256" in prompts else ""
    return Markdown(f"{text(count)}{source}{digest}")


def _training(training: TrainingSummary | None) -> Markdown | None:
    if training is None:
        return None
    divergence = code(training.divergence) if training.divergence else None
    if divergence and training.divergence_options:
        options = ", ".join(f"{name} = {value}" for name, value in training.divergence_options.items())
        divergence = Markdown(f"{divergence}, {text(options)}")
    writer = COMPLETIONS[training.completions] if training.completions else None
    if writer and training.lmbda is not None and training.lmbda < 1:
        writer = f"{writer}; the draft writes a fraction of {training.lmbda:g}"
    if writer and training.skd_top_k is not None:
        writer += f"; of its tokens, those outside the target's top {training.skd_top_k} are replaced by the target's"
    dataset = training.public_name("dataset")
    data = _dataset(dataset, training.dataset_revision) if dataset else None
    rows = [
        ("Data set", data),
        ("Scenario", ", ".join(training.scenarios) if training.scenarios else None),
        ("Rows", training.num_rows and f"{training.num_rows:,}"),
        ("Mixed in", _mixed_in(training)),
        ("Completion tokens", training.num_tokens and f"{training.num_tokens:,}"),
        ("Decoding of the data", "; ".join(map(str, training.sampling or ())) or None),
        ("Who wrote the completions", writer),
        ("Signal", SIGNALS[training.signal] if training.signal else None),
        ("Divergence", divergence),
        ("Loss temperature", training.loss_temperature),
        ("Adapter, merged", training.peft),
        ("Optimiser steps", training.num_steps),
        ("Epochs", training.num_epochs),
        ("Seed", training.seed),
    ]
    rows = [row for row in rows if row[1] is not None]
    return table(("", ""), rows) if rows else None


def _mixed_in(training: TrainingSummary) -> str | None:
    if not training.num_mixed_rows:
        return None
    share = training.num_mixed_rows / (training.num_mixed_rows + (training.num_rows or 0))
    return f"{training.num_mixed_rows:,} rows of other text" + (f" ({share:.0%} of all)" if training.num_rows else "")


def _dataset(name: str, revision: str | None) -> Markdown:
    return Markdown(f"{dataset_link(name)} at {code(revision)}") if revision else dataset_link(name)


def _pairs(values: Json | None, *, header: tuple[str, str]) -> Markdown | None:
    if not values:
        return None
    return table(header, [(code(name), _number(value)) for name, value in values.items()])


def _number(value: Any) -> Markdown:
    return text(f"{value:.4g}" if isinstance(value, float) else value)


def _made_with(provenance: Provenance) -> Markdown | None:
    versions = ", ".join(f"{name} {version}" for name, version in (provenance.versions or {}).items())
    sentences = [
        f"Made with {text(versions)}." if versions else None,
        f"Code at commit {code(provenance.commit)}." if provenance.commit else None,
        f"Trained on {text(provenance.hardware)}." if provenance.hardware else None,
        f"Finished {text(provenance.created)}." if provenance.created else None,
        f"Weights (sha256) {code(provenance.weights_sha256)}." if provenance.weights_sha256 else None,
        f"Command:\n\n{fenced(provenance.command, 'bash')}" if provenance.command else None,
    ]
    return Markdown(" ".join(filter(None, sentences))) if any(sentences) else None


def _limits(report: Json, training: TrainingSummary | None, target: str | None, revision: str | None) -> list[Markdown]:
    """What the figures do not say, derived from what is absent from the report."""
    settings = report.get("settings", ())
    found = []
    if not settings:
        so_far = (
            "Nothing was measured" if not (training and training.metrics) else "Only the figures above were measured"
        )
        found.append(f"{so_far} with this draft yet: whether it helps is not known.")
    else:
        names = [str(name) for name, _ in report_tables.domains(report) if name]
        where = f"on {text(', '.join(names))}" if names else "on the prompts above"
        found.append(f"It was tested {where} only. On other topics or languages acceptance is likely to be lower.")
        tested = dict.fromkeys(report_tables.decoding_name(setting) for setting in settings)
        found.append(f"Decoding settings tested: {text('; '.join(tested))}. Others were not measured.")
        if not any("assisted" in setting for setting in settings):
            found.append("No speed-up was measured: whether it pays depends on the hardware.")
        if "baseline" not in report:
            found.append("It was not compared with another draft.")
    if report.get("lossy"):
        found.append("Some figures were taken with lossy verification, which changes the target's output.")
    if target:
        at = f" at {code(revision)}" if revision else ""
        found.append(f"It fits {model_link(target)}{at}. A target that was fine-tuned further agrees with it less.")
    found.append(
        "Speculative decoding saves time where decoding is limited by memory bandwidth, which means small batches. "
        "With large batches, or very short answers, it can be slower than plain decoding."
    )
    found += [text(warning) for warning in report.get("warnings", ())]
    return [Markdown(limit) for limit in found]
