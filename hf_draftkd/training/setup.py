"""Everything that is checked, loaded, repaired and placed before training begins."""

import logging
import warnings
from contextlib import suppress
from typing import Any

import torch
from accelerate.utils import is_compiled_module
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from datasets import Dataset, IterableDataset
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.data_utils import get_dataset_column_names
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import get_config_model_id

from hf_draftkd.data.columns import is_transformed, row_lengths
from hf_draftkd.data.formats import (
    PER_TOKEN,
    as_messages,
    check_format,
    check_labels,
    check_token_ids,
    format_of,
    longest_text,
)
from hf_draftkd.data.target_cache import CacheFacts
from hf_draftkd.decoding.drafting import checked_vocabulary
from hf_draftkd.models.draft_length import drop_idle_sampling, recorded_vocabulary, store_draft_settings
from hf_draftkd.models.forward import HeadArithmetic, unwrapped
from hf_draftkd.models.identity import checkpoint_of
from hf_draftkd.models.loading import load_draft, load_target, load_tokenizer
from hf_draftkd.models.pairing import (
    align_vocabulary,
    check_own_tokenizer,
    check_weights_apart,
    fit_vocabulary,
    shared_vocab_size,
)
from hf_draftkd.models.resolve import Checkpoint, check_config, resolve
from hf_draftkd.models.sizing import larger_than_target
from hf_draftkd.models.tokenizers import pad_id, require_tokenizer, tokenizer_size
from hf_draftkd.training.config import DraftDistillConfig
from hf_draftkd.training.signals import arithmetic_of

logger = logging.getLogger(__name__)

# What `model_init_kwargs` and `target_model_init_kwargs` may hold; the target's also `gguf_file`.
_LOADING = ("dtype", "revision", "device_map", "quantization_config", "attn_implementation", "trust_remote_code")
# An adapter folded into quantised weights is rounded away: the draft that is saved would not be the one trained.
_QUANTISED_DRAFT = (
    "The draft {name!r} is quantised, and what it learns could not be saved: merging an adapter into quantised weights "
    "rounds it. Load the draft dense, it is small; the target may be quantised (`target_model_init_kwargs`), and the "
    "finished draft can be quantised when it is loaded."
)
_NOTHING_TO_TRAIN = (
    "Every parameter of the draft {name!r} is frozen: there is nothing to train. Call `draft.requires_grad_(True)`, "
    "load an adapter with `is_trainable=True`, or give a `peft_config`."
)


def model_name(model: Any) -> str:
    """The id or path a model came from; empty for one built in code."""
    return model if isinstance(model, str) else get_config_model_id(model.config) or ""


def named_datasets(train_dataset: Any, eval_dataset: Any) -> dict[str, Any]:
    """The data sets that were given, by name; `eval_dataset` may be several."""
    evals = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    evals = {f"eval_{name}" if name in ("train", "mix") else name: data for name, data in evals.items()}
    return {name: data for name, data in {"train": train_dataset, **evals}.items() if data is not None}


def check_arguments(model: Any, target_model: Any, reference_model: Any, tokenizer: Any) -> None:
    """Refuse what is neither a model nor its name, by the name of the argument, and what is no tokenizer."""
    given_models = {"model": model, "target_model": target_model, "reference_model": reference_model}
    for name, given in given_models.items():
        if not isinstance(given, str | torch.nn.Module) and (given is not None or name == "model"):
            instead = " Give `args` by name: here the target comes before it." if name == "target_model" else ""
            raise ValueError(
                f"`{name}` must be a model, or its id or path as text, got a `{type(given).__name__}`.{instead}"
            )
    if tokenizer is not None:
        require_tokenizer(tokenizer, "processing_class")


