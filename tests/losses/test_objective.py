"""The objective against a naive float64 reference, its chunked and projected twins, and its invariances."""

from functools import partial
from typing import Any

import pytest
import torch

from hf_draftkd.losses import (
    DIVERGENCES,
    LinearHead,
    Unprojected,
    forward_kl,
    gradients,
    total_variation,
    tvd_plus_plus,
)
from tests.losses.selected import distillation_loss

B, T, V, H, G = 3, 7, 23, 8, 12
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "forward_kl": ("forward_kl", {}),
    "reverse_kl": ("reverse_kl", {}),
    "jsd": ("generalized_jsd", {"beta": 0.3}),
    "jsd_0": ("generalized_jsd", {"beta": 0.0}),
    "jsd_1": ("generalized_jsd", {"beta": 1.0}),
    "total_variation": ("total_variation", {}),
    "negative_log_acceptance": ("negative_log_acceptance", {}),
    "lk_hybrid": ("lk_hybrid", {"eta": 2.0}),
    "tvd_full_batch": ("tvd_plus_plus", {"estimator": "full"}),
    "tvd_full_token": ("tvd_plus_plus", {"estimator": "full", "statistics": "token"}),
}


class Setup:
    """A draft and a target as hidden states with heads, and the same as plain logits."""

    def __init__(self, dtype: torch.dtype = torch.float64, scale: float = 1.0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden = normal(B, T, H).requires_grad_()
        self.weight = (scale * normal(V, H)).requires_grad_()
        self.bias = normal(V).requires_grad_()
        self.target_hidden, self.target_weight = normal(B, T, G), scale * normal(V, G)
        labels = torch.randint(V, (B, T), generator=generator)
        labels[0, :3], labels[1, 5:], labels[2, 0] = -100, -100, -100
        self.labels = labels

    def draft(self, **head: Any) -> Unprojected:
        return Unprojected(self.hidden, LinearHead(self.weight, self.bias, **head))

    def target(self) -> Unprojected:
        return Unprojected(self.target_hidden, LinearHead(self.target_weight))

    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.hidden @ self.weight.t() + self.bias, self.target_hidden @ self.target_weight.t()

    def gradients(self, loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, (self.hidden, self.weight, self.bias)))


def naive(setup: Setup, function, options, temperature=1.0, mix=0.0, weights=None, divisor=None) -> torch.Tensor:
    """Position by position, by the definition of the objective, over plain logits."""
    draft, target = setup.logits()
    chosen = (setup.labels != -100).nonzero().tolist()
    total = draft.new_zeros(())
    draft_rows = torch.stack([draft[b, t] for b, t in chosen])
    target_rows = torch.stack([target[b, t] for b, t in chosen])
    values = function(draft_rows / temperature, target_rows / temperature, **options)
    for row, (b, t) in enumerate(chosen):
        on_text = -draft[b, t].softmax(-1)[setup.labels[b, t]].log()
        weight = 1.0 if weights is None else weights[b, t]
        total = total + weight * ((1 - mix) * values[row] + mix * on_text)
    return total / (len(chosen) if divisor is None else divisor)


def assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor], **tolerance: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("form", ["hidden", "logits"])
def test_twins_equal_the_plain_form(case, chunk_size, form):
    """Hand-written gradients, projection in chunks and statistics over chunks: by value and gradient."""
    name, options = CASES[case]
    setup = Setup()
    expected = naive(setup, DIVERGENCES[name], options, 1.7, 0.25)
    draft, target = (setup.draft(), setup.target()) if form == "hidden" else setup.logits()
    actual = distillation_loss(
        draft, target, setup.labels, divergence=name, options=options, temperature=1.7, cross_entropy_weight=0.25,
        chunk_size=chunk_size,
    )  # fmt: skip
    torch.testing.assert_close(actual.loss, expected)
    assert_same(setup.gradients(actual.loss), setup.gradients(expected))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("regime", ["float32", "sharp", "bfloat16", "filtered"])
