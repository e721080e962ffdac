"""The model card of a draft: data in, text out.

Nothing here touches the network, measures anything or fills a gap: the report, the training summary and the provenance
say what is known, and what they do not say does not appear. Names and texts in them may come from strangers; they are
escaped, and the templates run in a sandbox.

    card = DraftModelCard.from_report(report, training=summary, pair=facts, name="org/draft")
    card.save("draft")                       # draft/README.md
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelCard, ModelCardData

from hf_draftkd.evaluation.report import SpeculationReport
from hf_draftkd.hub.card_merge import CARD_FILE, updated
from hf_draftkd.hub.markdown import render_card
from hf_draftkd.hub.metadata import card_data, eval_results
from hf_draftkd.hub.parts import card_context
from hf_draftkd.hub.provenance import PairFacts, Provenance, TrainingSummary
from hf_draftkd.hub.public_names import public_report
from hf_draftkd.utils.files import write_text

Json = Mapping[str, Any]
SECTIONS = ("summary", "use", "figures", "training", "limits", "citation")
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
        if report is not None and not isinstance(report, SpeculationReport):
            report = SpeculationReport.from_dict(report)
        known = public_report(report).to_dict() if report else {}
        context = card_context(
            known, training, pair, provenance, name, plots or {}, [*(provenance.notes or ()), *notes]
        )
        data = card_data(
            name=context["name"].rsplit("/", 1)[-1],
            target=context["target"],
            base_model=training.public_name("draft") if training else None,
            datasets=[name for name in [training and training.public_name("dataset")] if name],
            license=license,
            language=language,
            tags=tags,
            results=eval_results(known),
        )
        return cls(f"---\n{data.to_yaml()}\n---\n\n{render_card(TEMPLATE, SECTIONS, context, template)}")

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

    def updated_from(self, fresh: "DraftModelCard") -> "DraftModelCard":
        """Keep the prose and hand-set metadata of this card, and take the figures of a new one.

        Sections between the marks are taken from `fresh`, text outside them is kept. Metadata: what follows from the
        weights is taken from `fresh`, tags are united, and all else is kept, licence and language included.
        """
        return updated(self, fresh)
