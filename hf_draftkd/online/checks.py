"""What an online draft refuses, and why: pairs that cannot learn, and requests that cannot be learnt from."""

from typing import Any

from torch import Tensor, distributed
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.configuration_utils import GenerationMode

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


def check_request(
    target: Any, draft: Any, ids: Tensor | None, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
) -> GenerationConfig:
    """Refuse a call of `generate` that cannot be served with a draft and learnt from.

    Args:
        target: The model whose `generate` is called.
        draft: The draft.
        ids: Token ids, [1, L].
        generation_config: As the call gives it.
        kwargs: The call's other arguments.

    Returns:
        What `generate` will decode with, the target's own defaults filled in.

    Raises:
        ValueError: There are no token ids, several requests, or another draft; beams and the like, for which
            transformers leaves `assistant_model` unused; or classifier-free guidance, whose own calls of the target
            would be taken for those that check the draft.
    """
    if "assistant_model" in kwargs:
        raise ValueError("`assistant_model` is the distiller's own draft: leave it out.")
    if ids is None or kwargs.get("inputs_embeds") is not None:
        raise ValueError("A request is learnt from by its token ids: give `input_ids` instead of `inputs_embeds`.")
    if ids.ndim != 2 or ids.shape[0] != 1:
        raise ValueError(
            f"Assisted decoding serves one request at a time, `input_ids` [1, L], got shape {tuple(ids.shape)}. Call "
            "`generate` for each of them."
        )
    config, _ = unwrapped(target)._prepare_generation_config(generation_config, **kwargs)
    mode = config.get_generation_mode(draft)
    if mode != GenerationMode.ASSISTED_GENERATION:
        raise ValueError(
            f"This request decodes by {mode.value.replace('_', ' ')}, which does not use a draft. Leave out what asks "
            "for it (such as `num_beams`), or call `target_model.generate` for such requests."
        )
    if config.guidance_scale not in (None, 1):
        raise ValueError(
            f"`guidance_scale={config.guidance_scale}` makes the target read each text twice, and its output without "
            "the prompt must not be learnt from. Call `target_model.generate` for such requests."
        )
    return config
