"""A draft that proposes only the tokens of a list: the loss against its definition, in float64."""

from functools import partial

import pytest
import torch

from hf_draftkd import losses
from hf_draftkd.losses import DIVERGENCES, chunked, sample_target, top_k_target
from tests.losses.selected import distillation_loss, in_chunks_of
from tests.losses.test_objective import CASES, B, Setup, T, V, assert_same

LISTED = torch.tensor([1, 2, 5, 7, 11, 12, 20])
INSIDE = torch.zeros(V, dtype=torch.bool).index_fill(0, LISTED, True)


def kl(p, q, over):
    """Σ p (log p − log q), over some tokens."""
    return torch.where(over, p * (p.log() - torch.where(over, q, 1.0).log()), 0.0).sum(-1)


def by_definition(case: str, q: torch.Tensor, p: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """The divergence at each position, from q (0 outside the list) and p; 0 log 0 = 0."""
    name, options = CASES[case]
    overlap = torch.minimum(p, q).sum(-1)
    if name == "forward_kl" or options.get("beta") == 0:
        return kl(p, q, inside)
    if name == "reverse_kl" or options.get("beta") == 1:
        return kl(torch.where(inside, q, 1.0), p, inside)
    if name == "generalized_jsd":
        beta = options["beta"]
        m = beta * p + (1 - beta) * q
        everywhere = torch.ones_like(inside)
        return beta * kl(p, m, everywhere) + (1 - beta) * kl(torch.where(inside, q, 1.0), m, inside)
    if name == "total_variation":
        return 1 - overlap
    if name == "negative_log_acceptance":
        return -overlap.log()
    share = (-options["eta"] * overlap.detach()).exp()
    return share * kl(p, q, inside) + (1 - share) * (1 - overlap)


def gradients(setup: Setup, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, (setup.hidden, setup.weight, setup.bias), retain_graph=True))


