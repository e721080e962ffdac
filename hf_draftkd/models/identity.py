"""Which model is this: the commit a loaded model comes from, and the checksum of weights, loaded or in a folder.

A reported number without its commit or checksum cannot be checked by anybody else.
"""

import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from hf_draftkd.models.forward import unwrapped
from hf_draftkd.models.resolve import ADAPTER_CONFIG_NAME, Checkpoint, is_hub_id, read_index, resolve
from hf_draftkd.utils.hashing import sha256

logger = logging.get_logger(__name__)

WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
# safetensors' names of number formats that a plain, dense checkpoint consists of.
_DENSE = {"F64", "F32", "F16", "BF16"}
_ADAPTER_KEY = re.compile(r"\b(lora_[AB]|lora_embedding_[AB]|base_layer|modules_to_save|lora_magnitude_vector)\b")
_ATTRIBUTE = "_draftkd_checkpoint"
_NUMBERS_READ = 64  # of each weight, for a fingerprint
_FORMATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def remember_checkpoint(model: Any, checkpoint: Checkpoint) -> None:
    """Keep on a model where it was loaded from; its name alone would later stand for the newest commit."""
    setattr(model, _ATTRIBUTE, checkpoint)


def checkpoint_of(model: Any) -> Checkpoint:
    """Where a loaded model comes from: remembered by `load_target` and `load_draft`, else looked up by its name."""
    return getattr(model, _ATTRIBUTE, None) or resolve(model.name_or_path)


class ModelIdentity(NamedTuple):
    """What tells two models apart: a name, its commit on the Hub, and a fingerprint of the weights where known.

    `other_formats` are fingerprints that the same weights have once they are converted to other number formats: rows
    that a target wrote in bfloat16 are its own in float32, too.
    """

    name: str
    revision: str | None = None
    weights: str | None = None
    other_formats: tuple[str, ...] = ()

    def has_weights_of(self, other: "ModelIdentity") -> bool | None:
        """Whether both have the same weights; None where one of them does not know its own."""
        if self.weights is None or other.weights is None:
            return None
        return self.weights in (other.weights, *other.other_formats) or other.weights in self.other_formats

    def matches(self, now: "ModelIdentity") -> bool:
        """Whether both are one model; see `difference`."""
        return self.difference(now) is None

    def difference(self, now: "ModelIdentity") -> str | None:
        """What tells this model, which rows or a manifest name, from the one in use `now`; None if both are one model.

        Weights decide, in whichever folder they lie: a name stays the same when the model behind it is trained further,
        and models made in code share an empty one. Names and commits decide only where one of the two does not know its
        weights.
        """
        same_weights = self.has_weights_of(now)
        same_name = self.name == now.name and (None in (self.revision, now.revision) or self.revision == now.revision)
        if same_weights or (same_weights is None and same_name):
            return None
        if same_weights is None:
            return "another model, by its name or commit"
        if same_name and self.name:
            return (
                "with other weights than now: it was trained further in place since, or is loaded in another number "
                "format, which `dtype` sets"
            )
        return "another model, by its weights"

    def __str__(self) -> str:
        name = self.name or "a model without a name"
        return name if self.revision is None else f"{name} at {self.revision}"


def identity_of(model: PreTrainedModel) -> ModelIdentity:
    """The identity of a loaded model; without its weights where they are quantised, or not all of them at hand."""
    is_adapted = getattr(model, "peft_config", None) is not None
    # An adapter in memory makes another model of it, which has no name.
    name, revision = ("", None) if is_adapted else (model.name_or_path, model_revision(model))
    is_plain = getattr(model, "hf_quantizer", None) is None and not any(
        weight.is_meta or weight.numel() == 0 or isinstance(weight, DTensor) for weight in model.state_dict().values()
    )
    if not is_plain:
        return ModelIdentity(name, revision)
    weights = weights_fingerprint(model)
    converted = (weights_fingerprint(model, dtype) for dtype in _FORMATS)
    return ModelIdentity(name, revision, weights, tuple(each for each in converted if each != weights))


def model_revision(model: Any) -> str | None:
    """The commit of a loaded model; None for one from a local directory or made in code.

    A model that was not loaded by `load_target` or `load_draft` is assumed to be the newest commit in the local cache.
    """
    checkpoint = getattr(model, _ATTRIBUTE, None)
    return checkpoint.revision if checkpoint is not None else resolved_revision(model.name_or_path)


