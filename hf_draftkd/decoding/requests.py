"""What a call of `generate` asks for, and what of it speculative decoding cannot do: refused before any decoding."""

import inspect
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
)
from transformers.generation import GenerationMode
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from hf_draftkd.models.forward import CACHE

# Processors with a memory of their own, or that run the model themselves: calling them for drafted tokens, some of
# which are rejected, would change what they do.
_STATEFUL_PROCESSORS = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "guidance_scale",
    "ClassifierFreeGuidanceLogitsProcessor": "guidance_scale",
    "SynthIDTextWatermarkLogitsProcessor": "watermarking_config",
}
_KNOWN_INPUTS = {"attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep"}


def dropped_by_generate() -> dict[str, Any]:
    """`assistant_model`, `streamer` and `synced_gpus` as the running `generate` call received them.

    transformers 5.23 passes none of them to a callable, and says nothing. They are read where they still stand: in the
    frame of `generate`. Empty where no `generate` is running.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            return {name: frame.f_locals.get(name) for name in ("assistant_model", "streamer", "synced_gpus")}
        frame = frame.f_back  # type: ignore[assignment]
    return {}


def check_models(draft: PreTrainedModel, target: PreTrainedModel) -> None:
    """Refuse a target that cannot be decoded speculatively, or a draft that does not fit it.

    Raises:
        ValueError: The target is not a decoder with a cache, or reads more than the text, or vocabularies or devices
            differ.
    """
    if target.config.is_encoder_decoder or target._is_stateful:
        what = "is an encoder-decoder model" if target.config.is_encoder_decoder else "keeps a running state"
        raise ValueError(
            f"The target ({type(target).__name__}) {what}. Speculative decoding needs a decoder-only causal LM with a "
            "cache from which rejected tokens can be taken. Decode without a draft."
        )
    preparing = getattr(target.prepare_inputs_for_generation, "__self__", target)
    if preparing is not target:
        raise ValueError(
            f"The target's inputs are prepared by {type(preparing).__name__}, as with prompt or prefix tuning: what it "
            "adds to the text would be left out. Generate without `custom_generate`."
        )
    sizes = [model.config.get_text_config().vocab_size for model in (draft, target)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"The draft has {sizes[0]} rows of vocabulary and the target {sizes[1]}. If they share a tokenizer, align "
            "them once: `align_vocabulary(draft, target, tokenizer)`. If not, this draft cannot serve this target."
        )
    if draft.device != target.device:
        raise ValueError(
            f"The draft is on {draft.device} and the target on {target.device}. Move it: "
            f"`draft.to({str(target.device)!r})`."
        )


def check_request(
    target: PreTrainedModel,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    is_synced: bool,
) -> None:
    """Refuse a call of `generate` that cannot be honoured; the message names what.

    Raises:
        ValueError: Beams, another generation mode, a stateful processor, inputs besides text, right padding, no cache
            or one of another kind, outputs that are not collected, or processes that must generate in step.
    """
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"SpeculativeDecoding decodes greedily or by sampling, but these settings ask for {mode.value}. Leave out "
            "`num_beams`, `penalty_alpha`, `dola_layers` and `prompt_lookup_num_tokens`, or generate without it."
        )
    for processor in processors:
        cause = _STATEFUL_PROCESSORS.get(type(processor).__name__)
        if cause is not None:
            raise ValueError(
                f"{type(processor).__name__} ({cause}) remembers earlier calls, so it cannot be applied to drafted "
                "tokens that may be rejected. Leave it out, or generate without `custom_generate`."
            )
    # Before the inputs: `generate` passes these two on as inputs of the model.
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name):
            raise ValueError(
                f"`{name}` is not collected in speculative decoding; `output_scores` and `output_logits` are."
            )
    unknown = [name for name, value in model_kwargs.items() if value is not None and name not in _KNOWN_INPUTS]
    if unknown or input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"A draft reads token ids only, but {', '.join(unknown) or 'no `input_ids`'} was given. Generate without "
            "`custom_generate`, or take the text model out with `extract_text_model`."
        )
    is_sharded = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(target)
    if is_synced or (is_sharded and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        raise ValueError(
            "Processes that must run every forward pass together (FSDP, ZeRO-3, `synced_gpus`) cannot accept different "
            "numbers of tokens. Gather the weights first, or generate without `custom_generate`."
        )
    if not model_kwargs.get("use_cache"):
        raise ValueError("SpeculativeDecoding needs `use_cache=True`.")
    _check_mask(input_ids, model_kwargs)


def check_cache(cache: Any, config: GenerationConfig, input_ids: Tensor, attention_mask: Tensor | None) -> int:
    """Refuse a cache that cannot be rolled back; return how many columns of the prompt it holds already.

    Raises:
        ValueError: The cache is of another kind, has linear attention, or holds another text than the prompt; or the
            mask is not the prompt's.
    """
    if type(cache) not in (DynamicCache, StaticCache) or any(cache.is_linear):
        what = "linear attention or other recurrent layers" if isinstance(cache, DynamicCache) else type(cache).__name__
        raise ValueError(
            f"Rejected tokens must be taken out of the cache, which {what} cannot do. Use a plain dynamic or static "
            "cache, or generate without `custom_generate`."
        )
    read = int(cache.get_seq_length())
    mask_length = config._mask_length if attention_mask is None else attention_mask.shape[1]
    if read and (len(input_ids) > 1 or mask_length != input_ids.shape[1] or read >= input_ids.shape[1]):
        raise ValueError(
            f"The given cache holds {read} tokens. Continue one text at a time, and pass all of its ids, those in the "
            f"cache included (got {list(input_ids.shape)})."
        )
    if mask_length != input_ids.shape[1]:
        raise ValueError(
            f"`attention_mask` has {mask_length} columns and `input_ids` {input_ids.shape[1]}: give one number for "
            "each token."
        )
    return read


def _check_mask(input_ids: Tensor, model_kwargs: dict[str, Any]) -> None:
    mask = model_kwargs.get("attention_mask")
    expected = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    if mask is not None and mask.shape == input_ids.shape:
        if bool((mask[:, 1:] < mask[:, :-1]).any()) or not bool(mask[:, -1].all()):
            raise ValueError(
                "`attention_mask` has zeros after a token: right padding, or a hole. Pad prompts on the left "
                '(`tokenizer.padding_side = "left"`), and pass the tokenizer\'s mask: where there is none, `generate` '
                "takes every pad token of a prompt for padding."
            )
        expected = (mask.long().cumsum(1) - 1).clamp(min=0)
    positions = model_kwargs.get("position_ids")
    if positions is not None and (
        positions.shape[-1] == input_ids.shape[1] and (positions.ndim != 2 or bool((positions != expected).any()))
    ):
        raise ValueError("`position_ids` of your own cannot be continued: leave them out.")
