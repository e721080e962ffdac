"""What a trainer leaves behind for others: the plain model that they load, and the card that describes it."""

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Trainer

from hf_draftkd.evaluation.report import SpeculationReport
from hf_draftkd.hub.model_card import DraftModelCard
from hf_draftkd.hub.push import push_draft
from hf_draftkd.training.describe import describe_run


class PlainDrafts(Trainer):
    """A trainer whose checkpoints hold the adapter, so that they resume; all else it saves is the merged, plain draft.

    Mix it in before another trainer class.
    """

    _saving_checkpoint = False
    model: Any

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._saving_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_checkpoint = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # transformers pickles all arguments into `training_args.bin`, beside what people share.
        token, self.args.hub_token = self.args.hub_token, None
        try:
            self._save_draft(output_dir, state_dict)
        finally:
            self.args.hub_token = token

    def _save_draft(self, output_dir: str | None, state_dict: dict[str, Any] | None) -> None:
        if self._saving_checkpoint or not is_peft_model(self.model):
            super()._save(output_dir, state_dict)
            return
        if self.is_deepspeed_enabled:
            # On all processes. Of ZeRO-3 shards transformers has collected the adapter alone, without what it adapts.
            state_dict = self.accelerator.get_state_dict(self.deepspeed)
        if self.args.should_save:
            trained, self.model = self.model, merged(self.model, state_dict)
            try:
                super()._save(output_dir)
            finally:
                self.model = trained

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        *,
        report: SpeculationReport | None = None,
        plots: dict[str, str] | None = None,
    ) -> None:
        """Write the draft's card and `provenance.json` into `args.output_dir`.

        Args:
            model_name: Name on the card; by default the Hub id, or the output directory's name.
            dataset_name: Id of the training data on the Hub.
            tags: Tags beside the usual ones.
            report: Measured figures, as from [`evaluate_draft`]; without one the card names none.
            plots: Caption -> path of a picture inside `args.output_dir`.
        """
        if not self.is_world_process_zero():
            return
        directory = self.args.output_dir
        provenance = describe_run(self, dataset_name)
        provenance.save(directory)
        card = DraftModelCard.from_report(
            report,
            provenance=provenance,
            name=self.hub_model_id or model_name or Path(directory).name,
            tags=[tags] if isinstance(tags, str) else tags or (),
            plots=plots,
        )
        card.save(directory)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        license: str | None = None,
        language: str | list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the merged, plain draft and publish it in one commit: see [`push_draft`] for what is uploaded.

        Args:
            commit_message: First line of the commit.
            blocking: Kept for the signature of [`~transformers.Trainer`]; the call always waits for the commit.
            token: Overrides `args.hub_token`.
            revision: Branch; by default `args.hub_revision`.
            private: Whether a new repository is private; by default `args.hub_private_repo`.
            license: Identifier, needed where the draft started from no model on the Hub to inherit one from.
            language: Language code or codes for the metadata.
            **kwargs: For `create_model_card`.

        Returns:
            What was published; None on processes other than the first.
        """
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        return push_draft(
            self.args.output_dir,
            self.args.hub_model_id or Path(self.args.output_dir).name,
            commit_message=commit_message or "End of training",
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            private=self.args.hub_private_repo if private is None else private,
            license=license,
            language=language,
        )


def check_saving(trainer: Trainer) -> None:
    """Refuse settings under which a sharded draft would end in no file that others can load.

    Raises:
        ValueError: FSDP or ZeRO-3 keep the weights in shards when the draft is saved.
    """
    state, reason = trainer.accelerator.state, None
    if trainer.is_fsdp_enabled and "FULL_STATE_DICT" not in str(state.fsdp_plugin.state_dict_type):
        reason = "FSDP. Set `fsdp_state_dict_type: FULL_STATE_DICT` in the accelerate configuration"
    elif trainer.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3:
        gathers = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
        if not state.deepspeed_plugin.hf_ds_config.is_true(gathers):
            reason = f"ZeRO-3. Set `{gathers}` to true (`zero3_save_16bit_model: true` in an accelerate configuration)"
    if reason is not None:
        raise ValueError(f"The draft could not be saved as a plain model: its weights stay sharded under {reason}.")


def check_adapter(model: Any) -> None:
    """Refuse an adapter that no plain draft can hold: one that is no change of weights, or that changes one of two tied
    weights, since in the plain draft both would change, or neither.

    peft ties some such adapters (`ensure_weight_tying=True`), but then puts one on the head as well, which TRL refuses.
    Whole copies (`modules_to_save`) and `trainable_token_indices` come out right.

    Raises:
        ValueError: The message names the module.
    """
    if not is_peft_model(model):
        return
    if not hasattr(model, "merge_and_unload"):
        raise ValueError(
            f"An adapter of type {model.active_peft_config.peft_type.value} cannot be merged into a plain draft, which "
            "is what `generate(assistant_model=...)` needs. Choose one that changes weights, such as `LoraConfig`."
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

    Args:
        model: The draft.
        weights: All its weights, where `model` itself holds only this process's share of them.
    """
    if not is_peft_model(model):
        return model
    if weights is None:
        return copy.deepcopy(model).merge_and_unload()
    base = model.get_base_model()
    whole = get_peft_model(type(base)(copy.deepcopy(base.config)).to(base.dtype), model.active_peft_config)
    whole.load_state_dict(weights)
    return whole.merge_and_unload()
