"""What the draft learns from: a live target, its cached distributions, or only its text.

The three answer the same questions, so that the trainer does not care which it has: what did the target say at the
completion tokens of this batch (`distributions`), how often would it accept the draft there (`acceptance`), and would
the tokens that were written have been accepted as draft tokens (`accepted`)?
"""

import logging
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedModel

from hf_draftkd.acceptance import token_acceptance_rate, token_logprob
from hf_draftkd.data.kept_distributions import CACHE_COLUMNS
from hf_draftkd.data.target_cache import CacheFacts, missing_cache_columns, read_cache
from hf_draftkd.decoding.processors import logits_processors, process_logits
from hf_draftkd.decoding.setting import UNFILTERED, DecodingSetting
from hf_draftkd.evaluation.scoring import token_scores
from hf_draftkd.losses import SampledTarget, SparseTarget, Unprojected, acceptance_upper_bound
from hf_draftkd.losses.sparse import check_sampled
from hf_draftkd.models.forward import HeadArithmetic, head_arithmetic, hidden_at, logits_at, unwrapped
from hf_draftkd.training.config import DraftDistillConfig

Distributions = Tensor | SparseTarget | SampledTarget

# Features of a batch that no model's forward takes.
_OWN_FEATURES = frozenset({"labels", "decoding", *CACHE_COLUMNS})
_WHOLE_LOGITS = (
    "The logits of the %s are held for all completion tokens of a batch at once, [tokens, vocabulary], not a chunk at "
    "a time: %s. Should memory run out, lower `per_device_train_batch_size`."
)
_NO_PLAIN_HEAD = "its logits are not a plain linear layer's (an adapter, quantised or offloaded weights, other code)"

logger = logging.getLogger(__name__)


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What a model's forward takes of a batch."""
    return {name: value for name, value in batch.items() if name not in _OWN_FEATURES}


def arithmetic_of(model: torch.nn.Module, name: str, obstacle: str | None) -> HeadArithmetic | None:
    """How a model's logits follow from its hidden states; None, and a word on why, where they must be whole."""
    found = head_arithmetic(model) if obstacle is None else None
    if found is None and PartialState().is_main_process:
        logger.warning(_WHOLE_LOGITS, name, obstacle or _NO_PLAIN_HEAD)
    return found


class Written(NamedTuple):
    """Some of a batch's completion tokens, and where they stand."""

    tokens: Tensor
    """[n]."""
    rows: Tensor
    """[n] the row of the batch that each stands in."""
    lengths: Tensor
    """[n] how many tokens of its row stand before it."""
    input_ids: Tensor
    """[B, L], the whole batch's."""
    logprobs: Tensor | None
    """[n] log p of these tokens, where a cache says it."""

    @classmethod
    def of(cls, batch: dict[str, Any], keep: Tensor) -> "Written":
        """All N of them, in row-major order of `keep` [B, L], where they are predicted."""
        rows, positions = keep.nonzero(as_tuple=True)
        ids = batch["input_ids"]
        return cls(ids[rows, positions + 1], rows, positions + 1, ids, batch.get("completion_logprobs"))

    def at(self, index: slice | Tensor) -> "Written":
        """Those at `index`."""
        logprobs = None if self.logprobs is None else self.logprobs[index]
        return self._replace(
            tokens=self.tokens[index], rows=self.rows[index], lengths=self.lengths[index], logprobs=logprobs
        )


