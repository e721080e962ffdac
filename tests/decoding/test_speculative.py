"""Speculative decoding writes what `generate` writes: one text or a batch, whatever ends or shapes a text."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    GPTNeoConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MptConfig,
    PreTrainedModel,
    StoppingCriteria,
    StopStringCriteria,
    TextStreamer,
)

from examples.benchmarks.tiny_architectures import tiny_model
from hf_draftkd import SpeculativeDecoding, count_acceptance, load_draft, load_target
from hf_draftkd.acceptance import AcceptanceCounts
from hf_draftkd.decoding.caches import CachedModel, GrowingLayer
from hf_draftkd.decoding.compiled import CompiledModels
from hf_draftkd.decoding.drafting import OneByOne
from hf_draftkd.decoding.texts import Texts
from hf_draftkd.evaluation.assisted import fixed_draft_length
from hf_draftkd.models.forward import CACHE, evaluating
from hf_draftkd.models.parallel import store_parallel_draft
from tests.tiny import ARCHITECTURES, tiny_gpt2, tiny_llama, tiny_pair, tiny_prompts, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = tiny_prompts(TOKENIZER, 5)


def padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    rows = [prompt[0].tolist() for prompt in prompts]
    return dict(TOKENIZER.pad({"input_ids": rows}, padding_side="left", return_tensors="pt"))


def check_equal(target: PreTrainedModel, draft: PreTrainedModel, gamma: Any = 4, **options: Any) -> SpeculativeDecoding:
    """Greedy texts, some of them alone and all as a batch, are those of `generate` without a draft."""
    decoding = SpeculativeDecoding(draft, gamma)
    options = {"max_new_tokens": 24, "do_sample": False} | options
    for inputs in (*({"input_ids": prompt} for prompt in PROMPTS[:2]), padded(PROMPTS)):
        plain = target.generate(**inputs, **options)
        assert torch.equal(target.generate(**inputs, custom_generate=decoding, **options), plain)
    return decoding


@pytest.mark.parametrize("is_parallel", [False, True])
def test_a_text_may_grow_longer_than_the_draft_can_read(is_parallel):
    """An IndexError of GPT-2's positions in the middle of the work, for data too that a draft helps to write."""
    target, draft = tiny_gpt2(), tiny_gpt2(max_position_embeddings=20)
    if is_parallel:
        store_parallel_draft(draft.config, 2, 4)
    counts = check_equal(target, draft).counts
    assert 0 < counts.num_draft_tokens < 3 * counts.num_spec_steps


@pytest.mark.parametrize("is_parallel", [False, True])
def test_compiled_rounds_end_with_the_draft_s_context_too(is_parallel, monkeypatch):
    """The same IndexError: a round of one shape always drafted. And a context that lasts is used to its end."""
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    target, draft = tiny_gpt2(), tiny_gpt2(max_position_embeddings=36)
    if is_parallel:
        store_parallel_draft(draft.config, 2, 4)
    decoding = SpeculativeDecoding(draft, 4, compile=True)
    widest = padded(PROMPTS)["input_ids"].shape[1]
    for inputs, max_length, drafts_to_the_end in (
        ({"input_ids": PROMPTS[0]}, 36, True),
        ({"input_ids": PROMPTS[0]}, 60, False),
        (padded(PROMPTS), widest + 30, False),
    ):
        decoding.counts = AcceptanceCounts()
        options: dict[str, Any] = {"max_length": max_length, "do_sample": False, "eos_token_id": None}
        plain = target.generate(**inputs, **options)
        assert torch.equal(target.generate(**inputs, custom_generate=decoding, **options), plain)
        counts = decoding.counts
        assert (counts.num_draft_tokens == 4 * counts.num_spec_steps) == drafts_to_the_end


def test_a_batch_loses_a_text_before_anything_was_drafted():
    """An AttributeError of the draft's empty cache, where drafting was found not to pay and a text ended at once."""
    draft, target = tiny_pair("llama", eos_scale=2)
    inputs = padded(PROMPTS)
    first = target.generate(**inputs, max_new_tokens=1, do_sample=False)[:, -1]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": int(first[0])}
    decoding = SpeculativeDecoding(draft)
    decoding.length.choose = lambda num_texts: 0
    plain = target.generate(**inputs, **options)
    assert torch.equal(target.generate(**inputs, custom_generate=decoding, **options), plain)


