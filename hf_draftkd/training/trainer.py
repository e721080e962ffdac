"""`DraftDistillTrainer`: `trl.SFTTrainer` whose loss compares the draft with its target.

Everything that fine-tuning a draft shares with fine-tuning any model (formats, chat templates, masks, packing, PEFT,
checkpoints, logging) is SFTTrainer's. This file only wires: which positions count, what both models say there, how far
apart they are, and how that is summed.
"""

import contextlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer
from trl.models.utils import prepare_deepspeed

from hf_draftkd.data.formatting import DraftDistillCollator, check_format, exact_features
from hf_draftkd.evaluation.report import SpeculationReport
from hf_draftkd.hub.card import DraftModelCard
from hf_draftkd.hub.publishing import push_draft
from hf_draftkd.losses import DistillationLoss, distillation_loss, get_divergence
from hf_draftkd.models.forward import logits_at, predicting_positions, unwrapped
from hf_draftkd.models.pairing import shared_vocab_size
from hf_draftkd.training.config import DraftDistillConfig
from hf_draftkd.training.describe import data_facts, describe_run
from hf_draftkd.training.evaluation_sums import EvaluationSums, row_sums
from hf_draftkd.training.preflight import check_dataset_fits, model_name, prepare_pair
from hf_draftkd.training.saving import merged

# Features that only this trainer reads; a model's forward takes none of them.
_OWN_FEATURES = ("labels", "decoding")