class TextSignal:
    """Black box: the target's text and nothing else.

    Attributes:
        name: As the model card calls it.
        acceptance_name: What `acceptance` is called in logs.
        exact_text: Which text block efficiency is exact for.
        knows_distributions: Whether `acceptance` can be told at all.
    """

    name: ClassVar[str] = "black_box"
    acceptance_name: str = "acceptance_rate"
    exact_text: ClassVar[str] = "were written by one target, greedily"
    knows_distributions: ClassVar[bool] = False

    def distributions(self, batch: dict[str, Any], keep: Tensor) -> "Distributions | Unprojected | None":
        """The target at the N positions [B, L] `keep` that predict a completion token; None if it is not known."""
        return None

    def acceptance(self, draft_logits: Tensor, target: Distributions | None, temperature: float) -> Tensor | None:
        """[n] α at a sampling temperature, from raw draft logits [n, V]; None if it cannot be told.

        At temperature 0 it is 1 where draft and target find the same token likeliest, else 0.
        """
        return None

    def judges(self, setting: DecodingSetting) -> bool:
        """Whether `accepted` can tell of text written under this setting."""
        return setting.is_greedy

    def accepted(
        self, draft_logits: Tensor, target: Distributions | None, written: Written, setting: DecodingSetting
    ) -> Tensor | None:
        """[n] a_t: whether tokens that the target wrote under `setting` would have been accepted draft tokens; None if
        that cannot be told. From raw draft logits [n, V], and `distributions` at the same n positions.
        """
        if not self.judges(setting):
            return None
        # Greedy text needs no target: it wrote its likeliest token, and accepts what equals it.
        return (_processed(draft_logits, written, setting).argmax(-1) == written.tokens).float()


class CachedTarget(TextSignal):
    """The target's distributions as `cache_target_distributions` left them beside the text."""

    name = "cached"
    knows_distributions = True
    exact_text = "were written by one target, either greedily or at temperature 1 without top-p, top-k and penalties"

    def __init__(self, facts: list[CacheFacts], vocab_size: int) -> None:
        self._whole = all(fact.top_k == vocab_size for fact in facts)
        self.acceptance_name = "acceptance_rate" if self._whole else "acceptance_rate_upper_bound"
        self._temperature = facts[0].loss_temperature

    def distributions(self, batch: dict[str, Any], keep: Tensor) -> SparseTarget | SampledTarget:
        ids = batch["target_token_ids"]
        if "target_counts" in batch:
            return SampledTarget(ids, batch["target_counts"])
        return SparseTarget(ids, batch["target_logprobs"], batch["target_tail_logprob"])

    def acceptance(self, draft_logits: Tensor, target: Distributions | None, temperature: float) -> Tensor | None:
        if not isinstance(target, SparseTarget):
            return None
        if temperature == 0:
            likeliest = target.token_ids.gather(-1, target.logprobs.argmax(-1, keepdim=True)).squeeze(-1)
            return (draft_logits.argmax(-1) == likeliest).float()
        if temperature != self._temperature:
            return None
        if self._whole and target.token_ids.shape[-1] < draft_logits.shape[-1]:
            # Data given to `evaluate` later on: a bound may not go by the name of the rate.
            return None
        return acceptance_upper_bound(draft_logits if temperature == 1 else draft_logits / temperature, target)

    def judges(self, setting: DecodingSetting) -> bool:
        return super().judges(setting) or (setting == UNFILTERED and self._temperature == 1)

    def accepted(
        self, draft_logits: Tensor, target: Distributions | None, written: Written, setting: DecodingSetting
    ) -> Tensor | None:
        if setting.is_greedy or not self.judges(setting):
            return super().accepted(draft_logits, target, written, setting)
        # min(1, q / p) needs p of the written token alone, and that is always kept.
        assert written.logprobs is not None
        return (token_logprob(draft_logits, written.tokens) - written.logprobs.float()).clamp(max=0).exp()


