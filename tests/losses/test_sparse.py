"""Targets of which a part was kept: k = V is the dense form, merged tails against hand-merged distributions, draws
against their expectation.
"""

from functools import partial

import pytest
import torch

from hf_draftkd.acceptance import token_acceptance_rate
from hf_draftkd.losses import (
    DIVERGENCES,
    LinearHead,
    SampledTarget,
    SparseTarget,
    Unprojected,
    acceptance_upper_bound,
    cross_entropy,
    distillation_loss,
    forward_kl,
    sample_target,
    top_k_target,
)
from tests.losses.selected import in_chunks_of

N, V, K = 6, 17, 5
CASES = {
    "forward_kl": {},
    "reverse_kl": {},
    "generalized_jsd": {"beta": 0.3},
    "total_variation": {},
    "negative_log_acceptance": {},
    "lk_hybrid": {},
    "tvd_plus_plus": {"estimator": "full"},
}


def logits(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def slope_of(values: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(values.sum(), leaf)[0]


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return logits(N, V, seed=0).requires_grad_(), logits(N, V, seed=1)


def merged(draft: torch.Tensor, target: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both distributions over k tokens and a tail, row by row, as log-probabilities."""
    rows = []
    for q, p in zip(draft.softmax(-1), target.softmax(-1), strict=True):
        order = p.argsort(descending=True)
        kept, rest = order[:k], order[k:]
        rows.append((torch.cat([q[kept], q[rest].sum()[None]]), torch.cat([p[kept], p[rest].sum()[None]])))
    q, p = (torch.stack(side) for side in zip(*rows, strict=True))
    return q.log(), p.log()


def plain(draft: torch.Tensor, target: SparseTarget, name: str, options: dict) -> torch.Tensor:
    """The definition: the divergence over k + 1 buckets, the draft's tail summed as the target's is."""
    buckets, logprobs = draft.gather(-1, target.token_ids), target.logprobs
    if target.token_ids.shape[-1] < draft.shape[-1]:
        rest = draft.scatter(-1, target.token_ids, -torch.inf).logsumexp(-1, keepdim=True)
        buckets, logprobs = torch.cat([buckets, rest], -1), torch.cat([logprobs, target.tail_logprob[..., None]], -1)
    return DIVERGENCES[name](buckets, logprobs, **options)


def chunked(
    draft: torch.Tensor, target: SparseTarget | SampledTarget, name: str = "forward_kl", **options
) -> torch.Tensor:
    tokens = torch.arange(len(draft)) % draft.shape[-1]
    return distillation_loss(draft, target, tokens, divergence=name, options=options).loss


@pytest.mark.parametrize("name", CASES)
def test_tail_is_one_bucket(name, pair):
    """Leaving the tail out, or renormalising the top k, changes every divergence."""
    draft, target = pair
    expected = DIVERGENCES[name](*merged(draft, target, K), **CASES[name])
    actual = chunked(draft, top_k_target(target, K), name, **CASES[name])
    torch.testing.assert_close(actual, expected.mean())
    torch.testing.assert_close(slope_of(actual, draft), slope_of(expected, draft) / N)


@pytest.mark.parametrize("name", CASES)
def test_keeping_every_token_is_the_dense_form(name, pair):
    draft, target = pair
    everything = top_k_target(target, V)
    assert (everything.tail_logprob == -torch.inf).all()
    expected = DIVERGENCES[name](draft, target, **CASES[name])
    actual = chunked(draft, everything, name, **CASES[name])
    torch.testing.assert_close(actual, expected.mean())
    torch.testing.assert_close(slope_of(actual, draft), slope_of(expected, draft) / N)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("k", [1, K, V - 1, V])
def test_objective_twin_equals_the_plain_form(name, k, pair):
    draft, target = pair
    sparse = top_k_target(target / 1.5, k)
    labels = torch.arange(N)
    expected = (0.8 * plain(draft / 1.5, sparse, name, CASES[name])
                + 0.2 * cross_entropy(draft, tokens=labels)).mean()  # fmt: skip
    with in_chunks_of(4):
        actual = distillation_loss(
            draft, sparse, labels, divergence=name, options=CASES[name], temperature=1.5, cross_entropy_weight=0.2,
            with_acceptance=True,
        )  # fmt: skip
    torch.testing.assert_close(actual.loss, expected)
    torch.testing.assert_close(slope_of(actual.loss, draft), slope_of(expected, draft))
    torch.testing.assert_close(actual.acceptance, acceptance_upper_bound(draft / 1.5, sparse).detach())


def test_objective_with_hidden_states_and_a_sparse_target():
    hidden, weight = logits(2, 4, 3, seed=2).requires_grad_(), logits(V, 3, seed=3).requires_grad_()
    target = logits(2, 4, V, seed=4)
    labels = torch.tensor([[-100, 3, 4, 5], [1, 2, -100, -100]])
    mask = labels != -100
    whole = top_k_target(target, V)
    expected = forward_kl((hidden @ weight.t())[mask], target[mask]).mean()
    slopes = torch.autograd.grad(expected, (hidden, weight))
    draft = Unprojected(hidden[mask], LinearHead(weight))
    with in_chunks_of(2):
        actual = distillation_loss(draft, whole[mask], labels[mask]).loss
    torch.testing.assert_close(actual, expected)
    for one, other in zip(torch.autograd.grad(actual, (hidden, weight)), slopes, strict=True):
        torch.testing.assert_close(one, other)


def test_custom_divergence_on_a_sparse_target(pair):
    draft, target = pair
    function = partial(DIVERGENCES["generalized_jsd"], beta=0.4)
    sparse = top_k_target(target, K)
    named = distillation_loss(draft, sparse, torch.arange(N), divergence="generalized_jsd", options={"beta": 0.4}).loss
    given = distillation_loss(draft, sparse, torch.arange(N), divergence=function).loss
    torch.testing.assert_close(given, named)


def test_acceptance_from_top_k_is_an_upper_bound(pair):
    """It must never be reported as the acceptance rate itself."""
    draft, target = pair
    exact = token_acceptance_rate(draft, target)
    previous = torch.full((N,), 1.0 + 1e-12, dtype=torch.float64)
    for k in (1, 3, 8, V):
        bound = acceptance_upper_bound(draft, top_k_target(target, k))
        assert (bound >= exact - 1e-12).all()
        assert (bound <= previous + 1e-12).all(), "a finer partition cannot loosen the bound"
        previous = bound
    torch.testing.assert_close(previous, exact)


def test_divergences_from_top_k_are_lower_bounds(pair):
    draft, target = pair
    sparse = top_k_target(target, K)
    for name in ("forward_kl", "reverse_kl", "generalized_jsd", "total_variation", "negative_log_acceptance"):
        assert chunked(draft, sparse, name) <= DIVERGENCES[name](draft, target).mean() + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vanishing_tail_keeps_its_digits(dtype):
    """1 − Σ of the kept is 0, or negative, where the tail is 1e-9: its logarithm would be −∞ or NaN."""
    target = torch.zeros(1, 8, dtype=dtype)
    target[0, 0] = 25.0
    draft = torch.zeros(1, 8, dtype=dtype)
    draft[0, 0] = 30.0
    draft.requires_grad_()
    sparse = top_k_target(target, 1)
    tail = torch.tensor(7.0).log() - torch.tensor(25.0).exp().add(7).log()
    torch.testing.assert_close(sparse.tail_logprob, tail[None])
    for name, options in CASES.items():
        expected = plain(draft.float(), sparse, name, options)
        loss = chunked(draft, sparse, name, **options)
        assert expected.isfinite().all()
        torch.testing.assert_close(loss, expected.mean(), rtol=1e-4, atol=1e-7)
        assert slope_of(loss, draft).isfinite().all()


def test_half_precision_cache_stays_within_its_bound(pair):
    """In float16 a logarithm is off by at most 2^-11 of itself: the loss and its gradient by little more."""
    draft, target = pair
    exact = top_k_target(target, V)
    stored = SparseTarget(exact.token_ids, exact.logprobs.half(), exact.tail_logprob.half())
    one, other = (forward_kl_of(draft, sparse) for sparse in (exact, stored))
    torch.testing.assert_close(other[0], one[0], rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(other[1], one[1], rtol=0, atol=5e-3)


def forward_kl_of(draft: torch.Tensor, sparse: SparseTarget) -> tuple[torch.Tensor, torch.Tensor]:
    loss = distillation_loss(draft, sparse, torch.arange(N)).loss
    return loss.detach(), slope_of(loss, draft)


class TestDraws:
    def test_counts_are_what_was_drawn(self):
        target = logits(4, V, seed=5)
        sampled = sample_target(target, 50, generator=torch.Generator().manual_seed(0))
        assert (sampled.counts.sum(-1) == 50).all()
        for ids, counts in zip(sampled.token_ids, sampled.counts, strict=True):
            drawn = ids[counts > 0]
            assert len(set(drawn.tolist())) == len(drawn)

    def test_frequencies_follow_the_target(self):
        target = logits(1, V, seed=6)
        sampled = sample_target(target, 100_000, generator=torch.Generator().manual_seed(0))
        frequencies = torch.zeros(V, dtype=torch.float64)
        frequencies[sampled.token_ids[0]] += sampled.counts[0] / 100_000
        torch.testing.assert_close(frequencies, target[0].softmax(-1), atol=6e-3, rtol=0)

    def test_gradient_is_q_minus_frequencies(self, pair):
        draft, target = pair
        sampled = sample_target(target, 20, generator=torch.Generator().manual_seed(1))
        frequencies = torch.zeros(N, V, dtype=torch.float64)
        for row in range(N):
            for token, count in zip(sampled.token_ids[row].tolist(), sampled.counts[row].tolist(), strict=True):
                frequencies[row, token] += count / 20
        expected = draft.detach().softmax(-1) - frequencies
        with in_chunks_of(4):
            loss = distillation_loss(draft, sampled, torch.arange(N)).loss
        gaps = frequencies * (frequencies.clamp(min=1e-9).log() - draft.detach().log_softmax(-1))
        torch.testing.assert_close(loss, gaps.sum(-1).mean())
        torch.testing.assert_close(slope_of(loss, draft), expected / N)

    def test_gradient_is_unbiased(self, pair):
        """Top-k would stay off however often it is repeated; draws must come to the exact numbers."""
        draft, target = (logits[:1] for logits in pair)
        draft = draft.detach().requires_grad_()
        copies = 4000
        sampled = sample_target(target.expand(copies, -1), 8, generator=torch.Generator().manual_seed(2))
        many = draft.detach().expand(copies, -1).clone().requires_grad_()
        slopes = slope_of(chunked(many, sampled), many) * copies
        truth = slope_of(forward_kl(draft, target), draft)[0]
        error = slopes.std(0) / copies**0.5
        assert ((slopes.mean(0) - truth).abs() < 5 * error + 1e-9).all()

    def test_unused_places_count_for_nothing(self, pair):
        draft, _ = pair
        one = SampledTarget(torch.tensor([[3, 7]]), torch.tensor([[4, 1]]))
        padded = SampledTarget(torch.tensor([[3, 7, 0, 0]]), torch.tensor([[4, 1, 0, 0]]))
        torch.testing.assert_close(chunked(draft[:1], padded), chunked(draft[:1], one))

    @pytest.mark.parametrize("name", [name for name in CASES if name != "forward_kl"])
    def test_all_else_is_refused_with_the_reason(self, name, pair):
        draft, target = pair
        sampled = sample_target(target, 5)
        with pytest.raises(ValueError, match=f"'{name}' cannot be learned from tokens drawn.*linear in p"):
            chunked(draft, sampled, name, **CASES[name])
        with pytest.raises(ValueError, match="cannot be learned from tokens drawn"):
            distillation_loss(draft, sampled, torch.arange(N), divergence=DIVERGENCES[name])

    def test_draws_give_no_acceptance_rate(self, pair):
        draft, target = pair
        result = distillation_loss(draft, sample_target(target, 5), torch.arange(N), with_acceptance=True)
        assert result.acceptance is None


class TestErrors:
    def test_parts_that_do_not_fit(self):
        ids = torch.zeros(2, 3, dtype=torch.long)
        with pytest.raises(ValueError, match="tail_logprob"):
            SparseTarget(ids, torch.zeros(2, 3), torch.zeros(3))
        with pytest.raises(ValueError, match="shape"):
            SampledTarget(ids, torch.ones(2, 2))

    @pytest.mark.parametrize("k", [0, V + 1])
    def test_k(self, k):
        with pytest.raises(ValueError, match="`k` must be a whole number from 1 to 17"):
            top_k_target(torch.zeros(1, V), k)

    def test_draws(self):
        with pytest.raises(ValueError, match="num_draws"):
            sample_target(torch.zeros(1, V), 0)
