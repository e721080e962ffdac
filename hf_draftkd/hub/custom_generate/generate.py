"""Run by `target.generate(**inputs, assistant_model=draft, custom_generate="org/draft", trust_remote_code=True)`."""

from typing import Any

from hf_draftkd import SpeculativeDecoding


def generate(model: Any, assistant_model: Any = None, tokenizer: Any = None, **arguments: Any) -> Any:
    """`model.generate` with the draft `assistant_model`, decoded by `hf_draftkd.SpeculativeDecoding`."""
    if assistant_model is None:
        raise ValueError("Give the draft as well: `generate(..., assistant_model=draft, custom_generate=...)`.")
    return model.generate(**arguments, custom_generate=SpeculativeDecoding(assistant_model, tokenizer=tokenizer))
