"""Everything that is checked, loaded and repaired before a trainer is built."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import get_config_model_id

from hf_draftkd.data.formatting import longest_row
from hf_draftkd.models.checkpoints import check_config, check_model
from hf_draftkd.models.forward import unwrapped
from hf_draftkd.models.loading import load_draft, load_target, load_tokenizer
from hf_draftkd.models.pairing import align_vocabulary, check_own_tokenizer
from hf_draftkd.training.config import DraftDistillConfig


def model_name(model: Any) -> str:
    """The id or path a model came from; empty for one built in code."""
    return model if isinstance(model, str) else get_config_model_id(model.config) or ""


def prepare_pair(
    model: Any,
    target_model: str | PreTrainedModel | None,
    args: DraftDistillConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantization_config: Any = None,
) -> tuple[Any, PreTrainedModel | None, PreTrainedTokenizerBase]:
    """Load what was given by name, and make draft and target a pair.

    Returns:
        The draft, the frozen target (None without one), and the tokenizer they share.

    Raises:
        ValueError: A model cannot be loaded, is no causal LM, or its tokenizer differs from the other's.
    """
    trusted = {"trust_remote_code": args.trust_remote_code}
    draft_kwargs: dict[str, Any] = {"dtype": "float32", **trusted, **_as_dict(args.model_init_kwargs)}
    revision = draft_kwargs.get("revision")
    if quantization_config is not None:
        draft_kwargs["quantization_config"] = quantization_config
    # Whatever shows without the weights is looked at first: a pair that does not fit is refused in seconds.
    for given, at in ((model, revision), (target_model, args.target_model_revision)):
        if isinstance(given, str):
            check_model(given, revision=at, **trusted)
        elif given is not None:
            check_config(given.config, given.name_or_path or type(given).__name__)
    if model is target_model:
        raise ValueError("`model` and `target_model` are the same object; the target is frozen. Load the model twice.")
    if tokenizer is None:
        tokenizer = load_tokenizer(model_name(model), revision=revision, **trusted)
    check_own_tokenizer(model, tokenizer, revision=revision, **trusted)
    if target_model is not None:
        check_own_tokenizer(target_model, tokenizer, revision=args.target_model_revision, **trusted)
    draft = load_draft(model, **draft_kwargs) if isinstance(model, str) else model
    if isinstance(target_model, str):
        target_kwargs: dict[str, Any] = {**trusted, **_as_dict(args.target_model_init_kwargs)}
        target_model = load_target(target_model, revision=args.target_model_revision, **target_kwargs)
    target: PreTrainedModel | None = target_model
    if target is not None:
        target.eval().requires_grad_(False)
        align_vocabulary(unwrapped(draft), target, tokenizer)
    return draft, target, tokenizer


def _as_dict(value: Any) -> dict[str, Any]:
    assert value is None or isinstance(value, dict), "SFTConfig has parsed it"
    return value or {}


def check_dataset_fits(datasets: dict[str, Any], models: list[Any], args: DraftDistillConfig) -> None:
    """Refuse prepared data that leaves nothing to learn, or that is longer than a model can read.

    Raises:
        ValueError: Every token of a dataset is masked, or a row exceeds the context of a model.
    """
    context = min((_context_length(model) for model in models), default=None)
    for name, dataset in datasets.items():
        longest = longest_row(dataset)
        if longest == 0:
            raise ValueError(
                f"Nothing is left to learn from in the {name} dataset: every token is masked, or the prompts alone "
                f"fill `max_length={args.max_length}`. Check the masks, or raise `max_length`."
            )
        if longest is not None and context is not None and longest > context:
            raise ValueError(
                f"The longest row of the {name} dataset has {longest} tokens, but the models read {context} at most. "
                f"Set `max_length={context}` or less."
            )


def _context_length(model: Any) -> float:
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length or float("inf")
