"""What a trainer leaves behind for others: the plain model that they load, and the card that describes it."""

import copy
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from transformers import Trainer

from hf_draftkd.evaluation.report import SpeculationReport
from hf_draftkd.hub.card import DraftModelCard
from hf_draftkd.training.describe import describe_run


class PlainDrafts(Trainer):
    """A trainer whose checkpoints hold the adapter, so that they resume; all else it saves is the merged, plain draft.

    Mix it in before another trainer class.
    """

    _saving_checkpoint = False
    model: Any

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._saving_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_checkpoint = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._saving_checkpoint or not is_peft_model(self.model):
            super()._save(output_dir, state_dict)
            return
        if self.args.should_save:
            trained, self.model = self.model, merged(self.model)
            try:
                super()._save(output_dir)
            finally:
                self.model = trained

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        *,
        report: SpeculationReport | None = None,
        plots: dict[str, str] | None = None,
    ) -> None:
        """Write the draft's card and `provenance.json` into `args.output_dir`.

        Args:
            model_name: Name on the card; by default the Hub id, or the output directory's name.
            dataset_name: Id of the training data on the Hub.
            tags: Tags beside the usual ones.
            report: Measured figures, as from [`evaluate_draft`]; without one the card names none.
            plots: Caption -> path of a picture inside `args.output_dir`.
        """
        if not self.is_world_process_zero():
            return
        directory = self.args.output_dir
        provenance = describe_run(self, dataset_name)
        provenance.save(directory)
        card = DraftModelCard.from_report(
            report,
            provenance=provenance,
            name=self.hub_model_id or model_name or Path(directory).name,
            tags=[tags] if isinstance(tags, str) else tags or (),
            plots=plots,
        )
        card.save(directory)


def merged(model: Any) -> Any:
    """The plain model of a PEFT-wrapped draft, with the adapter folded in; the draft itself is left as it is.

    Merging in place and taking it back would change the weights by rounding, so a copy is merged: drafts are small.
    """
    return copy.deepcopy(model).merge_and_unload() if is_peft_model(model) else model
