"""The weights of a folder, looked at without loading a model: their names, their number, and their checksum."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
# safetensors' names of number formats that a plain, dense checkpoint consists of.
_DENSE = {"F64", "F32", "F16", "BF16"}
_ADAPTER_KEY = re.compile(r"\b(lora_[AB]|lora_embedding_[AB]|base_layer|modules_to_save|lora_magnitude_vector)\b")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, and the index where there are several.

    Raises:
        ValueError: A file that the index names is missing, or the index cannot be read.
    """
    single = folder / SAFE_WEIGHTS_NAME
    if single.is_file():
        return [single]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} cannot be read: {type(error).__name__}: {error}. Save the model again.") from error
    # The index is data: a name in it must not lead out of the folder.
    for name in names:
        if not (isinstance(name, str) and WEIGHT_FILE.fullmatch(name) and (folder / name).is_file()):
            raise ValueError(f"{index} names {name!r}, which is not a weight file in {folder}. Save the model again.")
    return [*(folder / name for name in names), index]


def count_parameters(folder: Path) -> int:
    """The number of parameters stored, after checking that they are dense and merged.

    Raises:
        ValueError: A file is damaged, weights are quantised, or an adapter was not merged.
    """
    total = 0
    for path, name, file in _tensors(folder):
        piece = file.get_slice(name)
        if _ADAPTER_KEY.search(name):
            raise ValueError(
                f"{path} holds adapter weights ({name}): the adapter was not merged. Merge and save it: "
                "`model.merge_and_unload().save_pretrained(folder)`; `draftkd train` does so by itself."
            )
        if piece.get_dtype() not in _DENSE:
            raise ValueError(
                f"{path} holds {name} as {piece.get_dtype()}: these weights are quantised. Push the dense weights; "
                "whoever uses the draft can quantise on loading."
            )
        size = 1
        for length in piece.get_shape():
            size *= length
        total += size
    return total


def weights_checksum(folder: Path) -> str:
    """SHA-256 over all tensors in the order of their names: name, number format, shape and bytes.

    It does not depend on how the tensors are spread over files, nor on metadata in them, so that a folder and its copy
    on the Hub agree.
    """
    import torch  # Only needed to read bytes of formats numpy does not know.

    digest = hashlib.sha256()
    for path, name in sorted(((path, name) for path, name, _ in _tensors(folder)), key=lambda item: item[1]):
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _tensors(folder: Path) -> Iterator[tuple[Path, str, safe_open]]:
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 - not a mapping
                        yield path, name, file
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged: {error}. Save the model again.") from error
