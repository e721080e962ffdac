"""How much text a model can read."""

from typing import Any


def context_length(model_or_config: Any) -> int | None:
    """The longest text a model can read, in tokens; None where its config does not say."""
    config = getattr(model_or_config, "config", model_or_config)
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
