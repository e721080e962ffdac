"""The model card of a draft: data in, text out.

Nothing here touches the network, measures anything or fills a gap: the report, the training summary and the provenance
say what is known, and what they do not say does not appear. Names and texts in them may come from strangers; they are
escaped, and the templates run in a sandbox.

    card = DraftModelCard.from_report(report, training=summary, pair=facts, name="org/draft")
    card.save("draft")                       # draft/README.md
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Self
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import PackageLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hf_draftkd.evaluation.report import SpeculationReport
from hf_draftkd.hub import engines, figures, sections
from hf_draftkd.hub.citations import bibtex, papers_used
from hf_draftkd.hub.markdown import Markdown, code, dataset_link, fenced, is_hub_id, model_link, one_line, text
from hf_draftkd.hub.metadata import card_data, eval_results
from hf_draftkd.hub.summary import COMPLETIONS, SIGNALS, PairFacts, Provenance, TrainingSummary, write_text

Json = Mapping[str, Any]
CARD_FILE = "README.md"
TEMPLATE = "draft_model_card.md"


class DraftModelCard(ModelCard):
    """A `huggingface_hub.ModelCard` that knows what a draft model's card says.

    Build one with `from_report`; `str(card)` or `card.render()` is its text, `card.data` its metadata and `card.save`
    writes it. Loading (`DraftModelCard.load(path_or_id)`), `validate` and `push_to_hub` are those of `ModelCard`.
    """

    card_data_class = ModelCardData

    @classmethod
    def from_report(
        cls,
        report: Any = None,
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
        template: str | None = None,
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
            template: Jinja source to use instead of the package's, run in a sandbox. It may say
                `{% extends "draft_model_card.md" %}` and override blocks.

        Raises:
            ValueError: The report is not one, or nothing at all is given.
        """
        provenance = provenance or Provenance()
        training = training or provenance.training
        pair = pair or provenance.pair or PairFacts()
        if report is None and training is None and name is None:
            raise ValueError("A card needs something to say: pass a report, a training summary, or at least a name.")
        known = public_report(report)
        context = _context(known, training, pair, provenance, name, plots or {}, [*(provenance.notes or ()), *notes])
        data = card_data(
            name=context["name"].rsplit("/", 1)[-1],
            target=context["target"],
            base_model=public_name(training.draft) if training and training.draft else None,
            datasets=[public_name(training.dataset)] if training and training.dataset else [],
            license=license,
            language=language,
            tags=tags,
            results=eval_results(known),
        )
        return cls(f"---\n{data.to_yaml()}\n---\n\n{_body(context, template)}")

    def render(self) -> str:
        """The whole card as text."""
        return str(self)

    def save(self, filepath: str | os.PathLike) -> Path:
        """Write the card, whole or not at all.

        Args:
            filepath: The file, or a folder in which it becomes `README.md`.
        """
        path = Path(filepath)
        return write_text(path / CARD_FILE if path.is_dir() else path, self.render())

    def updated_from(self, fresh: "DraftModelCard") -> Self:
        """Keep the prose and hand-set metadata of this card, and take the figures of a new one.

        Sections between the marks are taken from `fresh`, text outside them is kept. Metadata: what `fresh` states is
        taken, except licence and language once they are set; tags are united; other keys are kept; old figures go.
        """
        data = {key: value for key, value in self.data.to_dict().items() if key != "model-index"}
        new = fresh.data.to_dict()
        tags = [tag for tag in data.get("tags", []) if not str(tag).startswith("draft-for:")]
        data |= {key: value for key, value in new.items() if key not in ("license", "language") or key not in data}
        data["tags"] = list(dict.fromkeys([*tags, *new["tags"]]))
        merged = ModelCardData(**data)
        return type(self)(f"---\n{merged.to_yaml()}\n---\n{sections.with_sections(self.text, fresh.text)}")


def public_name(name: str) -> str:
    """A name as a stranger may read it: a Hub id as it is, a local path without the directories that lead to it."""
    if is_hub_id(name) and not os.path.exists(name):
        return name
    return f"path/to/{PurePath(one_line(name)).name or 'model'}/".rstrip("/")


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
        known[key] = _public_model(known.get(key))
    if "baseline" in known:
        known["baseline"] = dict(known["baseline"]) | {"draft": _public_model(known["baseline"].get("draft"))}
    if "source" in known.get("prompts", {}):
        source = known["prompts"]["source"]
        # The source may also be words ("given", "the demo's test queries"); only a path could tell something.
        shown = public_name(source) if any(mark in source for mark in "/\\") else source
        known["prompts"] = dict(known["prompts"]) | {"source": shown}
    return known


def _public_model(model: Json | None) -> dict[str, Any]:
    model = dict(model or {})
    return model | ({"name": public_name(model["name"])} if "name" in model else {})


