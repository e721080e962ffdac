"""How much text a model can read."""

import sys
from typing import Any


def context_length(model_or_config: Any) -> int | None:
    """The longest text a model can read, in tokens; None where its config does not say."""
    config = getattr(model_or_config, "config", model_or_config)
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def shared_context(*models: Any) -> int:
    """The longest text that every one of the models can read; without a limit, more than any text has."""
    return min((length for model in models if (length := context_length(model)) is not None), default=sys.maxsize)