def test_twins_in_low_precision_and_at_extremes(case, regime):
    """The twins take other roads than the plain forms; float32 must not make them drift apart or give NaN."""
    name, options = CASES[case]
    setup = Setup(torch.bfloat16 if regime == "bfloat16" else torch.float32, scale=30.0 if regime == "sharp" else 1.0)
    draft, target = (logits.float() for logits in setup.logits())
    if regime == "filtered":
        target = target.masked_fill(target < target.quantile(0.6, dim=-1, keepdim=True), -torch.inf)
    mask = setup.labels != -100
    leaf = draft.detach().double().requires_grad_()
    plain_options = options if case != "tvd_full_batch" else {**options, "mask": mask}
    plain = DIVERGENCES[name](leaf, target.double(), **plain_options)[mask].mean()
    (expected,) = torch.autograd.grad(plain, leaf)
    given = draft.detach().clone().requires_grad_()
    actual = distillation_loss(given, target, setup.labels, divergence=name, options=options, chunk_size=5)
    # Differences of logarithms carry the rounding of the largest: 6e-8 of 30, or of 1e4 for filtered tokens.
    rounding = 1e-3 if regime == "filtered" else 2e-5
    torch.testing.assert_close(actual.loss.double(), plain, rtol=2e-5, atol=rounding / 10)
    (slope,) = torch.autograd.grad(actual.loss, given)
    assert slope.isfinite().all()
    torch.testing.assert_close(slope.double(), expected, rtol=1e-4, atol=rounding / 10)
    assert torch.equal(given.detach(), draft.detach()), "the caller's logits were overwritten"


def test_negative_log_acceptance_twin_where_alpha_underflows():
    draft, target = torch.zeros(2, 6), torch.zeros(2, 6)
    draft[0, 0], target[0, 1] = 300.0, 300.0
    draft.requires_grad_()
    loss = distillation_loss(draft, target, torch.tensor([1, 1]), divergence="negative_log_acceptance").loss
    (actual,) = torch.autograd.grad(loss, draft)
    (expected,) = torch.autograd.grad(DIVERGENCES["negative_log_acceptance"](draft, target).mean(), draft)
    assert loss.isfinite()
    assert actual[0].abs().max() > 0.1
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("head", [{"scale": 0.25}, {"softcap": 2.0}, {"scale": 3.0, "softcap": 5.0}])
def test_scaled_and_capped_heads(head):
    """Cohere scales and Gemma caps its logits after the head: ignoring that trains on a distribution nobody decodes."""
    setup = Setup()
    draft, target = setup.logits()
    processed = draft * head.get("scale", 1.0)
    if "softcap" in head:
        processed = head["softcap"] * torch.tanh(processed / head["softcap"])
    mask = setup.labels != -100
    expected = forward_kl(processed[mask], target[mask]).mean()
    actual = distillation_loss(setup.draft(**head), setup.target(), setup.labels, chunk_size=4).loss
    torch.testing.assert_close(actual, expected)
    assert_same(setup.gradients(actual), setup.gradients(expected))


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith(("tvd", "lk"))])
def test_gradient_of_the_whole_objective_by_finite_differences(case):
    """Independent of every formula: the slope along random directions of hidden states, head weight and bias."""
    name, options = CASES[case]
    setup = Setup()

    def loss():
        return distillation_loss(
            setup.draft(softcap=4.0), setup.target(), setup.labels, divergence=name, options=options, temperature=0.8,
            cross_entropy_weight=0.5, chunk_size=5,
        ).loss  # fmt: skip

    torch.manual_seed(0)
    slopes = setup.gradients(loss())
    parameters = (setup.hidden, setup.weight, setup.bias)
    directions = [torch.randn_like(parameter) for parameter in parameters]
    step = 1e-6
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += sign * step * direction
            values.append(loss())
    expected = sum((slope * direction).sum() for slope, direction in zip(slopes, directions, strict=True))
    torch.testing.assert_close((values[0] - values[1]) / (2 * step), expected, rtol=1e-6, atol=1e-8)


def test_a_custom_divergence_is_differentiated_a_chunk_at_a_time():
    def squared(draft_logits, target_logits, *, power=2):
        return (draft_logits.softmax(-1) - target_logits.softmax(-1)).abs().pow(power).sum(-1)

    setup = Setup()
    expected = naive(setup, squared, {"power": 3})
    actual = distillation_loss(
        setup.draft(), setup.target(), setup.labels, divergence=squared, options={"power": 3}, chunk_size=3,
        with_acceptance=True,
    )  # fmt: skip
    torch.testing.assert_close(actual.loss, expected)
    assert_same(setup.gradients(actual.loss), setup.gradients(expected))
    assert actual.acceptance is not None


def test_black_box_is_cross_entropy_on_completion_tokens():
    setup = Setup()
    logits, _ = setup.logits()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), setup.labels.flatten(), ignore_index=-100)
    actual = distillation_loss(setup.draft(), None, setup.labels, divergence="cross_entropy", chunk_size=2).loss
    torch.testing.assert_close(actual, expected)
    assert_same(setup.gradients(actual), setup.gradients(expected))


