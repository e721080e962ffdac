"""Corrected drafting against its definition: propose, look at the target's k likeliest, replace."""

import pytest
import torch
from transformers import LogitsProcessorList

from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.training.correcting import CorrectedByTarget, corrected_distribution
from tests.tiny import tiny_pair


def by_enumeration(q: list[float], p: list[float], allowed: list[bool]) -> list[float]:
    """Probability of each outcome: every proposal, and every replacement of it."""
    outcome = [0.0] * len(q)
    for proposed in range(len(q)):
        if allowed[proposed]:
            outcome[proposed] += q[proposed]
        else:
            for replacement in range(len(p)):
                outcome[replacement] += q[proposed] * p[replacement]
    return outcome


def test_distribution_is_that_of_proposing_and_replacing():
    """Replacements drawn from what is left of p, or proposals outside the top k kept."""
    generator = torch.Generator().manual_seed(0)
    q, p = torch.rand(2, 7, generator=generator, dtype=torch.float64).softmax(-1)
    allowed = torch.tensor([True, False, False, True, False, True, False])
    expected = by_enumeration(q.tolist(), p.tolist(), allowed.tolist())
    torch.testing.assert_close(corrected_distribution(q, p, allowed), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_text_is_that_of_the_naive_loop(family):
    """A key-value cache out of step, positions that count the padding, or a mask that does not grow; the target's
    logits of whole prompts held, where those of their last tokens are read.
    """
    draft, target = tiny_pair(family)
    prompts = [[0, 40, 50, 60, 70], [0, 99]]
    top_k = 3
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(10):
            with torch.no_grad():
                q, p = (model(torch.tensor([ids])).logits[0, -1].double() for model in (draft, target))
            proposal = int(q.argmax())
            better = int((p > p[proposal]).sum())
            ids.append(proposal if better < top_k else int(p.argmax()))
        expected.append(ids[len(prompt) :])
    replaced = {tuple(row) for row in expected} - {tuple(_alone(draft, prompt)) for prompt in prompts}
    assert replaced, "the target must have had something to correct"

    ids = torch.tensor([[2] * (5 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (5 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    setting = DecodingSetting()
    processor = CorrectedByTarget(target, setting, top_k, 300, mask)
    projected = []
    target.lm_head.register_forward_hook(lambda head, inputs, logits: projected.append(logits.shape[1]))
    config = setting.generation_config(draft, 10, eos_token_id=None)
    output = draft.generate(
        input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=LogitsProcessorList([processor])
    )
    assert output[:, 5:].tolist() == expected
    assert projected == [1] * 10


def _alone(draft, prompt):
    config = DecodingSetting().generation_config(draft, 10, eos_token_id=None)
    ids = torch.tensor([prompt])
    output = draft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return output[0, len(prompt) :].tolist()


def test_sampling_setting_softens_both_and_the_top_k_does_not_move():
    """A temperature applied to one model only, or twice; filters that come before the target's choice of k."""
    draft, target = tiny_pair("llama")
    setting = DecodingSetting(temperature=0.5, top_p=0.9)
    ids = torch.tensor([[0, 40, 50, 60]])
    with torch.no_grad():
        q_logits, p_logits = (model(ids).logits[0, -1].double() for model in (draft, target))

    def softened(logits):
        probabilities = torch.softmax(logits / 0.5, -1)
        order = probabilities.argsort(descending=True)
        kept, total = torch.zeros_like(probabilities), 0.0
        for token in order.tolist():
            if total < 0.9:
                kept[token] = probabilities[token]
            total += float(probabilities[token])
        return kept / kept.sum()

    allowed = [bool((p_logits > value).sum() < 4) for value in p_logits]
    expected = by_enumeration(softened(q_logits).tolist(), softened(p_logits).tolist(), allowed)
    processor = CorrectedByTarget(target, setting, 4, 300, torch.ones_like(ids))
    with torch.no_grad():
        found = processor(ids, draft(ids).logits[:, -1].float())
    torch.testing.assert_close(found.double().softmax(-1)[0], torch.tensor(expected).double(), atol=1e-5, rtol=1e-4)


def test_rows_that_stand_for_no_token_are_never_written():
    """A target whose vocabulary is padded further than the draft's, and would write a padded row."""
    _, target = tiny_pair("qwen3", draft_vocab_size=304, target_vocab_size=320)
    ids = torch.tensor([[0, 40]])
    scores = torch.zeros(1, 304)
    scores[:, 300:] = -torch.inf
    with torch.no_grad():
        found = CorrectedByTarget(target, DecodingSetting(temperature=1.0), 2, 300, torch.ones_like(ids))(ids, scores)
    assert found.shape == (1, 304)
    assert bool((found[:, 300:] == -torch.inf).all())
