from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import ContinuousBatchingConfig, pipeline

from hf_draftkd import count_acceptance
from hf_draftkd.data.backends import AlignmentPipeline, cut_completion
from hf_draftkd.data.generation import cut_shards, generate_alignment_data
from hf_draftkd.data.rows import alignment_features, render_prompts
from hf_draftkd.decoding.setting import DecodingSetting
from tests.data.small import make_target, make_tokenizer
from tests.tiny import tiny_pair, tiny_tokenizer

COLUMNS = [
    *("prompt", "completion", "prompt_ids", "completion_ids", "ids_source", "scenario", "target", "target_revision"),
    "target_weights",
    *("temperature", "top_p", "top_k", "repetition_penalty", "seed", "finish_reason"),
]
TEXTS = ["the cat", "on", "sat on the mat, the cat", "a", "mat mat mat mat mat", "the"]


def by_hand(model, ids, new_tokens, end=()):
    """Greedy decoding straight from its definition: no cache, no batch, no `generate`."""
    text = list(ids)
    for _ in range(new_tokens):
        with torch.no_grad():
            text.append(model(torch.tensor([text])).logits[0, -1, : len(make_tokenizer())].argmax().item())
        if text[-1] in end:
            break
    return text[len(ids) :]


def test_a_tokenizer_and_a_target_that_changed_places_are_named(pair, tokenizer):
    """Fault: "TokenizersBackend has no attribute get_text_config"."""
    with pytest.raises(ValueError, match="`tokenizer` must be the tokenizer that draft and target share, got a `Llama"):
        generate_alignment_data(tokenizer, pair[1], ["a"])


def test_greedy_rows_are_exact_in_batches_of_unequal_prompts(target, tokenizer):
    """Left padding, length sorting and cutting must not change one token, nor the order of the rows."""
    data = generate_alignment_data(target, tokenizer, TEXTS, max_new_tokens=8, batch_size=4)
    assert data["prompt"] == TEXTS
    for row in data:
        assert row["prompt_ids"] == tokenizer(row["prompt"])["input_ids"]
        assert row["completion_ids"] == by_hand(target, row["prompt_ids"], 8, end={1})
        assert row["completion"] == tokenizer.decode(row["completion_ids"], skip_special_tokens=True)


@pytest.mark.parametrize("with_pad", [True, False])
def test_the_end_token_is_kept_where_pad_equals_end(with_pad):
    """Fault 3 of the field: pads are cut by their id, and with pad = end the end token goes with them."""
    target, tokenizer = make_target(), make_tokenizer(with_pad=with_pad)
    if with_pad:
        tokenizer.pad_token = tokenizer.eos_token
    ids = render_prompts(TEXTS, tokenizer)
    end = by_hand(target, ids[0], 3)[-1]
    target.generation_config.eos_token_id = [end, 1]
    target.generation_config.pad_token_id = end if with_pad else None
    data = generate_alignment_data(target, tokenizer, TEXTS, max_new_tokens=8, batch_size=6)
    reasons = set()
    for row in data:
        expected = by_hand(target, row["prompt_ids"], 8, end={end, 1})
        assert row["completion_ids"] == expected
        assert row["finish_reason"] == ("stop" if expected[-1] in (end, 1) else "length")
        reasons.add(row["finish_reason"])
    assert reasons == {"stop", "length"}
    assert tokenizer.pad_token == (tokenizer.eos_token if with_pad else None)
    assert tokenizer.padding_side == "right"


def test_a_draft_that_helps_changes_no_greedy_row():
    """Rows that are the draft's; a batch whose rows accept different numbers of tokens, mixed up."""
    draft, target = tiny_pair("llama")
    tokenizer = tiny_tokenizer()
    options = {"max_new_tokens": 12, "batch_size": 3, "temperatures": (0, 1.0)}
    expected = generate_alignment_data(target, tokenizer, TEXTS, **options)
    with count_acceptance(target) as counts:
        found = generate_alignment_data(target, tokenizer, TEXTS, draft_model=draft, **options)
    assert counts.num_accepted_draft_tokens > 0
    assert counts.num_tokens == sum(map(len, found["completion_ids"]))
    greedy = [[row for row in data.to_list() if row["temperature"] == 0] for data in (found, expected)]
    assert greedy[0] == greedy[1]
    again = generate_alignment_data(target, tokenizer, TEXTS, draft_model=draft, **options)
    assert again.to_list() == found.to_list(), "rows follow from the arguments"