class DraftDistillTrainer(SFTTrainer):
    """Distils a target into a draft for speculative decoding.

    The draft is trained on every completion token to say what the target says there. Afterwards it is an ordinary
    causal LM: `target.generate(**inputs, assistant_model=draft)`.

    To try a loss of your own, override [`DraftDistillTrainer.token_loss`].

    Example:
    ```python
    from hf_draftkd import DraftDistillConfig, DraftDistillTrainer

    trainer = DraftDistillTrainer(
        model="org/draft",
        target_model="org/target",
        args=DraftDistillConfig(output_dir="draft"),
        train_dataset=data,  # any format SFTTrainer takes, or what `draftkd generate` writes
        eval_dataset=held_out,
    )
    trainer.train()
    print(trainer.evaluate()["eval_block_efficiency"])
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or `PeftModel`):
            The draft: an id, a path or a model. Given by name it is loaded in float32 unless
            `args.model_init_kwargs` says otherwise: small updates are lost in bf16 weights.
        target_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            The target, frozen and never updated. `None` is for black-box training: `divergence="cross_entropy"` on
            text the target wrote.
        args ([`DraftDistillConfig`], *optional*):
            Configuration. Defaults to `output_dir` `"{draft}-DraftDistill"`.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Any format of [`~trl.SFTTrainer`], or alignment data with exact `prompt_ids` and `completion_ids`. May be
            `None` where only `evaluate()` is wanted.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict`, *optional*):
            As `train_dataset`. Never packed: figures are sums over whole texts.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer that both models share. Loaded from the draft's name if not given.
        data_collator, callbacks, optimizers, optimizer_cls_and_kwargs, quantization_config, peft_config,
        formatting_func:
            As in [`~trl.SFTTrainer`]. With `peft_config`, checkpoints hold the adapter, while `save_model()` and
            `push_to_hub()` write the merged, plain draft.

    Raises:
        ValueError: The pair does not fit, the data cannot be trained on, or a loss that compares distributions is
            asked for without a target.
        FloatingPointError: While training, a loss is not finite. The last checkpoint is left as it was.
    """

    _tag_names: ClassVar[list[str]] = [
        "hf_draftkd",
        "speculative-decoding",
        "draft-model",
        "assistant-model",
        "knowledge-distillation",
    ]
    _name = "DraftDistill"
    # `compute_loss` divides by the completion tokens of the whole accumulation window.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: "str | PreTrainedModel | Any",
        target_model: str | PreTrainedModel | None = None,
        args: DraftDistillConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: "Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None" = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[[dict], str] | None = None,
    ) -> None:
        if args is None:
            args = DraftDistillConfig(f"{model_name(model).split('/')[-1] or 'draft'}-DraftDistill")
        eval_datasets = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
        datasets = {"train": train_dataset, **eval_datasets}
        datasets = {name: dataset for name, dataset in datasets.items() if dataset is not None}
        if not datasets:
            raise ValueError("Neither `train_dataset` nor `eval_dataset` was given. Give at least one.")
        if formatting_func is None:
            for name, dataset in datasets.items():
                check_format(dataset, name, text_field=args.dataset_text_field)
        if args.eval_packing:
            raise ValueError("`eval_packing=True` would cut texts apart, but figures are sums over whole texts.")
        args.eval_packing = False
        if target_model is None and args.needs_target:
            raise ValueError(
                f"`divergence={args.divergence!r}` compares the draft with its target, but `target_model` is None. "
                'Give the target, or train on its text alone with `divergence="cross_entropy"`.'
            )

        draft, target, processing_class = prepare_pair(
            model, target_model, args, tokenizer=processing_class, quantization_config=quantization_config
        )
        self.draft_name = model_name(unwrapped(draft))
        self.target_name = None if target is None else model_name(target)
        self.data_facts = data_facts(train_dataset, self.target_name)
        self._eval_sums: EvaluationSums | None = None
        self._saving_checkpoint = False
        self._window = torch.zeros(3, dtype=torch.float64)

        # SFTTrainer would warn that it ignores them; they were used above.
        model_init_kwargs, args.model_init_kwargs = args.model_init_kwargs, None
        super().__init__(
            model=draft,
            args=args,
            data_collator=data_collator,
            # SFTTrainer insists on training data. For `evaluate()` alone any prepared dataset stands in.
            train_dataset=train_dataset if train_dataset is not None else next(iter(datasets.values())),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )
        args.model_init_kwargs = model_init_kwargs
        if train_dataset is None:
            self.train_dataset = None
        if data_collator is None:
            self.data_collator = DraftDistillCollator(**asdict(self.data_collator))

        # The loss normalises itself, whatever the draft's own forward accepts.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self.target_model = self._prepare_target(target)
        plain_draft = unwrapped(draft)
        models = [plain_draft] if target is None else [plain_draft, target]
        # Both distributions are compared over rows that stand for tokens: never over padding.
        self._shared_vocab = shared_vocab_size(models[0], models[-1], processing_class)
        check_dataset_fits(self._prepared_datasets(), models, self.args)

    def _prepare_target(self, target: PreTrainedModel | None) -> torch.nn.Module | None:
        if target is None:
            return None
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(target, self.accelerator)
        placed = getattr(target, "hf_device_map", None) is not None
        return self.accelerator.prepare_model(target, device_placement=not placed, evaluation_mode=True)

    def _prepared_datasets(self) -> dict[str, Any]:
        evals = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        named = {"train": self.train_dataset, **evals}
        return {name: dataset for name, dataset in named.items() if dataset is not None}

    # Data ------------------------------------------------------------------------------------------------------------

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: Any,
        args: DraftDistillConfig,
        packing: bool,
        formatting_func: Callable[[dict], str] | None,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        map_kwargs: dict[str, Any] = {}
        if isinstance(dataset, Dataset):
            map_kwargs = {"num_proc": args.dataset_num_proc, "desc": f"Reading exact ids of {dataset_name} dataset"}
        dataset = exact_features(dataset, self.target_name, **map_kwargs)
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = [*(self._signature_columns or []), "decoding"]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        # Figures are sums over texts, one a row, so evaluation batches are always padded.
        with self._collating_with(_padding(self.data_collator)):
            return super().get_eval_dataloader(eval_dataset)

    @contextlib.contextmanager
    def _collating_with(self, collator: Any) -> Any:
        usual, self.data_collator = self.data_collator, collator
        try:
            yield
        finally:
            self.data_collator = usual

    # Loss ------------------------------------------------------------------------------------------------------------

    def token_loss(self, draft_logits: Tensor, target_logits: Tensor) -> Tensor:
        """How far the draft is from the target at each token. Override this to train with a divergence of your own.

        Args:
            draft_logits: [n, V] next-token logits of the draft over the shared vocabulary, with gradient, divided by
                `args.temperature`.
            target_logits: [n, V] of the target, without gradient, divided by the same.

        Returns:
            [n] values. They are summed over all completion tokens and divided by their number. Positions come a chunk
            at a time, so each value may depend on its own position only.
        """
        return get_divergence(self.args.divergence)(draft_logits, target_logits, **self.args.divergence_options)

    def _distillation_loss(
        self, draft_logits: Tensor, target_logits: Tensor | None, tokens: Tensor, num_items: Tensor | int | None = None
    ) -> DistillationLoss:
        args: DraftDistillConfig = self.args
        divergence: Any = args.divergence
        options = args.divergence_options
        if type(self).token_loss is not DraftDistillTrainer.token_loss:
            # Named divergences have gradients written by hand; a method of one's own is differentiated by autograd.
            divergence, options = self.token_loss, {}
        elif not args.needs_target:
            divergence, target_logits = "cross_entropy", None
        return distillation_loss(
            draft_logits,
            target_logits,
            tokens,
            divergence=divergence,
            options=options,
            temperature=args.temperature,
            cross_entropy_weight=args.cross_entropy_weight if target_logits is not None else 0.0,
            num_items=num_items,
            with_acceptance=target_logits is not None,
        )

    def _logits(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Both models' logits [N, V] at the N positions that predict a completion token, those tokens, and where."""
        labels = inputs["labels"]
        keep = predicting_positions(labels)
        tokens = labels[:, 1:][keep[:, :-1]]
        forward_inputs = {name: value for name, value in inputs.items() if name not in _OWN_FEATURES}
        draft_logits = logits_at(model, forward_inputs, keep)[:, : self._shared_vocab]
        if self.target_model is None:
            return draft_logits, None, tokens, keep
        with torch.no_grad():
            target_logits = logits_at(self.target_model, forward_inputs, keep)[:, : self._shared_vocab]
        return draft_logits, target_logits.to(draft_logits.device), tokens, keep

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Sum of the token losses ÷ completion tokens of the whole accumulation window on all processes."""
        draft_logits, target_logits, tokens, _ = self._logits(model, inputs)
        result = self._distillation_loss(draft_logits, target_logits, tokens, num_items_in_batch)
        self._require_finite(result.loss, inputs)
        self._count(inputs, result)
        loss = result.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The tokens of every process were counted, and DDP averages gradients over processes.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return loss

    def _require_finite(self, loss: Tensor, inputs: dict[str, Any]) -> None:
        if not torch.isfinite(loss):
            starts = self.processing_class.batch_decode(inputs["input_ids"][:, :16])
            raise FloatingPointError(
                f"The loss is {loss.item()} in optimizer step {self.state.global_step + 1}, process "
                f"{self.accelerator.process_index}, in the batch whose rows begin with {starts}. The weights were not "
                f"updated, and the last checkpoint in {self.args.output_dir!r} is untouched. Look for logits that are "
                "not finite there, lower `learning_rate`, or train in float32."
            )

    # Evaluation ------------------------------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Adds the figures that come from sums over all texts: see [`DraftDistillTrainer.evaluate`]."""
        self._eval_sums = EvaluationSums(self.args.eval_num_assistant_tokens)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        figures = self._eval_sums.figures()
        self._eval_sums = None
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            draft_logits, target_logits, tokens, keep = self._logits(model, inputs)
            losses = self._distillation_loss(draft_logits, target_logits, tokens).token_losses
            sums = row_sums(
                losses,
                draft_logits,
                target_logits,
                inputs,
                keep,
                num_assistant_tokens=self.args.eval_num_assistant_tokens,
                target_model=None if self.target_model is None else unwrapped(self.target_model),
            )
        assert self._eval_sums is not None, "evaluation_loop makes it"
        # Gathered here, row by row, so that rows repeated to fill the last batch are dropped.
        self._eval_sums.add(self.accelerator.gather_for_metrics(sums))
        return losses.sum() / max(losses.numel(), 1), None, None

    # Logging ---------------------------------------------------------------------------------------------------------

    def _count(self, inputs: dict[str, Any], result: DistillationLoss) -> None:
        """Add to the sums of the current logging window: tokens read, tokens learnt from, Σα."""
        read = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        accepted = 0.0 if result.acceptance is None else result.acceptance.double().sum()
        self._window += torch.tensor([read, result.num_tokens, accepted], dtype=torch.float64)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds `num_tokens` read so far and, with a target, the window's `acceptance_rate` at the loss temperature.

        It is one minus total variation: what `tvd_plus_plus`, whose own value says nothing, has to be watched by.
        """
        if self.model.training:
            read, learnt, accepted = self.accelerator.reduce(self._window.to(self.args.device)).tolist()
            self._window.zero_()
            self._total_train_tokens += int(read)
            if learnt:
                logs["num_tokens"] = self._total_train_tokens
            if learnt and self.target_model is not None:
                logs["acceptance_rate"] = accepted / learnt
        super().log(logs, start_time)

    # Saving ----------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self._saving_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_checkpoint = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Checkpoints hold the adapter, so that they resume; anything else is the merged, plain draft."""
        if self._saving_checkpoint or not is_peft_model(self.model):
            super()._save(output_dir, state_dict)
            return
        if self.args.should_save:
            trained, self.model = self.model, merged(self.model)
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
        provenance = describe_run(self, dataset_name)
        provenance.save(self.args.output_dir)
        card = DraftModelCard.from_report(
            report,
            provenance=provenance,
            name=self.hub_model_id or model_name or Path(self.args.output_dir).name,
            tags=[tags] if isinstance(tags, str) else tags or (),
            plots=plots,
        )
        card.save(self.args.output_dir)

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
            **kwargs: For [`DraftDistillTrainer.create_model_card`].

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


def _padding(collator: Any) -> Any:
    """The collator for whole texts, one a row; a user's own is taken as it is."""
    if not isinstance(collator, DraftDistillCollator):
        return collator
    return DraftDistillCollator(**asdict(collator) | {"padding_free": False})
