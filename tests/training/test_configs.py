"""Ready-made configurations: read by the code that would read them."""

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from trl import ModelConfig

from hf_draftkd import DraftDistillConfig
from hf_draftkd.cli.options import parse
from hf_draftkd.cli.train import TrainOptions
from tests.cli.run import ROOT

CONFIGS = ROOT / "examples" / "configs"
NAMES = {"one_gpu": ("NO", 1), "fsdp_70b_target": ("FSDP", 8), "cached": ("MULTI_GPU", 8)}


@pytest.mark.parametrize("name", NAMES)
def test_configurations_are_what_accelerate_and_the_command_read(name, monkeypatch, tmp_path):
    """An option renamed here or there, and a ready-made file that is refused."""
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.distributed_type.value, config.num_processes) == NAMES[name]
    # Read on a machine without a GPU, which bf16 would be refused on.
    argv = ["--config", str(CONFIGS / f"train_{name}.yaml"), "--output_dir", str(tmp_path), "--use_cpu", "true"]
    options, args, _ = parse("train", (TrainOptions, DraftDistillConfig, ModelConfig), argv, "")
    assert options.model
    assert options.dataset
    assert args.bf16
    assert (options.target_model is None) == (name == "cached")


def test_every_file_is_tested():
    found = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert found == set(NAMES) | {f"train_{name}" for name in NAMES}
