"""What can be said of a pair before its weights are there: from configs, tokenizers and the headers of weight files."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, get_local_safetensors_metadata
from huggingface_hub.errors import HTTPError, SafetensorsParsingError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_draftkd.models.building import check_plan
from hf_draftkd.models.loading import load_without_weights
from hf_draftkd.models.pairing import check_rows, check_tokenizers, context_length
from hf_draftkd.models.resolve import Checkpoint, read_index
from hf_draftkd.models.sizing import TRAINED_BYTES, count_parameters, cut_layers, spread_layers, weight_bytes
from hf_draftkd.models.tokenizers import tokenizer_size

# Quantisations that transformers undoes on loading where there is no accelerator.
_EXPANDED_ON_CPU = ("fp8", "mxfp4")


@dataclass(frozen=True)
class ModelFacts:
    """One model: its size, its vocabulary, what it can read.

    Attributes:
        config: The config of the causal LM; for a multimodal model, of its text part.
        num_parameters: Parameters, tied ones once, of which `table_share` are in embedding and head.
        rows: Rows of the head, padding included, of which the tokenizer knows `num_tokens`; None without one.
        context: The longest text it can read, in tokens, where the config says so.
        stored: Number formats of the stored weights, with their counts; empty where the headers cannot be read.
    """

    config: PreTrainedConfig
    num_parameters: int
    table_share: float
    rows: int
    num_tokens: int | None
    context: int | None
    stored: dict[str, int]

    def weight_bytes(self, bits: int | None = None) -> int:
        """Bytes of the weights in memory: as `dtype="auto"` loads them, or in 8 or 4 bits."""
        if bits is not None or not self.quantization:
            return weight_bytes(self.config, bits or self._bits)
        if self.quantization.get("quant_method") in _EXPANDED_ON_CPU and not torch.accelerator.is_available():
            return weight_bytes(self.config, 16)
        if self.stored:
            return sum(count * _bits_of(number_format) for number_format, count in self.stored.items()) // 8
        guess = 4 if self.quantization.get("load_in_4bit") else 8
        return weight_bytes(self.config, self.quantization.get("bits") or guess)

    @property
    def _bits(self) -> int:
        """Bits of a number as it is loaded: by the config, else as most of them are stored."""
        if self.config.dtype is not None:
            return torch.finfo(self.config.dtype).bits
        return _bits_of(max(self.stored, key=self.stored.__getitem__)) if self.stored else 32

    @property
    def quantization(self) -> dict[str, Any]:
        """How the stored weights are quantised; empty where they are not."""
        return getattr(self.config, "quantization_config", None) or {}


@dataclass
class Examination:
    """What is known of a pair, or of a target alone.

    Attributes:
        target: None where it is refused.
        draft: None where there is none, or it is refused.
        cut_parameters: Without a draft: parameters of one made of `cut_layers` layers of the target.
        cut_layers: How many layers these are.
        refused: What later commands will refuse, and why.
        memory: Bytes of weights, gradients and optimiser, by what is done: `answering` (the target alone), training
            with the target `live`, in `4 bits`, or `cached`. Activations come on top.
    """

    target: ModelFacts | None = None
    draft: ModelFacts | None = None
    cut_layers: int = 0
    cut_parameters: int = 0
    refused: list[str] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)


def examine(target: Checkpoint, draft: Checkpoint | None = None, *, num_layers: int = 2) -> Examination:
    """Look at a target, and at a draft for it or at one of `num_layers` of its layers, without their weights."""
    found = Examination()
    with _refusals_go_to(found.refused):
        found.target = _facts(target, found.refused)
    if draft is None:
        with _refusals_go_to(found.refused):
            _examine_cut(found, num_layers)
        return found
    with _refusals_go_to(found.refused):
        found.draft = _facts(draft, found.refused)
    if found.draft and found.draft.num_tokens and found.target and found.target.num_tokens:
        with _refusals_go_to(found.refused):
            check_tokenizers(draft.tokenizer, target.tokenizer)
            check_rows(found.draft.rows, found.target.rows, target.tokenizer)
    if found.draft is not None:
        if found.draft.quantization:
            found.refused.append(
                f"The weights of {draft.name!r} are quantised: what a quantised draft learns cannot be saved exactly. "
                "Take the draft in plain weights."
            )
        found.memory = _memory(found.target, found.draft.num_parameters)
    return found


def _examine_cut(found: Examination, num_layers: int) -> None:
    if found.target is None:
        return
    config = found.target.config
    count = min(num_layers, config.get_text_config().num_hidden_layers)
    check_plan(config, num_layers=count)
    found.cut_parameters = count_parameters(cut_layers(config, spread_layers(config, count)))
    found.cut_layers = count
    found.memory = _memory(found.target, found.cut_parameters)


@contextmanager
def _refusals_go_to(refused: list[str]) -> Iterator[None]:
    try:
        yield
    except (ValueError, ImportError) as error:
        refused.append(str(error))


def _facts(checkpoint: Checkpoint, refused: list[str]) -> ModelFacts:
    model = load_without_weights(checkpoint)
    config = model.config
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    in_tables = {id(table.weight): table.weight.numel() for table in tables if table is not None}
    num_tokens = None
    with _refusals_go_to(refused):
        num_tokens = tokenizer_size(checkpoint.tokenizer)
    facts = ModelFacts(
        config=config,
        num_parameters=model.num_parameters(),
        table_share=sum(in_tables.values()) / model.num_parameters(),
        rows=config.get_text_config().vocab_size,
        num_tokens=num_tokens,
        context=context_length(config),
        stored={} if checkpoint.is_adapter or checkpoint.gguf_file else _stored(checkpoint),
    )
    held = sum(facts.stored.values())
    if facts.stored and not facts.quantization and held < facts.num_parameters:
        refused.append(
            f"The weights of {checkpoint.name!r} are incomplete: {held:,} numbers are stored, and its config describes "
            f"{facts.num_parameters:,}. Give a model that was saved whole, head included."
        )
    return facts


def _stored(checkpoint: Checkpoint) -> dict[str, int]:
    """Number formats of the stored weights, from the headers of their files: a few kilobytes each."""
    try:
        if checkpoint.is_local:
            folder, names = Path(checkpoint.name), [SAFE_WEIGHTS_NAME]
            if SAFE_WEIGHTS_NAME not in checkpoint.files:
                names = read_index(folder / SAFE_WEIGHTS_INDEX_NAME)
            for name in names:
                with safe_open(folder / name, framework="pt"):  # notices that it was cut off behind its header
                    pass
            found = get_local_safetensors_metadata(checkpoint.name)
        else:
            found = HfApi().get_safetensors_metadata(checkpoint.name, revision=checkpoint.revision)
        return {str(name): count for name, count in found.parameter_count.items()}
    except (SafetensorsParsingError, SafetensorError) as error:
        reason = str(error).rstrip(".")
        raise ValueError(
            f"The weights of {checkpoint.name!r} cannot be read: {reason}. Download or save the model again."
        ) from error
    except (OSError, HTTPError):  # without a network: the cache has no headers without weights
        return {}


def _memory(target: ModelFacts | None, draft_parameters: int) -> dict[str, int]:
    draft = TRAINED_BYTES * draft_parameters
    if target is None:
        return {"cached": draft}
    alone = target.weight_bytes()
    found = {"answering": alone, "live": alone + draft}
    if not target.quantization:  # what is quantised already cannot be loaded in 4 bits
        found["4 bits"] = target.weight_bytes(4) + draft
    return found | {"cached": draft}


def _bits_of(number_format: str) -> int:
    """Bits of a number in one of the formats of safetensors, such as F32, BF16 or F8_E4M3."""
    found = re.search(r"\d+", number_format)
    return int(found[0]) if found else 8  # BOOL