class LiveTarget(TextSignal):
    """The prepared target, run beside the draft; `sharded`: its weights are whole only inside its own forward."""

    name = "white_box"
    knows_distributions = True
    exact_text = "were written by this target, under a setting they record"

    def __init__(self, model: torch.nn.Module, vocab_size: int, *, sharded: bool = False) -> None:
        self.model = model
        self._vocab_size = vocab_size
        self.head_arithmetic = arithmetic_of(model, "target", "its weights are sharded" if sharded else None)

    @torch.no_grad()
    def distributions(self, batch: dict[str, Any], keep: Tensor) -> Tensor | Unprojected:
        lies_on = unwrapped(self.model).get_output_embeddings().weight.device
        if self.head_arithmetic is not None and lies_on != keep.device:
            # A target on another device hands over logits: to move its head in each step would cost more.
            self.head_arithmetic = None
            logger.warning(_WHOLE_LOGITS, "target", f"it lies on {lies_on}, the draft on {keep.device}")
        if self.head_arithmetic is None:
            return logits_at(self.model, model_inputs(batch), keep)[:, : self._vocab_size].to(keep.device)
        return hidden_at(self.model, model_inputs(batch), keep, self.head_arithmetic, self._vocab_size)

    def acceptance(self, draft_logits: Tensor, target: Distributions | None, temperature: float) -> Tensor:
        assert isinstance(target, Tensor)
        if temperature == 0:
            return (draft_logits.argmax(-1) == target.argmax(-1)).float()
        if temperature != 1:
            draft_logits, target = draft_logits / temperature, target / temperature
        return token_acceptance_rate(draft_logits, target)

    def judges(self, setting: DecodingSetting) -> bool:
        return True

    def accepted(
        self, draft_logits: Tensor, target: Distributions | None, written: Written, setting: DecodingSetting
    ) -> Tensor:
        assert isinstance(target, Tensor)
        model = unwrapped(self.model)
        draft, p = (_processed(logits, written, setting, model) for logits in (draft_logits, target))
        # Where the recorded setting could not have written the token, a_t is undefined (0 / 0): counted as rejected.
        return token_scores(draft, p, written.tokens, is_greedy=setting.is_greedy).accepted


def check_cached(
    datasets: dict[str, Dataset | IterableDataset],
    args: DraftDistillConfig,
    *,
    custom_loss: bool = False,
    custom_collator: bool = False,
) -> dict[str, tuple[Dataset, CacheFacts]]:
    """Make sure, before anything is loaded, that the loss asked for can be computed from cached distributions.

    `custom_loss`: `token_loss` is overridden; `custom_collator`: the user gave a collator. Returns `read_cache` of each
    data set.
    """
    for name, dataset in datasets.items():
        if missing := missing_cache_columns(dataset):
            what = "A custom `token_loss`" if custom_loss else f"`divergence={args.divergence!r}`"
            raise ValueError(
                f"{what} compares the draft with its target, but `target_model` is None and the {name} dataset holds "
                f"no cached distributions (no {', '.join(f'`{name}`' for name in missing)}). Give the target, cache it "
                "with `cache_target_distributions` (text: `with_token_ids` first), or train on its text alone with "
                f'`divergence="cross_entropy"`{" and without that method" if custom_loss else ""}.'
            )
    for given, what, why in (
        (custom_collator, "data_collator", "distributions are looked up by the trainer's own"),
        ((args.dataset_kwargs or {}).get("skip_prepare_dataset"), "skip_prepare_dataset", "rows are linked to them"),
    ):
        if given:
            raise ValueError(
                f"`{what}` cannot be changed where the target's distributions come from the data: {why}. Leave it out."
            )
    read = {name: read_cache(dataset, name) for name, dataset in datasets.items()}
    for name, (_, fact) in read.items():
        if fact.loss_temperature != args.loss_temperature:
            raise ValueError(
                f"The distributions of the {name} dataset were cached at `loss_temperature={fact.loss_temperature:g}`, "
                f"but `loss_temperature={args.loss_temperature:g}` was asked for. What was left out of the cache "
                f"cannot be re-tempered: set `loss_temperature={fact.loss_temperature:g}`, or cache again."
            )
        if fact.top_k is None:
            check_sampled("a custom `token_loss`" if custom_loss else args.divergence)
    return read


def _processed(
    logits: Tensor, written: Written, setting: DecodingSetting, target_model: PreTrainedModel | None = None
) -> Tensor:
    """[n, V] of these tokens, as decoding under `setting` would have seen them."""
    ids, rows = written.input_ids, written.rows
    # Only the penalty looks back; the prefixes of all tokens are large.
    prefixes = ids[rows] if setting.repetition_penalty != 1 else ids.new_zeros(len(rows), 0)
    return process_logits(logits, prefixes, written.lengths, logits_processors(setting, target_model))