def check_datasets(
    train_dataset: Any, eval_dataset: Any, mix_dataset: Any, args: DraftDistillConfig, *, format_known: bool
) -> dict[str, Any]:
    """The data sets by name, once it is clear that there is something to learn from each; else a `ValueError`.

    `format_known` is False with a `formatting_func`.
    """
    datasets = named_datasets(train_dataset, eval_dataset)
    if mix_dataset is not None:
        datasets["mix"] = mix_dataset
    if not datasets:
        raise ValueError("Neither `train_dataset` nor `eval_dataset` was given. Give at least one.")
    for name, dataset in datasets.items():
        if not isinstance(dataset, Dataset | IterableDataset):
            instead = "Make one, with `Dataset.from_list` for instance."
            if isinstance(dataset, dict):
                instead = f"Choose one of its splits: {', '.join(map(repr, dataset))}."
            raise ValueError(
                f"The {name} dataset must be a `datasets.Dataset` or `IterableDataset`, got a "
                f"`{type(dataset).__name__}`. {instead}"
            )
    if format_known:
        for name, dataset in datasets.items():
            check_format(dataset, name, text_field=args.dataset_text_field)
            only_some = args.completion_only_loss and not args.assistant_only_loss and name != "mix"
            if only_some and not _holds_more(dataset, args):
                raise ValueError(
                    f"`completion_only_loss=True`, but rows of the {name} dataset have no `completion`: all their "
                    "tokens would be learned from. Split prompts off, or leave the option out. Of `messages` "
                    "`assistant_only_loss=True` learns the answers alone."
                )
            if args.completion_only_loss is False and "completion_ids" in get_dataset_column_names(dataset):
                raise ValueError(
                    f"`completion_only_loss=False` has no meaning for the exact tokens in the {name} dataset: a prompt "
                    "is not what the target writes. Leave it out; to learn from other text too, give it as "
                    "`mix_dataset`."
                )
    cuts = train_dataset is not None and args.packing and args.packing_strategy != "bfd"
    if cuts and (args.assistant_only_loss or _holds_more(train_dataset, args)):
        raise ValueError(
            f"`packing_strategy={args.packing_strategy!r}` cuts rows where a packed row is full: completions would "
            'be learned without the prompt they answer. Leave it out: "bfd" packs whole rows.'
        )
    if args.eval_packing:
        raise ValueError("`eval_packing=True` would cut texts apart, but metrics are sums over whole texts.")
    return datasets


def _holds_more(dataset: Any, args: DraftDistillConfig) -> bool:
    """Whether rows hold a prompt, or a mask, beside what is learned from."""
    read = set(format_of(dataset, args.dataset_text_field) or ())
    if "input_ids" in read:
        read |= set(PER_TOKEN) & set(get_dataset_column_names(dataset))
    return len(read) > 1


def check_unpacked(datasets: dict[str, Any], args: DraftDistillConfig) -> None:
    """Refuse rows that were packed before where they are padded or packed again: their texts would see each other."""
    for name, dataset in datasets.items():
        is_kept_apart = name == "train" and args.padding_free and not args.packing
        if not isinstance(dataset, Dataset) or is_kept_apart or format_of(dataset) != ("input_ids",):
            continue
        if "seq_lengths" in dataset.column_names and row_lengths(dataset, "seq_lengths").max(initial=0) > 1:
            instead = "Give the rows as they were before"
            if name == "train":
                instead += " (`packing=True` packs them), or set `padding_free=True` and `max_length=None`"
            raise ValueError(
                f"Rows of the {name} dataset are packed (`seq_lengths`), and would be read as one text each. {instead}."
            )


def stand_in(datasets: dict[str, Any]) -> Dataset:
    """What SFTTrainer takes for training data where only `evaluate()` is wanted: it insists on some.

    It is one row, by which SFTTrainer tells the format. It is never prepared: it may be one without anything to learn.
    """
    first = next(iter(datasets.values()))
    row = Dataset.from_list([next(iter(first))]) if isinstance(first, IterableDataset) else first.select([0])
    return as_messages(row)


