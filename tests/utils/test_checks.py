"""Checks of values: what each refuses, and what its message tells the user."""

import math

import pytest

from hf_draftkd.utils.checks import did_you_mean, in_range, nearest, one_of, whole_number

DIVERGENCES = ("forward_kl", "reverse_kl", "generalized_jsd", "total_variation")


@pytest.mark.parametrize(
    ("given", "meant"),
    [("foward_kl", "forward_kl"), ("jsd", "generalized_jsd"), ("total-variation", "total_variation"), ("xyz", None)],
)
def test_typing_errors_and_short_forms_find_the_name_that_was_meant(given: str, meant: str | None):
    """Catches a suggestion that only looks at spelling, or one where nothing is near."""
    assert nearest(given, DIVERGENCES) == meant
    assert did_you_mean(given, DIVERGENCES) == (f" Did you mean {meant!r}?" if meant else "")


def test_initials_are_a_name():
    """Fault: `--lr`, which many scripts have, was taken for `--lora_r`."""
    names = ["--model", "--learning_rate", "--lora_r", "--lr_scheduler_type"]
    assert nearest("--lr", names) == "--learning_rate"


def test_one_of_returns_a_valid_value_and_lists_the_others():
    assert one_of("divergence", "forward_kl", DIVERGENCES) == "forward_kl"
    with pytest.raises(ValueError, match=r"'foward_kl'.*Did you mean 'forward_kl'\?.*reverse_kl, generalized_jsd"):
        one_of("divergence", "foward_kl", DIVERGENCES)
    with pytest.raises(ValueError, match="None"):
        one_of("divergence", None, DIVERGENCES)


@pytest.mark.parametrize("value", ["1e-1", True, math.nan, math.inf, -0.1, 1.1, None])
def test_in_range_refuses_what_is_not_a_number_in_it(value: object):
    """Catches strings that YAML leaves as they are, booleans, and NaN, which every comparison lets through."""
    with pytest.raises(ValueError, match=r"`beta` must be a number in \[0, 1\]"):
        in_range("beta", value, 0, 1)


def test_bounds_belong_to_the_range_unless_it_is_open():
    assert [in_range("beta", value, 0, 1) for value in (0, 1, 0.5)] == [0, 1, 0.5]
    assert in_range("learning_rate", 1e-9, 0, open_low=True) == 1e-9
    with pytest.raises(ValueError, match=r"\(0, ∞\), got 0"):
        in_range("learning_rate", 0, 0, open_low=True)


@pytest.mark.parametrize("value", [0, 17, 3.0, True, "4", None])
def test_whole_number_refuses_everything_else(value: object):
    with pytest.raises(ValueError, match="`num_assistant_tokens` must be a whole number from 1 to 16"):
        whole_number("num_assistant_tokens", value, 1, 16)


def test_whole_number_returns_its_value():
    assert [whole_number("seed", value, 0) for value in (0, 7)] == [0, 7]
    with pytest.raises(ValueError, match="of at least 0, got -1"):
        whole_number("seed", -1, 0)
