"""Write a trained draft as the plain model that others load."""

import copy
from typing import Any

from accelerate.utils import is_peft_model
from transformers import Trainer


class PlainDrafts(Trainer):
    """A trainer whose checkpoints hold the adapter, so that they resume; all else it saves is the merged, plain draft.

    Mix it in before another trainer class.
    """

    _saving_checkpoint = False

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


def merged(model: Any) -> Any:
    """The plain model of a PEFT-wrapped draft, with the adapter folded in; the draft itself is left as it is.

    Merging in place and taking it back would change the weights by rounding, so a copy is merged: drafts are small.
    """
    return copy.deepcopy(model).merge_and_unload() if is_peft_model(model) else model
