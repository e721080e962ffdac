"""The model card of a draft: data in, text out.

Nothing here touches the network, measures anything or fills a gap: the report, the training summary and the provenance
say what is known, and what they do not say does not appear. Names and texts in them may come from strangers, and are
escaped.

    card = DraftModelCard.from_report(report, training=summary, pair=facts, name="org/draft")
    card.save("draft")                       # draft/README.md
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Self
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData

from hf_draftkd.evaluation.recommendation import PARALLEL
from hf_draftkd.evaluation.report import SpeculationReport
from hf_draftkd.hub import report_tables as tables
from hf_draftkd.hub.card_merge import CARD_FILE, local_card, prose_of
from hf_draftkd.hub.citations import papers, papers_used
from hf_draftkd.hub.markdown import Markdown, code, fenced, hub_link, render_card, table, text
from hf_draftkd.hub.metadata import TAGS, draft_for_tag, eval_results
from hf_draftkd.hub.provenance import COMPLETIONS, SIGNALS, PairFacts, Provenance, TrainingSummary
from hf_draftkd.hub.public_names import is_public, public_name, public_report
from hf_draftkd.hub.serving_commands import UNTUNED_LENGTH, serving_commands
from hf_draftkd.hub.upload_files import CUSTOM_GENERATE_FOLDER
from hf_draftkd.utils.files import write_text
from hf_draftkd.utils.text import one_line

SECTIONS = ("summary", "use", "metrics", "training", "limits", "citation")


class DraftModelCard(ModelCard):
    """A `huggingface_hub.ModelCard` that knows what a draft model's card says.

    Build one with `from_report`; `str(card)` or `card.render()` is its text, `card.data` its metadata and `card.save`
    writes it. Loading (`DraftModelCard.load(path_or_id)`), `validate` and `push_to_hub` are those of `ModelCard`.
    """

    card_data_class = ModelCardData

    @classmethod
    def from_report(
        cls,
        report: SpeculationReport | Mapping[str, Any] | None = None,
        *,
        training: TrainingSummary | None = None,
        pair: PairFacts | None = None,
        provenance: Provenance | None = None,
        name: str | None = None,
        license: str | None = None,
        language: str | Sequence[str] | None = None,
        tags: Iterable[str] = (),
        plots: Mapping[str, str] | None = None,
        notes: Sequence[str] = (),
        custom_generate: bool = False,
    ) -> Self:
        """Write a card from what is known.

        Args:
            report: A `SpeculationReport`, or the dictionary that its JSON holds; None before any evaluation.
            training: How the draft was trained.
            pair: What decides which engines can run the pair; sizes and fingerprint.
            provenance: As stored in `provenance.json`; `training` and `pair` default to what it holds.
            name: Hub id under which the draft is, or will be, published; else its path.
            license: Identifier of the licence for the metadata (`apache-2.0`).
            language: Language code or codes for the metadata.
            tags: Further tags.
            plots: Caption to path within the repository.
            notes: Sentences that stand at the top of the card.
            custom_generate: Whether the repository holds code for `generate(custom_generate=...)`.

        Raises:
            ValueError: The report is not one, or nothing at all is given.
        """
        provenance = provenance or Provenance()
        training = training or provenance.training
        pair = pair or provenance.pair or PairFacts()
        if report is None and training is None and name is None:
            raise ValueError("A card needs something to say: pass a report, a training summary, or at least a name.")
        if report is not None and not isinstance(report, SpeculationReport):
            report = SpeculationReport.from_dict(report)  # type: ignore[arg-type]
        known = public_report(report) if report else None
        target = known.target.name if known else training.public_name("target") if training else None
        shown = public_name(name) if name else known.draft.name if known else "path/to/draft"
        if "/" not in shown:
            # A draft that was given a name but no owner is not on the Hub: nobody could load it by that name.
            shown = f"path/to/{shown}"
        hub_target = target if is_public(target) else None
        origin, dataset = (training.public_name("draft"), training.public_name("dataset")) if training else (None, None)
        results = eval_results(known)
        data = ModelCardData(
            # A draft that is not known to start from a model on the Hub names its target: it is distilled from it.
            base_model=origin if is_public(origin) else hub_target,
            datasets=[dataset] if dataset and is_public(dataset) else None,
            eval_results=results or None,
            language=[one_line(item) for item in ([language] if isinstance(language, str) else language or ())] or None,
            library_name="transformers",
            license=one_line(license) if license else None,
            # Without results a name would be a stray key: ModelCardData folds it into the model index.
            model_name=one_line(shown.rsplit("/", 1)[-1]) if results else None,
            pipeline_tag="text-generation",
            tags=[
                *TAGS,
                *([CUSTOM_GENERATE_FOLDER] if custom_generate else []),
                *([draft_for_tag(hub_target)] if hub_target else []),
                *map(one_line, tags),
            ],
        )
        context = {
            "title": shown if is_public(shown) else PurePath(shown).name,
            "notes": [*(provenance.notes or ()), *notes],
            "plots": [(caption, Markdown(quote(one_line(path)))) for caption, path in (plots or {}).items()],
            "report": known,
            "provenance": provenance,
            "versions": ", ".join(f"{name} {version}" for name, version in (provenance.versions or {}).items()),
            **(_measured(known) if known else dict.fromkeys(_MEASURED)),
            "training_table": _training_table(training) if training else None,
            "training_metrics": _value_table("Metric", training.metrics if training else None),
            "hyperparameters": _value_table("Name", training.hyperparameters if training else None),
            **_pair(shown, target, known, training, pair, custom_generate),
            "citations": [fenced(papers()[key], "bibtex") for key in papers_used(training, known)],
        }
        return cls(f"---\n{data.to_yaml()}\n---\n\n{render_card('draft_model_card.md', SECTIONS, context)}")

    def render(self) -> str:
        """The whole card as text."""
        return str(self)

    def save(self, filepath: str | os.PathLike) -> Path:
        """Write the card, whole or not at all, into a file, or into a folder as `README.md`."""
        path = Path(filepath)
        return write_text(path / CARD_FILE if path.is_dir() else path, self.render())


def local_model_card(folder: Path, fresh: DraftModelCard) -> DraftModelCard | None:
    """The card in a draft's folder, for which there is a `fresh` one; None without one."""
    card = local_card(DraftModelCard, folder)
    if card and _without_title(card) == _without_title(fresh):
        # In the folder a title is the folder's name or the run's. On the Hub another one was chosen by a person.
        card.text = fresh.text
    return card


