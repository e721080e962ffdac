"""Every divergence against its definition in plain loops, by gradcheck, and by the identities it is known by."""

import math
from functools import partial

import pytest
import torch

from hf_draftkd.acceptance.tensors import draw
from hf_draftkd.losses import (
    DIVERGENCES,
    check_divergence,
    cross_entropy,
    forward_kl,
    generalized_jsd,
    get_divergence,
    lk_hybrid,
    negative_log_acceptance,
    reverse_kl,
    total_variation,
    tvd_plus_plus,
)

FULL = partial(tvd_plus_plus, estimator="full")
PLAIN = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": generalized_jsd,
    "jsd_0.1": partial(generalized_jsd, beta=0.1),
    "total_variation": total_variation,
    "negative_log_acceptance": negative_log_acceptance,
    "lk_hybrid": lk_hybrid,
}


def logits(*shape: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def probabilities(row: list[float]) -> list[float]:
    top = max(row)
    weights = [math.exp(value - top) for value in row]
    return [weight / sum(weights) for weight in weights]


def kl(a: list[float], b: list[float]) -> float:
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def by_definition(name: str, draft_row: list[float], target_row: list[float]) -> float:
    """The textbook formula on probabilities, one number at a time."""
    q, p = probabilities(draft_row), probabilities(target_row)
    alpha = sum(min(x, y) for x, y in zip(p, q, strict=True))

    def jsd(beta: float) -> float:
        m = [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]
        return beta * kl(p, m) + (1 - beta) * kl(q, m)

    share = math.exp(-3 * alpha)
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: jsd(0.5),
        "jsd_0.1": lambda: jsd(0.1),
        "total_variation": lambda: sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2,
        "negative_log_acceptance": lambda: -math.log(alpha),
        "lk_hybrid": lambda: share * kl(p, q) + (1 - share) * (1 - alpha),
    }[name]()


def gradient(function, draft: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    draft = draft.detach().clone().requires_grad_()
    function(draft, target).sum().backward()
    return draft.grad


@pytest.mark.parametrize("name", PLAIN)
def test_value_equals_the_definition(name):
    """Swapped arguments, a missing entropy or a mean over the vocabulary would show here."""
    draft, target = logits(3, 4, 7, seed=1), logits(3, 4, 7, seed=2)
    values = PLAIN[name](draft, target)
    assert values.shape == (3, 4)
    expected = [
        by_definition(name, d, t) for d, t in zip(draft.view(-1, 7).tolist(), target.view(-1, 7).tolist(), strict=True)
    ]
    torch.testing.assert_close(values.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in PLAIN if name != "lk_hybrid"])
def test_gradient_by_finite_differences(name):
    draft, target = logits(2, 6, seed=3).requires_grad_(), logits(2, 6, seed=4)
    assert torch.autograd.gradcheck(lambda z: PLAIN[name](z, target), (draft,))


def test_lk_hybrid_holds_its_mixing_weight_constant():
    """A gradient through λ would reward *lowering* acceptance to get more KL."""
    draft, target = logits(2, 6, seed=3), logits(2, 6, seed=4)
    share = (-3 * (1 - total_variation(draft, target))).exp().unsqueeze(-1)
    expected = share * gradient(forward_kl, draft, target) + (1 - share) * gradient(total_variation, draft, target)
    torch.testing.assert_close(gradient(lk_hybrid, draft, target), expected)


def test_cross_entropy_value_and_gradient():
    draft, tokens = logits(3, 5, seed=5), torch.tensor([0, 4, 2])
    q = draft.softmax(-1)
    torch.testing.assert_close(cross_entropy(draft, tokens=tokens), -q[range(3), tokens].log())
    expected = q - torch.nn.functional.one_hot(tokens, 5)
    torch.testing.assert_close(gradient(lambda z, _: cross_entropy(z, tokens=tokens), draft, draft), expected)


def test_forward_kl_gradient_is_q_minus_p():
    draft, target = logits(4, 9, seed=6), logits(4, 9, seed=7)
    torch.testing.assert_close(gradient(forward_kl, draft, target), draft.softmax(-1) - target.softmax(-1))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_models_have_zero_loss_and_no_gradient(name, dtype):
    """Forward KL that is really cross-entropy (torchtune) is not 0 for equal models."""
    same = logits(4, 50, seed=8, scale=5.0, dtype=torch.float32).to(dtype)
    values = PLAIN[name](same, same)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient(PLAIN[name], same, same).float(), torch.zeros(4, 50), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", PLAIN)
def test_nothing_flows_to_the_target(name):
    draft, target = logits(2, 5, seed=1).requires_grad_(), logits(2, 5, seed=2).requires_grad_()
    PLAIN[name](draft, target).sum().backward()
    assert target.grad is None