def test_rows_of_another_draft_are_not_resumed(tmp_path):
    """Sampled rows depend on the draft's random numbers: half a folder with it and half without."""
    draft, target = tiny_pair("llama")
    draft.save_pretrained(tmp_path / "draft")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "draft")
    options = {"max_new_tokens": 4, "output_dir": str(tmp_path / "data")}
    generate_alignment_data(target, tokenizer, TEXTS, draft_model=str(tmp_path / "draft"), **options)
    with pytest.raises(ValueError, match="draft"):
        generate_alignment_data(target, tokenizer, TEXTS, **options)


@pytest.mark.parametrize("pad", ["beyond the embedding", "-1", "None", "the end token"])
def test_which_id_pads_changes_nothing(target, tokenizer, pad):
    """Fault: an added `[PAD]` that the embedding lacks, or the -1 of a published config, ends in an IndexError."""
    expected = generate_alignment_data(target, tokenizer, TEXTS, max_new_tokens=8, temperatures=(0, 1.0))
    if pad == "beyond the embedding":
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        assert tokenizer.pad_token_id == target.config.vocab_size
    else:
        tokenizer.pad_token = tokenizer.eos_token if pad == "the end token" else None
    target.generation_config.pad_token_id = {"-1": -1, "None": None}.get(pad, tokenizer.pad_token_id)
    found = generate_alignment_data(target, tokenizer, TEXTS, max_new_tokens=8, temperatures=(0, 1.0))
    assert found.to_list() == expected.to_list()


def test_an_end_token_on_the_last_allowed_place_is_a_stop():
    assert cut_completion([5, 6, 1], frozenset({1})) == ([5, 6, 1], "stop")
    assert cut_completion([5, 6, 7], frozenset({1})) == ([5, 6, 7], "length")
    assert cut_completion([5, 1, 2, 2], frozenset({1})) == ([5, 1], "stop")


def test_a_target_without_end_token(target, tokenizer):
    target.generation_config.eos_token_id = None
    data = generate_alignment_data(target, tokenizer, TEXTS, max_new_tokens=5)
    assert set(data["finish_reason"]) == {"length"}
    assert {len(ids) for ids in data["completion_ids"]} == {5}


def test_the_row_format(target, tokenizer):
    """The contract of design.md: names, types, messages answered with one assistant message, columns carried along."""
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": text}], "domain": "mats"} for text in TEXTS])
    data = generate_alignment_data(
        target, tokenizer, prompts, max_new_tokens=4, temperatures=(0.0, 0.7), top_p=0.95, seed=3, scenario="curated"
    )
    assert data.column_names == [*COLUMNS, "domain"]
    assert data.features == alignment_features(prompts.features)
    row = data[1]
    assert row["completion"] == [
        {"role": "assistant", "content": tokenizer.decode(row["completion_ids"], skip_special_tokens=True)}
    ]
    assert row["prompt_ids"] == render_prompts([row["prompt"]], tokenizer)[0]
    expected = {"ids_source": "generated", "scenario": "curated", "target": "tiny/target", "target_revision": None}
    expected |= {"temperature": 0.7, "top_p": 0.95, "top_k": 0, "repetition_penalty": 1.0, "seed": 3, "domain": "mats"}
    assert {name: row[name] for name in expected} == expected
    assert DecodingSetting.from_row(data[0]) == DecodingSetting()


def test_rows_of_a_quantised_target_name_no_weights(target, tokenizer):
    """Its packed weights have a fingerprint of their own, which no plain copy of the same model could match."""
    target.hf_quantizer = SimpleNamespace(is_compileable=False)
    data = generate_alignment_data(target, tokenizer, TEXTS[:1], max_new_tokens=2)
    assert data["target_weights"] == [None]


def test_settings_and_completions_are_counted_and_ordered(target, tokenizer):
    data = generate_alignment_data(
        target, tokenizer, TEXTS[:2], max_new_tokens=6, temperatures=(0, 1.0), num_completions=3
    )
    assert data["prompt"] == [TEXTS[0]] * 4 + [TEXTS[1]] * 4
    assert data["temperature"] == [0, 1, 1, 1] * 2
    sampled = [tuple(ids) for ids in data["completion_ids"]]
    assert len(set(sampled)) == 8


