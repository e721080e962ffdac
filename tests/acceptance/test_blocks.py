"""The block process against brute-force enumeration, simulation, hand computation and closed forms."""

import math
import random
from itertools import product

import pytest
import torch

from hf_draftkd.acceptance import (
    acceptance_by_position,
    block_efficiency,
    block_efficiency_by_length,
    expected_block_efficiency,
    expected_target_calls,
)
from hf_draftkd.acceptance.tensors import widest_float


def run_blocks(accepts: tuple[bool, ...], gamma: int) -> tuple[int, list[int]]:
    """Speculative decoding of one text, token by token, given which tokens the target would accept from the draft."""
    blocks, kept = 0, [0] * gamma
    position = 0
    while position < len(accepts):
        blocks += 1
        for offset in range(gamma):
            if position == len(accepts):
                break
            position += 1
            if not accepts[position - 1]:
                break
            kept[offset] += 1
        else:
            position += 1  # the bonus token
    return blocks, kept


def enumerate_blocks(rates: list[float], gamma: int) -> tuple[float, list[float]]:
    """Expected counts: every one of the 2^T outcomes, weighted with its probability."""
    blocks, kept = 0.0, [0.0] * gamma
    for accepts in product([False, True], repeat=len(rates)):
        weight = math.prod(a if yes else 1 - a for a, yes in zip(rates, accepts, strict=True))
        counted = run_blocks(accepts, gamma)
        blocks += weight * counted[0]
        kept = [x + weight * y for x, y in zip(kept, counted[1], strict=True)]
    return blocks, kept


def calls_at(accepted, gamma, mask=None):
    return expected_target_calls(accepted, (gamma,), mask)[:, 0]


@pytest.mark.parametrize("gamma", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 9])
def test_equals_enumeration_of_every_outcome(gamma, length):
    generator = random.Random(1000 * gamma + length)
    rates = [generator.random() for _ in range(length)]
    blocks, kept = enumerate_blocks(rates, gamma)
    accepted = torch.tensor([rates], dtype=torch.float64)
    assert calls_at(accepted, gamma).item() == pytest.approx(blocks, rel=1e-12)
    assert acceptance_by_position(accepted, gamma)[0].tolist() == pytest.approx(kept, rel=1e-12)


def test_two_tokens_by_hand():
    """γ = 1: accepting the first token makes the second the bonus (1 call), rejecting it costs a second call."""
    accepted = torch.tensor([[0.25, 0.5]])
    assert calls_at(accepted, 1).item() == 0.25 * 1 + 0.75 * 2
    assert block_efficiency(accepted, 1) == 2 / 1.75
    # γ = 5: the text ends inside the first block whenever the first token is accepted.
    assert calls_at(accepted, 5).item() == 1.75
    assert acceptance_by_position(accepted, 5).tolist() == [[0.25 + 0.75 * 0.5, 0.25 * 0.5, 0, 0, 0]]


def test_three_tokens_by_hand_with_the_text_cut_off():
    """γ = 1: starts at 0; at 1 after a rejection (1 − a); at 2 after a bonus (a) or two rejections (1 − a)(1 − b)."""
    a, b = 0.3, 0.6
    calls = 1 + (1 - a) + a + (1 - a) * (1 - b)
    assert calls_at(torch.tensor([[a, b, 0.9]], dtype=torch.float64), 1).item() == pytest.approx(calls)


@pytest.mark.parametrize("length", [1, 5, 6, 7, 96, 97])
def test_a_self_draft_needs_exactly_t_over_gamma_plus_one_calls(length):
    efficiency = block_efficiency_by_length(torch.ones(3, length))
    assert list(efficiency) == list(range(1, 17))
    for gamma, value in efficiency.items():
        assert value == length / math.ceil(length / (gamma + 1))


def test_a_draft_that_is_never_right_gives_exactly_one():
    assert set(block_efficiency_by_length(torch.zeros(2, 11)).values()) == {1.0}


def test_certain_outcomes_are_counted_without_rounding():
    """Greedy metrics must equal counting to the last digit, so 0/1 inputs must give whole numbers of calls."""
    generator = torch.Generator().manual_seed(0)
    accepted = (torch.rand(40, 200, generator=generator) < 0.7).float()
    calls = expected_target_calls(accepted, (1, 3, 5, 16))
    counted = [[run_blocks(tuple(map(bool, row)), gamma)[0] for gamma in (1, 3, 5, 16)] for row in accepted.tolist()]
    assert calls.tolist() == counted


def test_long_text_tends_to_the_closed_form():
    for alpha, gamma in [(0.3, 4), (0.8, 1), (0.9, 7)]:
        accepted = torch.full((1, 4000), alpha, dtype=torch.float64)
        assert block_efficiency(accepted, gamma) == pytest.approx(expected_block_efficiency(alpha, gamma), rel=2e-3)