def draft_probs(logits: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill(~INSIDE, -torch.inf).softmax(-1)


PLAIN = [case for case in CASES if not case.startswith("tvd")]


@pytest.mark.parametrize("case", PLAIN)
@pytest.mark.parametrize("form", ["hidden", "logits"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_loss_is_its_definition(case, form, temperature):
    """Catches a p that was masked too, and gradients that reach tokens outside the list."""
    name, options = CASES[case]
    setup = Setup()
    draft, target = (setup.draft(), setup.target()) if form == "hidden" else setup.logits()
    result = distillation_loss(
        draft, target, setup.labels, divergence=name, options=options, temperature=temperature, vocabulary=LISTED,
        chunk_size=4, with_acceptance=True,
    )  # fmt: skip
    chosen = setup.labels != -100
    q_logits, p_logits = (logits[chosen] / temperature for logits in setup.logits())
    q, p = draft_probs(q_logits), p_logits.softmax(-1)
    expected = by_definition(case, q, p, INSIDE.expand_as(p)).sum() / chosen.sum()
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(result.acceptance, torch.minimum(p, q).sum(-1).detach())
    found = gradients(setup, result.loss)
    assert_same(found, gradients(setup, expected))
    assert not found[1][~INSIDE].any(), "the head's rows outside the list learn nothing"


@pytest.mark.parametrize("case", ["tvd_full_batch", "tvd_full_token"])
def test_tvd_plus_plus_is_that_of_the_masked_draft(case):
    """Its definition has no logarithm, so the plain form is right where the draft's logits are masked."""
    name, options = CASES[case]
    setup = Setup()
    draft, target = setup.logits()
    result = distillation_loss(
        draft, target, setup.labels, divergence=name, options=options, vocabulary=LISTED, chunk_size=4
    )
    plain = partial(DIVERGENCES[name], **options)
    chosen = setup.labels != -100
    expected = plain(draft[chosen].masked_fill(~INSIDE, -1e9), target[chosen]).mean()
    torch.testing.assert_close(result.loss, expected)
    assert_same(gradients(setup, result.loss), gradients(setup, expected))
    torch.manual_seed(0)
    sampled = distillation_loss(draft, target, setup.labels, divergence=name, vocabulary=LISTED)
    assert not gradients(setup, sampled.loss)[1][~INSIDE].any(), "only tokens of the list are drawn"


@pytest.mark.parametrize("case", PLAIN)
@pytest.mark.parametrize("k", [1, 4, V])
def test_a_sparse_target_is_one_of_fewer_tokens(case, k):
    """Catches a tail that is taken for outside the list, and one that is not where the list has no token in it."""
    name, options = CASES[case]
    setup = Setup()
    chosen = setup.labels != -100
    draft, target = (logits[chosen] for logits in setup.logits())
    sparse = top_k_target(target, k)
    result = distillation_loss(draft, sparse, setup.labels[chosen], divergence=name, options=options, vocabulary=LISTED)
    q = draft_probs(draft)
    kept_q = q.gather(-1, sparse.token_ids)
    inside = INSIDE[sparse.token_ids]
    p = sparse.logprobs.exp()
    if k < V:
        kept_q = torch.cat([kept_q, q.scatter(-1, sparse.token_ids, 0.0).sum(-1, keepdim=True)], -1)
        p = torch.cat([p, sparse.tail_logprob.exp().unsqueeze(-1)], -1)
        inside = torch.cat([inside, inside.sum(-1, keepdim=True) < len(LISTED)], -1)
    expected = by_definition(case, kept_q, p, inside).mean()
    torch.testing.assert_close(result.loss, expected)
    assert_same(gradients(setup, result.loss), gradients(setup, expected))


def test_a_tail_without_a_listed_token():
    logits, target = torch.randn(3, 5, dtype=torch.float64), torch.tensor([[3.0, 2.0, 0.0, 0.0, 0.0]] * 3).double()
    sparse = top_k_target(target, 2)
    draft = logits.requires_grad_()
    result = distillation_loss(draft, sparse, torch.zeros(3, dtype=torch.long), vocabulary=torch.tensor([0, 1]))
    q, p = draft[:, :2].softmax(-1), target.softmax(-1)[:, :2]
    expected = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(result.loss, expected)
    assert_same(list(torch.autograd.grad(result.loss, draft)), list(torch.autograd.grad(expected, draft)))


def test_draws_outside_the_list_are_left_out():
    setup = Setup()
    chosen = setup.labels != -100
    draft, target = (logits[chosen] for logits in setup.logits())
    drawn = sample_target(target, 30, generator=torch.Generator().manual_seed(0))
    result = distillation_loss(draft, drawn, setup.labels[chosen], vocabulary=LISTED)
    frequencies = torch.zeros_like(target).scatter_add_(-1, drawn.token_ids, drawn.counts.double() / 30)
    on_list = INSIDE & (frequencies > 0)
    gap = torch.where(on_list, frequencies.log() - torch.where(INSIDE, draft_probs(draft), 1.0).log(), 0.0)
    expected = (frequencies * gap).sum(-1).mean()
    torch.testing.assert_close(result.loss, expected)
    assert_same(gradients(setup, result.loss), gradients(setup, expected))


def test_text_outside_the_list_is_not_learned_from():
    """Its cross-entropy is infinite, whatever the draft says."""
    setup = Setup()
    draft, target = setup.logits()
    chosen = setup.labels != -100
    tokens = setup.labels[chosen]
    q = draft_probs(draft[chosen]).gather(-1, tokens[:, None])[:, 0]
    expected = -q[INSIDE[tokens]].log().sum() / chosen.sum()
    assert 0 < int(INSIDE[tokens].sum()) < len(tokens) <= B * T
    result = distillation_loss(draft, None, setup.labels, divergence="cross_entropy", vocabulary=LISTED)
    torch.testing.assert_close(result.loss, expected)
    assert_same(gradients(setup, result.loss), gradients(setup, expected))
    mixed = distillation_loss(draft, target, setup.labels, cross_entropy_weight=0.25, vocabulary=LISTED)
    on_target = distillation_loss(draft, target, setup.labels, vocabulary=LISTED)
    torch.testing.assert_close(mixed.loss, 0.75 * on_target.loss + 0.25 * expected)


KNOWN = {
    **{f"top {k}": partial(top_k_target, k=k) for k in (1, 4, len(LISTED) + 2, V)},
    "draws": partial(sample_target, num_draws=30, generator=torch.Generator().manual_seed(0)),
    "text": lambda target: None,
}


@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize("case", CASES)
def test_a_head_without_the_rows_outside_the_list_gives_the_same(case, known, monkeypatch):
    """Where only hidden states are given, and a part of the target, no logit outside the list is computed."""
    name, options = CASES[case]
    if known in ("draws", "text"):
        if case != "forward_kl":
            return
        name = "forward_kl" if known == "draws" else "cross_entropy"
    setup = Setup()
    chosen = setup.labels != -100
    target = KNOWN[known](setup.logits()[1][chosen])
    widths = []

    def project(*args):
        widths.append(args[1].weight.shape[0])
        return chunked_project(*args)

    chunked_project = chunked._project
    monkeypatch.setattr(chunked, "_project", project)
    how = {"divergence": name, "options": options, "vocabulary": LISTED, "with_acceptance": True}
    if known != "text":
        how["cross_entropy_weight"] = 0.25
    hidden = setup.draft()
    with in_chunks_of(4):
        cut, whole = (
            losses.distillation_loss(draft, target, setup.labels[chosen], **how)
            for draft in (hidden._replace(hidden=hidden.hidden[chosen]), setup.logits()[0][chosen])
        )
    assert 0 < max(widths) <= len(LISTED) + 3 < V
    torch.testing.assert_close(cut.loss, whole.loss)
    torch.testing.assert_close(cut.token_losses, whole.token_losses)
    torch.testing.assert_close(cut.acceptance, whole.acceptance)
    assert_same(*(gradients(setup, each.loss) for each in (cut, whole)))


def test_the_whole_vocabulary_is_no_restriction():
    setup = Setup(torch.float32)
    for case, (name, options) in CASES.items():
        losses = [
            distillation_loss(setup.draft(), setup.target(), setup.labels, divergence=name, options=options, **more)
            for more in ({}, {"vocabulary": torch.arange(V)})
        ]
        torch.testing.assert_close(losses[1].loss, losses[0].loss, msg=lambda text, case=case: f"{case}: {text}")
        assert_same(*(gradients(setup, each.loss) for each in losses), atol=1e-6, rtol=1e-4)
