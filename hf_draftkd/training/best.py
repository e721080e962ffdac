"""Which figure chooses the best checkpoint: refused before training if `evaluate()` will not report it, or if it means
nothing. transformers would find out after the first evaluation.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_utils import IntervalStrategy

from hf_draftkd.data.collator import UNKNOWN_SETTING, rows_by_setting
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.training.config import DraftDistillConfig
from hf_draftkd.training.evaluation_sums import not_exact
from hf_draftkd.training.signal import Text

_OURS = re.compile(r"(.*_)?(loss|block_efficiency.*|acceptance_rate(_upper_bound)?)")


def check_best_metric(
    args: DraftDistillConfig,
    eval_dataset: Any,
    signal: Text,
    lengths: Sequence[int],
    temperatures: Sequence[float],
) -> None:
    """Refuse a `metric_for_best_model` that cannot choose a checkpoint.

    Args:
        args: The configuration.
        eval_dataset: Prepared rows, several of them by name, or None. Of a stream nothing is known.
        signal: What the draft learns from.
        lengths: Draft lengths beside `args.eval_num_assistant_tokens`.
        temperatures: Sampling temperatures with figures of their own.

    Raises:
        ValueError: No evaluation data gives this figure, it does not say of which data it is, or it is the value of
            `tvd_plus_plus`.
    """
    if args.metric_for_best_model is None or eval_dataset is None or args.eval_strategy == IntervalStrategy.NO:
        return
    sets = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    if not all(isinstance(dataset, Dataset) for dataset in sets.values()):
        return
    metric = args.metric_for_best_model.removeprefix("eval_")
    figures = {name: _figures(dataset, signal, lengths, temperatures) for name, dataset in sets.items()}
    wanted = [name for name in sets if metric.startswith(f"{name}_")] if "" not in sets else [""]
    if any(metric.removeprefix(f"{name}_") in figures[name] for name in wanted):
        if args.divergence == "tvd_plus_plus" and metric.endswith("loss"):
            raise ValueError(
                f"`metric_for_best_model={args.metric_for_best_model!r}`: the value of `tvd_plus_plus` says nothing of "
                'how good a draft is. Take "eval_acceptance_rate" or "eval_block_efficiency".'
            )
    elif _OURS.fullmatch(metric):
        # Any other name may be a subclass's own figure.
        raise ValueError(_missing(args.metric_for_best_model, metric, sets, figures, wanted, signal))


def _missing(
    given: str, metric: str, sets: dict[str, Dataset], figures: dict[str, set[str]], wanted: list[str], signal: Text
) -> str:
    if not wanted:
        example = f"eval_{next(iter(sets))}_{metric}"
        return (
            f"`metric_for_best_model={given!r}` does not say which evaluation data it is of: there are "
            f"{', '.join(map(repr, sets))}, and each has figures of its own. Take for instance {example!r}."
        )
    (name, *_) = wanted
    foreign = len(sets[name]) - sum(map(len, _exact_rows(sets[name], signal).values()))
    why = f" {not_exact(foreign, signal)}" if foreign and "block_efficiency" in metric else ""
    prefix = f"eval_{name}_" if name else "eval_"
    known = ", ".join(sorted(f"{prefix}{figure}" for figure in figures[name]))
    return f"`metric_for_best_model={given!r}` will not be among the figures of `evaluate()`.{why} There are: {known}."


def _figures(dataset: Dataset, signal: Text, lengths: Sequence[int], temperatures: Sequence[float]) -> set[str]:
    """What `EvaluationSums` will report of these rows; of acceptance rates those at temperature 1."""
    names = {"loss"}
    if type(signal) is not Text:
        names.add(signal.acceptance_name)
    settings = _exact_rows(dataset, signal)
    suffixes = [setting.log_suffix for setting in settings if setting.temperature in temperatures]
    if sum(map(len, settings.values())) == len(dataset):
        suffixes.append("")
    efficiencies = ["block_efficiency", *(f"block_efficiency_at_{length}" for length in lengths)]
    return names | {f"{name}{suffix}" for name in efficiencies for suffix in suffixes}


def _exact_rows(dataset: Dataset, signal: Text) -> dict[DecodingSetting, list[int]]:
    """The rows that block efficiency is exact for, by the setting they were written under."""
    if "decoding" not in dataset.column_names:
        return {}
    settings = torch.tensor([row or UNKNOWN_SETTING for row in dataset["decoding"]], dtype=torch.float32)
    return {setting: rows for setting, rows in rows_by_setting(settings).items() if signal.judges(setting)}