@pytest.mark.parametrize("name", [*PLAIN, "tvd_full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("regime", ["filtered target", "one-hot target", "huge logits", "disjoint", "one token each"])
def test_finite_in_value_and_gradient(name, dtype, regime):
    """0 · ∞ in a KL, log 0 in a sum of minima, an overflowing softmax: each gives NaN, in value or only in gradient."""
    draft, target = logits(3, 20, seed=9).to(dtype), logits(3, 20, seed=10).to(dtype)
    if regime == "filtered target":
        target[:, 5:] = -torch.inf
    elif regime == "one-hot target":
        target[:, 1:] = -torch.inf
    elif regime == "huge logits":
        draft, target = 3e4 * draft, 3e4 * target
    elif regime == "disjoint":
        draft[:, :10] -= 1e4
        target[:, 10:] -= 1e4
    else:
        draft[:, 3] += 1e5
        target[:, 4] += 1e5
    function = FULL if name == "tvd_full" else PLAIN[name]
    assert function(draft, target).isfinite().all()
    assert gradient(function, draft, target).isfinite().all()


def test_negative_log_acceptance_keeps_its_gradient_where_total_variation_loses_it():
    draft, target = torch.zeros(1, 4), torch.zeros(1, 4)
    draft[0, 0], target[0, 1] = 200.0, 200.0
    assert gradient(total_variation, draft, target).abs().max() == 0
    assert gradient(negative_log_acceptance, draft, target).abs().max() > 0.4


def test_negative_log_acceptance_gradient_is_total_variations_over_alpha():
    draft, target = logits(5, 11, seed=11), logits(5, 11, seed=12)
    alpha = 1 - total_variation(draft, target).unsqueeze(-1)
    torch.testing.assert_close(
        gradient(negative_log_acceptance, draft, target), gradient(total_variation, draft, target) / alpha
    )


def test_jsd_is_the_plain_kls_at_its_ends_and_tends_to_them():
    """β the wrong way round (TRL and GKD have differed in it) swaps the two limits."""
    draft, target = logits(4, 8, seed=13), logits(4, 8, seed=14)
    assert torch.equal(generalized_jsd(draft, target, beta=0), forward_kl(draft, target))
    assert torch.equal(generalized_jsd(draft, target, beta=1), reverse_kl(draft, target))
    near = 1e-5
    torch.testing.assert_close(
        generalized_jsd(draft, target, beta=near) / near, forward_kl(draft, target), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(
        generalized_jsd(draft, target, beta=1 - near) / near, reverse_kl(draft, target), rtol=1e-3, atol=0
    )


def test_jsd_is_symmetric_and_bounded_at_one_half():
    draft, target = logits(20, 8, seed=15, scale=9), logits(20, 8, seed=16, scale=9)
    values = generalized_jsd(draft, target)
    torch.testing.assert_close(values, generalized_jsd(target, draft))
    assert (values <= math.log(2)).all()


class TestTvdPlusPlus:
    draft, target = logits(6, 9, seed=17), logits(6, 9, seed=18)

    def rewards(self) -> tuple[torch.Tensor, torch.Tensor]:
        q, p = self.draft.softmax(-1), self.target.softmax(-1)
        return q, (p > q).double()

    def test_full_batch_gradient_is_total_variations_over_sigma(self):
        """The identity of design.md; μ must drop out of the gradient, σ must be that of the whole batch."""
        q, r = self.rewards()
        weights = q / q.sum()
        mean = (weights * r).sum()
        sigma = (weights * (r - mean) ** 2).sum().sqrt()
        expected = gradient(total_variation, self.draft, self.target) / sigma
        torch.testing.assert_close(gradient(FULL, self.draft, self.target), expected)

    def test_full_batch_values_sum_to_zero(self):
        torch.testing.assert_close(FULL(self.draft, self.target).sum(), torch.tensor(0.0, dtype=torch.float64))

    def test_full_token_gradient_is_total_variations_over_its_own_sigma(self):
        q, r = self.rewards()
        mean = (q * r).sum(-1, keepdim=True)
        sigma = (q * (r - mean) ** 2).sum(-1, keepdim=True).sqrt()
        expected = gradient(total_variation, self.draft, self.target) / sigma
        actual = gradient(partial(FULL, statistics="token"), self.draft, self.target)
        torch.testing.assert_close(actual, expected)

    def test_mask_decides_whose_rewards_are_counted(self):
        mask = torch.tensor([True, True, False, True, False, False])
        kept = gradient(FULL, self.draft[mask], self.target[mask])
        all_of_it = gradient(partial(FULL, mask=mask), self.draft, self.target)[mask]
        torch.testing.assert_close(all_of_it, kept)

    def test_sampled_with_given_tokens_is_the_paper_formula(self):
        tokens = torch.tensor([0, 8, 3, 3, 5, 1])
        q, r = self.rewards()
        picked = r[range(6), tokens]
        advantage = (picked - picked.mean()) / picked.std(correction=0)
        expected = -advantage * q[range(6), tokens].log()
        torch.testing.assert_close(tvd_plus_plus(self.draft, self.target, tokens=tokens), expected)
        one_hot = torch.nn.functional.one_hot(tokens, 9)
        torch.testing.assert_close(
            gradient(partial(tvd_plus_plus, tokens=tokens), self.draft, self.target),
            -advantage.unsqueeze(-1) * (one_hot - q),
        )

    def test_sampled_gradient_is_the_full_one_on_average(self):
        """Sampling from p, or from a tempered q, would be off by far more than the noise."""
        torch.manual_seed(0)
        copies = 20_000
        draft = self.draft[:1].expand(copies, -1)
        target = self.target[:1].expand(copies, -1)
        sampled = gradient(partial(tvd_plus_plus, statistics="token"), draft, target)
        exact = gradient(partial(FULL, statistics="token"), self.draft[:1], self.target[:1])[0]
        error = sampled.std(0) / copies**0.5
        assert ((sampled.mean(0) - exact).abs() < 5 * error + 1e-12).all()

    @pytest.mark.parametrize("estimator", ["full", "sampled"])
    @pytest.mark.parametrize("statistics", ["batch", "token"])
    def test_equal_models_give_finite_zero(self, estimator, statistics):
        """σ = 0 for equal models: unguarded it is 0/0."""
        function = partial(tvd_plus_plus, estimator=estimator, statistics=statistics)
        assert function(self.draft, self.draft).abs().max() == 0
        assert gradient(function, self.draft, self.draft).abs().max() == 0

    def test_an_empty_mask_is_finite(self):
        assert FULL(self.draft, self.target, mask=torch.zeros(6, dtype=torch.bool)).isfinite().all()


class TestErrors:
    def test_names_suggest_the_nearest(self):
        with pytest.raises(ValueError, match="Did you mean 'forward_kl'"):
            get_divergence("forwad_kl")
        assert get_divergence("reverse_kl") is DIVERGENCES["reverse_kl"]

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("generalized_jsd", {"beta": 1.5}, r"`beta`.*\[0, 1\], got 1.5"),
            ("generalized_jsd", {"bta": 0.5}, "Did you mean 'beta'"),
            ("forward_kl", {"beta": 0.5}, "takes no options"),
            ("lk_hybrid", {"eta": -1}, "`eta` must be"),
            ("tvd_plus_plus", {"estimator": "ful"}, "Did you mean 'full'"),
            ("tvd_plus_plus", {"statistics": "row"}, "statistics"),
            ("tvd_plus_plus", {"eps": 0.0}, "eps"),
            ("jsd", {}, "Did you mean 'generalized_jsd'"),
        ],
    )
    def test_options_are_checked_before_work(self, name, options, message):
        with pytest.raises(ValueError, match=message):
            check_divergence(name, options)

    def test_valid_options_pass(self):
        check_divergence("generalized_jsd", {"beta": 0.1})
        check_divergence("tvd_plus_plus", {"estimator": "full", "statistics": "token"})
        check_divergence("cross_entropy")

    @pytest.mark.parametrize("name", PLAIN)
    def test_padded_vocabularies_are_refused_not_broadcast(self, name):
        with pytest.raises(ValueError, match="one vocabulary"):
            PLAIN[name](torch.zeros(2, 5), torch.zeros(2, 8))
        with pytest.raises(ValueError, match="same positions"):
            PLAIN[name](torch.zeros(1, 5), torch.zeros(2, 5))

    def test_tokens_with_the_full_estimator_are_refused(self):
        with pytest.raises(ValueError, match="estimator='sampled'"):
            FULL(torch.zeros(1, 3), torch.zeros(1, 3), tokens=torch.zeros(1, dtype=torch.long))


def test_tokens_are_drawn_as_often_as_their_probability_says():
    """An inverse of the running sum that is off by one, or that falls on a token which cannot be."""
    probs = torch.tensor(
        [[0.0, 0.2, 0.0, 0.5, 0.3, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]]
    )
    torch.manual_seed(0)
    drawn = draw(probs.expand(40_000, 3, 6)).squeeze(-1)
    assert drawn.shape == (40_000, 3)
    shares = torch.nn.functional.one_hot(drawn, 6).double().mean(0)
    assert (shares[probs == 0] == 0).all()
    torch.testing.assert_close(shares, probs.double(), atol=0.01, rtol=0)
