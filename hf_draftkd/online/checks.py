"""What an online draft refuses, and why: pairs, requests, and states of another run."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.configuration_utils import GenerationMode

from hf_draftkd.models.forward import unwrapped
from hf_draftkd.models.loading import require_loaded
from hf_draftkd.models.pairing import check_own_tokenizer, check_weights_apart
from hf_draftkd.models.resolve import check_config

# What a saved buffer depends on, and what to do where it differs.
_REMEDIES = {
    "target": "Serve the target it was saved with",
    "vocab_size": "Give the same tokenizer",
    "top_k": "Set it as it was",
    "loss_temperature": "Set it as it was",
}


def check_pair(draft: Any, target: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse a pair that cannot learn while it serves.

    Raises:
        ValueError: The tokenizers differ, weights are shared, the target is in training mode, or there are several
            processes.
    """
    require_loaded(draft, target)
    for model in (draft, target):
        check_config(model.config, model.name_or_path or type(model).__name__)
    if tokenizer is not None:
        check_own_tokenizer(unwrapped(draft), tokenizer)
        check_own_tokenizer(unwrapped(target), tokenizer, is_target=True)
    check_weights_apart(draft, target)
    if target.training:
        raise ValueError("The target is in training mode, in which dropout changes what it says: `target.eval()`.")
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise ValueError(
            "Online distillation runs in one process: each of several would teach a draft of its own. Serve replicas "
            "with plain `generate`, and teach in one of them."
        )


def check_request(ids: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Refuse a call of `generate` that cannot be served with a draft and learnt from.

    Args:
        ids: Token ids, [1, L].
        kwargs: The call's other arguments.

    Raises:
        ValueError: There are no token ids, several requests, or another draft.
    """
    if "assistant_model" in kwargs:
        raise ValueError("`assistant_model` is the distiller's own draft: leave it out.")
    if ids is None or kwargs.get("inputs_embeds") is not None:
        raise ValueError("A request is learnt from by its token ids: give `input_ids`, and no `inputs_embeds`.")
    if ids.ndim != 2 or ids.shape[0] != 1:
        raise ValueError(
            f"Assisted decoding serves one request at a time, `input_ids` [1, L], got shape {tuple(ids.shape)}. Call "
            "`generate` for each of them."
        )


def check_decoding(target: Any, draft: Any, generation_config: Any, kwargs: dict[str, Any]) -> None:
    """Refuse decoding in which the draft has no part, or the target is asked for more than to check it.

    Args:
        target: Whose `generate` is called.
        draft: The draft.
        generation_config: As the call gives it.
        kwargs: The call's other arguments.

    Raises:
        ValueError: Beams and the like, for which transformers leaves `assistant_model` unused; or classifier-free
            guidance, whose own calls of the target would be taken for those that check the draft.
    """
    config, _ = unwrapped(target)._prepare_generation_config(generation_config, **kwargs)
    mode = config.get_generation_mode(draft)
    if mode != GenerationMode.ASSISTED_GENERATION:
        raise ValueError(
            f"This request decodes by {mode.value.replace('_', ' ')}, in which a draft has no part. Leave out what "
            "asks for it (`num_beams`, say), or call `target_model.generate` for such requests."
        )
    if config.guidance_scale not in (None, 1):
        raise ValueError(
            f"`guidance_scale={config.guidance_scale}` has the target read each text twice, and what it says without "
            "the prompt is nothing to learn from. Call `target_model.generate` for such requests."
        )


def check_state(directory: str, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuse a saved state whose distributions mean something else here.

    Args:
        directory: Where it lies.
        there: Its facts.
        here: The same of this process: `target`, `vocab_size`, `top_k` and `loss_temperature`.

    Raises:
        ValueError: One of them differs.
    """
    for name, remedy in _REMEDIES.items():
        if there[name] != here[name]:
            raise ValueError(
                f"The state in {directory!r} was saved with {name}={there[name]!r}, and here it is {here[name]!r}; the "
                f"distributions in its buffer are of no use then. {remedy}, or name another `output_dir`."
            )
