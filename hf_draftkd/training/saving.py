"""Plain drafts: what others can load, whatever the draft was while it trained (an adapter, shards)."""

import copy
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Trainer


def check_saving(trainer: Trainer) -> None:
    """Raise a `ValueError` for settings under which a sharded draft would end in no file that others can load."""
    state, reason = trainer.accelerator.state, None
    if trainer.is_fsdp_enabled and "FULL_STATE_DICT" not in str(state.fsdp_plugin.state_dict_type):
        reason = "FSDP. Set `fsdp_state_dict_type: FULL_STATE_DICT` in the accelerate configuration"
    elif trainer.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3:
        gathers = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
        if not state.deepspeed_plugin.hf_ds_config.is_true(gathers):
            reason = f"ZeRO-3. Set `{gathers}` to true (`zero3_save_16bit_model: true` in an accelerate configuration)"
    if reason is not None:
        raise ValueError(f"The draft could not be saved as a plain model: its weights stay sharded under {reason}.")


def check_adapter(model: Any, *, loads_best: bool) -> None:
    """Refuse an adapter that no plain draft can hold: one that transformers holds and not peft, that does not change
    weights, or that changes one of two tied weights, since in the plain draft both would change, or neither. With
    `loads_best` (`load_best_model_at_end`) also one of which transformers would not find the best checkpoint.

    peft ties some such adapters (`ensure_weight_tying=True`), but then puts one on the head as well, which TRL refuses.
    Whole copies (`modules_to_save`) and `trainable_token_indices` come out right.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "The draft carries an adapter that transformers holds (`add_adapter`, or an adapter loaded by "
            "`AutoModelForCausalLM`): only the adapter would be saved, and no plain draft. Give `peft_config`, or "
            "`get_peft_model(draft, config)`; `load_draft` loads a draft with its adapter merged."
        )
    if not is_peft_model(model):
        return
    if not hasattr(model, "merge_and_unload"):
        raise ValueError(
            f"An adapter of type {model.active_peft_config.peft_type.value} cannot be merged into a plain draft, which "
            "is what `generate(assistant_model=...)` needs. Choose one that changes weights, such as `LoraConfig`."
        )
    if loads_best and model.active_adapter != "default":
        raise ValueError(
            "`load_best_model_at_end` finds adapters named 'default' alone, and the draft's is "
            f"{model.active_adapter!r}: the last checkpoint would be taken for the best. Leave out the name "
            "(`get_peft_model(draft, config)`), or the option."
        )
    base = model.get_base_model()
    ends = {"embeddings": base.get_input_embeddings(), "head": base.get_output_embeddings()}
    tied = _plain_weight(ends["embeddings"])
    if tied is None or tied is not _plain_weight(ends["head"]):
        return
    names = {id(module): name for name, module in base.named_modules()}
    for what, module in ends.items():
        if isinstance(module, BaseTunerLayer):
            raise ValueError(
                f"The adapter changes {names[id(module)]!r}, the draft's {what}, whose weight is also that of its "
                f"{'head' if what == 'embeddings' else 'embeddings'} (`tie_word_embeddings`): merged into the plain "
                "draft it would change both, and the saved draft would not be the trained one. Leave the module out "
                "of `target_modules`; to train it, name it in `modules_to_save`, with `ensure_weight_tying=True`."
            )


def _plain_weight(module: Any) -> Any:
    """The weight below whatever PEFT put around a module."""
    while (inner := getattr(module, "base_layer", getattr(module, "original_module", None))) is not None:
        module = inner
    return getattr(module, "weight", None)


def merged(model: Any, weights: dict[str, torch.Tensor] | None = None) -> Any:
    """The plain model of a PEFT-wrapped draft, with the adapter folded in; the draft itself is left as it is.

    Merging in place and taking it back would change the weights by rounding, so a copy is merged: drafts are small.
    `weights` are all of them, where the draft holds only this process's share.
    """
    if weights is None:
        return copy.deepcopy(model).merge_and_unload()
    base = model.get_base_model()
    whole = get_peft_model(type(base)(copy.deepcopy(base.config)).to(base.dtype), model.active_peft_config)
    whole.load_state_dict(weights)
    return whole.merge_and_unload()
