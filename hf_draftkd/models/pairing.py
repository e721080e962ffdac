"""What makes two models a pair: the same tokenizer, and vocabularies that differ by padding at most.

    check_tokenizers(draft_tokenizer, target_tokenizer)         # raises where the token ids mean different things
    draft = align_vocabulary(draft, target, tokenizer)          # Qwen2.5 0.5B: 151936 rows, 7B: 152064
    target.generate(**inputs, assistant_model=draft)            # now works, and on the fast same-tokenizer path

Models of one family often share a tokenizer and differ in how far their embeddings were padded. transformers takes a
pair with unequal `vocab_size` for a pair with unequal tokenizers; `align_vocabulary` repairs that once, in the draft.
"""

import logging
import sys
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_draftkd.models.draft_length import drop_idle_sampling
from hf_draftkd.models.identity import checkpoint_of
from hf_draftkd.models.parallel import parallel_draft
from hf_draftkd.models.resolve import Checkpoint
from hf_draftkd.models.tokenizers import SPECIAL_IDS, tokenizer_size, vocabulary_difference

logger = logging.getLogger(__name__)


def check_tokenizers(draft_tokenizer: PreTrainedTokenizerBase, target_tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that a token id means the same to both models; else a `ValueError` names the first difference.

    Contents are compared, not sizes: every token with its id, the merges, and how text is cut up and put together
    again. Different bos, eos and pad tokens are no obstacle (`align_vocabulary` repairs them in the models) and only
    logged; chat templates do not matter.
    """
    difference = vocabulary_difference(draft_tokenizer, target_tokenizer)
    if difference is not None:
        raise ValueError(
            f"The tokenizers of draft and target differ: {difference} Speculative decoding compares token ids, which "
            "must mean the same to both models. Choose a draft of the target's own family, or make one with "
            "`build_draft(target_model, ...)`."
        )
    for name in SPECIAL_IDS:
        draft_id, target_id = getattr(draft_tokenizer, name), getattr(target_tokenizer, name)
        if draft_id != target_id:
            logger.info("%s is %s in the draft's tokenizer and %s in the target's.", name, draft_id, target_id)


def check_own_tokenizer(
    model: Checkpoint | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, is_target: bool = False
) -> None:
    """Make sure that `tokenizer` is the one a model was trained with, by the files the model was loaded from.

    The model is the draft, or with `is_target` the target: the message then speaks of `tokenizer` as the draft's. A
    loaded model may come from a place that has no tokenizer: that is logged.
    """
    if isinstance(model, Checkpoint):
        own = model.tokenizer
    elif not model.name_or_path:
        return
    else:
        try:
            own = checkpoint_of(model).tokenizer
        except ValueError as error:
            logger.info("The tokenizer of %s could not be compared: %s", model.name_or_path, error)
            return
    check_tokenizers(*((tokenizer, own) if is_target else (own, tokenizer)))


def check_weights_apart(draft: nn.Module, other: nn.Module, what: str = "target") -> None:
    """Refuse a draft that has a weight in common with the `other` model: training it would change that."""
    # Tensors that are sharded, or not loaded yet, have the address 0.
    theirs = {parameter.data_ptr() for parameter in other.parameters()} - {0}
    shared = next((name for name, parameter in draft.named_parameters() if parameter.data_ptr() in theirs), None)
    if shared is not None:
        raise ValueError(
            f"Draft and {what} share weights ({shared}): training the draft would change the {what}, which is frozen. "
            "Load it twice, or copy what they share (`copy.deepcopy`)."
        )


def shared_vocab_size(
    draft_model: PreTrainedModel, target_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> int:
    """How many rows V of both models' logits stand for tokens: the vocabulary that losses and analysis use.

    Without the tokenizer, the rows that both models pad cannot be told from tokens, and are counted.
    """
    sizes = [_vocab_size(draft_model), _vocab_size(target_model)]
    if tokenizer is not None:
        sizes.append(tokenizer_size(tokenizer))
    return min(sizes)


def context_length(model_or_config: Any) -> int | None:
    """The longest text a model can read, in tokens; None where its config does not say."""
    config = getattr(model_or_config, "config", model_or_config)
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def shared_context(*models: Any) -> int:
    """The longest text that every one of the models can read; without a limit, more than any text has."""
    return min((length for model in models if (length := context_length(model)) is not None), default=sys.maxsize)


def align_vocabulary(
    draft_model: PreTrainedModel, target_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedModel:
    """Make a draft fit a target that shares its tokenizer; changes the draft in place, never the target.

    - The draft gets the target's `vocab_size`. New rows of embedding and head are zero; rows too many are cut off,
      but only where they are padding.
    - Padded ids go into the draft's `generation_config.suppress_tokens`, which assisted decoding honours: a zero row
      has logit 0, more than many tokens have. (The target's own padded rows are left alone: speculative decoding must
      not change the target's output.)
    - bos, eos and pad ids are copied into the draft's config and generation config; sampling settings that do nothing
      there, because `do_sample` is off, are removed: transformers would refuse to save them.

    All of it is saved with the draft. Doing it twice changes nothing more. Do it before making an optimiser and
    before adding adapters, since embedding and head may be replaced.

    Args:
        draft_model: The draft.
        target_model: The target.
        tokenizer: Their tokenizer: tells padding from tokens. Without it only rows that one model lacks, or that are
            zero or suppressed already, are known to be padding.

    Returns:
        The draft.

    Raises:
        ValueError: A difference is not padding: tokens would be lost or invented. Or a parallel draft's mask token is
            among the rows to be cut.
    """
    fit_vocabulary(draft_model, _vocab_size(target_model), tokenizer)
    copy_special_ids(draft_model, target_model)
    drop_idle_sampling(draft_model.generation_config)
    return draft_model


def fit_vocabulary(draft_model: PreTrainedModel, new_size: int, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """What `align_vocabulary` does to the draft's rows, where only their number in the target is known; the same
    errors.
    """
    old_size = _vocab_size(draft_model)
    _check_padding(draft_model, old_size, new_size, tokenizer)
    parallel = parallel_draft(draft_model.config)
    if parallel is not None and parallel.mask_token_id >= new_size:
        raise ValueError(
            f"The mask token by which the draft predicts several tokens in one pass (id {parallel.mask_token_id}) is "
            f"none of the target's {new_size} rows. To use it as an ordinary draft, set "
            "`draft_model.config.parallel_tokens = 1`."
        )
    if old_size != new_size:
        _resize(draft_model, old_size, new_size)

    first_padded = min(old_size, new_size) if tokenizer is None else tokenizer_size(tokenizer)
    config = draft_model.generation_config
    kept = {i for i in config.suppress_tokens or () if i < new_size}
    # An empty list would be a processor that does nothing at every step.
    config.suppress_tokens = sorted(kept | set(range(first_padded, new_size))) or None


def copy_special_ids(draft_model: PreTrainedModel, target_model: PreTrainedModel) -> None:
    """Give the draft's config and generation config the target's bos, eos and pad ids.

    Each from its own counterpart: a chat model's generation config often lists several end-of-sequence ids where its
    config has one, and transformers' pipeline compares the configs.
    """
    for draft_part, target_part in (
        (draft_model.config.get_text_config(), target_model.config.get_text_config()),
        (draft_model.generation_config, target_model.generation_config),
    ):
        for name in SPECIAL_IDS:
            value = getattr(target_part, name, None)
            setattr(draft_part, name, list(value) if isinstance(value, list) else value)
        pad = draft_part.pad_token_id
        if pad is not None and not 0 <= pad < _vocab_size(draft_model):
            # The target was published with -1, or with an added pad token. A draft saved with it could not be loaded.
            draft_part.pad_token_id = None


def _vocab_size(model: Any) -> int:
    # The config, not the weights: under ZeRO-3 a weight's shape is 0.
    return model.config.get_text_config().vocab_size


def check_rows(draft_rows: int, target_rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a `ValueError` unless the rows that one of the models lacks are padding, by their tokenizer."""
    size = tokenizer_size(tokenizer)
    if draft_rows < min(size, target_rows):
        raise ValueError(
            f"The draft has {draft_rows} rows, but the tokenizer has {size} tokens and the target {target_rows} rows: "
            "the missing rows are tokens that the draft was never trained on, not padding. Add them yourself with "
            f"`draft_model.resize_token_embeddings({target_rows})` and train them, or choose another draft."
        )
    if target_rows < min(size, draft_rows):
        raise ValueError(
            f"The target has {target_rows} rows, but the tokenizer has {size} tokens and the draft {draft_rows} rows: "
            "the rows to be cut from the draft are tokens, not padding. Check that this is the target's tokenizer."
        )


def _check_padding(
    draft_model: PreTrainedModel, old_size: int, new_size: int, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Raise unless every row that must be added to or cut from the draft is padding."""
    if tokenizer is not None:
        check_rows(old_size, new_size, tokenizer)
    elif old_size > new_size:
        tables = [draft_model.get_input_embeddings().weight, draft_model.get_output_embeddings().weight]
        rows = set(range(new_size, old_size)) - set(draft_model.generation_config.suppress_tokens or ())
        unknown = [row for row in sorted(rows) if any(bool(table[row].any()) for table in tables)]
        if unknown:
            raise ValueError(
                f"The draft has {old_size} rows and the target {new_size}, and whether rows {unknown[0]} and up are "
                "padding or tokens cannot be told from the models. Pass the tokenizer as third argument."
            )


def _resize(model: PreTrainedModel, old_size: int, new_size: int) -> None:
    needed = f"The draft's vocabulary must change from {old_size} to {new_size} rows, but"
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"{needed} it carries a PEFT adapter. Align the plain draft first and add the adapter then, or merge it: "
            "`draft.merge_and_unload()`."
        )
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    if not all(table.weight.is_floating_point() for table in tables):
        raise ValueError(
            f"{needed} its embedding or head is quantised. Load the draft without `quantization_config`, align it, "
            "save it, and load that one quantised."
        )
    # transformers draws new rows at random before they are zeroed: the caller's random state must not notice.
    with torch.random.fork_rng(devices=[]):
        model.resize_token_embeddings(new_size, mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight[old_size:] = 0
            if getattr(table, "bias", None) is not None:
                table.bias[old_size:] = 0