def resolved_revision(name_or_path: str) -> str | None:
    """The commit of a model that was loaded from the Hub, as the local cache knows it; None for a local directory."""
    if not is_hub_id(name_or_path) or Path(name_or_path).exists():
        return None
    found = (try_to_load_from_cache(name_or_path, name) for name in (CONFIG_NAME, ADAPTER_CONFIG_NAME))
    # .../models--org--name/snapshots/COMMIT/config.json
    return next((Path(path).parent.name for path in found if isinstance(path, str)), None)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, and the index where there are several; all of them are there."""
    single = folder / SAFE_WEIGHTS_NAME
    if single.is_file():
        return [single]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    names = read_index(index)
    # The index is data: a name in it must not lead out of the folder.
    for name in names:
        if not (WEIGHT_FILE.fullmatch(name) and (folder / name).is_file()):
            raise ValueError(f"{index} names {name!r}, which is not a weight file in {folder}. Save the model again.")
    return [*(folder / name for name in names), index]


def stored_parameters(folder: Path) -> int:
    """The number of parameters in a folder; a `ValueError` if weights are damaged, quantised, or of an adapter."""
    total = 0
    for path, name, file in _tensors(folder):
        piece = file.get_slice(name)
        if _ADAPTER_KEY.search(name):
            raise ValueError(
                f"{path} holds adapter weights ({name}): the adapter was not merged. Merge and save it: "
                "`model.merge_and_unload().save_pretrained(folder)`; `draftkd train` does so."
            )
        if piece.get_dtype() not in _DENSE:
            raise ValueError(
                f"{path} holds {name} as {piece.get_dtype()}: these weights are quantised. Push the dense weights; "
                "whoever uses the draft can quantise on loading."
            )
        total += math.prod(piece.get_shape())
    return total


def weights_checksum(folder: Path, dtype: str | torch.dtype | None = None) -> str:
    """SHA-256 over all tensors in the order of their names: name, number format, shape and bytes.

    It does not depend on how the tensors are spread over files, nor on metadata in them, so that a folder and its copy
    on the Hub agree. With `dtype` (`bfloat16`) it is of the numbers as they are after loading in this format.
    """
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise ValueError(f"{dtype!r} is not a floating number format of torch, such as 'bfloat16'.")

    def pieces() -> Iterator[str | torch.Tensor]:
        for path, name in sorted(((path, name) for path, name, _ in _tensors(folder)), key=lambda item: item[1]):
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(name)
            if wanted is not None and tensor.is_floating_point():
                tensor = tensor.to(wanted)
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}\n"
            yield tensor

    return sha256(pieces())


def loaded_checksum(model: PreTrainedModel) -> str | None:
    """`weights_checksum` of the folder that a loaded model would be saved to, in the model's own number format.

    It is about the weights in memory: a model that was trained since, or whose vocabulary was padded, has another. The
    model is saved into a temporary folder for it, because only `save_pretrained` knows how tied and converted weights
    are stored. None where no plain weights can be saved: the model is quantised, carries an adapter that is not merged,
    or the disk is full.
    """
    is_adapted = getattr(model, "peft_config", None) is not None or getattr(model, "_hf_peft_config_loaded", False)
    if is_adapted or getattr(model, "hf_quantizer", None) is not None:
        return None
    # Only weights are asked for, and some generation configs that were loaded cannot be saved.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with tempfile.TemporaryDirectory() as folder, without_weight_bars():
            model.save_pretrained(folder)
            return weights_checksum(Path(folder), model.dtype)
    except (OSError, SafetensorError) as error:  # the latter where the disk fills up during the writing
        logger.warning(f"The weights could not be saved to take their checksum, so the report names none: {error}")
        return None
    finally:
        model.generation_config = own


def weights_fingerprint(model: PreTrainedModel, dtype: torch.dtype | None = None) -> str:
    """A hash over some numbers of every weight: another revision or a tuned copy of a model has another one.

    Targets may have hundreds of gigabytes, so not every number is read; training moves all of them. With `dtype` it is
    that of the model loaded in this number format.
    """

    def pieces() -> Iterator[str | torch.Tensor]:
        # Whatever wraps them, compiled or with an adapter, the names are the same.
        for name, weight in sorted(unwrapped(model).state_dict().items()):
            kind = dtype if dtype is not None and weight.is_floating_point() else weight.dtype
            yield f"{name} {tuple(weight.shape)} {kind}"
            if not weight.is_meta:  # offloaded by accelerate
                flat = weight.detach().reshape(-1)
                yield flat[:: max(1, flat.numel() // _NUMBERS_READ)].to(kind)

    return sha256(pieces())[:16]


@contextmanager
def without_weight_bars() -> Iterator[None]:
    """Leave out the bars that transformers shows for every model it reads or writes; downloads keep theirs."""

    def hook(bar: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        is_idle = options.get("desc") in ("Loading weights", "Writing model shards")
        return bar(*args, **options | ({"disable": True} if is_idle else {}))

    previous = logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)


def _tensors(folder: Path) -> Iterator[tuple[Path, str, safe_open]]:
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 - not a mapping
                        yield path, name, file
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged: {error}. Save the model again.") from error
