"""Gradients under float16 autocast: nothing may underflow that a loss scaler would have saved."""

import pytest
import torch

from hf_draftkd.losses import LinearHead, Unprojected, chunked, distillation_loss
from tests.losses.selected import in_chunks_of

N, V, H = 128, 4000, 32
# A window of accumulation is divided by its tokens, here in the same backward as the loss scaler's factor.
WINDOW, LOSS_SCALE = 16384, 2.0**16


def pair(noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator)
    weight = torch.randn(V, H, generator=generator) / 4
    return hidden, weight, hidden @ weight.t() + noise * torch.randn(N, V, generator=generator)


def backward(loss: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    """Gradients as if the loss had been divided by 1, in float64."""
    return [g.double() / LOSS_SCALE * WINDOW for g in torch.autograd.grad(loss * LOSS_SCALE, leaves)]


def of_chunks(divergence, hidden, weight, target, *, dtype=torch.float32, token_weights=None, **head):
    hidden, weight = (leaf.to(dtype, copy=True).requires_grad_() for leaf in (hidden, weight))
    with torch.autocast("cpu", torch.float16), in_chunks_of(50):
        loss = distillation_loss(
            Unprojected(hidden, LinearHead(weight, **head)),
            target,
            torch.zeros(N, dtype=torch.long),
            divergence=divergence,
            num_items=WINDOW,
            token_weights=token_weights,
        ).loss
    return backward(loss, hidden, weight)


def by_definition(divergence, logits, target, token_weights=1.0):
    p, q = target.softmax(-1), logits.softmax(-1)
    values = p * (p.log() - logits.log_softmax(-1)) if divergence == "forward_kl" else 0.5 * (p - q).abs()
    return (values.sum(-1) * token_weights).sum() / WINDOW


def of_plain_autocast(divergence, hidden, weight, target):
    hidden, weight = (leaf.clone().requires_grad_() for leaf in (hidden, weight))
    with torch.autocast("cpu", torch.float16):
        logits = torch.nn.functional.linear(hidden, weight)
    return backward(by_definition(divergence, logits.float(), target), hidden, weight)


def in_float64(divergence, hidden, weight, target, rounded=None, token_weights=1.0, scale=1.0, softcap=None):
    """The exact gradient; with `rounded`, that at these logits, so that only what follows them is compared."""
    hidden, weight = (leaf.double().requires_grad_() for leaf in (hidden, weight))
    logits = hidden @ weight.t() * scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    if rounded is not None:
        logits = logits + (rounded.double() - logits).detach()
    return backward(by_definition(divergence, logits, target.double(), token_weights), hidden, weight)


def errors(got, wanted):
    return [float((g - w).norm() / w.norm()) for g, w in zip(got, wanted, strict=True)]


@pytest.mark.parametrize("noise", [1.0, 0.1])
@pytest.mark.parametrize("divergence", ["forward_kl", "total_variation"])
def test_gradients_are_at_least_as_near_as_plain_autocasts(divergence, noise):
    """Gradients divided by the window and rounded to float16 before the loss scaler's factor: 16 % off, not 2 %."""
    case = pair(noise)
    wanted = in_float64(divergence, *case)
    ours, plain = (errors(gradients(divergence, *case), wanted) for gradients in (of_chunks, of_plain_autocast))
    # Both share the rounding of the logits, which at the smaller noise is nearly all of the error.
    assert all(mine <= 1.001 * theirs for mine, theirs in zip(ours, plain, strict=True)), (ours, plain)


def test_rounding_after_the_logits_is_float16s_own():
    """Underflow hidden behind the rounding of the logits, in which the test above would not see it."""
    hidden, weight, target = pair(0.1)
    rounded = hidden.half() @ weight.half().t()
    wanted = in_float64("forward_kl", hidden, weight, target, rounded)
    ours = errors(of_chunks("forward_kl", hidden, weight, target), wanted)
    plain = errors(of_plain_autocast("forward_kl", hidden, weight, target), wanted)
    assert all(mine <= theirs for mine, theirs in zip(ours, plain, strict=True)), (ours, plain)
    assert max(ours) < 2.0**-11, "half a step of float16"


def test_float16_leaves_get_the_loss_scalers_factor_before_they_are_rounded():
    """Hidden states that are float16 themselves: their gradient is lost between forward and backward."""
    hidden, weight, target = (leaf.half().float() for leaf in pair(0.1))
    wanted = in_float64("forward_kl", hidden, weight, target, hidden.half() @ weight.half().t())
    got = of_chunks("forward_kl", hidden, weight, target, dtype=torch.float16)
    # Rounded once more, in part below float16's normal numbers: the factor is the scaler's to choose.
    assert max(errors(got, wanted)) < 2e-3
    leaves = [leaf.half().requires_grad_() for leaf in (hidden, weight)]
    loss = distillation_loss(Unprojected(leaves[0], LinearHead(leaves[1])), target, torch.zeros(N).long()).loss
    loss.backward()
    assert all(leaf.grad.dtype == torch.float16 for leaf in leaves)


@pytest.mark.parametrize("head", [{"scale": 0.25}, {"softcap": 5.0}, {"scale": 1 / 3, "softcap": 2.0}], ids=str)
def test_heads_and_token_weights(head):
    """A scale taken twice, or token weights of very unequal size squeezed into float16."""
    hidden, weight, target = pair(1.0)
    token_weights = torch.rand(N, generator=torch.Generator().manual_seed(1)) * 1e-4
    token_weights[::7] = 0
    wanted = in_float64("forward_kl", hidden, weight, target, token_weights=token_weights.double(), **head)
    got = of_chunks("forward_kl", hidden, weight, target, token_weights=token_weights, **head)
    assert max(errors(got, wanted)) < 3e-3


def test_gradients_of_every_size():
    """A scale that overflows where there is nothing to learn; large gradients beyond 65504; NaN made a number."""
    hidden, weight, target = pair(1.0)
    rounded = (hidden.half() @ weight.half().t()).float()
    assert all(not g.any() for g in of_chunks("forward_kl", hidden, weight, target, token_weights=torch.zeros(N)))
    assert all(g.isfinite().all() for g in of_chunks("forward_kl", hidden, weight, rounded))
    # One token that the draft holds for impossible: the slope of every row is 1 at it.
    sure = torch.full((N, V), -50.0)
    sure[:, 7] = 50
    got = of_chunks("forward_kl", hidden, 100 * weight, sure)
    wanted = in_float64("forward_kl", hidden, 100 * weight, sure)
    assert max(errors(got, wanted)) < 2e-2
    target[3, 3] = torch.nan
    hidden_gradient, _ = of_chunks("forward_kl", hidden, weight, target)
    assert hidden_gradient.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_types_pay_nothing(monkeypatch, dtype):
    """One more pass over [chunk, vocabulary] where the format's range makes it needless."""
    monkeypatch.setattr(chunked, "_to_half_range", lambda gradient: pytest.fail("a pass for its maximum"))
    hidden, weight, target = pair(1.0)
    leaves = [leaf.to(dtype).requires_grad_() for leaf in (hidden, weight)]
    distillation_loss(Unprojected(leaves[0], LinearHead(leaves[1])), target, torch.zeros(N).long()).loss.backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