def test_rows_follow_from_the_arguments_alone(target, tokenizer):
    """The caller's random state, its training mode and further temperatures must not change a row."""

    def rows(**changes):
        options = {"max_new_tokens": 6, "temperatures": (1.0,), "batch_size": 2, "seed": 1, **changes}
        return generate_alignment_data(target, tokenizer, TEXTS, **options)

    first = rows()
    state = torch.get_rng_state()
    torch.manual_seed(99)
    target.train()
    again = rows()
    assert target.training
    assert again["completion_ids"] == first["completion_ids"]
    both = rows(temperatures=(0.0, 1.0))
    assert both.filter(lambda row: row["temperature"] == 1)["completion_ids"] == first["completion_ids"]
    assert rows(seed=2)["completion_ids"] != first["completion_ids"]
    # As YAML writes numbers: the manifest calls them equal, so a run may resume with them.
    whole = {"temperatures": (1,), "top_p": 1, "top_k": 0.0, "repetition_penalty": 1}
    assert rows(**whole)["completion_ids"] == first["completion_ids"]
    torch.set_rng_state(state)
    rows()
    assert torch.equal(torch.get_rng_state(), state)


def test_shards_draw_different_random_numbers(target, tokenizer):
    """Shards seeded alike would give every shard the same draws."""
    data = generate_alignment_data(
        target, tokenizer, ["the cat"] * 4, max_new_tokens=8, temperatures=(1.0,), batch_size=2, shard_size=2
    )
    assert len({tuple(ids) for ids in data["completion_ids"]}) == 4


def test_sampled_tokens_follow_the_targets_distribution(target, tokenizer):
    """First tokens of 1,500 samples against p itself: a leaking top-k or temperature shows here."""
    data = generate_alignment_data(
        target, tokenizer, ["the cat"], max_new_tokens=1, temperatures=(1.0,), num_completions=1500, batch_size=100
    )
    with torch.no_grad():
        p = target(torch.tensor([data[0]["prompt_ids"]])).logits[0, -1].double().softmax(-1)
    counted = torch.bincount(torch.tensor([ids[0] for ids in data["completion_ids"]]), minlength=len(p)) / 1500
    expected_distance = (p * (1 - p) / 1500).sqrt().sum() * (2 / torch.pi) ** 0.5 / 2  # of a true sample, on average
    assert 0.5 * (counted - p).abs().sum() < 1.3 * expected_distance
    assert (counted > 0).sum() > 50


def test_ids_that_stand_for_no_token_are_never_written(tokenizer):
    """A padded vocabulary: rows beyond the tokenizer decode to nothing and cannot be data."""
    target = make_target(vocab_size=1000)
    data = generate_alignment_data(target, tokenizer, TEXTS, max_new_tokens=8, temperatures=(0, 1.0))
    assert max(max(ids) for ids in data["completion_ids"]) < len(tokenizer)
    for row in data.filter(lambda row: row["temperature"] == 0):
        assert row["completion_ids"] == by_hand(target, row["prompt_ids"], 8, end={1})


def test_the_pipeline_class_works_with_the_stock_pipeline_function(target, tokenizer):
    pipe = pipeline(
        "text-generation", model=target, tokenizer=tokenizer, pipeline_class=AlignmentPipeline, device="cpu"
    )
    ids = render_prompts(TEXTS[:3], tokenizer)
    written = pipe(ids, generation_config=DecodingSetting().generation_config(target, 4))
    assert [cut_completion(each, {1})[0] for each in written] == [by_hand(target, each, 4, end={1}) for each in ids]


def test_continuous_batching_writes_the_same_greedy_tokens(target, tokenizer):
    small = {"continuous_batching": True}
    small["continuous_batching_config"] = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64)
    options = {"max_new_tokens": 8, "temperatures": (0.0,), "repetition_penalty": 1.0}
    target.generation_config.repetition_penalty = 5.0  # must not leak in on this way either
    batched = generate_alignment_data(target, tokenizer, TEXTS, **small, **options)
    assert batched.to_list() == generate_alignment_data(target, tokenizer, TEXTS, **options).to_list()
    # transformers drops the penalty here: rows would be recorded under a setting that did not write them.
    with pytest.raises(ValueError, match=r"no repetition penalty, got 5.0"):
        generate_alignment_data(target, tokenizer, TEXTS, **small, max_new_tokens=8)


def test_a_prompt_that_continuous_batching_dropped_is_missed(target, tokenizer):
    """A failed request is left out by transformers, and only a log says so: its prompt would have had no row."""
    target.generate_batch = lambda **_: {"req_0": SimpleNamespace(error=None, generated_tokens=[5])}
    small = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64)
    options = {"continuous_batching": True, "continuous_batching_config": small, "max_new_tokens": 4}
    with pytest.raises(RuntimeError, match="2 prompts got no answer"):
        generate_alignment_data(target, tokenizer, TEXTS[:3], temperatures=(0.0,), **options)