def test_simulated_blocks_agree():
    generator = random.Random(1)
    rates = [generator.random() for _ in range(60)]
    runs = 4000
    counted = [run_blocks(tuple(generator.random() < a for a in rates), 4)[0] for _ in range(runs)]
    mean = sum(counted) / runs
    error = (sum((c - mean) ** 2 for c in counted) / runs / runs) ** 0.5
    assert calls_at(torch.tensor([rates]), 4).item() == pytest.approx(mean, abs=4 * error)


def test_every_length_at_once_equals_each_alone():
    accepted = torch.rand(5, 30, generator=torch.Generator().manual_seed(2))
    lengths = (7, 1, 16, 3)
    together = expected_target_calls(accepted, lengths)
    for column, gamma in enumerate(lengths):
        torch.testing.assert_close(together[:, column], calls_at(accepted, gamma), rtol=1e-13, atol=0)


def test_padding_counts_for_nothing():
    """Right padding must not add calls, whatever stands there, and must not be taken for tokens."""
    accepted = torch.rand(3, 8, generator=torch.Generator().manual_seed(3))
    mask = torch.arange(8) < torch.tensor([[8], [3], [0]])
    padded = accepted.masked_fill(~mask, torch.nan)
    calls = calls_at(padded, 2, mask)
    alone = [calls_at(accepted[:1], 2).item(), calls_at(accepted[1:2, :3], 2).item(), 0.0]
    assert calls.tolist() == alone
    assert block_efficiency(padded, 2, mask) == 11 / sum(alone)
    kept = acceptance_by_position(padded, 2, mask)
    torch.testing.assert_close(kept[1:2], acceptance_by_position(accepted[1:2, :3], 2))
    assert kept[2].tolist() == [0, 0]


def test_efficiency_is_a_ratio_of_sums():
    """A mean of per-text ratios would give short texts the weight of long ones."""
    mask = torch.tensor([[True, False, False, False], [True] * 4])
    assert block_efficiency(torch.ones(2, 4), 3, mask) == 5 / 2


def test_order_of_texts_does_not_matter():
    accepted = torch.rand(50, 20, generator=torch.Generator().manual_seed(4))
    assert block_efficiency(accepted, 5) == pytest.approx(block_efficiency(accepted.flip(0), 5), rel=1e-14)


def test_sums_run_in_float64_over_long_texts():
    accepted = torch.rand(1, 3000, generator=torch.Generator().manual_seed(5))
    calls = calls_at(accepted, 16)
    assert calls.dtype == torch.float64
    # Every token is drafted, corrected or a bonus: the counts must add up over the whole text.
    ended_by_target = calls.item() - 1  # all but the last block, about
    assert acceptance_by_position(accepted, 16).sum().item() + ended_by_target == pytest.approx(3000, abs=1)


def test_a_text_of_no_positions():
    assert calls_at(torch.zeros(2, 0), 3).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="every text is empty"):
        block_efficiency(torch.zeros(2, 0), 3)


class TestErrors:
    @pytest.mark.parametrize("gamma", [0, -1, 2.0, True, "5"])
    def test_draft_length(self, gamma):
        with pytest.raises(ValueError, match="`num_assistant_tokens` must be a whole number"):
            calls_at(torch.ones(1, 3), gamma)

    def test_no_draft_lengths(self):
        with pytest.raises(ValueError, match="draft_lengths is empty"):
            expected_target_calls(torch.ones(1, 3), ())

    def test_one_dimension(self):
        with pytest.raises(ValueError, match=r"unsqueeze\(0\)"):
            calls_at(torch.ones(3), 1)

    @pytest.mark.parametrize("bad", [1.2, -0.1, math.nan])
    def test_not_a_probability(self, bad):
        with pytest.raises(ValueError, match="probabilities"):
            calls_at(torch.tensor([[0.5, bad]]), 1)

    def test_left_padding_and_holes(self):
        """Left-padded batches are what `generate` makes; blocks must not start inside the padding."""
        for row in ([False, True, True], [True, False, True]):
            with pytest.raises(ValueError, match="Row 1 of the mask has padding before"):
                calls_at(torch.ones(2, 3), 1, torch.tensor([[True] * 3, row]))

    def test_mask_of_another_shape(self):
        with pytest.raises(ValueError, match="shape"):
            calls_at(torch.ones(2, 3), 1, torch.ones(2, 4, dtype=torch.bool))


def test_a_device_without_float64_counts_in_float32(monkeypatch):
    """Apple's MPS refuses float64: metrics of tensors there would stop with a TypeError."""
    assert [widest_float(device) for device in ("mps", torch.device("mps", 0), "cpu", "cuda:1")] == [
        torch.float32,
        torch.float32,
        torch.float64,
        torch.float64,
    ]
    accepted = torch.rand(3, 40)
    usual = block_efficiency(accepted, 5)
    monkeypatch.setattr("hf_draftkd.acceptance.blocks.widest_float", lambda device: torch.float32)
    assert calls_at(accepted, 5).dtype == torch.float32
    assert block_efficiency(accepted, 5) == pytest.approx(usual, rel=1e-5)
