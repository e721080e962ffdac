"""Sampled texts have the target's distribution, and are accepted as often as the exact computation says."""

from itertools import product
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_draftkd import SpeculativeDecoding
from hf_draftkd.acceptance import accepted_given_output, block_efficiency
from hf_draftkd.decoding.processors import logits_processors, process_logits
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.decoding.verification import verify_greedy, verify_sampled
from tests.tiny import tiny_pair

SMALL = 7
LENGTH = 3
PROMPT = torch.tensor([[0, 4, 5, 3]])


def small_pair(**options: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    draft, target = tiny_pair(draft_vocab_size=SMALL, target_vocab_size=SMALL, agreement=0.7, **options)
    for model in (draft, target):
        with torch.no_grad():
            model.lm_head.weight *= 0.5  # every continuation has a chance
        model.generation_config.pad_token_id = 2
    return draft, target


def next_distribution(logits: torch.Tensor, prefix: list[int], options: dict[str, Any]) -> torch.Tensor:
    """What `generate` samples from, written from the definitions, in float64."""
    scores = logits.double()
    penalty = options.get("repetition_penalty", 1.0)
    for token in set(prefix):
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    p = (scores / options.get("temperature", 1.0)).softmax(0)
    if options.get("top_k"):
        p = torch.where(p >= p.sort(descending=True).values[options["top_k"] - 1], p, 0.0)
    if "top_p" in options:
        order = p.argsort(descending=True)
        before = p[order].cumsum(0) - p[order]
        p[order[before >= options["top_p"]]] = 0.0
    if "min_p" in options:
        p = torch.where(p >= options["min_p"] * p.max(), p, 0.0)
    if "typical_p" in options:
        surprise = (-p.log() - -(p * p.log()).sum()).abs()
        order = surprise.argsort()
        before = p[order].cumsum(0) - p[order]
        p[order[before >= options["typical_p"]]] = 0.0
    return p / p.sum()


def continuations(target: PreTrainedModel, options: dict[str, Any]) -> dict[tuple[int, ...], float]:
    """The chance of every continuation of LENGTH tokens, padded (2) behind an end of sequence (1)."""
    chances = {(): 1.0}
    for _ in range(LENGTH):
        longer: dict[tuple[int, ...], float] = {}
        for text, chance in chances.items():
            if 1 in text:
                longer[(*text, 2)] = longer.get((*text, 2), 0.0) + chance
                continue
            prefix = [*PROMPT[0].tolist(), *text]
            with torch.no_grad():
                logits = target(torch.tensor([prefix])).logits[0, -1]
            for token, p in enumerate(next_distribution(logits, prefix, options).tolist()):
                longer[(*text, token)] = longer.get((*text, token), 0.0) + chance * p
        chances = longer
    return chances


def chi_square_p_value(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Cells with fewer than 5 expected are pooled into one."""
    rare = expected < 5
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_p": 0.9},
        {"top_k": 3},
        {"min_p": 0.3},
        {"typical_p": 0.7},
        {"temperature": 1.5, "repetition_penalty": 1.8},
    ],
    ids=str,
)
def test_whole_continuations_have_the_target_s_distribution(options: dict[str, Any]) -> None:
    draft, target = small_pair()
    chances = continuations(target, options)
    torch.manual_seed(1)
    number = 6000
    decoding = SpeculativeDecoding(draft, 2)
    texts = target.generate(
        PROMPT, max_new_tokens=LENGTH, do_sample=True, num_return_sequences=number, custom_generate=decoding,
        **({"top_k": 0} | options),
    )[:, PROMPT.shape[1] :]  # fmt: skip
    texts = torch.nn.functional.pad(texts, (0, LENGTH - texts.shape[1]), value=2)
    index = {text: i for i, text in enumerate(chances)}
    counts = torch.zeros(len(index), dtype=torch.float64)
    for text in texts.tolist():
        counts[index[tuple(text)]] += 1
    expected = number * torch.tensor(list(chances.values()), dtype=torch.float64)
    assert counts[expected == 0].sum() == 0
    assert chi_square_p_value(counts[expected > 0], expected[expected > 0]) > 1e-3
    assert 0.2 < decoding.counts.draft_acceptance_rate < 0.95


def test_a_single_text_has_the_target_s_distribution() -> None:
    draft, target = small_pair(seed=3)
    options = {"temperature": 0.8, "top_p": 0.9}
    chances = continuations(target, options)
    decoding = SpeculativeDecoding(draft, 2)
    torch.manual_seed(0)
    seen: dict[tuple[int, ...], int] = dict.fromkeys(chances, 0)
    number = 200
    for _ in range(number):
        text = target.generate(
            PROMPT, max_new_tokens=LENGTH, do_sample=True, top_k=0, custom_generate=decoding, **options
        )
        new = text[0, PROMPT.shape[1] :].tolist()
        seen[tuple(new + [2] * (LENGTH - len(new)))] += 1
    expected = number * torch.tensor(list(chances.values()), dtype=torch.float64)
    counts = torch.tensor(list(seen.values()), dtype=torch.float64)
    assert chi_square_p_value(counts[expected > 0], expected[expected > 0]) > 1e-3


def test_counted_block_efficiency_is_the_computed_one() -> None:
    draft, target = tiny_pair(agreement=0.9, num_layers=1)
    setting = DecodingSetting(temperature=0.7, top_p=0.9)
    processors = logits_processors(setting)
    torch.manual_seed(0)
    differences = []
    for _ in range(10):
        decoding = SpeculativeDecoding(draft, 4)
        texts = target.generate(
            PROMPT, max_new_tokens=30, do_sample=True, temperature=0.7, top_p=0.9, top_k=0, eos_token_id=None,
            pad_token_id=2, num_return_sequences=48, custom_generate=decoding,
        )  # fmt: skip
        new, start = texts[:, PROMPT.shape[1] :], PROMPT.shape[1] - 1
        with torch.no_grad():
            q, p = (model(texts).logits[:, start:-1] for model in (draft, target))
        lengths = torch.full((new.numel(),), 1)
        q, p = (process_logits(x.flatten(0, 1), new.reshape(-1, 1), lengths, processors).view_as(x) for x in (q, p))
        computed = block_efficiency(accepted_given_output(q, p, new), 4)
        differences.append(decoding.counts.mean_acceptance_length - computed)
    mean, deviation = torch.tensor(differences).mean(), torch.tensor(differences).std()
    assert abs(mean) < 3.5 * deviation / len(differences) ** 0.5
    # The interval is narrow enough to see warping twice, which costs several hundredths here.
    assert deviation / len(differences) ** 0.5 < 0.02


@pytest.mark.parametrize("form", ["linear", "square", "exponential", "ensemble"])
def test_lenience_accepts_as_often_as_its_form_says(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(6, generator=generator).mul(2).softmax(0) for _ in range(2))
    number, lenience = 40000, 0.6
    torch.manual_seed(0)
    drafted = torch.multinomial(q, number, replacement=True)[:, None]
    scores = p.log().expand(number, 2, -1)
    verdict = verify_sampled(drafted, scores, q.expand(number, 1, -1), lenience=lenience, form=form)
    v = {
        "linear": p / lenience,
        "square": p / lenience**2,
        "exponential": p**lenience,
        "ensemble": lenience * p + (1 - lenience) * q,
    }[form]
    kept = torch.minimum(q, v)
    assert float(verdict[:, -1].float().mean()) == pytest.approx(float(kept.sum()), abs=0.01)
    residual = (p - q).clamp(min=0)
    expected = kept + (1 - kept.sum()) * residual / residual.sum()
    counts = torch.bincount(verdict[:, 0], minlength=6).double()
    assert chi_square_p_value(counts, number * expected.double()) > 1e-3


@torch.no_grad()
def test_lossy_greedy_text_is_that_of_the_ensemble() -> None:
    """The wrong share of p and q, or the token behind accepted ones from the ensemble instead of the target."""
    draft, target = tiny_pair(agreement=0.8)
    gamma, weight, length = 3, 0.4, 40
    text = PROMPT
    while text.shape[1] < PROMPT.shape[1] + length:
        drafted, q = text, []
        for _ in range(gamma):
            q.append(draft(drafted).logits[0, -1].double().softmax(0))
            drafted = torch.cat([drafted, q[-1].argmax()[None, None]], 1)
        p = target(drafted).logits[0, text.shape[1] - 1 :].double().softmax(-1)
        chosen = [int((weight * p[k] + (1 - weight) * q[k]).argmax()) for k in range(gamma)] + [int(p[gamma].argmax())]
        guesses = drafted[0, text.shape[1] :].tolist()
        kept = next((k for k in range(gamma) if chosen[k] != guesses[k]), gamma) + 1
        text = torch.cat([text, torch.tensor([chosen[:kept]])], 1)
    expected = text[:, : PROMPT.shape[1] + length]
    options: dict[str, Any] = {"max_new_tokens": length, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    lossy = SpeculativeDecoding(draft, gamma, lenience=weight, lenience_form="ensemble")
    assert torch.equal(target.generate(PROMPT, custom_generate=lossy, **options), expected)
    assert not torch.equal(target.generate(PROMPT, **options), expected)
    assert 0 < lossy.counts.draft_acceptance_rate < 1


def test_verdicts_of_single_positions() -> None:
    scores = torch.zeros(1, 3, 4)
    for position, token in enumerate([2, 3, 1]):
        scores[0, position, token] = 50.0
    assert verify_greedy(torch.tensor([[2, 3]]), scores).tolist() == [[2, 3, 1, 2]]
    assert verify_greedy(torch.tensor([[2, 0]]), scores).tolist()[0][:2] == [2, 3]
    assert verify_greedy(torch.tensor([[1, 3]]), scores)[0, -1] == 0
    q = torch.zeros(1, 2, 4).scatter_(2, torch.tensor([[[2], [0]]]), 1.0)
    verdict = verify_sampled(torch.tensor([[2, 0]]), scores, q)[0].tolist()
    assert verdict[:2] + verdict[-1:] == [2, 3, 1]


def test_every_pair_of_p_and_q_over_two_tokens_gives_p() -> None:
    """The definition, by enumeration: q(x)·min(1, p/q) plus what is left to the residual is p."""
    torch.manual_seed(0)
    for p0, q0 in product((0.0, 0.3, 1.0), (0.1, 0.9)):
        number = 4000
        p, q = torch.tensor([p0, 1 - p0]), torch.tensor([q0, 1 - q0])
        drafted = torch.multinomial(q, number, replacement=True)[:, None]
        verdict = verify_sampled(drafted, p.log().expand(number, 2, 2), q.expand(number, 1, 2))
        share = float((verdict[:, 0] == 0).float().mean())
        assert share == pytest.approx(p0, abs=4 * (p0 * (1 - p0) / number) ** 0.5)
