"""Write a trained draft as the plain model that others load."""

import copy
from typing import Any

from accelerate.utils import is_peft_model


def merged(model: Any) -> Any:
    """The plain model of a PEFT-wrapped draft, with the adapter folded in; the draft itself is left as it is.

    Merging in place and taking it back would change the weights by rounding, so a copy is merged: drafts are small.
    """
    return copy.deepcopy(model).merge_and_unload() if is_peft_model(model) else model
