"""Whether a model keeps the texts of a packed row apart: tried, since no config says so.

In a packed row texts stand one behind the other, and `position_ids` alone tell where one ends. Some architectures
(GPT-OSS, OPT, Bloom and MPT in transformers 5.24; in 5.23 Falcon too) build their mask without looking at them, so that
texts see each other and the loss is wrong; others (GPT-Neo, MPT) hold tables that end with the context.
"""

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_draftkd.data.columns import is_transformed, row_lengths
from hf_draftkd.models.forward import evaluating, logits_at, unwrapped
from hf_draftkd.models.pairing import context_length
from hf_draftkd.training.signals import model_inputs

_TEXT_LENGTH = 16
# Half precision rounds a logit by about 1%, in some architectures more where the row has another length; a text that is
# seen changes most of them by far more.
_ROUNDING, _SHARE = 0.02, 0.1


def longest_packed_row(dataset: Any, batch_size: int, max_length: int | None) -> int:
    """Tokens of the longest row that the padding-free collator makes: all rows of a batch, one behind the other."""
    if not isinstance(dataset, Dataset) or is_transformed(dataset):
        return batch_size * (max_length or 0)
    return int(np.sort(row_lengths(dataset, "input_ids"))[-batch_size:].sum())


@torch.no_grad()
def check_packing(model: torch.nn.Module, name: str, row_length: int) -> None:
    """Compare a text's logits behind another text in a packed row with those of the text alone; else a `ValueError`.

    If the longest packed row has more tokens (`row_length`) than the model's context, such a row is tried as well.
    """
    inner = unwrapped(model)
    generator = torch.Generator().manual_seed(0)
    vocab_size = inner.config.get_text_config().vocab_size
    first, last = torch.randint(vocab_size, (2, _TEXT_LENGTH), generator=generator)
    context = context_length(inner)
    with evaluating(model):
        alone, joined = _last_logits(model, [last], packed=False), _last_logits(model, [first, last], packed=False)
        _compare(model, name, [first, last], alone, joined, "")
        if context is not None and row_length > context:
            texts = [first] * (context // _TEXT_LENGTH + 1)
            limit = f" longer than its context of {context} tokens"
            _compare(model, name, [*texts, last], alone, joined, limit)


def _compare(model: torch.nn.Module, name: str, texts: list[Tensor], alone: Tensor, joined: Tensor, limit: str) -> None:
    error: Exception | None = None
    try:
        packed = _last_logits(model, texts, packed=True)
        reason = "texts see each other in them, and the loss would be wrong"
        allowed = _SHARE * (joined - alone).norm(dim=-1) + _ROUNDING * alone.norm(dim=-1)
        if ((packed - alone).norm(dim=-1) / allowed).median() <= 1:
            return
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, ValueError) as caught:
        error, reason = caught, str(caught).rstrip(".")
    instead = "Leave out `packing` and `padding_free`."
    if limit:
        instead = "Lower `per_device_train_batch_size` or `max_length`: a row is as long as both together make it."
    kind = unwrapped(model).config.model_type
    raise ValueError(f"The {name} (model type {kind!r}) cannot read packed rows{limit}: {reason}. {instead}") from error


def _last_logits(model: torch.nn.Module, texts: list[Tensor], *, packed: bool) -> Tensor:
    """[length, V] logits at the last text, after texts in one row: as training packs them, or as one long text."""
    inputs: dict[str, Any] = {"input_ids": torch.cat(texts)[None]}
    if packed:
        collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
        inputs = model_inputs(collator([{"input_ids": text.tolist(), "labels": text.tolist()} for text in texts]))
    keep = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    keep[:, -len(texts[-1]) :] = True
    return logits_at(model, inputs, keep).float()
