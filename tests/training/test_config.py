"""The configuration: sane on a machine without a GPU, and no value accepted that would do nothing or do harm."""

import json

import pytest
import torch
import yaml
from transformers import BitsAndBytesConfig

from hf_draftkd import DraftDistillConfig
from hf_draftkd.cli.options import parse


def test_no_argument_is_needed_without_a_gpu(tmp_path):
    """TRL turns bf16 on, and transformers then refuses to start on a CPU."""
    config = DraftDistillConfig(output_dir=str(tmp_path))
    assert config.bf16 is False
    assert not config.activation_checkpointing


def test_gradient_checkpointing_can_still_be_asked_for(tmp_path):
    """A changed default that overrides what the user says."""
    with pytest.warns(FutureWarning, match="activation_checkpointing"):
        config = DraftDistillConfig(output_dir=str(tmp_path), gradient_checkpointing=True)
    assert config.activation_checkpointing


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("divergence", "foward_kl", "forward_kl"),
        ("divergence", "mse", "forward_kl"),
        ("per_device_train_batch_size", 0, "`per_device_train_batch_size` must be a whole number of at"),
        ("learning_rate", -1.0, r"`learning_rate` must be a number in \[0, ∞\), got -1.0"),
        ("loss_temperature", 0.0, r"`loss_temperature` must be a number in \(0, ∞\), got 0.0"),
        ("loss_temperature", float("nan"), "`loss_temperature` must be a number"),
        ("loss_temperature", "1.0", "`loss_temperature` must be a number"),
        ("beta", 1.5, r"`beta` must be a number in \[0, 1\], got 1.5"),
        ("beta", -0.1, "`beta`"),
        ("eta", -1.0, "`eta`"),
        ("cross_entropy_weight", 2.0, "`cross_entropy_weight`"),
        ("eval_num_assistant_tokens", 0, "`eval_num_assistant_tokens`"),
        ("eval_num_assistant_tokens", 2.5, "`eval_num_assistant_tokens`"),
        ("tvd_estimator", "ful", "Did you mean 'full'"),
        ("tvd_statistics", "row", "batch, token"),
        ("loss_type", "dft", "Choose the loss with `divergence`"),
        ("label_smoothing_factor", 0.1, "cannot be used when distilling"),
        ("router_aux_loss_coef", 0.1, "cannot be used when distilling"),
        # An evaluation before training left the draft in float16, and its loss rose from 2 to 27.
        ("fp16_full_eval", True, "leave the draft itself in float16"),
        # TRL would take the model's tokens too: the saved draft had 384 rows, its target 330.
        ("chat_template_path", "org/other-model", "must stay the target's"),
    ],
)
def test_values_that_cannot_work_are_named(tmp_path, name, value, message):
    with pytest.raises(ValueError, match=message):
        DraftDistillConfig(output_dir=str(tmp_path), **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("beta", 1.0, {"divergence": "generalized_jsd"}),  # reverse KL for somebody who comes from GKD
        ("eta", 9.0, {"divergence": "lk_hybrid"}),
        ("tvd_estimator", "full", {"divergence": "tvd_plus_plus"}),
        ("selected_share", 0.1, {"token_selection": "adaspec"}),
    ],
)
def test_an_option_of_another_loss_is_refused(tmp_path, name, value, wanted):
    """A run of plain forward KL whose script says otherwise."""
    with pytest.raises(ValueError, match=f"`{name}` would do nothing without"):
        DraftDistillConfig(output_dir=str(tmp_path), **{name: value}).refuse_idle_loss_options()
    DraftDistillConfig(output_dir=str(tmp_path), **{name: value}, **wanted).refuse_idle_loss_options()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 9),
        ("generation_temperature", 0.3),
        ("generation_top_k", 5),
        ("parallel_weights", "confidence"),
    ],
)
def test_an_option_of_what_is_not_done_is_refused(tmp_path, name, value):
    """A temperature set for text that nobody writes."""
    with pytest.raises(ValueError, match=f"`{name}` would do nothing"):
        DraftDistillConfig(output_dir=str(tmp_path), **{name: value})


def test_values_from_yaml_are_checked_as_well(tmp_path):
    """YAML given by `--config` bypasses argparse's types and choices."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path), "loss_temperature": -1, "divergence": "reverse_kl"}))
    with pytest.raises(Exception, match="`loss_temperature` must be a number"):
        parse("train", (DraftDistillConfig,), ["--config", str(path)], "")


def test_every_option_can_be_given_as_text(tmp_path):
    (config,) = parse(
        "train",
        (DraftDistillConfig,),
        [
            *("--output_dir", str(tmp_path), "--beta", "0.25", "--divergence", "generalized_jsd"),
            *("--target_model_init_kwargs", '{"dtype": "bfloat16"}'),
        ],
        "",
    )
    assert config.divergence_options == {"beta": 0.25}
    assert config.target_model_init_kwargs == {"dtype": "bfloat16"}


def test_a_quantised_target_can_be_logged(tmp_path):
    """Fault: TensorBoard and others write the arguments as JSON, and a run with `BitsAndBytesConfig` ended there."""
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    kwargs = {"dtype": torch.float32, "quantization_config": quantization}
    args = DraftDistillConfig(str(tmp_path), target_model_init_kwargs=kwargs)
    written = json.loads(args.to_json_string())["target_model_init_kwargs"]
    assert written["dtype"] == "float32"
    assert written["quantization_config"]["load_in_8bit"] is True
    assert args.target_model_init_kwargs["quantization_config"] is quantization
