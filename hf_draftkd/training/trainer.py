"""`DraftDistillTrainer`: `trl.SFTTrainer` whose loss compares the draft with its target.

Formats, chat templates, masks, packing, PEFT, checkpoints and logging are SFTTrainer's. This file reads from top to
bottom as a run does: build, rows, loss, rollouts, evaluation, logging, saving. What needs no trainer is done by its
neighbours: `setup.py` (what is checked and loaded), `signals.py` (what is known of the target), `parallel.py` (several
tokens in one pass), `rollouts.py` (completions written while training), `token_selection.py`, `metrics.py` (sums),
`finite.py`, `checkpoints.py`, `saving.py` (plain drafts), `run_provenance.py` (the card's facts).
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy, PredictionOutput
from trl import SFTTrainer
from trl.data_utils import get_dataset_column_names
from trl.trainer.utils import global_then_local_main_first

from hf_draftkd.acceptance.tensors import widest_float
from hf_draftkd.data.collator import INDEX_COLUMN, SETTING_COLUMN, CachedDistributions, DraftDistillCollator
from hf_draftkd.data.formats import (
    as_messages,
    exact_features,
    format_of,
    learnable_rows,
    normalize_rows,
    packed,
    warn_of_cuts,
    warn_of_other_authors,
)
from hf_draftkd.data.mixing import check_mix, mix_datasets
from hf_draftkd.data.target_cache import CacheFacts, warn_of_withheld, with_caches_alike
from hf_draftkd.evaluation.report import SpeculationReport
from hf_draftkd.hub.card_merge import merged as merged_card
from hf_draftkd.hub.metadata import TAGS
from hf_draftkd.hub.model_card import DraftModelCard, local_model_card
from hf_draftkd.hub.push import push_draft
from hf_draftkd.losses import DistillationLoss, Unprojected, distillation_loss, get_divergence
from hf_draftkd.models.forward import in_head, predicting_positions, unwrapped
from hf_draftkd.models.identity import identity_of, weights_checksum
from hf_draftkd.models.pairing import copy_special_ids, shared_context, shared_vocab_size
from hf_draftkd.training import setup
from hf_draftkd.training.callbacks import BeforeFirstStep, asked_metrics, with_acceptance
from hf_draftkd.training.checkpoints import batches_read, check_options, checkpoint_to_resume, record_options
from hf_draftkd.training.config import DraftDistillConfig
from hf_draftkd.training.finite import StopOnNonFiniteGradient, check_loss, check_weights
from hf_draftkd.training.metrics import EvaluationSums, FilledUp, TrainingSums, check_best_metric, not_exact
from hf_draftkd.training.parallel import Lesson, parallel_training
from hf_draftkd.training.rollouts import CompletionWriter, check_writer, check_writing
from hf_draftkd.training.run_provenance import author, data_facts, describe_run
from hf_draftkd.training.saving import check_adapter, check_saving, merged
from hf_draftkd.training.signals import CachedTarget, Distributions, LiveTarget, TextSignal, check_cached, model_inputs
from hf_draftkd.training.token_selection import (
    TokenMetrics,
    check_selection,
    check_token_weights,
    select_tokens,
    token_metrics,
)
from hf_draftkd.utils.files import only_run


class DraftDistillTrainer(SFTTrainer):
    """Distils a target into a draft for speculative decoding.

    The draft is trained on every completion token to say what the target says there. Afterwards it is an ordinary
    causal LM: `target.generate(**inputs, assistant_model=draft)`. For a custom loss override
    [`DraftDistillTrainer.token_loss`]; to choose the tokens that are learned from,
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
            Configuration, which is copied. Defaults to `output_dir` `"{draft}-DraftDistill"`.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Any format of [`~trl.SFTTrainer`], or alignment data with exact `prompt_ids` and `completion_ids`. May be
            `None` where only `evaluate()` is wanted.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict`, *optional*):
            As `train_dataset`. Never packed: metrics are sums over whole texts.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer that both models share. By default the target's, since prompts are rendered with its chat
            template, or the draft's where there is no target.
        mix_dataset ([`~datasets.Dataset`], *optional*):
            Rows to interleave with the training data (`args.mix` says how many), so that the draft does not forget what
            lies outside it. Ordinarily plain text (`text`), learned from on all its tokens. A `formatting_func` reads
            them only where they have none of the known formats.
        reference_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            For `args.token_selection="adaspec"`, or a custom `token_weights`: a draft that was distilled before.
            Frozen, and never saved.
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

    # Tags that `draft.push_to_hub()` would put on its card.
    _tag_names: ClassVar[list[str]] = ["hf_draftkd", *TAGS]
    # `compute_loss` divides by the completion tokens of the whole accumulation window.
    loss_is_scaled_for_ga = True

    # Build -----------------------------------------------------------------------------------------------------------

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
        # What shows without a model is checked first.
        setup.check_arguments(model, target_model, reference_model, processing_class)
        if args is None:
            args = DraftDistillConfig(f"{setup.model_name(model).split('/')[-1] or 'draft'}-DraftDistill")
        if not isinstance(args, DraftDistillConfig):
            given = type(args).__name__
            raise ValueError(f"`args` must be a `DraftDistillConfig`, got a `{given}`. It takes the same, and more.")
        args = copy.copy(args)  # they are changed below, and the user's may serve for another trainer
        trains = train_dataset is not None
        # SFTTrainer prepares the training data first, and evaluation data may be named `train` too.
        self._training_data_is_next, self._mix_dataset = trains, mix_dataset
        self._custom_loss = type(self).token_loss is not DraftDistillTrainer.token_loss
        if not self._custom_loss:  # one of the user's own may read any of them
            args.refuse_idle_loss_options()
        check_writer(args, has_target=target_model is not None)
        known = formatting_func is None
        check_mix(train_dataset, mix_dataset, args)
        datasets = setup.check_datasets(train_dataset, eval_dataset, mix_dataset, args, format_known=known)
        args.eval_packing = False  # whatever `packing` is: metrics are sums over whole texts
        if eval_dataset is not None and args.eval_strategy == IntervalStrategy.NO:
            args.eval_strategy = IntervalStrategy.EPOCH
        if trains and known:
            train_dataset = as_messages(train_dataset)  # `assistant_only_loss` asks SFTTrainer for a chat
        if data_collator is None:
            setup.check_unpacked(datasets, args)
        # Whether the loss reads the target's distributions, or only its text.
        self.learns_from_target = args.needs_target or self._custom_loss
        facts: list[CacheFacts] = []
        if self.learns_from_target and target_model is None:
            custom = {"custom_loss": self._custom_loss, "custom_collator": data_collator is not None}
            facts = [fact for _, fact in check_cached(datasets, args, **custom).values()]
        elif target_model is not None:
            setup.warn_of_unread_caches(datasets)
        self._cache = CachedDistributions() if facts else None
        custom_weights = type(self).token_weights is not DraftDistillTrainer.token_weights
        self._weighs_tokens = custom_weights or args.token_selection != "all"
        check_selection(
            args,
            has_reference=reference_model is not None,
            custom_weights=custom_weights,
            knows_distributions=self.learns_from_target,
            from_draws=any(fact.top_k is None for fact in facts),
        )

        # The models are loaded, and made a pair.
        draft, target, processing_class = setup.prepare_pair(
            model,
            target_model,
            args,
            tokenizer=processing_class,
            quantization_config=quantization_config,
            trains=trains,
            adds_adapter=peft_config is not None,
        )
        setup.fit_to_data(draft, datasets, facts, processing_class)
        self.parallel = parallel_training(unwrapped(draft), args, processing_class) if trains else None
        reference = setup.prepare_reference(reference_model, draft, target, args, processing_class)
        self.draft_name = setup.model_name(unwrapped(draft))
        # Where the target is not at hand, the data names it.
        given = setup.named_datasets(train_dataset, eval_dataset)
        self.target_id = author(given.values()) if target is None else identity_of(unwrapped(target))
        self.data_facts = data_facts(train_dataset, self.target_id)

        own_forward = vars(unwrapped(draft)).get("forward")
        stand_in = None if trains else setup.stand_in(datasets)
        self._prepared: WeakSet[Dataset | IterableDataset] = WeakSet([] if trains else [stand_in])
        # SFTTrainer would warn that it ignores them; they were used above.
        model_init_kwargs, args.model_init_kwargs = args.model_init_kwargs, None
        try:
            super().__init__(
                model=draft,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset if trains else stand_in,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=with_acceptance(callbacks),
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                peft_config=peft_config,
                formatting_func=formatting_func,
            )
        finally:
            args.model_init_kwargs = model_init_kwargs
        setup.undo_sft_changes(unwrapped(self.model), own_forward)
        setup.check_whole_rows(self)
        check_saving(self)
        if not trains:
            self.train_dataset = None
        # Rows bring two columns more than SFTTrainer's.
        self._set_signature_columns_if_needed()
        self._signature_columns += [SETTING_COLUMN, INDEX_COLUMN]
        if data_collator is None:
            self.data_collator = DraftDistillCollator(**asdict(self.data_collator), cache=self._cache)
        # The loss normalises itself, whatever the draft's own forward accepts.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        if target is not None:
            # SFTTrainer gave the draft the tokenizer's pad and eos; assisted decoding compares them with the target's.
            copy_special_ids(unwrapped(self.model), target)
        if not self.is_deepspeed_enabled and self.accelerator.scaler is None:
            self.add_callback(StopOnNonFiniteGradient(lambda: self._row_starts(self._step_batches)))
        self.add_callback(BeforeFirstStep(self))

        # What each model says is settled, now that it lies where it runs.
        models = [unwrapped(draft), *([] if target is None else [target])]
        # Both distributions are compared over rows that stand for tokens: never over padding.
        self._shared_vocab = shared_vocab_size(models[0], models[-1], processing_class)
        self._vocabulary = setup.draft_vocabulary(models[0], args, self._shared_vocab)
        sharded = self.is_deepspeed_enabled or (self.is_fsdp_enabled and args.shard_target)
        self.target_model = setup.place_target(target, self)
        self.signal = CachedTarget(facts, self._shared_vocab) if facts else TextSignal()
        if self.target_model is not None:
            self.signal = LiveTarget(self.target_model, self._shared_vocab, sharded=sharded)
        placed = setup.place_target(reference, self)
        self.reference_signal = None if placed is None else LiveTarget(placed, self._shared_vocab, sharded=sharded)
        # Where the head is plain arithmetic, the loss takes hidden states, and no logits of all tokens are ever held.
        self.head_arithmetic = setup.draft_arithmetic(self)

        # What shows only now is checked, before anything is trained.
        self._shared_context = shared_context(*models)
        given = setup.named_datasets(self.train_dataset, self.eval_dataset)
        setup.check_dataset_fits(given, self._shared_context, args)
        if trains:
            check_adapter(self.model, loads_best=args.load_best_model_at_end)
            setup.check_optimizer(self)
            if not isinstance(model, str):
                setup.warn_of_lost_updates(self)
            check_writing(self, self._shared_context, get_dataset_column_names(train_dataset))
            if isinstance(self.data_collator, DraftDistillCollator):
                asked = asked_metrics(self.callback_handler.callbacks, args.eval_num_assistant_tokens)
                check_best_metric(args, self.eval_dataset, self.signal, asked)

        self._writer: CompletionWriter | None = None
        if args.writes_completions and self.target_model is not None:
            self._writer = CompletionWriter(
                args,
                target=self.target_model,
                accelerator=self.accelerator,
                tokenizer=processing_class,
                vocab_size=self._shared_vocab,
                vocabulary=self._vocabulary,
                context=self._shared_context,
            )
        self._training_sums = TrainingSums()
        self._evaluation_sums: EvaluationSums | None = None
        self._explained: set[str] = set()  # evaluation sets already warned about
        self._step_batches: Sequence[dict[str, Any]] = ()  # what the next optimizer step learns from
        self._saving_checkpoint = False
        # Checksum of the weights as they were last saved; None once they have been trained further.
        self.weights_sha256: str | None = None

    # Rows ------------------------------------------------------------------------------------------------------------

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: Any,
        args: DraftDistillConfig,
        packing: bool,
        formatting_func: Callable[[dict], str] | None,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        """SFTTrainer tokenises what it reads. Here alignment rows keep their exact ids, rows of another format may be
        mixed in, and rows know where their cached distributions lie.
        """
        if dataset in self._prepared:  # `evaluate` hands over a dict's data sets twice
            return dataset
        is_training, self._training_data_is_next = self._training_data_is_next, False
        if not is_training and dataset_name in ("train", "mix"):
            dataset_name = f"eval_{dataset_name}"
        usual = super()._prepare_dataset
        map_kwargs: dict[str, Any] = {}
        if isinstance(dataset, Dataset):
            map_kwargs = {"num_proc": args.dataset_num_proc, "desc": f"Reading exact ids of {dataset_name} dataset"}
        # SFTTrainer decides by the first training row whether prompts are masked, for all data. Only rows that have
        # a prompt come with the mask that this turns on.
        self.completion_only_loss = args.completion_only_loss is not False
        parts = {dataset_name: dataset}
        if is_training and self._mix_dataset is not None:
            parts["mix"] = self._mix_dataset
        first_rows: dict[str, int] = {}
        if self._cache is not None:
            # Again, since `evaluate` takes other data.
            read = check_cached(parts, args)
            for name, (rows, _) in read.items():
                warn_of_withheld(parts[name], rows, name)
                parts[name] = rows
            facts = [fact for _, fact in read.values()]
            first_rows = {dataset_name: self._cache.add(with_caches_alike(list(parts.values()), facts, dataset_name))}
            first_rows["mix"] = first_rows[dataset_name] + len(parts[dataset_name])
        # Whole first, so that rows of two formats can be mixed, and what `max_length` costs can be counted.
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        text_field = args.dataset_text_field

        for name, part in parts.items():
            # The function is for the training data: what is mixed in may have a format of its own.
            has_format = name == "mix" and format_of(part, text_field) is not None
            reader = None if has_format else formatting_func
            with global_then_local_main_first():
                part = normalize_rows(part, processing_class, name, text_field=text_field, formatting_func=reader)
                if name not in ("train", "mix"):
                    warn_of_other_authors(part, name, self.target_id)
                part = exact_features(part, self.target_id, first_row=first_rows.get(name), **map_kwargs)
            # Where rows hold ids, SFTTrainer says that it ignores the function; of all others it has made texts.
            ignored = reader if "input_ids" in get_dataset_column_names(part) else None
            parts[name] = usual(part, processing_class, whole, False, ignored, name)
        dataset = parts[dataset_name]
        if "mix" in parts:
            with global_then_local_main_first():
                dataset = mix_datasets(dataset, parts["mix"], args.mix, args.seed)
            self.data_facts["num_mixed_rows"] = len(dataset) - len(parts[dataset_name])
        warn_of_cuts(dataset, dataset_name, None if packing and args.packing_strategy != "bfd" else args.max_length)
        if packing and args.packing_strategy == "bfd":
            # Without packing, SFTTrainer drops the others itself.
            with global_then_local_main_first():
                dataset = learnable_rows(dataset, dataset_name, args.max_length, map_kwargs)
        if packing and self._cache:
            # SFTTrainer packs `input_ids` and `labels` and drops the rest, so the packing is done here.
            with global_then_local_main_first():
                # As SFTTrainer does, before and after.
                dataset = dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset
                dataset = packed(dataset, args.max_length, {**map_kwargs, "desc": f"Packing {dataset_name} dataset"})
                dataset = dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset
        else:
            dataset = usual(dataset, processing_class, args, packing, None, dataset_name)
        self._prepared.add(dataset)
        return dataset

    # Loss ------------------------------------------------------------------------------------------------------------

    def token_loss(self, draft_logits: Tensor, target_logits: Tensor) -> Tensor:
        """How far the draft is from the target at each token. Override this to train with a custom divergence.

        Both are [n, V] next-token logits over the shared vocabulary, divided by `args.loss_temperature`, the draft's
        with gradient and around −1e6 for tokens outside `args.draft_vocabulary`. From a cache of the k likeliest
        tokens they are [n, k + 1], the last one standing for all other tokens.

        Returns:
            [n] values. They are summed over all completion tokens and divided by their number. Positions come a chunk
            at a time, so each value may depend on its own position only.
        """
        return get_divergence(self.args.divergence)(draft_logits, target_logits, **self.args.divergence_options)

    def token_weights(self, metrics: TokenMetrics) -> Tensor:
        """How much each completion token counts. Override this to choose the tokens that are learned from.

        Called once for each batch on each process, before the loss, with what is known of its N completion tokens;
        `super().token_weights(metrics)` gives what `args.token_selection` says.

        Returns:
            [N] weights, 0 or above. They multiply the losses, whose sum is divided by the number of completion
            tokens, selected or not: so a token's gradient depends on no other token's weight.
        """
        return select_tokens(metrics, self.args.token_selection, self.args.selected_share)

    def _distillation_loss(
        self,
        draft: Tensor | Unprojected,
        target: Distributions | Unprojected | None,
        tokens: Tensor,
        num_items: Tensor | float | None = None,
        token_weights: Tensor | None = None,
    ) -> DistillationLoss:
        args: DraftDistillConfig = self.args
        divergence: Any = args.divergence
        options = args.divergence_options
        if self._custom_loss:
            # Named divergences have gradients written by hand; a custom one is differentiated by autograd.
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
            vocabulary=self._vocabulary,
            with_acceptance=target is not None,
        )

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
        tokens = inputs["labels"][:, 1:][keep[:, :-1]]
        target = self.signal.distributions(inputs, keep) if self.learns_from_target else None
        reference = None if self.reference_signal is None else self.reference_signal.distributions(inputs, keep)
        lesson = Lesson(inputs, keep, target, tokens, num_items_in_batch)
        if self.parallel is not None:
            lesson = self.parallel(lesson, model)

        def loss_of(draft: Tensor | Unprojected) -> tuple[DistillationLoss, Tensor]:
            weights = lesson.weights
            if self._weighs_tokens:
                # Only the head is passed twice: hidden states are at hand.
                with torch.no_grad():
                    metrics = token_metrics(
                        draft,
                        target,
                        reference,
                        tokens,
                        keep=keep,
                        position_ids=inputs.get("position_ids"),
                        loss=self._distillation_loss,
                        vocabulary=self._vocabulary,
                    )
                    weights = check_token_weights(self.token_weights(metrics), metrics)
            result = self._distillation_loss(draft, lesson.target, lesson.tokens, lesson.num_items, weights)
            return result, result.loss

        read = model_inputs(lesson.inputs)
        result = in_head(model, read, lesson.keep, self.head_arithmetic, self._shared_vocab, loss_of)
        result = lesson.at_depth_one(result)
        check_loss(result.loss, self.model, self.state.global_step, partial(self._row_starts, [inputs]))
        self._training_sums.add(inputs, result)
        loss = result.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The tokens of every process were counted, and DDP averages gradients over processes.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, {"loss": loss}) if return_outputs else loss

    def _row_starts(self, batches: Sequence[dict[str, Any]]) -> list[str]:
        return [row for batch in batches for row in self.processing_class.batch_decode(batch["input_ids"][:, :16])]

    # Rollouts --------------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """The batches of an accumulation window, rewritten unless it is the data's turn, and how many tokens count."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._writer is not None and batches:
            step, collator = self.state.global_step, self.data_collator
            batches = self._writer.rewrite(batches, step, self.model_wrapped, collator)
            num_items = self._get_num_items_in_batch(batches, device)
        self._step_batches = batches
        return batches, num_items

    # Evaluation ------------------------------------------------------------------------------------------------------

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        """Metrics are sums over texts: what is evaluated comes one text a row, and each text once, to the last. All
        processes get the same number of batches of a stream.
        """
        usual, num_processes = self.data_collator, self.accelerator.num_processes
        drops_last = self.args.dataloader_drop_last
        if not kwargs.get("is_training"):
            self.args.dataloader_drop_last = False
            if isinstance(usual, DraftDistillCollator):
                self.data_collator = usual.padded()
        if isinstance(dataset, torch.utils.data.IterableDataset) and num_processes > 1:
            dataset = FilledUp(dataset, batch_size * num_processes)
        try:
            return super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)
        finally:
            self.data_collator, self.args.dataloader_drop_last = usual, drops_last

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in transformers, which for other data than the constructor's would hand out workers that persist, and so
        the data that they read.
        """
        if eval_dataset is None or eval_dataset is self.eval_dataset or isinstance(eval_dataset, str):
            return super().get_eval_dataloader(eval_dataset)
        return self.get_test_dataloader(eval_dataset)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As in trl; data that is given here is checked as the constructor's is, and a string names one of its sets."""
        if isinstance(eval_dataset, str):
            known = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []
            if eval_dataset not in known:
                raise ValueError(
                    f"`evaluate({eval_dataset!r})` names none of the evaluation sets {known}: a name is a key of the "
                    "constructor's `eval_dataset`. Load the data and give it instead."
                )
        elif eval_dataset is not None:
            eval_dataset = self._checked(eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """The metrics of `evaluate`, of data in any format that it takes. There are no predictions: whole logits, which
        would be those, are never held.
        """
        if isinstance(test_dataset, dict):
            raise ValueError(f"`predict` takes one data set, got {list(test_dataset)}; `evaluate` takes several.")
        return super().predict(self._checked(test_dataset), ignore_keys, metric_key_prefix)

    def _checked(self, given: Any) -> Any:
        """Data that comes after the constructor, checked and prepared as what that was given."""
        args = self.args
        datasets = setup.check_datasets(None, given, None, args, format_known=self._formatting_func is None)
        if isinstance(self.data_collator, DraftDistillCollator):
            setup.check_unpacked(datasets, args)
        if not (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
            for name, dataset in datasets.items():
                datasets[name] = self._prepare_dataset(
                    dataset,
                    self.processing_class,
                    args,
                    packing=False,
                    formatting_func=self._formatting_func,
                    dataset_name=name,
                )
        setup.check_dataset_fits(datasets, self._shared_context, args)
        return dict(zip(given, datasets.values(), strict=True)) if isinstance(given, dict) else datasets["eval"]

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Adds the metrics that come from sums over all texts: see [`EvaluationSums`](metrics.py)."""
        # Asked each time, since callbacks may be added or removed.
        length = self.args.eval_num_assistant_tokens
        asked = asked_metrics(self.callback_handler.callbacks, length)
        self._evaluation_sums = sums = EvaluationSums(self.signal, length, *asked, vocabulary=self._vocabulary)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self._evaluation_sums = None
        metrics = sums.metrics()
        is_left_out = metrics and sums.foreign_rows and self.signal.knows_distributions
        if is_left_out and metric_key_prefix not in self._explained:
            # Remembered here, and not by Python's own memory of warnings, which forgets with each checkpoint.
            self._explained.add(metric_key_prefix)
            warnings.warn(not_exact(sums.foreign_rows, self.signal, metric_key_prefix), stacklevel=2)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss of one batch, whose summands are added to those of the evaluation."""
        evaluation = self._evaluation_sums
        assert evaluation is not None, "evaluation_loop makes it"
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            keep = predicting_positions(inputs["labels"])
            target = self.signal.distributions(inputs, keep)

            def sums_of(draft: Tensor | Unprojected) -> tuple[Tensor, Tensor]:
                # All tokens count alike, whichever are selected for training.
                sums = evaluation.of_batch(draft, target, inputs, keep, self._distillation_loss)
                return sums, draft.new_zeros(0) if isinstance(draft, Tensor) else draft.hidden[:0]

            sums = in_head(model, model_inputs(inputs), keep, self.head_arithmetic, self._shared_vocab, sums_of)
        tokens, loss = sums[:, :2].sum(0)
        rows = partial(self._row_starts, [inputs])
        check_loss(loss, self.model, self.state.global_step, rows, evaluates=True)
        if self.accelerator.num_processes > 1:
            sums = sums.to(widest_float(keep.device)).to(keep.device)
        # Gathered here, row by row, so that rows repeated to fill the last batch are dropped (see also `FilledUp`).
        evaluation.add(self.accelerator.gather_for_metrics(sums))
        return (loss / tokens.clamp(min=1)).float().to(keep.device), None, None

    # Logging ---------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to entries about training: `num_tokens` read so far (a resumed run counts on from the last entry before
        its checkpoint), the `acceptance_rate` since the last entry where it can be told, and what was written (see
        [`CompletionWriter.close_log_entry`](rollouts.py)).

        The rate is one minus total variation at the loss temperature: `tvd_plus_plus`, whose own value means nothing,
        has to be watched by it. From a cache without the whole tail it is named `acceptance_rate_upper_bound`.
        """
        if "loss" in logs or "train_loss" in logs:  # the second is the last entry's, after the last evaluation
            if self._writer is not None:
                logs |= self._writer.close_log_entry()
            read, acceptance = self._training_sums.close(self.accelerator)
            if read:
                entries = reversed(self.state.log_history)
                logs["num_tokens"] = read + next((entry["num_tokens"] for entry in entries if "num_tokens" in entry), 0)
            if acceptance is not None:
                logs[self.signal.acceptance_name] = acceptance
        super().log(logs, start_time)

    # Saving ----------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; `resume_from_checkpoint=True` takes the newest complete checkpoint in `args.output_dir`.

        Raises:
            ValueError: There is none, another run is writing to `args.output_dir`, or no batch was filled.
            FloatingPointError: A loss, a gradient or the weights are not finite.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = checkpoint_to_resume(self.args.output_dir, warns=self.is_world_process_zero())
        if resume_from_checkpoint:
            check_options(str(resume_from_checkpoint), self.args, has_adapter=is_peft_model(self.model))
        self.weights_sha256 = None
        if self.accelerator.num_processes > 1 and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            setup.undo_evaluation_only(self)
        with only_run(self.args.output_dir) if self.is_world_process_zero() else nullcontext():
            try:
                result = super().train(resume_from_checkpoint, *args, **kwargs)
            finally:
                self.control.should_save = False  # an interrupted save leaves it on, and no card would be written
        if self.args.dataloader_drop_last and not self.state.global_step:
            raise ValueError(
                "No step was taken: the rows do not fill one batch of each process, and `dataloader_drop_last` leaves "
                "out what does not. Lower `per_device_train_batch_size`, or leave `dataloader_drop_last` out."
            )
        check_weights(self)
        return result

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        """Passes, and batches of the next one, that a checkpoint has seen: transformers takes a stream for endless.
        What is logged is counted anew.
        """
        found = super()._init_training_state(*args)
        # What is left of an attempt that was interrupted, or that ran out of memory, does not count.
        self._training_sums = TrainingSums()
        if self._writer is not None:
            self._writer.close_log_entry()
        if self.state.global_step >= args[0]:  # a run that was finished, of which transformers takes one step more
            return args[2], 0
        in_stream = isinstance(self.train_dataset, IterableDataset) and found[1] > 0
        return batches_read(args[3], self.args.gradient_accumulation_steps) if in_stream else found

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the plain draft, with an adapter merged into it, and `provenance.json` beside it.

        Checkpoints, which transformers saves through this method too, hold the adapter, so that they resume.

        Raises:
            FloatingPointError: The weights are not finite. Nothing is written.
        """
        check_weights(self)
        # Only for a checkpoint does transformers itself name a folder.
        is_checkpoint = self._saving_checkpoint = _internal_call and output_dir is not None
        directory = Path(output_dir or self.args.output_dir)
        if is_checkpoint and self.args.should_save:
            # Written last, it tells that a checkpoint is complete: an older one of the same step is not any longer.
            (directory / TRAINER_STATE_NAME).unlink(missing_ok=True)
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self._saving_checkpoint = False
        if not self.is_world_process_zero():
            return
        if is_checkpoint:
            record_options(directory, self.args)
        else:
            self.weights_sha256 = weights_checksum(directory)
            describe_run(self).save(directory)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        trained, token = self.model, self.args.hub_token
        if is_peft_model(trained) and not self._saving_checkpoint:
            if self.is_deepspeed_enabled:
                # On all processes: from ZeRO-3's shards transformers has collected the adapter alone.
                state_dict = self.accelerator.get_state_dict(self.deepspeed)
            if not self.args.should_save:
                return
            self.model, state_dict = merged(trained, state_dict), None
        # transformers pickles all arguments into `training_args.bin`, beside what people share.
        self.args.hub_token = None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.model, self.args.hub_token = trained, token

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        *,
        report: SpeculationReport | None = None,
        plots: dict[str, str] | None = None,
    ) -> None:
        """Write the draft's card and `provenance.json` into `args.output_dir`; what people wrote into the card stays.

        Args:
            model_name: Name on the card; by default the Hub id, or the output directory's name.
            dataset_name: Id of the training data on the Hub.
            tags: Tags beside the usual ones.
            report: What was measured, as from [`evaluate_draft`]; without one the card gives no measurements.
            plots: Caption -> path of a picture inside `args.output_dir`.
        """
        if not self.is_world_process_zero() or self.control.should_save:
            # With each checkpoint TRL asks for a card in a folder that holds no weights yet, or those of another run.
            return
        directory, provenance = self.args.output_dir, describe_run(self, dataset_name)
        provenance.save(directory)
        fresh = DraftModelCard.from_report(
            report,
            provenance=provenance,
            name=self.hub_model_id or model_name or Path(directory).name,
            tags=[tags] if isinstance(tags, str) else tags or (),
            plots=plots,
        )
        card, _ = merged_card(fresh, local_model_card(Path(directory), fresh))
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

        `revision` is a branch; it, `token` and `private` are by default those of `args`. A `license` is needed where
        the draft started from no model on the Hub to inherit one from. The call always waits for the commit, whatever
        `blocking` says; further arguments are for `create_model_card`, whose `report` is published too.

        Returns:
            What was published; None on processes other than the first.
        """
        if private is not None:
            self.args.hub_private_repo = private  # for callbacks too, which may publish something beside the draft
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = kwargs.pop("tags", None) or []
        tags = [*([tags] if isinstance(tags, str) else tags), *(unwrapped(self.model).model_tags or ())]
        self.create_model_card(tags=tags, **kwargs)
        return push_draft(
            self.args.output_dir,
            self.args.hub_model_id or Path(self.args.output_dir).name,
            report=kwargs.get("report"),
            commit_message=commit_message or "End of training",
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            private=self.args.hub_private_repo,
            license=license,
            language=language,
        )