def prepare_pair(
    model: Any,
    target_model: str | PreTrainedModel | None,
    args: DraftDistillConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    quantization_config: Any,
    trains: bool,
    adds_adapter: bool,
) -> tuple[Any, PreTrainedModel | None, PreTrainedTokenizerBase]:
    """Load what was given by name, and make draft and target a pair.

    Without `tokenizer`, the target's is used, else the draft's. `trains`: the draft learns and is not only evaluated;
    `adds_adapter`: an adapter will be added, and only that is trained.

    Returns:
        The draft, the frozen target (None without one), and the tokenizer they share.
    """
    for name, its_model, what in (
        ("model_init_kwargs", model, "model"),
        ("target_model_init_kwargs", target_model, "target_model"),
        ("target_model_revision", target_model, "target_model"),
    ):
        if getattr(args, name) and not isinstance(its_model, str):
            why = f"there is no `{what}`" if its_model is None else f"`{what}` is loaded already"
            raise ValueError(f"`{name}` would do nothing: {why}. Leave it out, or give the model's name or path.")
    draft_kwargs = {"dtype": "float32", **_loading_options(args, args.model_init_kwargs)}
    target_kwargs = _loading_options(args, args.target_model_init_kwargs, "gguf_file")
    target_kwargs.setdefault("revision", args.target_model_revision)
    if quantization_config is not None or draft_kwargs.get("quantization_config") is not None:
        raise ValueError(_QUANTISED_DRAFT.format(name=model_name(model)))
    # Whatever shows without the weights is looked at first: a pair that does not fit is refused in seconds.
    draft = _looked_up(model, draft_kwargs)
    target = None if target_model is None else _looked_up(target_model, target_kwargs)
    if draft is target:
        raise ValueError("`model` and `target_model` are the same object; the target is frozen. Load the model twice.")
    if tokenizer is None:
        tokenizer = _shared_tokenizer(draft, target)
    check_own_tokenizer(draft, tokenizer)
    if target is not None:
        check_own_tokenizer(target, tokenizer, is_target=True)
    if isinstance(draft, Checkpoint):
        draft = load_draft(draft, **draft_kwargs)
    if is_compiled_module(draft):
        raise ValueError(
            "The draft is compiled (`torch.compile`), and would be saved under names that nobody can load. Give the "
            "plain model, and set `torch_compile=True`."
        )
    if getattr(unwrapped(draft), "hf_quantizer", None) is not None:
        raise ValueError(_QUANTISED_DRAFT.format(name=model_name(unwrapped(draft))))
    learns_itself = trains and not adds_adapter
    if learns_itself and not any(parameter.requires_grad for parameter in draft.parameters()):
        raise ValueError(_NOTHING_TO_TRAIN.format(name=model_name(unwrapped(draft))))
    if isinstance(target, Checkpoint):
        target = load_target(target, **target_kwargs)
    if target is not None:
        if learns_itself:
            check_weights_apart(draft, target)
        if warning := larger_than_target(unwrapped(draft), target):
            logger.warning(f"{warning} `model` is the small one, which learns.")
        target.eval().requires_grad_(False)
        align_vocabulary(unwrapped(draft), target, tokenizer)
    drop_idle_sampling(unwrapped(draft).generation_config)  # without a target too: it could not be saved
    tokenizer.pad_token_id = pad_id(unwrapped(draft), tokenizer.pad_token_id, tokenizer.eos_token_id)
    return draft, target, tokenizer


def _loading_options(args: DraftDistillConfig, given: Any, *further: str) -> dict[str, Any]:
    known = (*_LOADING, *further)
    for option in given or {}:
        if option not in known:
            raise ValueError(f"Models are loaded with {', '.join(known)}; not with {option!r}.")
    return {"trust_remote_code": args.trust_remote_code, **(given or {})}


def _looked_up(model: Any, options: dict[str, Any]) -> Any:
    """The checkpoint of that name, or the loaded model; refused if it is not a causal LM.

    What a checkpoint remembers is taken out of `options`, which are those of loading it.
    """
    named = {name: options.pop(name) for name in ("revision", "gguf_file", "trust_remote_code") if name in options}
    if isinstance(model, str):
        checkpoint = resolve(model, **named)
        checkpoint.config  # noqa: B018 - raises where it is not a usable causal LM
        return checkpoint
    check_config(model.config, model.name_or_path or type(model).__name__)
    return model


def _shared_tokenizer(draft: Any, target: Any) -> PreTrainedTokenizerBase:
    """The target's, if it has one: chats are put to the target in its own template, and end with its own token."""
    if isinstance(target, Checkpoint):
        return target.tokenizer
    if target is not None and target.name_or_path:
        # A model in memory may come from where no tokenizer lies.
        with suppress(ValueError):
            return checkpoint_of(target).tokenizer
    if isinstance(draft, Checkpoint):
        return draft.tokenizer
    if not model_name(draft):
        raise ValueError("Neither model says where its tokenizer lies. Give the tokenizer as `processing_class`.")
    return load_tokenizer(model_name(draft))


