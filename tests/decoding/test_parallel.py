"""A parallel draft proposes in one pass what separate passes over mask tokens say, and the target's text stays."""

from typing import Any

import pytest
import torch
from transformers import CompileConfig, PreTrainedModel

from hf_draftkd import SpeculativeDecoding
from hf_draftkd.decoding import verification
from hf_draftkd.models.draft_length import draft_length_settings, store_draft_settings
from hf_draftkd.models.parallel import choose_mask_token, parallel_draft, store_parallel_draft
from tests.tiny import ARCHITECTURES, tiny_llama, tiny_pair, tiny_prompts, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = tiny_prompts(TOKENIZER, 4)
MASK = 2


def parallel_pair(architecture: str = "llama", num_tokens: int = 6, **options: Any) -> tuple[Any, Any]:
    """A draft whose proposals behind mask tokens are right now and then: mask tokens add little to its states."""
    draft, target = tiny_pair(architecture, agreement=0.95, **options)
    store_parallel_draft(draft.config, MASK, num_tokens)
    return draft, target


def padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    rows = [prompt[0].tolist() for prompt in prompts]
    return dict(TOKENIZER.pad({"input_ids": rows}, padding_side="left", return_tensors="pt"))


@torch.no_grad()
def reference_rounds(
    draft: PreTrainedModel, target: PreTrainedModel, prompt: torch.Tensor, new: int, gamma: int
) -> tuple[int, int]:
    """(rounds, accepted) of greedy decoding, each pass over the whole text, without a cache."""
    text, rounds, accepted = prompt, 0, 0
    while (left := prompt.shape[1] + new - text.shape[1]) > 0:
        drafted = min(gamma, left - 1)
        masks = torch.full((1, max(drafted - 1, 0)), MASK)
        proposed = draft(torch.cat([text, masks], 1)).logits[:, text.shape[1] - 1 :].argmax(-1)[:, :drafted]
        chosen = target(torch.cat([text, proposed], 1)).logits[:, text.shape[1] - 1 :].argmax(-1)
        n = int((proposed == chosen[:, :drafted]).long().cumprod(1).sum())
        text, rounds, accepted = torch.cat([text, chosen[:, : n + 1]], 1), rounds + 1, accepted + n
    return rounds, accepted


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_pass_proposes_what_separate_passes_say(architecture: str) -> None:
    draft, target = parallel_pair(architecture)
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    together = SpeculativeDecoding(draft, 3)
    batch = padded(PROMPTS)
    texts = target.generate(**batch, custom_generate=together, **options)
    assert torch.equal(texts, target.generate(**batch, **options))
    for prompt in PROMPTS:
        decoding = SpeculativeDecoding(draft, 3)
        text = target.generate(prompt, custom_generate=decoding, **options)
        assert torch.equal(text, target.generate(prompt, **options))
        counts = (decoding.counts.num_spec_steps, decoding.counts.num_accepted_draft_tokens)
        assert counts == reference_rounds(draft, target, prompt, 30, 3)
    # A batch drafts on where one of its texts is about to end, so its counts may differ there.
    assert together.counts.num_accepted_draft_tokens > 0


@pytest.mark.parametrize("gamma", [1, "auto"])
def test_other_lengths_and_penalties_that_look_back(gamma: Any) -> None:
    draft, target = parallel_pair(eos_scale=2.0)
    options: dict[str, Any] = {"max_new_tokens": 25, "do_sample": False, "repetition_penalty": 1.5}
    for inputs in ({"input_ids": PROMPTS[0]}, padded(PROMPTS)):
        text = target.generate(**inputs, custom_generate=SpeculativeDecoding(draft, gamma), **options)
        assert torch.equal(text, target.generate(**inputs, **options))


def test_sampling_verifies_with_the_distribution_of_each_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    draft, target = parallel_pair()
    seen = []
    verify = verification.verify_sampled
    monkeypatch.setattr(verification, "verify_sampled", lambda *a, **o: seen.append(a) or verify(*a, **o))
    decoding = SpeculativeDecoding(draft, 4, draft_vocabulary=list(range(3, 290)))
    target.generate(PROMPTS[1], do_sample=True, temperature=0.7, max_new_tokens=12, custom_generate=decoding, top_k=0)
    drafted, _, q = seen[0]
    with torch.no_grad():
        logits = draft(torch.cat([PROMPTS[1], torch.full((1, 3), MASK)], 1)).logits[0, -4:]
    logits[:, [0, 1, 2, *range(290, 300)]] = -torch.inf
    torch.testing.assert_close(q[0], (logits / 0.7).softmax(-1))
    assert drafted.shape == (1, 4)


def test_the_same_weights_serve_as_an_ordinary_draft() -> None:
    draft, target = parallel_pair()
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
    plain = target.generate(PROMPTS[0], **options)
    assert torch.equal(target.generate(PROMPTS[0], assistant_model=draft, **options), plain)
    one_by_one = SpeculativeDecoding(draft, 12, parallel=False)
    assert torch.equal(target.generate(PROMPTS[0], custom_generate=one_by_one, **options), plain)
    store_parallel_draft(draft.config, None, 1)
    ordinary = SpeculativeDecoding(draft, 12)
    target.generate(PROMPTS[0], custom_generate=ordinary, **options)
    assert ordinary.counts == one_by_one.counts


def test_compiled_rounds_have_one_shape() -> None:
    draft, target = parallel_pair(num_layers=1)
    decoding = SpeculativeDecoding(draft, 3, compile=True)
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
    eager = CompileConfig(backend="eager", dynamic=False, mode=None)
    for inputs in ({"input_ids": PROMPTS[0][:, :3]}, padded(PROMPTS)):
        text = target.generate(**inputs, custom_generate=decoding, compile_config=eager, **options)
        assert torch.equal(text, target.generate(**inputs, **options))


def test_what_a_config_says_survives_saving_and_drafts_of_others_are_read(tmp_path: Any) -> None:
    draft = tiny_llama()
    with pytest.raises(ValueError, match="pard_token"):
        SpeculativeDecoding(draft, parallel=True)
    draft.config.ptd_token_id = 7
    assert parallel_draft(draft.config) == (7, 8)
    store_parallel_draft(draft.config, MASK, 4)
    draft.save_pretrained(tmp_path)
    loaded = type(draft).from_pretrained(tmp_path)
    assert parallel_draft(loaded.config) == (MASK, 4)
    with pytest.raises(ValueError, match="predict 4 tokens in one pass"):
        SpeculativeDecoding(loaded, 5)


def test_each_way_of_drafting_has_a_recorded_length_of_its_own(tmp_path: Any) -> None:
    """Catches 3 tokens that pay in one pass and are then drafted one by one, in transformers' own loop too."""
    draft, _ = parallel_pair()
    store_draft_settings(draft, draft_length_settings(2) | draft_length_settings(3, parallel=True))
    draft.save_pretrained(tmp_path)
    loaded = type(draft).from_pretrained(tmp_path)
    assert SpeculativeDecoding(loaded).length.longest == 3
    assert SpeculativeDecoding(loaded, parallel=False).length.longest == 2
    assert loaded.generation_config.num_assistant_tokens == 2


def test_the_mask_token_is_one_that_no_text_holds() -> None:
    assert choose_mask_token(tiny_llama(vocab_size=304), TOKENIZER) == 300
    assert choose_mask_token(tiny_llama(), TOKENIZER) == TOKENIZER.pad_token_id == 2
    with pytest.raises(ValueError, match="mask token"):
        choose_mask_token(tiny_llama(), tiny_tokenizer(pad_is_eos=True))
