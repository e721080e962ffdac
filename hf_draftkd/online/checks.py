"""What an online draft refuses, and why: pairs that cannot learn, and requests that cannot be learnt from."""

from typing import Any

from torch import Tensor, distributed
from transformers import PreTrainedTokenizerBase

from hf_draftkd.models.forward import unwrapped
from hf_draftkd.models.loading import require_loaded
from hf_draftkd.models.pairing import check_own_tokenizer, check_weights_apart


def check_pair(draft: Any, target: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse a pair that cannot learn while it serves.

    Raises:
        ValueError: The tokenizers differ, weights are shared, the target is in training mode, or there are several
            processes.
    """
    require_loaded(draft, target)
    if tokenizer is not None:
        check_own_tokenizer(unwrapped(draft), tokenizer)
        check_own_tokenizer(unwrapped(target), tokenizer, is_target=True)
    check_weights_apart(draft, target)
    if target.training:
        raise ValueError("The target is in training mode, where dropout changes its output. Call `target.eval()`.")
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ValueError(
            "Online distillation runs in one process: each of several would train a different draft. Serve replicas "
            "with plain `generate`, and train in one of them."
        )


def check_request(ids: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
    """Refuse a call of `generate` that cannot be learnt from; what cannot be decoded, `SpeculativeDecoding` refuses.

    Returns:
        The ids [B, L].

    Raises:
        ValueError: There are none, or another draft or way of decoding is given.
    """
    for name in ("assistant_model", "custom_generate"):
        if kwargs.get(name) is not None:
            raise ValueError(f"`{name}` is the distiller's own: leave it out, or call `target_model.generate`.")
    if ids is None or kwargs.get("inputs_embeds") is not None:
        raise ValueError("A request is learnt from by its token ids: give `input_ids` instead of `inputs_embeds`.")
    return ids
