"""From the data sets a user gives to rows that are ready for batches.

SFTTrainer prepares one format at a time and tokenises what it reads. Here alignment rows keep their exact ids, rows of
several formats may be mixed, and rows know where their cached distributions lie.
"""

import copy
from collections.abc import Callable
from typing import Any

from datasets import Dataset, IterableDataset
from trl.trainer.utils import global_then_local_main_first

from hf_draftkd.data.collator import CachedDistributions
from hf_draftkd.data.formats import exact_features, packed, warn_of_cuts
from hf_draftkd.data.mixing import rejoined, split_by_format
from hf_draftkd.data.target_cache import rows_with_distributions
from hf_draftkd.training.config import DraftDistillConfig
from hf_draftkd.training.signal import check_cached


class PreparesRows:
    """Mixed into `DraftDistillTrainer` before `SFTTrainer`, whose preparation it calls."""

    # Set by `DraftDistillTrainer` before SFTTrainer prepares anything.
    _cache: CachedDistributions | None
    target_name: str | None
    _signature_columns: list[str] | None

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: Any,
        args: DraftDistillConfig,
        packing: bool,
        formatting_func: Callable[[dict], str] | None,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        usual: Callable[..., Any] = super()._prepare_dataset  # type: ignore[misc]
        map_kwargs: dict[str, Any] = {}
        if isinstance(dataset, Dataset):
            map_kwargs = {"num_proc": args.dataset_num_proc, "desc": f"Reading exact ids of {dataset_name} dataset"}
        first_row = None
        if self._cache is not None:
            # Again, since `evaluate` takes data of its own.
            dataset = rows_with_distributions(dataset, dataset_name)
            check_cached({dataset_name: dataset}, args, own_loss=False, own_collator=False)
            first_row = self._cache.add(dataset)
        # Whole first, so that rows of several formats can be joined, and what `max_length` costs can be counted.
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False

        def prepared(part: Dataset | IterableDataset) -> Any:
            with global_then_local_main_first():
                part = exact_features(part, self.target_name, first_row=first_row, **map_kwargs)
            return usual(part, processing_class, whole, False, formatting_func, dataset_name)

        if isinstance(dataset, IterableDataset):
            dataset = prepared(dataset)
        else:
            parts = split_by_format(dataset, dataset_name, text_field=args.dataset_text_field)
            dataset = rejoined([(prepared(part), rows) for part, rows in parts])
        warn_of_cuts(dataset, dataset_name, None if packing and args.packing_strategy != "bfd" else args.max_length)
        if not (packing and self._cache):
            return usual(dataset, processing_class, args, packing, None, dataset_name)
        # SFTTrainer packs `input_ids` and `labels` and drops the rest, so the packing is done here.
        with global_then_local_main_first():
            return packed(dataset, args.max_length, {**map_kwargs, "desc": f"Packing {dataset_name} dataset"})

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()  # type: ignore[misc]
            self._signature_columns = [*(self._signature_columns or []), "decoding", "cache_index"]
