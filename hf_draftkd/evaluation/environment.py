"""What was measured, and where: a number without its models and its machine cannot be compared."""

import os
import platform
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hf_draftkd.evaluation.report import HardwareInfo, ModelInfo
from hf_draftkd.models.identity import model_revision
from hf_draftkd.models.sizing import loaded_parameters


def model_info(model: PreTrainedModel) -> ModelInfo:
    """Name, revision, size and number format of a loaded model."""
    name = model.config.name_or_path or type(model).__name__
    return ModelInfo(
        name=name,
        # Recorded now: later, and in another folder, nobody can tell a relative path from an id on the Hub.
        is_local=os.path.isdir(name),
        revision=model_revision(model),
        num_parameters=loaded_parameters(model),
        dtype=dtype_name(model),
    )


def hardware_info(model: PreTrainedModel) -> HardwareInfo:
    """The machine as it matters to the speed of `model`."""
    device = model.device
    devices = {parameter.device for parameter in model.parameters()}
    return HardwareInfo(
        device=device.type,
        name=torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        num_devices=len(devices),
        num_threads=torch.get_num_threads(),
        dtype=dtype_name(model),
    )


def dtype_name(model: PreTrainedModel) -> str:
    """The number format of a model's weights, such as `float32`."""
    return str(model.dtype).removeprefix("torch.")


def processor_name() -> str:
    """The CPU's own name; `platform.processor()` is empty on most Linux systems."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            label, _, name = line.partition(":")
            if label.strip() in ("model name", "Model", "Hardware") and name.strip():
                return name.strip()
    return platform.processor() or platform.machine()
