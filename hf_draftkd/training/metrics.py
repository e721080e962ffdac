"""What training logs and what `trainer.evaluate()` reports: sums over all texts and processes, divided at the end."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset
from transformers.trainer_utils import IntervalStrategy

from hf_draftkd.acceptance import expected_target_calls
from hf_draftkd.acceptance.tensors import only_listed
from hf_draftkd.data.collator import SETTING_COLUMN, UNKNOWN_SETTING, rows_by_setting, setting_feature
from hf_draftkd.decoding.setting import SETTING_COLUMNS, DecodingSetting
from hf_draftkd.losses import DistillationLoss
from hf_draftkd.losses.chunked import scan
from hf_draftkd.training.config import DraftDistillConfig
from hf_draftkd.training.signals import TextSignal, Written

# The first columns of `EvaluationSums.of_batch`. For each temperature follow rated tokens and their Σα, then target
# calls at each draft length.
_COLUMNS = ("tokens", "loss", "foreign_rows", *SETTING_COLUMNS)
_SETTING = slice(3, 7)
# Stands for a probability that cannot be told.
_UNTOLD = -1.0

TokenLoss = Callable[[Tensor, Any, Tensor], DistillationLoss]


class TrainingSums:
    """What is logged of the training steps since the last log entry: tokens read, and their mean acceptance rate."""

    def __init__(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64)

    def add(self, batch: dict[str, Any], result: DistillationLoss) -> None:
        """Add one batch of this process."""
        read = batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel()
        alpha = result.acceptance
        # Summed over batches in float64 on the CPU: not every accelerator has it.
        rated, accepted = (0, 0.0) if alpha is None else (alpha.numel(), float(alpha.cpu().double().sum()))
        self._sums += torch.tensor([int(read), rated, accepted], dtype=torch.float64)

    def close(self, accelerator: Any) -> tuple[int, float | None]:
        """Sum over all processes and start again: tokens read, and the mean acceptance rate if it could be told."""
        sums = self._sums.to(accelerator.device) if accelerator.num_processes > 1 else self._sums
        read, rated, accepted = accelerator.reduce(sums).tolist()
        self._sums.zero_()
        return int(read), accepted / rated if rated else None


class FilledUp(IterableDataset):
    """A stream's prepared rows, filled up with rows that count for nothing, so that every process gets the same number
    of batches.

    accelerate would repeat rows from its beginning instead: it could not drop them again, since a stream's length is
    unknown; or it would shard by file, and wait forever where some processes have more rows.

    The number of rows becomes a multiple of `multiple`, the rows of one batch on all processes together.
    """

    def __init__(self, rows: Any, multiple: int) -> None:
        self._rows, self._multiple = rows, multiple

    def set_epoch(self, epoch: int) -> None:
        """Have a shuffled stream read in the order of this epoch."""
        self._rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        count, row = 0, None
        for row in self._rows:
            count += 1
            yield row
        if row is not None:
            yield from [row | {"labels": [-100] * len(row["input_ids"])}] * (-count % self._multiple)


class EvaluationSums:
    """Sums over the texts of an evaluation.

    Args:
        signal: What the draft learns from: it names the acceptance rate, and says which text it can judge.
        num_assistant_tokens: Draft length γ of the metric called `block_efficiency`.
        more_lengths: Further draft lengths, each reported as `block_efficiency_at_γ`.
        temperatures: Those of further acceptance rates, and of the settings whose block efficiency is reported.
        vocabulary: Ids that the draft may propose; None for all.
    """

    def __init__(
        self,
        signal: TextSignal,
        num_assistant_tokens: int,
        more_lengths: Sequence[int] = (),
        temperatures: Sequence[float] = (),
        *,
        vocabulary: Tensor | None = None,
    ) -> None:
        self._signal, self._vocabulary = signal, vocabulary
        self.draft_lengths = (num_assistant_tokens, *more_lengths)
        self.temperatures = tuple(sorted({1.0, *temperatures}))
        self._chosen = frozenset(temperatures)
        self._total = torch.zeros(len(_COLUMNS) + 2 * len(self.temperatures) + len(self.draft_lengths)).double()
        self._by_setting: dict[DecodingSetting, Tensor] = {}

    def of_batch(self, draft: Any, target: Any, batch: dict[str, Any], keep: Tensor, loss: TokenLoss) -> Tensor:
        """The summands of one batch, a row per text, from a chunk of positions after the other.

        Args:
            draft: Logits [N, V], or hidden states with their head, of the draft at the N completion tokens.
            target: What the signal knows of the target there.
            batch: The batch: `input_ids` [B, L], and `decoding` [B, 4] where the collator gives it.
            keep: [B, L] bool, where the N tokens are predicted.
            loss: (draft logits [n, V], target at these n, tokens [n]) -> their loss.

        Returns:
            [B, 7 + 2 K + G] float64 on the CPU: completion tokens; their loss; 1 if block efficiency is not exact for
            this text; the setting it was written under; at each of K temperatures the tokens whose acceptance can be
            told and their Σα; if block efficiency is exact, the text's expected target calls at each of G draft
            lengths, else zeros.
        """
        written = Written.of(batch, keep)
        settings = rows_by_setting(batch["decoding"]) if "decoding" in batch else {}
        setting_of_row = torch.full(keep.shape[:1], -1, device=keep.device)
        for index, rows in enumerate(settings.values()):
            setting_of_row[rows] = index
        of_tokens = self._of_tokens(draft, target, written, list(settings), setting_of_row[written.rows], loss)
        # Not every accelerator has float64, so sums are taken here.
        losses, accepted, *rates = (values.cpu().double() for values in of_tokens)
        row_of_token, lengths = written.rows.cpu(), keep.sum(1).cpu()

        def by_row(values: Tensor) -> Tensor:
            return torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, row_of_token, values)

        # Tokens are in row-major order, so each row's own stand together.
        padded = pad_sequence(accepted.split(lengths.tolist()), batch_first=True)
        valid = torch.arange(padded.shape[1]) < lengths[:, None]
        exact = (setting_of_row.cpu() >= 0) & ~((padded == _UNTOLD) & valid).any(1)
        decoded = torch.full((len(lengths), len(SETTING_COLUMNS)), math.nan, dtype=torch.float64)
        for setting, rows in settings.items():
            decoded[rows] = torch.tensor(setting_feature(setting), dtype=torch.float64)
        columns = [lengths.double(), by_row(losses), ((lengths > 0) & ~exact).double(), *decoded.T]
        for rate in rates:
            is_told = not (rate == _UNTOLD).any()
            columns += [lengths.double() * is_told, by_row(rate) * is_told]
        calls = torch.zeros(len(lengths), len(self.draft_lengths), dtype=torch.float64)
        calls[exact] = expected_target_calls(padded[exact], self.draft_lengths, valid[exact])
        return torch.cat([torch.stack(columns, 1), calls], 1)

    def _of_tokens(
        self,
        draft: Any,
        target: Any,
        written: Written,
        settings: Sequence[DecodingSetting],
        setting_of_token: Tensor,
        loss: TokenLoss,
    ) -> list[Tensor]:
        """[N] each: the tokens' losses, their a_t, and their α at each temperature; `_UNTOLD` where it cannot be told.

        `setting_of_token` [N] are the places of their texts' settings in `settings`, -1 where none is known.
        """
        losses = torch.zeros(written.tokens.shape, device=written.tokens.device)
        accepted = torch.full_like(losses, _UNTOLD)
        rates = {temperature: torch.zeros_like(losses) for temperature in self.temperatures}

        def look(rows: slice, draft_logits: Tensor, against: Any) -> None:
            draft_logits = only_listed(draft_logits, self._vocabulary)
            losses[rows] = loss(draft_logits, against, written.tokens[rows]).token_losses.to(losses)
            for temperature, rate in rates.items():
                found = self._signal.acceptance(draft_logits, against, temperature)
                rate[rows] = _UNTOLD if found is None else found.to(rate)
            for index, setting in enumerate(settings):
                (chosen,) = (setting_of_token[rows] == index).nonzero(as_tuple=True)
                if len(chosen):
                    # Indexing copies: what decoding does to logits may be done to these.
                    there = None if against is None else against[chosen]
                    found = self._signal.accepted(draft_logits[chosen], there, written.at(rows).at(chosen), setting)
                    accepted[rows][chosen] = _UNTOLD if found is None else found.to(accepted)  # a slice is a view

        scan((draft, target), look)
        return [losses, accepted, *rates.values()]

    def add(self, sums: Tensor) -> None:
        """Add the rows of one batch, gathered over processes."""
        sums = sums.cpu()
        self._total += sums.nan_to_num().sum(0)
        exact = sums[sums[:, 2] == 0]
        for setting, rows in rows_by_setting(exact[:, _SETTING]).items():
            self._by_setting[setting] = self._by_setting.get(setting, 0) + exact[rows].sum(0)

    @property
    def foreign_rows(self) -> int:
        """Rows for which block efficiency is not exact."""
        return int(self._total[2])

    def metrics(self) -> dict[str, float]:
        """`loss` per completion token and, as far as the signal can tell, acceptance rates and block efficiencies.

        - `acceptance_rate` is α at temperature 1, `acceptance_rate_t0` at temperature 0 (the share of tokens where
          draft and target find the same one likeliest); `acceptance_rate_upper_bound` where the tail is not known.
        - `block_efficiency` (tokens per target call, bonus token included), `block_efficiency_at_3` at draft length 3:
          of all texts, each under the setting it was recorded with. Left out with rows for which it is not exact.
        - `block_efficiency_t0`, `block_efficiency_at_3_t0`: of the texts written at temperature 0 (see
          `DecodingSetting.log_suffix`), for each setting with a chosen temperature.
        """
        num_rates = 2 * len(self.temperatures)
        tokens, loss = self._total[:2].tolist()
        if tokens == 0:
            return {}
        metrics = {"loss": loss / tokens}
        sums = self._total[len(_COLUMNS) :][:num_rates].view(-1, 2).tolist()
        for temperature, (rated, acceptance) in zip(self.temperatures, sums, strict=True):
            if rated:
                metrics[self._rate_name(temperature)] = acceptance / rated
        if self.foreign_rows == 0:
            metrics |= self._block_efficiencies(self._total, "")
        for setting in sorted(self._by_setting):
            if setting.temperature in self._chosen:
                metrics |= self._block_efficiencies(self._by_setting[setting], setting.log_suffix)
        return metrics

    def _block_efficiencies(self, total: Tensor, suffix: str) -> dict[str, float]:
        names = ["block_efficiency", *(f"block_efficiency_at_{length}" for length in self.draft_lengths[1:])]
        tokens, calls = float(total[0]), total[-len(names) :].tolist()
        return {f"{name}{suffix}": tokens / call for name, call in zip(names, calls, strict=True) if call}

    def _rate_name(self, temperature: float) -> str:
        if temperature == 1:
            return self._signal.acceptance_name
        # The target's likeliest token is known from any cache, so this is exact.
        name = "acceptance_rate" if temperature == 0 else self._signal.acceptance_name
        return f"{name}_t{temperature:g}"


def not_exact(foreign_rows: int, signal: TextSignal, prefix: str = "eval") -> str:
    """Why there is no block efficiency of all rows."""
    return (
        f"{prefix}_block_efficiency is left out: {foreign_rows} evaluation rows do not say that they "
        f"{signal.exact_text}. Make such rows with `draftkd generate` or `generate_alignment_data`."
    )


# Best checkpoint -----------------------------------------------------------------------------------------------------


def check_best_metric(
    args: DraftDistillConfig, eval_dataset: Any, signal: TextSignal, asked: tuple[Sequence[int], Sequence[float]]
) -> None:
    """Refuse, before training, a `metric_for_best_model` that `evaluate()` will not report or that means nothing.

    transformers would find out after the first evaluation. Names that are none of ours are left to it. `eval_dataset`
    holds prepared rows, several sets of them by name, or None; nothing is known of a stream. `asked` are further draft
    lengths and temperatures that are measured.
    """
    given = args.metric_for_best_model
    if given is None or eval_dataset is None or args.eval_strategy == IntervalStrategy.NO:
        return
    sets = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    metric = given.removeprefix("eval_")
    name = max((name for name in sets if not name or metric.startswith(f"{name}_")), key=len, default=None)
    if name is None:
        if metric in ("loss", signal.acceptance_name, "acceptance_rate") or metric.startswith("block_efficiency"):
            raise ValueError(
                f"`metric_for_best_model={given!r}` does not say which evaluation data it is of: there are "
                f"{', '.join(map(repr, sets))}. Use for instance 'eval_{next(iter(sets))}_{metric}'."
            )
        return
    metric = metric.removeprefix(f"{name}_")
    reason = _not_measured(metric, args.eval_num_assistant_tokens, *asked)
    if metric == "loss" and args.divergence == "tvd_plus_plus":
        reason = "the value of `tvd_plus_plus` does not measure how good a draft is. Choose the acceptance rate"
    elif metric == "acceptance_rate" != signal.acceptance_name:
        reason = f"of this cache only an upper bound is known. Choose {given.replace(metric, signal.acceptance_name)!r}"
    elif metric.startswith("acceptance_rate") and not signal.knows_distributions:
        reason = "acceptance rates need the target's distributions. Choose the block efficiency"
    elif re.fullmatch(r"block_efficiency(_at_\d+)?", metric) and (foreign_rows := _foreign_rows(sets[name], signal)):
        reason = not_exact(foreign_rows, signal).removesuffix(".")
    if reason is not None:
        raise ValueError(f"`metric_for_best_model={given!r}` cannot choose a checkpoint: {reason}.")


def _not_measured(metric: str, usual: int, lengths: Sequence[int], temperatures: Sequence[float]) -> str | None:
    """Why a metric at a draft length or temperature is not reported; None if it is, or names neither."""
    length = re.match(r"block_efficiency_at_(\d+)", metric)
    if length and int(length[1]) == usual:
        return f"at `eval_num_assistant_tokens={usual}` it is called {metric.replace(f'_at_{usual}', '', 1)!r}"
    if length and int(length[1]) not in lengths:
        return f"nothing asks for it. Give `AcceptanceCallback([{length[1]}])` among the `callbacks`"
    temperature = re.fullmatch(r"acceptance_rate(?:_upper_bound)?_t(\d+(?:\.\d+)?)", metric)
    if temperature and float(temperature[1]) not in temperatures:
        return f"nothing asks for it. Give `AcceptanceCallback(temperatures=[{temperature[1]}])` among the `callbacks`"
    return None


def _foreign_rows(dataset: Any, signal: TextSignal) -> int:
    """Rows for which block efficiency is not exact; 0 of a stream, which is not read ahead."""
    if not isinstance(dataset, Dataset):
        return 0
    decoding = dataset[SETTING_COLUMN] if SETTING_COLUMN in dataset.column_names else []
    recorded = rows_by_setting(torch.tensor([row or UNKNOWN_SETTING for row in decoding], dtype=torch.float32))
    return len(dataset) - sum(len(rows) for setting, rows in recorded.items() if signal.judges(setting))