def _without_title(card: DraftModelCard) -> str:
    return "\n".join(line for line in prose_of(card.text).splitlines() if not line.startswith("# "))


# What the template knows of a report beyond its fields.
_MEASURED = ("parts", "prompts", "stock", "speed", "parallel", "engines", "vocabulary", "hardware", "domains", "tested")


def _measured(report: SpeculationReport) -> dict[str, Any]:
    parts = []
    for index, (domain, settings) in enumerate(tables.by_domain(report)):
        acceptance = tables.acceptance_table(report, settings, is_whole=index == 0)
        lengths = tables.length_table(settings)
        if acceptance or lengths:
            parts.append({"title": domain, "acceptance": acceptance, "lengths": lengths})
    prompts, source = report.prompts, ""
    if prompts.source != "given":
        source = f" of {hub_link(prompts.source, 'datasets/') if '/' in prompts.source else text(prompts.source)}"
    stock = report.baseline.draft if report.baseline and report.baseline.settings else None
    return {
        "parts": parts,
        "prompts": Markdown(f"{prompts.count} prompts{source} (sha256 {code(prompts.sha256)})"),
        "stock": _at(hub_link(stock.name), stock.revision) if stock else None,
        "speed": tables.speed_table(report.settings),
        "parallel": tables.parallel_table(report.settings),
        "engines": tables.engine_table(report),
        "vocabulary": tables.vocabulary_table(report.settings, tables.shown_length(report)),
        "hardware": tables.hardware_text(report.hardware),
        "domains": [name for name, _ in tables.by_domain(report) if name],
        "tested": dict.fromkeys(str(setting.decoding) for setting in report.settings),
    }