def test_rows_are_written_under_the_targets_own_penalty(target, tokenizer):
    """`evaluate` measures under it by default, and refused data just made, by default without it."""
    target.generation_config.repetition_penalty = 5.0
    options = {"max_new_tokens": 8, "temperatures": (0.0,)}
    rows = generate_alignment_data(target, tokenizer, TEXTS, **options)
    assert set(rows["repetition_penalty"]) == {5.0}
    for row in rows:
        ids = torch.tensor([row["prompt_ids"]])
        assert (
            row["completion_ids"] == target.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
        )
    without = generate_alignment_data(target, tokenizer, TEXTS, repetition_penalty=1.0, **options)
    assert set(without["repetition_penalty"]) == {1.0}
    assert without["completion_ids"] != rows["completion_ids"]


def test_shards_cover_the_prompts_once_in_whole_batches():
    for count in (1, 7, 100, 5000):
        shards = cut_shards(count, batch_size=8)
        assert [row for shard in shards for row in shard] == list(range(count))
        assert all(len(shard) % 8 == 0 for shard in shards[:-1])
    assert [len(shard) for shard in cut_shards(10, batch_size=2, shard_size=3)] == [4, 4, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 2.0}, "top_p"),
        ({"scenario": "query"}, "scenario"),
        ({"max_new_tokens": 125}, "rows 0, 2, 4 .* longer than 3 tokens"),
        ({"cache_distributions": {"top_k": 265}, "max_new_tokens": 9}, "between 1 and the vocabulary's 264"),
    ],
)
def test_bad_input_is_refused_before_the_target_runs(tokenizer, options, message):
    target = make_target()
    target.generate = None  # a single call would fail with another error
    with pytest.raises(ValueError, match=message):
        generate_alignment_data(target, tokenizer, TEXTS[:5], **options)


def test_settings_of_the_target_that_its_rows_are_written_without_are_named(target, tokenizer, caplog):
    """`evaluate` said so, after the data was made."""
    target.generation_config.update(no_repeat_ngram_size=7, top_k=11)
    generate_alignment_data(target, tokenizer, TEXTS[:1], max_new_tokens=1, temperatures=(0,))
    assert "carries no_repeat_ngram_size=7, which the settings asked for leave out or replace" in caplog.text


@pytest.mark.parametrize("continuous", [False, True])
def test_answers_stop_at_the_end_of_turn_where_asked(target, tokenizer, caplog, continuous):
    """Fault: a chat template ends turns with a token that the generation config lacks, and rows run on behind it."""
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    options = {"max_new_tokens": 12, "temperatures": (0,), "continuous_batching": continuous}
    if continuous:
        options["continuous_batching_config"] = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    ids = render_prompts(chats, tokenizer)
    end = by_hand(target, ids[0], 3)[-1]  # written early
    token = tokenizer.convert_ids_to_tokens(end)
    tokenizer.add_special_tokens({"extra_special_tokens": [token]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>{% endfor", token + "{% endfor")
    ids = render_prompts(chats, tokenizer)
    running_on = generate_alignment_data(target, tokenizer, chats, **options)
    assert f"(id {end})" in caplog.text
    assert "eos_token_id` is [1]" in caplog.text
    caplog.clear()
    stopped = generate_alignment_data(target, tokenizer, chats, stop_at_turn_end=True, **options)
    assert not [each for each in caplog.records if each.name.startswith("hf_draftkd")]
    assert running_on["completion_ids"] == [by_hand(target, each, 12, end={1}) for each in ids]
    assert stopped["completion_ids"] == [by_hand(target, each, 12, end={1, end}) for each in ids]
    assert stopped["completion_ids"] != running_on["completion_ids"]
    ends = {"stop" if row[-1] in {1, end} else "length" for row in stopped["completion_ids"]}
    assert set(stopped["finish_reason"]) == ends


def test_an_end_of_turn_that_is_not_there_is_refused(target, tokenizer):
    options = {"max_new_tokens": 2, "stop_at_turn_end": True}
    with pytest.raises(ValueError, match="would do nothing"):
        generate_alignment_data(target, tokenizer, TEXTS, **options)
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="no special token"):
        generate_alignment_data(target, tokenizer, [[{"role": "user", "content": "x"}]], **options)
    with pytest.raises(ValueError, match="server"):
        generate_alignment_data("served", tokenizer, TEXTS, endpoint="http://localhost:1", **options)