def test_blocks_within_a_chunk_change_nothing(monkeypatch):
    """A chunk is worked on in blocks of rows: an index shifted by the block's start would mix positions up."""
    setup = Setup()
    arguments = {"divergence": "generalized_jsd", "cross_entropy_weight": 0.3, "with_acceptance": True}
    whole = distillation_loss(setup.draft(), setup.target(), setup.labels, **arguments)
    slopes = setup.gradients(whole.loss)
    monkeypatch.setattr("hf_draftkd.losses.chunked._CPU_BLOCK", 2 * V)
    blocks = distillation_loss(setup.draft(), setup.target(), setup.labels, chunk_size=5, **arguments)
    torch.testing.assert_close(blocks.token_losses, whole.token_losses)
    torch.testing.assert_close(blocks.acceptance, whole.acceptance)
    assert_same(setup.gradients(blocks.loss), slopes)


def test_token_weights_scale_the_sum_and_not_the_divisor():
    setup = Setup()
    weights = torch.rand(B, T, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = naive(setup, forward_kl, {}, weights=weights)
    slopes = setup.gradients(expected)
    weights = weights[setup.labels != -100]
    actual = distillation_loss(setup.draft(), setup.target(), setup.labels, token_weights=weights).loss
    torch.testing.assert_close(actual, expected)
    assert_same(setup.gradients(actual), slopes)


@pytest.mark.parametrize("form", ["hidden", "logits"])
def test_micro_batches_add_up_to_the_whole(form):
    """Dividing each micro-batch by its own count makes the loss change with gradient accumulation (trl#6478)."""
    setup = Setup()

    def part(index, **arguments):
        draft, target = (setup.draft(), setup.target()) if form == "hidden" else setup.logits()
        if form == "hidden":
            draft, target = (source._replace(hidden=source.hidden[index]) for source in (draft, target))
        else:
            draft, target = draft[index], target[index]
        return distillation_loss(draft, target, setup.labels[index], **arguments)

    whole = part(slice(None))
    num_items = torch.tensor(whole.num_tokens)
    parts = [part(index, num_items=num_items).loss for index in (slice(0, 1), slice(1, 3))]
    torch.testing.assert_close(parts[0] + parts[1], whole.loss)
    assert_same(setup.gradients(parts[0] + parts[1]), setup.gradients(whole.loss))


@pytest.mark.parametrize("case", [*CASES, "cross_entropy"])
@pytest.mark.parametrize("form", ["hidden", "logits"])
def test_a_batch_without_completion_tokens(case, form):
    """0 ÷ 0, or a loss cut from its graph: DDP would wait forever for the missing gradients."""
    name, options = CASES.get(case, ("cross_entropy", {}))
    setup = Setup()
    draft, target = (setup.draft(), setup.target()) if form == "hidden" else setup.logits()
    nothing = torch.full_like(setup.labels, -100)
    result = distillation_loss(
        draft, None if case == "cross_entropy" else target, nothing, divergence=name, options=options,
        with_acceptance=True,
    )  # fmt: skip
    assert result.loss.item() == 0
    assert result.num_tokens == 0
    assert all((gradient == 0).all() for gradient in setup.gradients(result.loss))


def test_equal_models_have_nothing_to_learn():
    setup = Setup(torch.float32)
    same = Unprojected(setup.hidden.detach(), LinearHead(setup.weight.detach(), setup.bias.detach()))
    result = distillation_loss(setup.draft(), same, setup.labels, with_acceptance=True)
    assert result.loss.item() == 0
    assert (result.acceptance == 1).all()
    assert all((gradient == 0).all() for gradient in setup.gradients(result.loss))


@pytest.mark.parametrize("case", CASES)
def test_acceptance_beside_the_loss(case):
    name, options = CASES[case]
    setup = Setup()
    draft, target = setup.logits()
    mask = setup.labels != -100
    result = distillation_loss(
        setup.draft(), setup.target(), setup.labels, divergence=name, options=options, chunk_size=4,
        with_acceptance=True,
    )  # fmt: skip
    torch.testing.assert_close(result.acceptance, 1 - total_variation(draft, target)[mask].detach())
    assert result.token_losses.shape == (int(mask.sum()),)
    assert not result.token_losses.requires_grad


def test_acceptance_is_at_the_loss_temperature_and_absent_unless_asked_for():
    setup = Setup()
    draft, target = setup.logits()
    result = distillation_loss(setup.draft(), setup.target(), setup.labels, temperature=2.0, with_acceptance=True)
    expected = 1 - total_variation(draft / 2, target / 2)[setup.labels != -100].detach()
    torch.testing.assert_close(result.acceptance, expected)
    assert distillation_loss(setup.draft(), setup.target(), setup.labels).acceptance is None


def test_padded_vocabulary_is_cut_from_both_heads():
    setup = Setup()
    draft, target = setup.logits()
    mask = setup.labels != -100
    setup.labels[mask] %= 20
    expected = forward_kl(draft[mask][:, :20], target[mask][:, :20]).mean()
    short = Unprojected(setup.hidden, LinearHead(setup.weight, setup.bias).first(20))
    short_target = Unprojected(setup.target_hidden, LinearHead(setup.target_weight).first(20))
    actual = distillation_loss(short, short_target, setup.labels).loss
    torch.testing.assert_close(actual, expected)
    assert_same(setup.gradients(actual), setup.gradients(expected))
    assert (setup.gradients(distillation_loss(short, short_target, setup.labels).loss)[1][20:] == 0).all()


def test_a_frozen_head_gets_no_gradient():
    """With LoRA the head is frozen; its gradient is a third of the work."""
    setup = Setup()
    setup.weight.requires_grad_(False)
    setup.bias.requires_grad_(False)
    loss = distillation_loss(setup.draft(), setup.target(), setup.labels).loss
    loss.backward()
    assert setup.hidden.grad is not None
    assert setup.weight.grad is None


def test_no_gradient_is_computed_in_evaluation(monkeypatch):
    from hf_draftkd.losses import objective

    asked = []
    original = objective.listed_value_and_gradient
    monkeypatch.setattr(
        objective, "listed_value_and_gradient", lambda *a, **k: asked.append(k["gradient"]) or original(*a, **k)
    )
    setup = Setup()
    with torch.no_grad():
        silent = distillation_loss(setup.draft(), setup.target(), setup.labels)
    assert asked == [False]
    assert not silent.loss.requires_grad
    torch.testing.assert_close(silent.loss, distillation_loss(setup.draft(), setup.target(), setup.labels).loss)


def test_a_second_backward_is_refused_and_not_doubled():
    setup = Setup()
    loss = distillation_loss(setup.draft(), setup.target(), setup.labels).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


def test_backward_multiplies_by_what_comes_in():
    """Trainers scale the loss (accumulation, fp16 loss scaling, number of processes)."""
    setup = Setup()
    plain = setup.gradients(distillation_loss(setup.draft(), setup.target(), setup.labels).loss)
    scaled = setup.gradients(8 * distillation_loss(setup.draft(), setup.target(), setup.labels).loss)
    assert_same(scaled, [8 * gradient for gradient in plain])


def test_under_autocast_the_projection_is_bf16_and_the_rest_float32():
    setup = Setup(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = distillation_loss(setup.draft(), setup.target(), setup.labels, with_acceptance=True)
        tvd = distillation_loss(
            setup.draft(), setup.target(), setup.labels, divergence="tvd_plus_plus", options={"estimator": "full"}
        )
    draft = (setup.hidden.bfloat16() @ setup.weight.bfloat16().t()).float() + setup.bias
    target = (setup.target_hidden.bfloat16() @ setup.target_weight.bfloat16().t()).float()
    mask = setup.labels != -100
    assert result.loss.dtype == torch.float32
    torch.testing.assert_close(result.loss, forward_kl(draft, target)[mask].mean())
    assert setup.gradients(result.loss)[1].dtype == torch.float32
    assert tvd.token_losses.sum().abs() < 1e-4


def test_memory_stays_within_a_chunk():
    """No tensor of [tokens, vocabulary] may come into being, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.t.default:  # a view of a head, not logits
                return out
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == V:
                    self.rows = max(self.rows, tensor.numel() // V)
            return out

    setup = Setup()
    for name, options in CASES.values():
        with Largest() as seen:
            loss = distillation_loss(
                setup.draft(), setup.target(), setup.labels, divergence=name, options=options, chunk_size=2,
                cross_entropy_weight=0.5,
            ).loss  # fmt: skip
            setup.gradients(loss)
        assert 0 < seen.rows <= 2, name


class TestTvdPlusPlus:
    def test_full_batch_identity_through_the_chunked_pass(self):
        """Statistics per chunk instead of per batch would break the identity gradient = TV's ÷ σ."""
        setup = Setup()
        draft, target = setup.logits()
        mask = setup.labels != -100
        q, p = draft[mask].softmax(-1), target[mask].softmax(-1)
        share = (q * (p > q)).sum(-1).mean()
        sigma = (share * (1 - share)).sqrt().detach()
        tv = distillation_loss(setup.draft(), setup.target(), setup.labels, divergence="total_variation")
        expected = [gradient / sigma for gradient in setup.gradients(tv.loss)]
        surrogate = distillation_loss(
            setup.draft(), setup.target(), setup.labels, divergence="tvd_plus_plus", options={"estimator": "full"},
            chunk_size=2,
        )  # fmt: skip
        assert abs(surrogate.loss.item()) < 1e-12
        assert_same(setup.gradients(surrogate.loss), expected)

    @pytest.mark.parametrize("statistics", ["batch", "token"])
    def test_sampled(self, statistics, monkeypatch):
        setup = Setup()
        tokens = setup.labels[setup.labels != -100]
        expected = naive(setup, tvd_plus_plus, {"statistics": statistics, "tokens": tokens})
        slopes = setup.gradients(expected)
        drawn = iter(tokens)
        monkeypatch.setattr(gradients, "draw", lambda q: torch.stack([next(drawn) for _ in q]).unsqueeze(-1))
        actual = distillation_loss(
            setup.draft(), setup.target(), setup.labels, divergence="tvd_plus_plus",
            options={"statistics": statistics}, chunk_size=4,
        ).loss  # fmt: skip
        torch.testing.assert_close(actual, expected)
        assert_same(setup.gradients(actual), slopes)

    def test_sampled_draws_the_same_tokens_in_both_passes(self):
        """Statistics from one draw and gradients from another would not be centred."""
        torch.manual_seed(0)
        setup = Setup()
        result = distillation_loss(
            setup.draft(), setup.target(), setup.labels, divergence="tvd_plus_plus", options={}, chunk_size=2
        )
        log_q = setup.logits()[0].log_softmax(-1)[setup.labels != -100].detach()
        advantages = []
        for loss in result.token_losses:
            # Two possible advantages, of opposite sign; each loss is one of them times −log q of some token.
            advantages.append(torch.sign(loss).item())
        assert {-1.0, 1.0} == set(advantages)
        ratio = advantages.count(1.0) / len(advantages)
        share, sigma = ratio, (ratio * (1 - ratio)) ** 0.5
        sizes = {1.0: (1 - share) / sigma, -1.0: share / sigma}
        for sign, loss, row in zip(advantages, result.token_losses.tolist(), log_q, strict=True):
            assert (row + abs(loss) / sizes[sign]).abs().min() < 1e-9


class TestErrors:
    setup = Setup()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"divergence": "forward"}, "Did you mean 'forward_kl'"),
            ({"divergence": "generalized_jsd", "options": {"beta": 2}}, "`beta` must be"),
            ({"temperature": 0.0}, "`temperature` must be"),
            ({"cross_entropy_weight": 1.5}, "`cross_entropy_weight` must be"),
            ({"divergence": "cross_entropy"}, "target must be None"),
        ],
    )
    def test_settings(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            distillation_loss(self.setup.draft(), self.setup.target(), self.setup.labels, **arguments)

    def test_a_missing_target(self):
        with pytest.raises(ValueError, match=r"divergence='forward_kl' compares.*choose divergence='cross_entropy'"):
            distillation_loss(self.setup.draft(), None, self.setup.labels)
        with pytest.raises(ValueError, match="target is None"):
            distillation_loss(self.setup.draft(), None, self.setup.labels, divergence=forward_kl)

    def test_tempered_cross_entropy(self):
        with pytest.raises(ValueError, match="always stands at temperature 1"):
            distillation_loss(self.setup.draft(), None, self.setup.labels, divergence="cross_entropy", temperature=2.0)

    def test_vocabularies_that_differ(self):
        longer = Unprojected(self.setup.target_hidden, LinearHead(torch.zeros(V + 1, G, dtype=torch.float64)))
        with pytest.raises(ValueError, match=r"one vocabulary.* 23\).* 24\).*cut both"):
            distillation_loss(self.setup.draft(), longer, self.setup.labels)


def test_partial_application_is_a_custom_divergence():
    setup = Setup()
    function = partial(DIVERGENCES["generalized_jsd"], beta=0.3)
    named = distillation_loss(
        setup.draft(), setup.target(), setup.labels, divergence="generalized_jsd", options={"beta": 0.3}
    )
    given = distillation_loss(setup.draft(), setup.target(), setup.labels, divergence=function)
    torch.testing.assert_close(given.loss, named.loss)
