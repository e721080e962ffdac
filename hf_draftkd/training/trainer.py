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
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from hf_draftkd.data.cache_lookup import CachedDistributions
from hf_draftkd.data.formatting import DraftDistillCollator
from hf_draftkd.data.mixing import mixed_in
from hf_draftkd.losses import DistillationLoss, Unprojected, distillation_loss, get_divergence
from hf_draftkd.models.forward import head_arithmetic, logits_at, loss_at, predicting_positions, unwrapped
from hf_draftkd.models.pairing import copy_special_ids, shared_vocab_size
from hf_draftkd.training import preflight
from hf_draftkd.training.callbacks import with_acceptance
from hf_draftkd.training.checkpoints import WholeCheckpoints
from hf_draftkd.training.config import DraftDistillConfig
from hf_draftkd.training.describe import author, data_facts
from hf_draftkd.training.evaluation_sums import EvaluationSums, row_sums
from hf_draftkd.training.preparing import PreparesRows
from hf_draftkd.training.saving import PlainDrafts
from hf_draftkd.training.signal import Distributions, check_cached, make_signal, model_inputs
from hf_draftkd.training.watching import LoggingWindow, require_finite


class DraftDistillTrainer(PreparesRows, PlainDrafts, WholeCheckpoints, SFTTrainer):
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
            The tokenizer that both models share. Loaded from the draft's name if not given.
        mix_dataset ([`~datasets.Dataset`], *optional*):
            Rows to strew into the training data, so that the draft does not forget what lies outside them: `args.mix`
            says how many. Ordinarily plain text (`text`), learnt from on all its tokens.
        data_collator, callbacks, optimizers, optimizer_cls_and_kwargs, quantization_config, peft_config,
        formatting_func:
            As in [`~trl.SFTTrainer`]. With `peft_config`, checkpoints hold the adapter, while `save_model()` and
            `push_to_hub()` write the merged, plain draft.

    Raises:
        ValueError: The pair does not fit, the data cannot be trained on, or a loss that compares distributions is
            asked for with neither a target nor cached distributions that serve it.
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
        mix_dataset: Dataset | None = None,
    ) -> None:
        if args is None:
            args = DraftDistillConfig(f"{preflight.model_name(model).split('/')[-1] or 'draft'}-DraftDistill")
        train_dataset = mixed_in(train_dataset, mix_dataset, args.mix, args.seed, text_field=args.dataset_text_field)
        datasets = preflight.check_datasets(train_dataset, eval_dataset, args, format_known=formatting_func is None)
        own_loss = type(self).token_loss is not DraftDistillTrainer.token_loss
        # Whether the loss reads the target's distributions, or only its text.
        self.learns_from_target = args.needs_target or own_loss
        cached = self.learns_from_target and target_model is None
        own = {"own_loss": own_loss, "own_collator": data_collator is not None}
        facts = check_cached(datasets, args, **own) if cached else []
        self._cache = CachedDistributions() if facts else None
        callbacks, self._draft_lengths = with_acceptance(callbacks, args, evaluates=eval_dataset is not None)

        draft, target, processing_class = preflight.prepare_pair(
            model, target_model, args, tokenizer=processing_class, quantization_config=quantization_config
        )
        self.draft_name = preflight.model_name(unwrapped(draft))
        # Where the target is not at hand, its name is what the data says.
        self.target_name = author(datasets.values()) if target is None else preflight.model_name(target)
        self.data_facts = data_facts(train_dataset, self.target_name, text_field=args.dataset_text_field)
        self._eval_sums: EvaluationSums | None = None
        self._window = LoggingWindow()

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
            self.data_collator = DraftDistillCollator(**asdict(self.data_collator), cache=self._cache)

        if target is not None:
            # SFTTrainer gave the draft the tokenizer's pad and eos; assisted decoding compares them with the target's.
            copy_special_ids(unwrapped(self.model), target)
        # The loss normalises itself, whatever the draft's own forward accepts.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self.target_model = preflight.place_target(target, self)
        models = [unwrapped(draft), *([] if target is None else [target])]
        # Both distributions are compared over rows that stand for tokens: never over padding.
        self._shared_vocab = shared_vocab_size(models[0], models[-1], processing_class)
        # Where the head is plain arithmetic, the loss takes hidden states, and no logits of all tokens are ever held.
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self.signal = make_signal(self.target_model, self._cache, facts, self._shared_vocab, sharded=sharded)
        self._arithmetic = None if args.torch_compile or self.is_deepspeed_enabled else head_arithmetic(self.model)
        preflight.check_dataset_fits(preflight.named_datasets(self.train_dataset, self.eval_dataset), models, self.args)

    # Data ------------------------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        usual = self.data_collator
        if isinstance(usual, DraftDistillCollator):
            # Figures are sums over texts, one a row, so evaluation batches are always padded.
            self.data_collator = usual.padded()
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = usual

    # Loss ------------------------------------------------------------------------------------------------------------

    def token_loss(self, draft_logits: Tensor, target_logits: Tensor) -> Tensor:
        """How far the draft is from the target at each token. Override this to train with a divergence of your own.

        Args:
            draft_logits: [n, V] next-token logits of the draft over the shared vocabulary, with gradient, divided by
                `args.temperature`. From a cache of the k likeliest tokens: [n, k + 1], the last one standing for all
                other tokens.
            target_logits: The same of the target, without gradient.

        Returns:
            [n] values. They are summed over all completion tokens and divided by their number. Positions come a chunk
            at a time, so each value may depend on its own position only.
        """
        return get_divergence(self.args.divergence)(draft_logits, target_logits, **self.args.divergence_options)

    def _distillation_loss(
        self,
        draft: Tensor | Unprojected,
        target: Distributions | Unprojected | None,
        batch: dict[str, Any],
        num_items: Tensor | int | None = None,
    ) -> DistillationLoss:
        args: DraftDistillConfig = self.args
        divergence: Any = args.divergence
        options = args.divergence_options
        if type(self).token_loss is not DraftDistillTrainer.token_loss:
            # Named divergences have gradients written by hand; a method of one's own is differentiated by autograd.
            divergence, options = self.token_loss, {}
        elif not self.learns_from_target:
            divergence, options, target = "cross_entropy", {}, None
        labels = batch["labels"]
        return distillation_loss(
            draft,
            target,
            labels[:, 1:][labels[:, 1:] != -100],
            divergence=divergence,
            options=options,
            temperature=args.temperature,
            cross_entropy_weight=args.cross_entropy_weight if target is not None else 0.0,
            num_items=num_items,
            with_acceptance=target is not None,
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Sum of the token losses ÷ completion tokens of the whole accumulation window on all processes."""
        keep = predicting_positions(inputs["labels"])
        target = self.signal.for_loss(inputs, keep) if self.learns_from_target else None
        loss_from = partial(self._distillation_loss, target=target, batch=inputs, num_items=num_items_in_batch)
        if self._arithmetic is None:
            result = loss_from(logits_at(model, model_inputs(inputs), keep)[:, : self._shared_vocab])
        else:
            result = loss_at(model, model_inputs(inputs), keep, self._arithmetic, self._shared_vocab, loss_from)
        require_finite(result.loss, inputs, self)
        self._window.add(inputs, result)
        loss = result.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The tokens of every process were counted, and DDP averages gradients over processes.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return loss

    # Evaluation ------------------------------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Adds the figures that come from sums over all texts: see [`EvaluationSums`]."""
        self._eval_sums = EvaluationSums(self.args.eval_num_assistant_tokens, self._draft_lengths, self.signal)
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
        assert self._eval_sums is not None, "evaluation_loop makes it"
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            keep = predicting_positions(inputs["labels"])
            draft_logits = logits_at(model, model_inputs(inputs), keep)[:, : self._shared_vocab]
            target = self.signal.distributions(inputs, keep)
            losses = self._distillation_loss(draft_logits, target, inputs).token_losses
            require_finite(losses.sum(), inputs, self)
            sums = row_sums(losses, draft_logits, target, inputs, keep, self._eval_sums.draft_lengths, self.signal)
        # Gathered here, row by row, so that rows repeated to fill the last batch are dropped.
        self._eval_sums.add(self.accelerator.gather_for_metrics(sums))
        return losses.sum() / max(losses.numel(), 1), None, None

    # Logging ---------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds `num_tokens` read so far and, where it can be told, the window's `acceptance_rate`.

        It stands at the loss temperature and is one minus total variation: what `tvd_plus_plus`, whose own value says
        nothing, has to be watched by. From a cache without the whole tail it is named `acceptance_rate_upper_bound`.
        """
        if self.model.training:
            read, acceptance = self._window.close(self.accelerator)
            self._total_train_tokens += read
            if read:
                logs["num_tokens"] = self._total_train_tokens
            if acceptance is not None:
                logs[self.signal.acceptance_name] = acceptance
        super().log(logs, start_time)
