"""`DraftDistillTrainer`: `trl.SFTTrainer` whose loss compares the draft with its target.

Everything that fine-tuning a draft shares with fine-tuning any model (formats, chat templates, masks, packing, PEFT,
checkpoints, logging) is SFTTrainer's. This file only wires: which positions count, what both models say there, how far
apart they are, and how that is summed.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTTrainer
from trl.data_utils import get_dataset_column_names

from hf_draftkd.data.collator import CachedDistributions, DraftDistillCollator
from hf_draftkd.data.mixing import mixed_in
from hf_draftkd.losses import DistillationLoss, Unprojected, distillation_loss, get_divergence
from hf_draftkd.models.forward import logits_at, loss_at, predicting_positions, unwrapped
from hf_draftkd.models.pairing import copy_special_ids, shared_vocab_size
from hf_draftkd.training import preflight
from hf_draftkd.training.best import check_best_metric
from hf_draftkd.training.callbacks import KeepSpecialIds, asked_figures, with_acceptance
from hf_draftkd.training.checkpoints import WholeCheckpoints
from hf_draftkd.training.config import DraftDistillConfig
from hf_draftkd.training.describe import author, data_facts
from hf_draftkd.training.evaluating import EvaluatesTexts
from hf_draftkd.training.finite import StaysFinite, require_finite_loss
from hf_draftkd.training.positions import TokenFigures, check_selection, check_weights, select_tokens, token_figures
from hf_draftkd.training.preparing import PreparesRows
from hf_draftkd.training.rollouts import WritesCompletions, check_writer, check_writing
from hf_draftkd.training.saving import PlainDrafts, check_adapter, check_saving
from hf_draftkd.training.signal import Distributions, check_cached, make_signal, model_inputs
from hf_draftkd.training.watching import LogsAcceptance


class DraftDistillTrainer(
    PreparesRows,
    StaysFinite,
    WritesCompletions,
    EvaluatesTexts,
    LogsAcceptance,
    PlainDrafts,
    WholeCheckpoints,
    SFTTrainer,
):
    """Distils a target into a draft for speculative decoding.

    The draft is trained on every completion token to say what the target says there. Afterwards it is an ordinary
    causal LM: `target.generate(**inputs, assistant_model=draft)`.

    To try a loss of your own, override [`DraftDistillTrainer.token_loss`]; to learn from tokens of your own choice,
    [`DraftDistillTrainer.token_weights`].

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
            The target, frozen and never updated. `None` learns from the distributions that the data holds (see
            [`cache_target_distributions`]), or, black box, from text alone: `divergence="cross_entropy"`.
        args ([`DraftDistillConfig`], *optional*):
            Configuration. Defaults to `output_dir` `"{draft}-DraftDistill"`.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Any format of [`~trl.SFTTrainer`], or alignment data with exact `prompt_ids` and `completion_ids`. May be
            `None` where only `evaluate()` is wanted.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict`, *optional*):
            As `train_dataset`. Never packed: figures are sums over whole texts.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer that both models share. If not given it is loaded by the target's name, in whose chat
            template it will be asked, or by the draft's where there is no target.
        mix_dataset ([`~datasets.Dataset`], *optional*):
            Rows to strew into the training data, so that the draft does not forget what lies outside them: `args.mix`
            says how many. Ordinarily plain text (`text`), learnt from on all its tokens.
        reference_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            For `args.token_selection="adaspec"`, or a `token_weights` of your own: a draft that was distilled before.
            Frozen, and saved nowhere.
        data_collator, callbacks, optimizers, optimizer_cls_and_kwargs, peft_config, formatting_func:
            As in [`~trl.SFTTrainer`]. With `peft_config`, checkpoints hold the adapter, while `save_model()` and
            `push_to_hub()` write the merged, plain draft.
        quantization_config:
            Refused: it is the draft's in [`~trl.SFTTrainer`], and merging an adapter into quantised weights rounds it
            away. A quantised target is asked for in `args.target_model_init_kwargs`.

    Raises:
        ValueError: The pair does not fit, the data cannot be trained on, or a loss that compares distributions is
            asked for with neither a target nor cached distributions that serve it.
        FloatingPointError: While training, a loss, a gradient or the weights are not finite. The last checkpoint is
            left as it was.
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
        mix_dataset: Dataset | None = None,
        reference_model: str | PreTrainedModel | None = None,
    ) -> None:
        if args is None:
            args = DraftDistillConfig(f"{preflight.model_name(model).split('/')[-1] or 'draft'}-DraftDistill")
        if not isinstance(args, DraftDistillConfig):
            raise ValueError(
                f"`args` must be a `DraftDistillConfig`, got a `{type(args).__name__}`. It takes the same arguments, "
                "and those of distilling."
            )
        train_dataset = mixed_in(train_dataset, mix_dataset, args.mix, args.seed, text_field=args.dataset_text_field)
        check_writer(args, has_target=target_model is not None)
        datasets = preflight.check_datasets(train_dataset, eval_dataset, args, format_known=formatting_func is None)
        own_loss = type(self).token_loss is not DraftDistillTrainer.token_loss
        # Whether the loss reads the target's distributions, or only its text.
        self.learns_from_target = args.needs_target or own_loss
        cached = self.learns_from_target and target_model is None
        own = {"own_loss": own_loss, "own_collator": data_collator is not None}
        facts = check_cached(datasets, args, **own) if cached else []
        self._cache = CachedDistributions() if facts else None
        own_weights = type(self).token_weights is not DraftDistillTrainer.token_weights
        self._weighs_tokens = own_weights or args.token_selection != "all"
        check_selection(
            args,
            has_reference=reference_model is not None,
            own_weights=own_weights,
            knows_distributions=self.learns_from_target,
            from_draws=any(fact.top_k is None for fact in facts),
        )
        callbacks = with_acceptance(callbacks, args, evaluates=eval_dataset is not None)

        draft, target, processing_class = preflight.prepare_pair(
            model,
            target_model,
            args,
            tokenizer=processing_class,
            quantization_config=quantization_config,
            trains=train_dataset is not None,
            adds_adapter=peft_config is not None,
        )
        self.draft_name = preflight.model_name(unwrapped(draft))
        # Where the target is not at hand, its name is what the data says.
        self.target_name = author(datasets.values()) if target is None else preflight.model_name(target)
        self.data_facts = data_facts(train_dataset, self.target_name, text_field=args.dataset_text_field)

        reference = preflight.prepare_reference(reference_model, [draft, target], args, processing_class)

        # SFTTrainer would warn that it ignores them; they were used above.
        model_init_kwargs, args.model_init_kwargs = args.model_init_kwargs, None
        super().__init__(
            model=draft,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset if train_dataset is not None else preflight.stand_in(datasets),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )
        check_saving(self)
        if train_dataset is not None:
            check_adapter(self.model)
            if not isinstance(model, str):
                preflight.warn_of_lost_updates(self)
        args.model_init_kwargs = model_init_kwargs
        if train_dataset is None:
            self.train_dataset = None
        if data_collator is None:
            self.data_collator = DraftDistillCollator(**asdict(self.data_collator), cache=self._cache)

        if target is not None:
            # SFTTrainer gave the draft the tokenizer's pad and eos; assisted decoding compares them with the target's.
            copy_special_ids(unwrapped(self.model), target)
            self.add_callback(KeepSpecialIds(target))
        # The loss normalises itself, whatever the draft's own forward accepts.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        models = [unwrapped(draft), *([] if target is None else [target])]
        # Both distributions are compared over rows that stand for tokens: never over padding.
        self._shared_vocab = shared_vocab_size(models[0], models[-1], processing_class)
        self._read_distributions(target, reference, facts)
        preflight.check_dataset_fits(preflight.named_datasets(self.train_dataset, self.eval_dataset), models, self.args)
        self._context = preflight.shortest_context(models)
        if train_dataset is not None:
            sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
            columns = get_dataset_column_names(train_dataset)
            check_writing(self.train_dataset, self.args, self._context, sharded=sharded, columns=columns)
            if isinstance(self.data_collator, DraftDistillCollator):
                asked = asked_figures(self.callback_handler.callbacks, args.eval_num_assistant_tokens)
                check_best_metric(args, self.eval_dataset, self.signal, *asked)

    def _read_distributions(self, target: Any, reference: Any, facts: list[Any]) -> None:
        """Put target and reference where they run, and settle how each model's distributions are read."""
        sharded = self.is_deepspeed_enabled or (self.is_fsdp_enabled and self.args.shard_target)
        self.target_model = preflight.place_target(target, self)
        self.signal = make_signal(self.target_model, self._cache, facts, self._shared_vocab, sharded=sharded)
        self._reference: Any = None
        if reference is not None:
            placed = preflight.place_target(reference, self)
            self._reference = make_signal(placed, None, [], self._shared_vocab, sharded=sharded)
        # Where the head is plain arithmetic, the loss takes hidden states, and no logits of all tokens are ever held.
        self._arithmetic = preflight.draft_arithmetic(self)

    # Loss ------------------------------------------------------------------------------------------------------------

    def token_loss(self, draft_logits: Tensor, target_logits: Tensor) -> Tensor:
        """How far the draft is from the target at each token. Override this to train with a divergence of your own.

        Args:
            draft_logits: [n, V] next-token logits of the draft over the shared vocabulary, with gradient, divided by
                `args.loss_temperature`. From a cache of the k likeliest tokens: [n, k + 1], the last one
                standing for all other tokens.
            target_logits: The same of the target, without gradient.

        Returns:
            [n] values. They are summed over all completion tokens and divided by their number. Positions come a chunk
            at a time, so each value may depend on its own position only.
        """
        return get_divergence(self.args.divergence)(draft_logits, target_logits, **self.args.divergence_options)

    def token_weights(self, figures: TokenFigures) -> Tensor:
        """How much each completion token counts. Override this to learn from tokens of your own choice.

        Called once for each batch on each process, before the loss; `super().token_weights(figures)` gives what
        `args.token_selection` says.

        Args:
            figures: What is known of the batch's N completion tokens, without gradient: the draft's losses and, with
                a `reference_model`, the reference's; acceptance rates; the tokens and their places. See
                [`TokenFigures`](positions.py).

        Returns:
            [N] weights, 0 or above. They multiply the losses, whose sum is divided by the number of completion
            tokens, selected or not: so a token's gradient depends on no other token's weight.
        """
        return select_tokens(figures, self.args.token_selection, self.args.selected_share)

    def _distillation_loss(
        self,
        draft: Tensor | Unprojected,
        target: Distributions | Unprojected | None,
        tokens: Tensor,
        num_items: Tensor | int | None = None,
        token_weights: Tensor | None = None,
    ) -> DistillationLoss:
        args: DraftDistillConfig = self.args
        divergence: Any = args.divergence
        options = args.divergence_options
        if type(self).token_loss is not DraftDistillTrainer.token_loss:
            # Named divergences have gradients written by hand; a method of one's own is differentiated by autograd.
            divergence, options = self.token_loss, {}
        elif not self.learns_from_target:
            divergence, options, target = "cross_entropy", {}, None
        return distillation_loss(
            draft,
            target,
            tokens,
            divergence=divergence,
            options=options,
            temperature=args.loss_temperature,
            cross_entropy_weight=args.cross_entropy_weight if target is not None else 0.0,
            token_weights=token_weights,
            num_items=num_items,
            with_acceptance=target is not None,
        )

    def _weighted_loss(
        self,
        draft: Tensor | Unprojected,
        target: Distributions | Unprojected | None,
        reference: Tensor | Unprojected | None,
        batch: dict[str, Any],
        keep: Tensor,
        num_items: Tensor | int | None,
    ) -> DistillationLoss:
        tokens = batch["labels"][:, 1:][keep[:, :-1]]
        weights = None
        if self._weighs_tokens:
            # Only the head is passed twice: hidden states are at hand.
            with torch.no_grad():
                places = keep, batch.get("position_ids")
                figures = token_figures(draft, target, reference, tokens, *places, self._distillation_loss)
                weights = check_weights(self.token_weights(figures), figures)
        return self._distillation_loss(draft, target, tokens, num_items, weights)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Sum of the weighted token losses ÷ completion tokens of the whole accumulation window on all processes.

        With `return_outputs` also `{"loss": loss}`: whole logits, which a model would return, are never held.
        """
        keep = predicting_positions(inputs["labels"])
        target = self.signal.for_loss(inputs, keep) if self.learns_from_target else None
        reference = None if self._reference is None else self._reference.for_loss(inputs, keep)
        loss_from = partial(
            self._weighted_loss,
            target=target,
            reference=reference,
            batch=inputs,
            keep=keep,
            num_items=num_items_in_batch,
        )
        if self._arithmetic is None:
            result = loss_from(logits_at(model, model_inputs(inputs), keep)[:, : self._shared_vocab])
        else:
            result = loss_at(model, model_inputs(inputs), keep, self._arithmetic, self._shared_vocab, loss_from)
        require_finite_loss(result.loss, inputs, self)
        self._window.add(inputs, result)
        loss = result.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The tokens of every process were counted, and DDP averages gradients over processes.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, {"loss": loss}) if return_outputs else loss
