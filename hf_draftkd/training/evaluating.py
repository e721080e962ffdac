"""How a trainer evaluates: text by text, a chunk of positions at a time, figures divided once at the end."""

import warnings
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from hf_draftkd.acceptance.tensors import widest_float
from hf_draftkd.data.collator import DraftDistillCollator
from hf_draftkd.losses import Unprojected
from hf_draftkd.models.forward import HeadArithmetic, in_head, logits_at, predicting_positions
from hf_draftkd.training.callbacks import asked_figures
from hf_draftkd.training.evaluation_sums import EvaluationSums, not_exact, row_sums
from hf_draftkd.training.finite import require_finite_loss
from hf_draftkd.training.signal import Text, model_inputs


class FilledUp(IterableDataset):
    """A stream that ends with rows in which nothing counts, so that all processes have as many batches.

    accelerate would repeat rows from its beginning instead: of a stream, whose length is not known, they are not
    dropped again. Or it would give each process shards of its own, and wait for ever where some have more rows.

    Args:
        rows: The prepared rows.
        multiple: Their number becomes one of this.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], multiple: int) -> None:
        self._rows, self._multiple = rows, multiple

    def __iter__(self) -> Iterator[dict[str, Any]]:
        count, row = 0, None
        for row in self._rows:
            count += 1
            yield row
        if row is not None:
            yield from [row | {"labels": [-100] * len(row["input_ids"])}] * (-count % self._multiple)


class EvaluatesTexts(Trainer):
    """A trainer whose `evaluate()` reports what [`EvaluationSums`] says. Mix it in before another trainer class."""

    signal: Text
    data_collator: Any
    _arithmetic: HeadArithmetic | None
    _shared_vocab: int
    _eval_sums: EvaluationSums | None = None

    @cached_property
    def _explained(self) -> set[str]:
        """The evaluation sets of which was said why they have no block efficiency."""
        return set()

    def _distillation_loss(self, draft: Any, target: Any, tokens: Tensor) -> Any:
        raise NotImplementedError

    def _get_dataloader(self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        """Figures are sums over texts: what is evaluated comes one text a row, and each text once."""
        usual = self.data_collator
        if not is_training:
            if isinstance(usual, DraftDistillCollator):
                self.data_collator = usual.padded()
            if isinstance(dataset, IterableDataset) and self.accelerator.num_processes > 1:
                dataset = FilledUp(dataset, self.args.eval_batch_size * self.accelerator.num_processes)
        try:
            return super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = usual

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Adds the figures that come from sums over all texts: see [`EvaluationSums`]."""
        gamma = self.args.eval_num_assistant_tokens
        # Asked now, since callbacks may have been added or removed.
        self._eval_sums = EvaluationSums(self.signal, gamma, *asked_figures(self.callback_handler.callbacks, gamma))
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        figures, foreign_rows = self._eval_sums.figures(), self._eval_sums.foreign_rows
        self._eval_sums = None
        if figures and foreign_rows and type(self.signal) is not Text and metric_key_prefix not in self._explained:
            # Here, and not by Python's own memory of warnings, which forgets with each checkpoint.
            self._explained.add(metric_key_prefix)
            warnings.warn(not_exact(foreign_rows, self.signal, metric_key_prefix), stacklevel=2)
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
        figures = self._eval_sums
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            keep = predicting_positions(inputs["labels"])
            target = self.signal.for_loss(inputs, keep)

            def sums_of(draft: Tensor | Unprojected) -> Tensor:
                return row_sums(
                    draft,
                    target,
                    inputs,
                    keep,
                    # Of all tokens alike, whichever are selected for training.
                    loss=lambda *chunk: self._distillation_loss(*chunk).token_losses,
                    signal=self.signal,
                    temperatures=figures.temperatures,
                    draft_lengths=figures.draft_lengths,
                )

            if self._arithmetic is None:
                sums = sums_of(logits_at(model, model_inputs(inputs), keep)[:, : self._shared_vocab])
            else:
                sums = in_head(
                    model,
                    model_inputs(inputs),
                    keep,
                    self._arithmetic,
                    self._shared_vocab,
                    lambda source: (sums_of(source), source.hidden[:0]),
                )
        tokens, loss = sums[:, :2].sum(0)
        require_finite_loss(loss, inputs, self, evaluates=True)
        if self.accelerator.num_processes > 1:
            sums = sums.to(widest_float(keep.device)).to(keep.device)
        # Gathered here, row by row, so that rows repeated to fill the last batch are dropped (see also `FilledUp`).
        figures.add(self.accelerator.gather_for_metrics(sums))
        return (loss / tokens.clamp(min=1)).float().to(keep.device), None, None