def test_tokenizers_are_read_and_compared_once_and_as_the_models_were(saved_pair, monkeypatch):
    """Again by each `SpeculativeDecoding`, and without the code that the models were allowed to bring."""
    read, tokenizer_of = [], AutoTokenizer.from_pretrained

    def noted(name: str, **options: Any) -> Any:
        read.append(options["trust_remote_code"])
        return tokenizer_of(name, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", noted)
    compared = []
    monkeypatch.setattr("hf_draftkd.decoding.speculative.check_tokenizers", lambda *both: compared.append(both))
    draft, target = load_draft(saved_pair[0], trust_remote_code=True), load_target(saved_pair[1])
    for _ in range(2):
        target.generate(PROMPTS[0], custom_generate=SpeculativeDecoding(draft), max_new_tokens=2)
    assert read == [True, False]
    assert len(compared) == 1


@pytest.mark.parametrize("gamma", [1, 4, "auto"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_texts_are_those_of_plain_decoding(architecture: str, gamma: Any) -> None:
    draft, target = tiny_pair(architecture, eos_scale=2.0, agreement=0.95)
    decoding = check_equal(target, draft, gamma)
    # Neither every draft accepted nor none: both ways through a round were taken.
    assert 0 < decoding.counts.draft_acceptance_rate < 1


def test_left_padding_with_a_single_text() -> None:
    draft, target = tiny_pair(agreement=0.95)
    inputs = {name: rows[:1] for name, rows in padded(PROMPTS).items()}
    assert inputs["attention_mask"].min() == 0
    plain = target.generate(**inputs, max_new_tokens=30, do_sample=False)
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
    assert torch.equal(target.generate(**inputs, custom_generate=SpeculativeDecoding(draft, 3), **options), plain)


def test_a_draft_that_is_its_own_target_is_always_accepted() -> None:
    target = tiny_llama()
    decoding = SpeculativeDecoding(target, 4)
    target.generate(PROMPTS[0], max_new_tokens=50, do_sample=False, eos_token_id=None, custom_generate=decoding)
    assert decoding.counts.mean_acceptance_length == 5.0
    assert decoding.counts.draft_acceptance_rate == 1.0


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 12},
        {"bad_words_ids": [[20, 21], [30]]},
        {"exponential_decay_length_penalty": (5, 1.2)},
        {"forced_eos_token_id": 1},
        {"suppress_tokens": [40, 41, 42]},
        {"prefix_allowed_tokens_fn": lambda row, ids: list(range(1 + len(ids) % 3, 300, 3))},
        {"eos_token_id": [1, 60, 61, 62, 63, 64, 65]},
        {"max_new_tokens": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_settings_that_look_back_or_end_texts(options: dict[str, Any]) -> None:
    draft, target = tiny_pair(eos_scale=2.0, agreement=0.95)
    check_equal(target, draft, **options)


@pytest.mark.parametrize(("is_static", "gamma", "length"), [(False, 3, 160), (True, 6, 153)])
def test_holes_that_rejected_tokens_leave_are_squeezed_out(
    is_static: bool, gamma: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens out of order, or of another row, once a cache holds more holes than it is worth reading over, or a static
    one is full of them: at this length it has the least room. Its steps are not compiled here.
    """
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    draft, target = tiny_pair("qwen3", agreement=0.85, num_layers=1)
    squeezed, keep_rows = [], CachedModel.keep_rows

    def noted(model: CachedModel, places: list[int]) -> None:
        squeezed.append(places == list(range(len(model.read))))
        keep_rows(model, places)

    monkeypatch.setattr(CachedModel, "keep_rows", noted)
    options: dict[str, Any] = {"max_new_tokens": length, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    plain = target.generate(**padded(PROMPTS), **options)
    decoding = SpeculativeDecoding(draft, gamma, compile=is_static)
    assert torch.equal(target.generate(**padded(PROMPTS), custom_generate=decoding, **options), plain)
    assert any(squeezed)


def test_num_return_sequences_is_a_batch() -> None:
    draft, target = tiny_pair(agreement=0.95)
    torch.manual_seed(0)
    options: dict[str, Any] = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 20}
    texts = target.generate(PROMPTS[1], custom_generate=SpeculativeDecoding(draft, 3), **options)
    assert len({tuple(text) for text in texts.tolist()}) == 3


def test_stop_strings() -> None:
    draft, target = tiny_pair(agreement=0.95)
    text = target.generate(PROMPTS[0], max_new_tokens=40, do_sample=False)[0, PROMPTS[0].shape[1] :]
    stop = TOKENIZER.decode(text[9:11])
    check_equal(target, draft, stopping_criteria=[StopStringCriteria(TOKENIZER, [stop])])
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "stop_strings": [stop]}
    plain = target.generate(PROMPTS[0], tokenizer=TOKENIZER, **options)
    assert plain.shape[1] < PROMPTS[0].shape[1] + 40
    decoding = SpeculativeDecoding(draft, 4, tokenizer=TOKENIZER)
    assert torch.equal(target.generate(PROMPTS[0], custom_generate=decoding, **options), plain)
    with pytest.raises(ValueError, match="tokenizer"):
        target.generate(PROMPTS[0], custom_generate=SpeculativeDecoding(draft, 4), **options)


class _EndsAfter(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return (input_ids == 50).sum(1) + (input_ids[:, -1] % 7 == 0) > 0


def test_a_criterion_of_the_user_is_asked_after_every_token() -> None:
    draft, target = tiny_pair(agreement=0.95)
    check_equal(target, draft, stopping_criteria=[_EndsAfter()])


class _EndsAtSeven(EosTokenCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] % 7 == 0


@pytest.mark.parametrize(
    "criterion", [MaxLengthCriteria(45), MaxLengthCriteria(70), MaxLengthCriteria(3), _EndsAtSeven(1)]
)
def test_a_criterion_of_the_user_takes_the_place_of_the_call_s_own(criterion: StoppingCriteria) -> None:
    """Texts cut off at the call's `max_new_tokens`; a crash where the prompt is longer already, of which plain decoding
    writes one token; another meaning of a criterion of a known kind.
    """
    draft, target = tiny_pair(agreement=0.95)
    check_equal(target, draft, stopping_criteria=[criterion], max_new_tokens=25)


class _DependsOnPosition(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, input_ids.shape[1] % 5 :: 5] += 3.0
        return scores


def test_a_processor_of_the_user_sees_the_prefix_it_would_have_seen() -> None:
    draft, target = tiny_pair(agreement=0.95)
    check_equal(target, draft, logits_processor=LogitsProcessorList([_DependsOnPosition()]))


def test_a_constraint_is_never_asked_about_what_no_text_holds() -> None:
    """Rows of a batch that are shorter were shown with what lay behind their ends, which a grammar refuses."""
    draft, target = tiny_pair(agreement=0.95)
    start = padded(PROMPTS)["input_ids"].shape[1]

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        groups = [token // 50 for token in ids[start:].tolist()]
        assert groups == [k % 6 for k in range(len(groups))]
        return list(range(50 * (len(groups) % 6), 50 * (len(groups) % 6 + 1)))

    options: dict[str, Any] = {"max_new_tokens": 30, "eos_token_id": None, "prefix_allowed_tokens_fn": allowed}
    plain = target.generate(**padded(PROMPTS), **options)
    decoding = SpeculativeDecoding(draft, 4)
    assert torch.equal(target.generate(**padded(PROMPTS), custom_generate=decoding, **options), plain)
    assert 0 < decoding.counts.draft_acceptance_rate < 1


def test_a_constraint_is_never_asked_what_follows_the_end_of_a_text() -> None:
    """The draft goes on behind an end of sequence, where a grammar has nothing to allow."""
    draft, target = tiny_pair(agreement=0.95)
    start = PROMPTS[0].shape[1]

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        new = ids[start:].tolist()
        if TOKENIZER.eos_token_id in new:
            return []
        return list(range(50, 150)) if len(new) < 5 else [TOKENIZER.eos_token_id]

    options: dict[str, Any] = {"max_new_tokens": 30, "prefix_allowed_tokens_fn": allowed}
    plain = target.generate(PROMPTS[0], **options)
    ours = target.generate(PROMPTS[0], custom_generate=SpeculativeDecoding(draft, 4), **options)
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("samples", [False, True])
def test_a_constraint_that_leaves_nothing_of_the_draft_vocabulary(samples: bool) -> None:
    """Greedily the draft went on from a token that is not allowed; sampled, it drew an id that does not exist."""
    draft, target = tiny_pair(agreement=0.95)

    class Grammar(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            new = input_ids[0, PROMPTS[0].shape[1] :].tolist()
            assert all((token < 150) == (place % 2 == 0) for place, token in enumerate(new))
            return scores.masked_fill((torch.arange(300) < 150) != (len(new) % 2 == 0), -torch.inf)

    options: dict[str, Any] = {"max_new_tokens": 20, "eos_token_id": None, "logits_processor": [Grammar()]}
    decoding = SpeculativeDecoding(draft, 4, draft_vocabulary=list(range(3, 150)))
    text = target.generate(PROMPTS[0], do_sample=samples, custom_generate=decoding, **options)
    assert text.shape[1] == PROMPTS[0].shape[1] + 20
    assert samples or torch.equal(text, target.generate(PROMPTS[0], **options))


def test_max_time_ends_decoding() -> None:
    draft, target = tiny_pair()
    text = target.generate(
        PROMPTS[0], max_new_tokens=200, max_time=1e-6, do_sample=False, custom_generate=SpeculativeDecoding(draft, 2)
    )
    # One round, as plain decoding writes one token before it looks at the clock.
    assert 0 < text.shape[1] - PROMPTS[0].shape[1] <= 3


def test_scores_and_logits_are_those_of_plain_decoding() -> None:
    draft, target = tiny_pair(agreement=0.95)
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "repetition_penalty": 1.3}
    options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    for inputs in ({"input_ids": PROMPTS[0]}, padded(PROMPTS)):
        plain = target.generate(**inputs, **options)
        ours = target.generate(**inputs, custom_generate=SpeculativeDecoding(draft, 4), **options)
        assert torch.equal(plain.sequences, ours.sequences)
        for name in ("scores", "logits"):
            torch.testing.assert_close(torch.stack(ours[name]), torch.stack(plain[name]), atol=1e-4, rtol=1e-4)
    assert getattr(ours, CACHE) is None


def test_the_returned_cache_continues_the_text() -> None:
    draft, target = tiny_pair(agreement=0.95)
    decoding = SpeculativeDecoding(draft, 4)
    options: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "eos_token_id": None}
    first = target.generate(PROMPTS[0], max_new_tokens=10, custom_generate=decoding, **options)
    assert first[CACHE].get_seq_length() == first.sequences.shape[1] - 1
    cache = first[CACHE]
    second = target.generate(first.sequences, max_new_tokens=10, **{CACHE: cache}, custom_generate=decoding, **options)
    whole = target.generate(PROMPTS[0], max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert torch.equal(second.sequences, whole)


@torch.inference_mode()
def _served(target: PreTrainedModel, **options: Any) -> Any:
    return target.generate(return_dict_in_generate=True, **options)


@pytest.mark.parametrize("is_padded", [False, True])
def test_a_chat_goes_on_outside_of_inference_mode_and_behind_padding(is_padded: bool) -> None:
    """An error about memory that `torch.inference_mode()` made; padding in the cache that was read as text."""
    draft, target = tiny_pair(agreement=0.95)
    pad = (4 if is_padded else 0, 0)
    ids = torch.nn.functional.pad(PROMPTS[0], pad, value=2)
    mask = torch.nn.functional.pad(torch.ones_like(PROMPTS[0]), pad)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    whole = target.generate(ids, attention_mask=mask, **(options | {"max_new_tokens": 24}))
    mask_of_both = torch.nn.functional.pad(mask, (0, 12), value=1)
    decoding = SpeculativeDecoding(draft, 4)
    for continuing in ({}, {"custom_generate": decoding}):
        first = _served(target, input_ids=ids, attention_mask=mask, custom_generate=decoding, **options)
        second = target.generate(
            first.sequences.clone(),
            attention_mask=mask_of_both,
            **{CACHE: first[CACHE]},
            **continuing,
            **options,
        )
        assert torch.equal(second, whole)


def test_a_batch_leaves_a_cache_of_the_caller_s_alone() -> None:
    """Holes in it, and rows that are missing: plain decoding went on from it with an error, or with another text."""
    draft, target = tiny_pair(eos_scale=2.0, agreement=0.95)
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
    cache = DynamicCache(config=target.config)
    first = target.generate(
        **padded(PROMPTS), **{CACHE: cache}, custom_generate=SpeculativeDecoding(draft, 4), **options
    )
    mask = torch.nn.functional.pad(padded(PROMPTS)["attention_mask"], (0, first.shape[1] - 25), value=1)
    options["eos_token_id"] = None
    second = target.generate(first, attention_mask=mask, **{CACHE: cache}, **options)
    assert torch.equal(second, target.generate(first, attention_mask=mask, **options))


def test_ids_of_another_type() -> None:
    draft, target = tiny_pair(agreement=0.95)
    inputs = padded(PROMPTS)
    inputs["input_ids"] = inputs["input_ids"].int()
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
    plain = target.generate(**inputs, **options)
    ours = target.generate(**inputs, custom_generate=SpeculativeDecoding(draft, 4), **options)
    assert ours.dtype == plain.dtype
    assert torch.equal(ours, plain)


def test_a_static_cache_serves_one_text() -> None:
    draft, target = tiny_pair(agreement=0.95)
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
    plain = target.generate(PROMPTS[2], **options)
    decoding = SpeculativeDecoding(draft, 4)
    ours = target.generate(PROMPTS[2], cache_implementation="static", custom_generate=decoding, **options)
    assert torch.equal(ours, plain)
    with pytest.raises(ValueError, match="static"):
        target.generate(**padded(PROMPTS), cache_implementation="static", custom_generate=decoding, **options)


def test_a_long_prompt_is_read_in_chunks() -> None:
    draft, target = tiny_pair(agreement=0.95)
    check_equal(target, draft, prefill_chunk_size=5)


def test_a_sliding_window_is_served_one_text_at_a_time() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 8, "eos_token_id": None}
    target = MistralForCausalLM(MistralConfig(**config, initializer_range=0.5)).eval()
    noisy = MistralForCausalLM(MistralConfig(**config, initializer_range=0.5)).eval()
    noisy.load_state_dict({name: w + 0.05 * torch.randn_like(w) for name, w in target.state_dict().items()})
    for decoding in (SpeculativeDecoding(target, 3), SpeculativeDecoding(noisy, 3)):
        for prompt in PROMPTS:
            plain = target.generate(prompt, max_new_tokens=30, do_sample=False)
            ours = target.generate(prompt, max_new_tokens=30, do_sample=False, custom_generate=decoding)
            assert torch.equal(ours, plain)
        # Nothing is drafted for the last token: a draft that had read nothing ended in an AttributeError.
        one = target.generate(prompt, max_new_tokens=1, do_sample=False, custom_generate=decoding)
        assert torch.equal(one, plain[:, : prompt.shape[1] + 1])
    with pytest.raises(ValueError, match="sliding window"):
        target.generate(**padded(PROMPTS), max_new_tokens=5, do_sample=False, custom_generate=decoding)


def test_a_static_cache_with_a_window_is_refused() -> None:
    """A rolled-back window is overwritten: the text went wrong after the first rejection."""
    from transformers import MistralConfig, MistralForCausalLM

    config = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 8, "eos_token_id": None}
    target = MistralForCausalLM(MistralConfig(**config)).eval()
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "cache_implementation": "static"}
    with pytest.raises(ValueError, match="Leave out `cache_implementation`"):
        target.generate(PROMPTS[0], custom_generate=SpeculativeDecoding(target, 3), **options)


@pytest.mark.parametrize(
    "config",
    [
        MptConfig(d_model=16, n_heads=2, n_layers=2, vocab_size=300, use_cache=True, eos_token_id=None),
        GPTNeoConfig(
            vocab_size=300,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            window_size=8,
            eos_token_id=None,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_attention_that_counts_columns_is_served_one_text_at_a_time(config: Any) -> None:
    """Rejected tokens leave holes in a batch, which MPT's bias and GPT-Neo's local window count: texts went wrong."""
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(config).eval()
    noisy = copy.deepcopy(target)
    noisy.load_state_dict({name: w + 0.02 * torch.randn_like(w) for name, w in target.state_dict().items()})
    decoding = SpeculativeDecoding(noisy, 3)
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
    for prompt in PROMPTS:
        plain = target.generate(prompt, **options)
        assert torch.equal(target.generate(prompt, custom_generate=decoding, **options), plain)
    with pytest.raises(ValueError, match="counts columns"):
        target.generate(**padded(PROMPTS), custom_generate=decoding, **options)


def test_a_draft_that_was_moved_is_followed() -> None:
    """Ids and a cut head that stay where the draft was when the object was made."""
    draft, target = tiny_pair()
    draft.generation_config.suppress_tokens = [7]
    decoding = SpeculativeDecoding(draft, 3)
    decoding._placed = torch.device("meta"), draft.dtype  # made elsewhere
    decoding._proposable = None  # type: ignore[assignment]
    target.generate(PROMPTS[0], max_new_tokens=4, custom_generate=decoding)
    assert decoding._proposable.suppressed.device == draft.device


def test_a_draft_that_was_cast_is_followed() -> None:
    """A head, cut before, of another type than the layers below it."""
    draft, target = tiny_pair()
    decoding = SpeculativeDecoding(draft, 3, draft_vocabulary=list(range(3, 200)))
    draft.to(torch.bfloat16)
    target.generate(PROMPTS[0], max_new_tokens=4, custom_generate=decoding)
    assert decoding.counts.num_spec_steps > 0


def test_modes_are_left_as_they_were() -> None:
    """A head cut while the draft was training put its layers back to training after every call."""
    draft, target = tiny_pair()
    decoding = SpeculativeDecoding(draft.train(), 3, draft_vocabulary=list(range(3, 200)))
    draft.eval()
    target.generate(PROMPTS[0], max_new_tokens=4, custom_generate=decoding)
    assert not any(module.training for module in draft.modules())


@pytest.mark.parametrize("given_to", ["object", "generate"])
def test_a_streamer_prints_the_text_as_it_comes(given_to: str, capsys: pytest.CaptureFixture[str]) -> None:
    draft, target = tiny_pair(agreement=0.95)
    streamer = TextStreamer(TOKENIZER, skip_prompt=True)
    decoding = SpeculativeDecoding(draft, 4, streamer=streamer if given_to == "object" else None)
    options: dict[str, Any] = {"streamer": streamer} if given_to == "generate" else {}
    text = target.generate(PROMPTS[0], max_new_tokens=20, do_sample=False, custom_generate=decoding, **options)
    assert capsys.readouterr().out == TOKENIZER.decode(text[0, PROMPTS[0].shape[1] :]) + "\n"


def test_padded_rows_of_a_draft_are_never_proposed() -> None:
    draft, target = tiny_pair(draft_vocab_size=304, target_vocab_size=304, real_vocab_size=300, agreement=0.95)
    with torch.no_grad():
        draft.lm_head.weight[300:] = 10 * draft.lm_head.weight[50]
    draft.generation_config.suppress_tokens = [300, 301, 302, 303]
    assert check_equal(target, draft).counts.num_accepted_draft_tokens > 0
    torch.manual_seed(0)
    sampled = target.generate(
        PROMPTS[0], max_new_tokens=30, do_sample=True, top_k=0, suppress_tokens=[300, 301, 302, 303],
        custom_generate=SpeculativeDecoding(draft, 3),
    )  # fmt: skip
    assert sampled.max() < 300


def test_a_draft_vocabulary_restricts_the_draft_and_not_the_target() -> None:
    draft, target = tiny_pair(agreement=1.0)
    ids = list(range(0, 300, 2))
    decoding = SpeculativeDecoding(draft, 4, draft_vocabulary=ids)
    plain = target.generate(PROMPTS[0], max_new_tokens=60, do_sample=False, eos_token_id=None)
    ours = target.generate(PROMPTS[0], max_new_tokens=60, do_sample=False, eos_token_id=None, custom_generate=decoding)
    assert torch.equal(ours, plain)
    # The draft is the target, so a token is accepted exactly where it may be proposed.
    new = ours[0, PROMPTS[0].shape[1] :].tolist()
    calls = position = 0
    while position < len(new):
        run = 0
        while run < 4 and position + run < len(new) and new[position + run] in ids:
            run += 1
        position, calls = position + run + 1, calls + 1
    assert decoding.counts.num_spec_steps == calls
    assert draft.lm_head.weight.shape[0] == 300
    draft.generation_config.draft_vocabulary = ids
    assert SpeculativeDecoding(draft, 4).draft_vocabulary == ids


def test_the_draft_length_comes_from_the_draft_s_generation_config() -> None:
    draft, target = tiny_pair(agreement=1.0)
    draft.generation_config.num_assistant_tokens = 7
    decoding = SpeculativeDecoding(draft)
    target.generate(PROMPTS[0], max_new_tokens=32, do_sample=False, eos_token_id=None, custom_generate=decoding)
    assert decoding.counts.acceptance_histogram == [0] * 7 + [4]


def test_room_in_a_cache_survives_selection_of_rows() -> None:
    layer = GrowingLayer()
    cache = DynamicCache()
    cache.layers = [layer]
    states = torch.randn(3, 2, 5, 4)
    for k in range(5):
        cache.update(states[:, :, k : k + 1], states[:, :, k : k + 1], 0)
    cache.crop(-2)
    cache.batch_select_indices(torch.tensor([2, 0]))
    keys, _ = cache.update(states[:2, :, :2], states[:2, :, :2], 0)
    assert torch.equal(keys, torch.cat([states[[2, 0], :, :3], states[:2, :, :2]], dim=2))


def test_compiled_steps_write_the_same_texts() -> None:
    """With the compiler's front end only: fixed shapes, static caches, and nothing traced twice for the same shape.

    A single text was a view of its whole buffer, and its strides had every other length traced again.
    """
    draft, target = tiny_pair("qwen3", eos_scale=2.0, agreement=0.95, num_layers=1)
    decoding = SpeculativeDecoding(draft, 3, compile=True)
    traced: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        traced.append(graph)
        return graph.forward

    compiling = {"compile_config": CompileConfig(backend=backend, dynamic=False, mode=None)}
    for inputs in ({"input_ids": PROMPTS[0]}, padded(PROMPTS)):
        for length, is_new in ((40, True), (40, False), (30, False)):
            num_traced, seconds = len(traced), decoding.compiled.compile_seconds
            options: dict[str, Any] = {"max_new_tokens": length, "do_sample": False}
            plain = target.generate(**inputs, **options)
            assert torch.equal(target.generate(**inputs, custom_generate=decoding, **compiling, **options), plain)
            assert (len(traced) > num_traced) == (decoding.compiled.compile_seconds > seconds) == is_new
    assert 0 < decoding.counts.draft_acceptance_rate < 1


def test_compiled_caches_outlive_inference_mode_and_are_not_given_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error about memory that `torch.inference_mode()` made; a returned cache that the next call wrote over."""
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    draft, target = tiny_pair(agreement=0.95)
    decoding = SpeculativeDecoding(draft, 3, compile=True)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    _served(target, input_ids=PROMPTS[0], custom_generate=decoding, **options)
    ours = target.generate(PROMPTS[0], custom_generate=decoding, return_dict_in_generate=True, **options)
    assert torch.equal(ours.sequences, target.generate(PROMPTS[0], **options))
    assert getattr(ours, CACHE) is None


def test_compiled_caches_do_not_pile_up() -> None:
    """A pair of caches stayed for every length: prompts of all lengths filled an accelerator's memory."""
    _, target = tiny_pair()
    kept, config = CompiledModels(), GenerationConfig(compile_config=CompileConfig(backend="eager", mode=None))

    def cache_for(max_length: int, num_texts: int = 1) -> Any:
        texts = Texts(PROMPTS[0].repeat(num_texts, 1), None, max_length, spare=4)
        return kept.cached(target, texts, (4,), 1, config).cache

    short, of_two = weakref.ref(cache_for(40)), cache_for(40, 2)
    long = cache_for(200)
    gc.collect()
    assert short() is None
    assert cache_for(100) is long
    assert cache_for(40, 2) is of_two


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"do_sample": True}], ids=str)
def test_distributions_are_made_only_where_verification_looks_at_them(options: Any, monkeypatch: Any) -> None:
    """Greedy rounds kept γ rows of logits alive that nothing read."""
    draft, target = tiny_pair()
    choose, found = OneByOne._choose, []
    monkeypatch.setattr(OneByOne, "_choose", lambda *given: found.append(choose(*given)) or found[-1])
    target.generate(PROMPTS[0], max_new_tokens=8, custom_generate=SpeculativeDecoding(draft, 3), **options)
    assert found
    assert all((q is not None) == ("do_sample" in options) for _, q in found)


def test_count_acceptance_counts_it_as_it_counts_itself() -> None:
    draft, target = tiny_pair(eos_scale=2.0, agreement=0.95)
    decoding = SpeculativeDecoding(draft, 4)
    with count_acceptance(target) as counts:
        target.generate(**padded(PROMPTS), max_new_tokens=20, do_sample=False, custom_generate=decoding)
    target_calls = counts.num_spec_steps
    assert target_calls > 0
    assert counts == decoding.counts
    target.generate(PROMPTS[0], max_new_tokens=20, do_sample=False, custom_generate=decoding)
    assert counts.num_spec_steps == target_calls < decoding.counts.num_spec_steps


def test_a_batch_needs_as_many_calls_as_its_texts_one_by_one() -> None:
    """The draft's cache stays in step too: a token it reads twice, or a hole it sees, would only lower acceptance."""
    draft, target = tiny_pair(agreement=0.97)
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    single, batch = SpeculativeDecoding(draft, 4), SpeculativeDecoding(draft, 4)
    for prompt in PROMPTS:
        target.generate(prompt, custom_generate=single, **options)
    target.generate(**padded(PROMPTS), custom_generate=batch, **options)
    assert single.counts.num_spec_steps == batch.counts.num_spec_steps
    assert single.counts.draft_acceptance_rate > 0.2


def test_counts_are_those_of_transformers_own_loop() -> None:
    draft, target = tiny_pair(eos_scale=2.0, agreement=0.95)
    decoding = SpeculativeDecoding(draft, 4)
    with fixed_draft_length(draft, 4), count_acceptance(target) as counts:
        for prompt in PROMPTS:
            target.generate(prompt, max_new_tokens=30, do_sample=False, assistant_model=draft)
    for prompt in PROMPTS:
        target.generate(prompt, max_new_tokens=30, do_sample=False, custom_generate=decoding)
    assert counts.num_spec_steps == decoding.counts.num_spec_steps
    assert counts.acceptance_histogram == decoding.counts.acceptance_histogram


def test_a_batch_of_a_mixture_of_experts_that_was_published_with_its_routing_loss() -> None:
    """The loss pairs the routing of new tokens with the mask of the whole text: a batch died in its second round."""
    target = tiny_model("mixtral")
    draft = tiny_model("mixtral", seed=1)
    for model in (draft, target):
        model.config.output_router_logits = True
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    with evaluating(target):
        plain = target.generate(**padded(PROMPTS), **options)
    written = target.generate(**padded(PROMPTS), custom_generate=SpeculativeDecoding(draft, 3), **options)
    assert torch.equal(written, plain)
    assert target.config.output_router_logits
