"""Where a figure comes from: models, machine, versions, prompts. A number without these cannot be compared."""

import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_draftkd.evaluation.report import HardwareInfo, ModelInfo
from hf_draftkd.models.identity import model_revision
from hf_draftkd.utils.hashing import sha256


def model_info(model: PreTrainedModel, name: str | None = None, *, weights_sha256: str | None = None) -> ModelInfo:
    """Name, revision, size and number format of a loaded model.

    Args:
        model: The model.
        name: What to call it where it was not loaded from anywhere.
        weights_sha256: Its checksum, where it was taken.
    """
    name = name or model.config.name_or_path or type(model).__name__
    return ModelInfo(
        name=name,
        # Recorded now: later, and in another folder, nobody can tell a relative path from an id on the Hub.
        is_local=os.path.isdir(name),
        revision=model_revision(model),
        num_parameters=model.num_parameters(),
        dtype=_dtype_name(model),
        weights_sha256=weights_sha256,
    )


def hardware_info(model: PreTrainedModel) -> HardwareInfo:
    """The machine as it matters to the speed of `model`."""
    device = model.device
    devices = {parameter.device for parameter in model.parameters()}
    return HardwareInfo(
        device=device.type,
        name=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name(),
        num_devices=len(devices),
        num_threads=torch.get_num_threads(),
        dtype=_dtype_name(model),
    )


def content_hash(items: Iterable[Any]) -> str:
    """SHA-256 over JSON-ready items, in order."""
    return sha256(json.dumps(item, ensure_ascii=False, sort_keys=True) + "\n" for item in items)


def _dtype_name(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _processor_name() -> str:
    """The CPU's own name; `platform.processor()` is empty on most Linux systems."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            label, _, name = line.partition(":")
            if label.strip() in ("model name", "Model", "Hardware") and name.strip():
                return name.strip()
    return platform.processor() or platform.machine()