def fit_to_data(
    draft: Any, datasets: dict[str, Any], facts: list[CacheFacts], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Give the draft the vocabulary of the target that the caches in use are of (none where the target is at hand).

    A `ValueError` if the two differ by more than padding, or a row holds an id that the draft lacks.
    """
    model = unwrapped(draft)
    sizes = [fact.vocab_size for fact in facts if fact.vocab_size is not None]
    if sizes:
        fit_vocabulary(model, max(sizes), tokenizer)
    rows = model.config.get_text_config().vocab_size
    for name, dataset in datasets.items():
        check_token_ids(dataset, name, rows)
    shared = min(rows, tokenizer_size(tokenizer))
    largest = max((fact.largest_id for fact in facts), default=0)
    if largest >= shared:
        raise ValueError(
            f"The cached distributions name token {largest}, but draft and tokenizer share {shared} tokens. "
            "Cache with the pair's `tokenizer`, so that padded rows are left out, or check that the draft has the "
            "tokenizer of the target that wrote these rows."
        )


def prepare_reference(
    reference_model: str | PreTrainedModel | None,
    draft: Any,
    target: PreTrainedModel | None,
    args: DraftDistillConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel | None:
    """The frozen model that `token_weights` compares the draft with; None without one.

    A `ValueError` if it is one of the pair itself, or has another tokenizer or vocabulary.
    """
    if reference_model is None:
        return None
    if reference_model is draft or reference_model is target:
        raise ValueError(
            "`reference_model` is the same object as the draft or the target, and could tell nothing new. Give a "
            "copy of the draft that was distilled before."
        )
    reference = _looked_up(reference_model, {"trust_remote_code": args.trust_remote_code})
    check_own_tokenizer(reference, tokenizer)
    if isinstance(reference, Checkpoint):
        reference = load_draft(reference, dtype="float32")
    needed = shared_vocab_size(unwrapped(draft), unwrapped(draft if target is None else target), tokenizer)
    rows = shared_vocab_size(reference, reference, tokenizer)
    if rows < needed:
        raise ValueError(
            f"`reference_model` predicts {rows} tokens, but draft and target share {needed}. Give a copy of the draft "
            "that was distilled from this target."
        )
    check_weights_apart(draft, reference, "`reference_model`")
    return reference.eval().requires_grad_(False)


def draft_vocabulary(draft: PreTrainedModel, args: DraftDistillConfig, vocab_size: int) -> torch.Tensor | None:
    """The ids that the draft may propose, kept in its generation config so that it is saved with them; None for all."""
    ids = args.draft_vocabulary
    if ids is None:
        return None
    if isinstance(ids, str):
        ids = recorded_vocabulary(draft.generation_config)
        if ids is None:
            raise ValueError(
                '`draft_vocabulary="recorded"` reads the list in the draft\'s generation config, but it holds none. '
                "Choose one with `draftkd vocabulary`, or give the ids themselves."
            )
    ids = checked_vocabulary(ids, vocab_size)
    store_draft_settings(draft, {"draft_vocabulary": ids})
    return torch.tensor(ids, device=args.device)


def warn_of_unread_caches(datasets: dict[str, Any]) -> None:
    """Say that distributions kept at some cost are not what is learned from."""
    for name, dataset in datasets.items():
        if "target_token_ids" in get_dataset_column_names(dataset):
            logger.warning(
                "The %s dataset holds cached distributions, which are not read beside a `target_model`. Leave "
                "`target_model` out to learn from them.",
                name,
            )


def undo_sft_changes(draft: PreTrainedModel, own_forward: Any) -> None:
    """Take off again what SFTTrainer puts on a draft for losses of its own.

    `own_forward` is what the attribute was before: accelerate puts one on a model that is spread over devices.
    """
    # TRL's fused head is bound to this very model, so a copy of it would run the original.
    vars(draft).pop("forward", None)
    if own_forward is not None:
        draft.forward = own_forward
    # A load-balancing loss is no part of ours. Saved with the draft, this would have it computed while decoding, where
    # transformers fails at a padded prompt.
    config = draft.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False


def check_whole_rows(trainer: Any) -> None:
    """Refuse to split a row over processes: the loss would miss the tokens where it is cut."""
    parallelism = trainer.accelerator.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            "Context and sequence parallelism (`cp_size`, `sp_size`) split each row over processes, but the loss "
            "compares draft and target over whole rows. Leave them out: DDP, FSDP and DeepSpeed split other things."
        )


def place_target(target: PreTrainedModel | None, trainer: Any) -> torch.nn.Module | None:
    """The target where the trainer runs it: on its device, sharded as the draft is, in evaluation mode."""
    if target is None:
        return None
    if trainer.is_deepspeed_enabled:
        if not trainer.args.shard_target and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise ValueError(
                "`shard_target=False` keeps the target whole on each process, but ZeRO-3 shards every model as it is "
                "loaded. Leave it out, or use ZeRO-2 or FSDP."
            )
        return prepare_deepspeed(target, trainer.accelerator)
    if trainer.is_fsdp_enabled and trainer.args.shard_target:
        # For evaluation `prepare_model` would neither shard it nor move it. accelerate's own function for FSDP2 shards
        # layer by layer and hands out weights that only the first process read; trl's shards the model as one piece.
        if trainer.accelerator.is_fsdp2:
            return fsdp2_prepare_model(trainer.accelerator, target).eval()
        return prepare_fsdp(target, trainer.accelerator).eval()
    # Moved, and nothing else: prepare_model would leave the user's own model under autocast for good.
    placed = getattr(target, "hf_device_map", None) is not None
    target = target if placed else target.to(trainer.accelerator.device)
    if trainer.is_fsdp_enabled:
        # Here too the first process may be the only one that read the weights.
        for tensor in (*target.parameters(), *target.buffers()):
            torch.distributed.broadcast(tensor.data, src=0)
    return target


def undo_evaluation_only(trainer: Any) -> None:
    """Have a draft that was evaluated before it is trained, by this trainer or another, prepared for training.

    accelerate takes it for prepared and would not wrap it in DDP: each process would train a draft of its own.
    """
    if not any(isinstance(module, DistributedDataParallel) for module in trainer.model_wrapped.modules()):
        trainer.model_wrapped = trainer.model
        trainer.model._is_accelerate_prepared = False


def check_optimizer(trainer: Any) -> None:
    """Refuse an optimizer that was made for other parameters than those that learn now."""
    if trainer.optimizer is None:
        return
    given = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    learning = {id(parameter): name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    left_out = [name for key, name in learning.items() if key not in given]
    if left_out and given - learning.keys():
        raise ValueError(
            f"The optimizer in `optimizers` was made before the draft took its final form: it lacks {left_out[0]!r}, "
            f"and holds {len(given - learning.keys())} parameters that do not learn. An adapter (`peft_config`), and "
            "fitting the vocabulary to the target's, replace parameters. Give `optimizer_cls_and_kwargs` instead, or "
            "call `align_vocabulary` or `get_peft_model` before making the optimizer."
        )


def warn_of_lost_updates(trainer: Any) -> None:
    """Warn where the weights that learn are too coarse for small updates, and no finer copy of them is kept."""
    if trainer.is_deepspeed_enabled or (trainer.is_fsdp_enabled and trainer.accelerator.mixed_precision != "no"):
        # They update float32 copies.
        return
    learning = {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad}
    coarse = sorted(str(dtype).removeprefix("torch.") for dtype in learning & {torch.bfloat16, torch.float16})
    if coarse and trainer.is_world_process_zero():
        warnings.warn(
            f"The draft's weights are {coarse[0]}, in which small updates are lost to rounding: at the usual learning "
            "rates most weights would never change. Load it in float32 (`dtype=torch.float32`, or give its name), and "
            "leave the speed of half precision to `bf16=True`.",
            stacklevel=3,
        )


def draft_arithmetic(trainer: Any) -> HeadArithmetic | None:
    """As `arithmetic_of`, for the draft of a trainer."""
    obstacle = None
    if trainer.args.torch_compile:
        obstacle = "`torch_compile` takes the model's forward as it is"
    elif trainer.is_deepspeed_enabled:
        obstacle = "DeepSpeed gathers the head's weights for the head's own forward alone"
    return arithmetic_of(trainer.model, "draft", obstacle)


def check_dataset_fits(datasets: dict[str, Any], context: int, args: DraftDistillConfig) -> None:
    """Refuse prepared data of which every token is masked, or with a row that exceeds the models' shared `context`."""
    for name, dataset in datasets.items():
        if is_transformed(dataset):  # its rows are made as they are asked for
            continue
        check_labels(dataset, name, args.max_length)
        if isinstance(dataset, IterableDataset):
            continue
        longest = longest_text(dataset)
        if longest > context:
            raise ValueError(
                f"The longest row of the {name} dataset has {longest} tokens, but the models read {context} at most. "
                f"Set `max_length={context}` or less."
            )