def _context(
    report: Json,
    training: TrainingSummary | None,
    pair: PairFacts,
    provenance: Provenance,
    name: str | None,
    plots: Mapping[str, str],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Everything the template needs, as plain values and finished tables."""
    target: str | None = report.get("target", {}).get("name")
    if target is None and training and training.target:
        target = public_name(training.target)
    revision = report.get("target", {}).get("revision") or (training.target_revision if training else None)
    shown = public_name(name) if name else report.get("draft", {}).get("name") or "path/to/draft"
    if "/" not in shown:
        # A draft that was given a name but no owner is not on the Hub: nobody could load it by that name.
        shown = f"path/to/{shown}"
    # What evaluation recommends wins over what a config still holds from before.
    length = figures.tuned_length(report) or pair.num_assistant_tokens
    commands = engines.commands(
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
        "untuned_length": engines.UNTUNED_LENGTH,
        "prompts_text": _prompts(report.get("prompts", {})),
        "figures": parts,
        "has_stock": bool(report.get("baseline", {}).get("settings")),
        "stock": _model(report.get("baseline", {}).get("draft", {})),
        "speed": figures.speed_table(report.get("settings", ())),
        "hardware": figures.hardware_text(report.get("hardware")),
        "relative_cost": figures.estimate_text(latency.get("relative_cost"), 3),
        "verdicts": figures.verdict_rows(report),
        "plots": [(caption, Markdown(quote(one_line(path)))) for caption, path in plots.items()],
        "training_metrics": _pairs(training.metrics if training else None, header=("Metric", "Value")),
        "training_table": _training(training),
        "hyperparameters": _pairs(training.hyperparameters if training else None, header=("Name", "Value")),
        "made_with": _made_with(provenance),
        "limits": _limits(report, training, target, revision),
        "citations": [fenced("bibtex", bibtex(key)) for key in papers_used(training, report)],
    }


def _is_commit(revision: Any) -> bool:
    return isinstance(revision, str) and len(revision) == 40 and all(digit in "0123456789abcdef" for digit in revision)


def _parts(report: Json) -> list[dict[str, Any]]:
    parts = []
    for index, (domain, settings) in enumerate(figures.domains(report)):
        acceptance = figures.acceptance_table(report, settings, is_whole=index == 0)
        lengths = figures.length_table(settings)
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
        origin = _model({"name": public_name(training.draft), "revision": training.draft_revision})
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
    return figures.table(("", ""), [row for row in rows if row[1] is not None]) if any(row[1] for row in rows) else None


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
    if writer and training.lmbda is not None:
        writer = f"{writer}; the draft writes a fraction of {training.lmbda:g}"
    data = None
    if training.dataset:
        data = _dataset(public_name(training.dataset), training.dataset_revision)
    rows = [
        ("Data set", data),
        ("Scenario", ", ".join(training.scenarios) if training.scenarios else None),
        ("Rows", training.num_rows and f"{training.num_rows:,}"),
        ("Mixed in", _mixed_in(training)),
        ("Completion tokens", training.num_tokens and f"{training.num_tokens:,}"),
        ("Decoding of the data", "; ".join(map(figures.decoding_name, training.sampling or ())) or None),
        ("Who wrote the completions", writer),
        ("Signal", SIGNALS[training.signal] if training.signal else None),
        ("Divergence", divergence),
        ("Loss temperature", training.temperature),
        ("Adapter, merged", training.peft),
        ("Optimiser steps", training.num_steps),
        ("Epochs", training.num_epochs),
        ("Seed", training.seed),
    ]
    rows = [row for row in rows if row[1] is not None]
    return figures.table(("", ""), rows) if rows else None


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
    return figures.table(header, [(code(name), _number(value)) for name, value in values.items()])


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
        f"Command:\n\n{fenced('bash', provenance.command)}" if provenance.command else None,
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
        names = [str(name) for name, _ in figures.domains(report) if name]
        where = f"on {text(', '.join(names))}" if names else "on the prompts above"
        found.append(f"It was tested {where} only. On other topics or languages acceptance is likely to be lower.")
        tested = dict.fromkeys(figures.decoding_name(setting) for setting in settings)
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


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        loader=PackageLoader("hf_draftkd.hub", "templates"),
        undefined=StrictUndefined,
        finalize=text,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["estimate"] = figures.estimate_text
    environment.filters["block"] = lambda command: fenced(command.language, command.content)
    # For texts of this package only (titles and remarks of commands); data never goes through it.
    environment.filters["markdown"] = Markdown
    return environment


def _body(context: Json, source: str | None) -> str:
    """Render the template's blocks one by one and put the marks around them."""
    environment = _environment()
    template = environment.from_string(source) if source is not None else environment.get_template(TEMPLATE)
    blocks = template.blocks
    if source is not None and not set(blocks) & {"title", *sections.SECTIONS}:
        # A template without blocks is the whole body: all of it is prose then.
        return template.render(context).strip("\n") + "\n"

    def render(name: str) -> str:
        origin = blocks.get(name) or environment.get_template(TEMPLATE).blocks[name]
        return "".join(origin(template.new_context(dict(context)))).strip("\n")

    parts = [render("title") + "\n"]
    parts += [sections.marked(name, content) for name in sections.SECTIONS if (content := render(name))]
    return "\n".join(parts)
