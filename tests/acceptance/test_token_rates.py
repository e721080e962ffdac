"""Acceptance of one token against its definition, and against sampling the verification rules themselves."""

import pytest
import torch

from hf_draftkd.acceptance import VERIFICATION_RULES, accepted_given_output, token_acceptance_rate, token_logprob

INF = float("inf")


def logits(*shape: int, seed: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def greedy_logits(logits: torch.Tensor) -> torch.Tensor:
    """What decoding at temperature 0 makes of logits: 0 for the likeliest token, `-inf` for every other."""
    return torch.full_like(logits, -INF).scatter_(-1, logits.argmax(-1, keepdim=True), 0.0)


def of(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_hand_computed_two_token_vocabulary():
    draft, target = of(0.9, 0.1), of(0.6, 0.4)
    assert token_acceptance_rate(draft, target).item() == pytest.approx(0.6 + 0.1)
    assert token_acceptance_rate(draft, target, "greedy_draft").item() == pytest.approx(0.6)
    assert token_acceptance_rate(draft, target, "exact_match").item() == pytest.approx(0.6)
    for token, ratio in [(0, 1.0), (1, 0.25)]:
        assert accepted_given_output(draft, target, torch.tensor(token)).item() == pytest.approx(ratio)
    for token, match in [(0, 1.0), (1, 0.0)]:
        assert accepted_given_output(draft, target, torch.tensor(token), "greedy_draft").item() == match


def test_rate_is_the_sum_of_minima():
    draft, target = logits(5, 3, 40, seed=0), logits(5, 3, 40, seed=1)
    q, p = draft.double().softmax(-1), target.double().softmax(-1)
    expected = [[sum(min(a, b) for a, b in zip(x, y, strict=True)) for x, y in zip(i, j, strict=True)]
                for i, j in zip(q.tolist(), p.tolist(), strict=True)]  # fmt: skip
    torch.testing.assert_close(token_acceptance_rate(draft, target), torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", VERIFICATION_RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_self_draft_is_exactly_one(rule, dtype):
    """Σ min(p, q) over a large vocabulary is 1 only up to rounding; a self-draft must not measure 0.9999997."""
    same = logits(64, 5000, seed=2, scale=3.0).to(dtype)
    filtered = same.masked_fill(same < same.float().quantile(0.9, dim=-1, keepdim=True), -INF)
    for processed in (same, filtered, greedy_logits(same)):
        likeliest = processed.argmax(-1)
        drawn = processed.float().softmax(-1).multinomial(1, generator=torch.Generator().manual_seed(0))[:, 0]
        tokens = drawn if rule == "rejection_sampling" else likeliest  # the other rules draft the likeliest ones only
        assert (accepted_given_output(processed, processed, tokens, rule) == 1).all()
    assert (token_acceptance_rate(same, same) == 1).all()
    assert (token_acceptance_rate(filtered, filtered) == 1).all()
    assert (token_acceptance_rate(greedy_logits(same), greedy_logits(same), rule) == 1).all()


@pytest.mark.parametrize("rule", VERIFICATION_RULES)
def test_at_temperature_zero_every_rule_is_agreement_of_the_likeliest_token(rule):
    draft, target = logits(200, 4, seed=3), logits(200, 4, seed=4)
    agree = (draft.argmax(-1) == target.argmax(-1)).float()
    assert 0 < agree.mean() < 1
    processed = greedy_logits(draft), greedy_logits(target)
    assert torch.equal(token_acceptance_rate(*processed, rule), agree)
    assert torch.equal(accepted_given_output(*processed, target.argmax(-1), rule), agree)


def test_disjoint_filters_give_zero_and_not_nan():
    """Top-k on both sides can leave no common token; ∞ − ∞ and 0/0 lurk there."""
    draft, target = of(0.5, 0.5, 0.0, 0.0), of(0.0, 0.0, 0.3, 0.7)
    assert token_acceptance_rate(draft, target).item() == 0
    assert accepted_given_output(draft, target, torch.tensor(3)).item() == 0
    assert accepted_given_output(draft, target, torch.tensor(0)).item() == 1
    target_and_draft_exclude_it = of(0.5, 0.5, 0.0), of(0.5, 0.5, 0.0)
    assert accepted_given_output(*target_and_draft_exclude_it, torch.tensor(2)).item() == 0


def test_a_uniform_draft():
    target = logits(10, 32, seed=5)
    expected = target.softmax(-1).clamp(max=1 / 32).sum(-1)
    torch.testing.assert_close(token_acceptance_rate(torch.zeros(10, 32), target), expected)


def test_expectation_over_the_targets_output_is_the_acceptance_rate():
    """Σ_x p(x) a(x) must be α: the bridge between scoring a text and the rate of a token."""
    draft, target = logits(20, 14, seed=6).double(), logits(20, 14, seed=7).double()
    p = target.softmax(-1)
    for rule in VERIFICATION_RULES:
        per_token = torch.stack(
            [accepted_given_output(draft, target, torch.full((20,), x), rule) for x in range(14)], dim=-1
        )
        torch.testing.assert_close((p * per_token).sum(-1), token_acceptance_rate(draft, target, rule))


def test_rejection_sampling_simulated():
    """Draws from the published algorithm: its output is p, and given its output the draft was kept with a_t."""
    generator = torch.Generator().manual_seed(8)
    draft, target = logits(6, seed=9).double(), logits(6, seed=10).double()
    q, p = draft.softmax(-1), target.softmax(-1)
    n = 200_000
    proposed = q.multinomial(n, replacement=True, generator=generator)
    kept = torch.rand(n, generator=generator, dtype=torch.float64) < p[proposed] / q[proposed]
    residual = (p - q).clamp(min=0)
    output = torch.where(kept, proposed, residual.multinomial(n, replacement=True, generator=generator))
    assert kept.double().mean().item() == pytest.approx(token_acceptance_rate(draft, target).item(), abs=4e-3)
    for token in range(6):
        chosen = output == token
        assert chosen.double().mean().item() == pytest.approx(p[token].item(), abs=4e-3)
        counted = kept[chosen].double().mean().item()
        computed = accepted_given_output(draft, target, torch.tensor(token)).item()
        assert counted == pytest.approx(computed, abs=4 / chosen.sum().item() ** 0.5)


def test_a_draft_that_samples_from_its_ten_likeliest():
    """llama.cpp's: `min(p, q)` with the rest of q cut off and its mass given to the ten."""
    draft, target = logits(50, 30, seed=16).double(), logits(50, 30, seed=17).double()
    rates = token_acceptance_rate(draft, target, "top_10_draft")
    for row, rate in zip(zip(draft, target, strict=True), rates, strict=True):
        q, p = (each.softmax(-1).tolist() for each in row)
        ten = sorted(range(30), key=q.__getitem__)[-10:]
        expected = sum(min(p[token], q[token] / sum(q[each] for each in ten)) for token in ten)
        assert rate.item() == pytest.approx(expected)
    assert not torch.allclose(rates, token_acceptance_rate(draft, target))
    few = draft[:, :9], target[:, :9]
    assert torch.equal(token_acceptance_rate(*few, "top_10_draft"), token_acceptance_rate(*few))


def test_half_precision_is_computed_in_float32():
    draft, target = logits(8, 4000, seed=11).bfloat16(), logits(8, 4000, seed=12).bfloat16()
    rate = token_acceptance_rate(draft, target)
    assert rate.dtype == torch.float32
    torch.testing.assert_close(rate.double(), token_acceptance_rate(draft.double(), target.double()), atol=1e-6, rtol=0)


def test_rate_is_differentiable():
    draft, target = logits(3, 5, seed=13).double().requires_grad_(), logits(3, 5, seed=14).double()
    assert torch.autograd.gradcheck(lambda z: token_acceptance_rate(z, target), (draft,))


def test_token_logprob():
    row = logits(4, 9, seed=15)
    tokens = torch.tensor([0, 8, 3, 3])
    torch.testing.assert_close(token_logprob(row, tokens), row.log_softmax(-1)[range(4), tokens])


class TestErrors:
    def test_unknown_rule_names_the_nearest(self):
        with pytest.raises(
            ValueError, match=r"Unknown verification rule 'rejection'\. Did you mean 'rejection_sampling'"
        ):
            token_acceptance_rate(torch.zeros(2), torch.zeros(2), "rejection")
        with pytest.raises(ValueError, match="Did you mean 'greedy_draft'"):
            accepted_given_output(torch.zeros(2), torch.zeros(2), torch.tensor(0), "greedy")

    def test_vocabularies_that_differ_are_refused(self):
        with pytest.raises(ValueError, match=r"\(3, 10\).*\(3, 12\).*shared vocabulary"):
            token_acceptance_rate(torch.zeros(3, 10), torch.zeros(3, 12))

    def test_positions_that_differ_are_refused(self):
        """Broadcasting [1, V] against [T, V] would silently compare the wrong positions."""
        with pytest.raises(ValueError, match="same positions"):
            token_acceptance_rate(torch.zeros(1, 10), torch.zeros(3, 10))
        with pytest.raises(ValueError, match="one token per position"):
            accepted_given_output(torch.zeros(3, 10), torch.zeros(3, 10), torch.zeros(2, dtype=torch.long))

    @pytest.mark.parametrize("token", [-100, 10])
    def test_tokens_outside_the_vocabulary_are_refused(self, token):
        with pytest.raises(ValueError, match=r"tokens must lie in \[0, 10\)"):
            accepted_given_output(torch.zeros(10), torch.zeros(10), torch.tensor(token))

    def test_scalar_logits_are_refused(self):
        with pytest.raises(ValueError, match="last dimension"):
            token_acceptance_rate(torch.tensor(0.0), torch.tensor(0.0))