def _pair(
    name: str,
    target: str | None,
    report: SpeculationReport | None,
    training: TrainingSummary | None,
    pair: PairFacts,
    custom_generate: bool,
) -> dict[str, Any]:
    """What the template says about draft and target together: the summary and the commands."""
    revision = (report.target.revision if report else None) or (training.target_revision if training else None)
    is_commit = revision is not None and len(revision) == 40 and set(revision) <= set("0123456789abcdef")
    # What evaluation recommends wins over what a config still holds from before.
    advice = report.recommendation if report else None
    advised = tables.recommended_length(report)
    length, at_once = advised or pair.num_assistant_tokens, None
    if pair.parallel_tokens is not None and (advice is None or advice.way == PARALLEL):
        length, at_once = pair.num_assistant_tokens, min(advised or UNTUNED_LENGTH, pair.parallel_tokens)
    commands = serving_commands(
        name,
        target or "path/to/target",
        target_revision=revision if is_public(target) and is_commit else None,
        pair=pair,
        num_assistant_tokens=length,
        custom_generate=custom_generate,
        num_parallel_tokens=at_once,
    )
    sizes = {pair.draft_vocab_size, pair.target_vocab_size}
    shown_target = _at(hub_link(target), revision) if target else None
    return {
        "summary": _summary(shown_target, report, training, pair, length),
        "commands": commands,
        "has_engines": any(command.language == "bash" for command in commands),
        "draft_length": length,
        "untuned_length": UNTUNED_LENGTH,
        "pair": pair,
        "sizes_differ": None not in sizes and len(sizes) == 2,
        "target": shown_target,
    }


def _at(shown: Markdown, revision: str | None) -> Markdown:
    return Markdown(f"{shown} at {code(revision)}") if revision else shown


def _known_table(rows: Mapping[str, Any]) -> Markdown | None:
    """A table of what is known."""
    return table(("", ""), [row for row in rows.items() if row[1] is not None])


def _count(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"


def _summary(
    target: Markdown | None,
    report: SpeculationReport | None,
    training: TrainingSummary | None,
    pair: PairFacts,
    length: int | None,
) -> Markdown | None:
    draft_size = report.draft.num_parameters if report else pair.draft_parameters
    target_size = report.target.num_parameters if report else pair.target_parameters
    share = f" ({draft_size / target_size:.2%} of the target)" if draft_size and target_size else ""
    origin = None
    if training and training.draft:
        origin = _at(hub_link(str(training.public_name("draft"))), training.draft_revision)
    elif training and training.built_from:
        origin = text(training.built_from)
    proposed, rows = pair.draft_vocabulary_size, pair.draft_vocab_size
    return _known_table(
        {
            "Target": target,
            "Started from": origin,
            "Parameters": f"{draft_size:,}{share}" if draft_size else None,
            "Parameters of the target": _count(target_size),
            "Tokenizer": code(pair.tokenizer_fingerprint) if pair.tokenizer_fingerprint else None,
            "Tuned draft length": length,
            "Tokens it proposes with SpeculativeDecoding": f"{proposed:,} of {rows:,}" if proposed and rows else None,
        }
    )


def _training_table(training: TrainingSummary) -> Markdown | None:
    dataset = training.public_name("dataset")
    divergence = code(training.divergence) if training.divergence else None
    if divergence and training.divergence_options:
        options = ", ".join(f"{name} = {value}" for name, value in training.divergence_options.items())
        divergence = Markdown(f"{divergence}, {text(options)}")
    mixed = None
    if training.num_mixed_rows:
        share = training.num_mixed_rows / (training.num_mixed_rows + (training.num_rows or 0))
        mixed = f"{training.num_mixed_rows:,} rows of other text" + (
            f" ({share:.0%} of all)" if training.num_rows else ""
        )
    writer = COMPLETIONS[training.completions] if training.completions else None
    if writer and training.lmbda is not None and training.lmbda < 1:
        writer += f"; the draft writes a fraction of {training.lmbda:g}"
    if writer and training.skd_top_k is not None:
        writer += f"; of its tokens, those outside the target's top {training.skd_top_k} are replaced by the target's"
    return _known_table(
        {
            "Data set": _at(hub_link(dataset, "datasets/"), training.dataset_revision) if dataset else None,
            "Scenario": ", ".join(training.scenarios) if training.scenarios else None,
            "Rows": _count(training.num_rows),
            "Mixed in": mixed,
            "Completion tokens": _count(training.num_tokens),
            "Decoding of the data": "; ".join(map(str, training.sampling or ())) or None,
            "Who wrote the completions": writer,
            "Signal": SIGNALS[training.signal] if training.signal else None,
            "Divergence": divergence,
            "Loss temperature": training.loss_temperature,
            "Adapter, merged": training.peft,
            "Optimiser steps": training.num_steps,
            "Epochs": training.num_epochs,
            "Seed": training.seed,
        }
    )


def _value_table(header: str, values: Mapping[str, Any] | None) -> Markdown | None:
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in (values or {}).items()}
    return table((header, "Value"), [(code(name), text(value)) for name, value in shown.items()])
