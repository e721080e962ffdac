"""Whether a model keeps the texts of a packed row apart: tried, since no config says so.

In a packed row texts stand one behind the other, and `position_ids` alone tell where one ends. Some architectures
(GPT-OSS, OPT, Bloom, Falcon and MPT in transformers 5.23) build their mask without looking at them, so that texts see
each other and the loss is wrong.
"""

from typing import Any

import torch
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_draftkd.models.forward import evaluating, logits_at, unwrapped
from hf_draftkd.training.signals import model_inputs

_TEXT_LENGTH = 16
# Half precision rounds a logit by about 1%, in some architectures more where the row has another length; a text that is
# seen changes most of them by far more.
_ROUNDING, _SHARE = 0.02, 0.1


@torch.no_grad()
def check_packing(model: torch.nn.Module, name: str) -> None:
    """Compare a text's logits behind another text in a packed row with those of the text alone; else a `ValueError`."""
    config = unwrapped(model).config
    vocab_size = config.get_text_config().vocab_size
    first, last = torch.randint(vocab_size, (2, _TEXT_LENGTH), generator=torch.Generator().manual_seed(0))
    error: Exception | None = None
    reason = "texts see each other in them, and the loss would be wrong"
    with evaluating(model):
        alone, joined = _last_logits(model, [last], packed=False), _last_logits(model, [first, last], packed=False)
        allowed = _SHARE * (joined - alone).norm(dim=-1) + _ROUNDING * alone.norm(dim=-1)
        try:
            packed = _last_logits(model, [first, last], packed=True)
            if ((packed - alone).norm(dim=-1) / allowed).median() <= 1:
                return
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, ValueError) as caught:
            error, reason = caught, str(caught).rstrip(".")
    raise ValueError(
        f"The {name} (model type {config.model_type!r}) cannot read packed rows: {reason}. Leave out `packing` and "
        "`padding_free`."
    ) from error


def _last_logits(model: torch.nn.Module, texts: list[Tensor], *, packed: bool) -> Tensor:
    """[length, V] logits at the last text, after texts in one row: as training packs them, or as one long text."""
    inputs: dict[str, Any] = {"input_ids": torch.cat(texts)[None]}
    if packed:
        collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
        inputs = model_inputs(collator([{"input_ids": text.tolist(), "labels": text.tolist()} for text in texts]))
    keep = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    keep[:, -len(texts[-1]) :] = True
    return logits_at(model, inputs, keep).float()
