"""The whole evaluation on tiny pairs, from Python."""

import copy
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets

from hf_draftkd.acceptance import Estimate
from hf_draftkd.data.generation import generate_alignment_data
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.evaluation import evaluate, timing
from hf_draftkd.evaluation.engines.measure import written_texts
from hf_draftkd.evaluation.evaluate import evaluate_draft
from hf_draftkd.evaluation.report import Comparison, SelfCheck, SpeculationReport
from hf_draftkd.evaluation.statistics import sampled_agree
from hf_draftkd.models.identity import remember_checkpoint, weights_checksum
from hf_draftkd.models.loading import load_draft, load_target
from hf_draftkd.models.resolve import Checkpoint
from tests.evaluation import samples
from tests.tiny import TEXT, tiny_llama, tiny_pair, tiny_tokenizer

PROMPTS = [f"{text[: 15 + number]} {number}" for number in range(4) for text in TEXT]
QUICK = {"max_new_tokens": 8, "measure_speed": False}


@pytest.fixture(scope="module")
def measured():
    """One full evaluation with everything on, which several tests look at."""
    draft, target = tiny_pair("llama", eos_scale=1.5, num_layers=1)
    stock, _ = tiny_pair("llama", agreement=0.7, eos_scale=1.5, num_layers=1)
    rows = Dataset.from_list(
        [{"prompt": prompt, "domain": ("maths", "prose")[number % 2]} for number, prompt in enumerate(PROMPTS)]
    )
    before = [(model.generation_config.to_dict(), copy.deepcopy(model.state_dict())) for model in (draft, target)]
    draft.train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_draftkd.evaluation.self_check._SAMPLED_TEXTS", 8)
        report = evaluate_draft(
            draft,
            target,
            tiny_tokenizer(),
            rows,
            baseline=stock,
            max_new_tokens=8,
            num_speed_prompts=3,
            speed_batch_sizes=[2],
            verify=2,
            source="tests",
            domain="nothing in particular",
        )
    return report, (draft, target), before


def test_the_report_is_complete_and_survives_its_own_json(measured):
    report, (draft, target), _ = measured
    assert SpeculationReport.from_json(report.to_json()) == report
    assert [setting.decoding.temperature for setting in report.settings] == [0, 1]
    assert [setting.verification for setting in report.settings] == ["exact_match", "rejection_sampling"]
    assert report.prompts.count == len(PROMPTS)
    assert report.draft.num_parameters == draft.num_parameters()
    assert report.target.num_parameters == target.num_parameters()
    for setting in report.settings:
        assert setting.num_texts == len(PROMPTS)
        assert setting.block_efficiency.keys() == setting.mbsu.keys() == set(range(1, 17))
        assert len(setting.acceptance_by_position) == 5
        assert setting.assisted.num_prompts == 3
        assert setting.assisted.num_assistant_tokens == report.recommendation.num_assistant_tokens
        assert setting.assisted.tokens_per_second > 0
        assert setting.speculative.num_assistant_tokens == setting.assisted.num_assistant_tokens
        assert setting.speculative.plain_tokens_per_second == setting.assisted.plain_tokens_per_second
        assert list(setting.speculative_batches) == [2]
        assert setting.speculative_batches[2].num_prompts == 2
        assert setting.recommendation.reason
    greedy = report.settings[0]
    for run in (greedy.assisted, greedy.speculative):
        assert run.num_identical == 3
        assert run.differences is None
        assert run.mean_acceptance_length == greedy.assisted.mean_acceptance_length
        limit = greedy.block_efficiency[run.num_assistant_tokens].value * report.latency.target_step_seconds
        limit /= (
            run.num_assistant_tokens * report.latency.draft_step_seconds
            + report.latency.verify_seconds[run.num_assistant_tokens + 1]
        )
        assert run.share_of_limit == pytest.approx(run.speedup.value / limit)
    assert set(report.latency.verify_seconds) == set(range(2, 18))
    assert report.warnings == []


def test_models_the_wrong_way_round_are_said(tokenizer):
    """Fault: the report called the large model a poor draft, and nothing said that it was given as the draft."""
    small, large = tiny_llama(num_layers=1), tiny_llama(num_layers=3)
    said = [
        " ".join(evaluate_draft(*models, tokenizer, PROMPTS[:1], **QUICK).warnings)
        for models in ((small, large), (large, small))
    ]
    assert ["the wrong way round" in each for each in said] == [False, True]


def test_prompts_in_the_place_of_the_tokenizer_are_named(pair):
    """Fault: "Give `prompts`" to a user who gave them and left out the tokenizer."""
    with pytest.raises(ValueError, match="`tokenizer` must be the tokenizer that draft and target share, got a `list`"):
        evaluate_draft(*pair, PROMPTS[:1], **QUICK)


def test_the_models_are_as_they_were(measured):
    """A draft left in eval mode, or with a fixed draft length it did not have; weights that were aligned or trained."""
    _, (draft, target), before = measured
    assert draft.training
    assert not target.training
    for model, (settings, weights) in zip((draft, target), before, strict=True):
        assert model.generation_config.to_dict() == settings
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_better_draft_is_better_by_more_than_its_interval(measured):
    """Draft and baseline swapped, or texts paired wrongly."""
    report, _, _ = measured
    assert report.baseline.settings[0].num_tokens == report.settings[0].num_tokens
    for mine, theirs, difference in zip(
        report.settings, report.baseline.settings, report.paired_difference, strict=True
    ):
        gain = difference.block_efficiency[5]
        assert gain.low > 0
        assert gain.value == pytest.approx(mine.block_efficiency[5].value - theirs.block_efficiency[5].value)
        assert difference.acceptance_rate.value == pytest.approx(
            mine.acceptance_rate.value - theirs.acceptance_rate.value
        )


def test_groups_split_the_texts(measured):
    """Groups must partition the tokens, each with its own numbers."""
    report, _, _ = measured
    assert set(report.groups) == {"maths", "prose"}
    for index, setting in enumerate(report.settings):
        parts = [settings[index] for settings in report.groups.values()]
        assert sum(part.num_tokens for part in parts) == setting.num_tokens
        total = sum(part.acceptance_rate.value * part.num_tokens for part in parts)
        assert total / setting.num_tokens == pytest.approx(setting.acceptance_rate.value)


def test_the_self_check_agrees(measured):
    report, _, _ = measured
    assert report.self_check.equal
    assert report.self_check.prompts == 2
    greedy = [entry for entry in report.self_check.comparisons if entry.decoding.temperature == 0]
    assert [(entry.way, entry.num_assistant_tokens) for entry in greedy] == [
        (way, length) for way in ("assistant_model=", "SpeculativeDecoding") for length in (1, 3, 5)
    ]
    assert all(entry.computed.value == entry.counted.value for entry in greedy)


def test_a_slow_copy_of_the_target_is_exact_and_not_worth_it():
    """The measure must not flatter: a draft slower than its target cannot pay, however often it is right.

    Slow by far, on a busy machine too: at this size `SpeculativeDecoding` can make up for a draft that is merely as
    slow, since plain `generate` spends as much time outside the model as in it.
    """
    target = tiny_llama(eos_scale=1.5)
    target.generation_config.repetition_penalty = 1.2
    draft = copy.deepcopy(target)
    draft.register_forward_hook(lambda *_: time.sleep(0.03))
    report = evaluate_draft(draft, target, tiny_tokenizer(), PROMPTS[:4], max_new_tokens=8, num_speed_prompts=1)
    for setting in report.settings:
        assert setting.acceptance_rate.value == 1
        assert setting.decoding.repetition_penalty == 1.2
        assert not setting.recommendation.worth_it
    assert not report.recommendation.worth_it
    assert report.recommendation.reason.startswith("Not worth it")
    assert any("repetition_penalty=1.2: applied to draft and target alike" in text for text in report.warnings)
    assert any("Only 4 prompts" in text for text in report.warnings)


def test_several_drafts_are_ranked_with_their_differences():
    drafts = [tiny_pair("llama", agreement=share)[0] for share in (0.6, 1.0, 0.9)]
    target = tiny_pair("llama")[1]
    report = evaluate_draft(drafts, target, tiny_tokenizer(), PROMPTS[:8], **QUICK)
    rates = [result.settings[1].acceptance_rate.value for result in report.drafts]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(1)
    assert report.settings == report.drafts[0].settings
    assert report.drafts[0].paired_difference is None
    for result in report.drafts[1:]:
        assert result.paired_difference[1].acceptance_rate.high < 0
    assert SpeculationReport.from_json(report.to_json()) == report


def test_recorded_answers_give_what_fresh_ones_give(pair):
    """Alignment data read back: the same texts, so the same numbers, with nothing generated."""
    draft, target = pair
    tokenizer = tiny_tokenizer()
    rows = generate_alignment_data(target, tokenizer, PROMPTS[:6], max_new_tokens=8, temperatures=(0.0, 1.0))
    recorded = evaluate_draft(draft, target, tokenizer, dataset=rows, **QUICK)
    one = evaluate_draft(draft, target, tokenizer, dataset=rows, temperatures=[1.0], **QUICK)
    assert [setting.decoding.temperature for setting in recorded.settings] == [0, 1]
    assert one.settings == [recorded.settings[1]]
    fresh = evaluate_draft(draft, target, tokenizer, PROMPTS[:6], temperatures=[0.0], **QUICK)
    assert fresh.settings[0].block_efficiency == recorded.settings[0].block_efficiency
    with pytest.raises(ValueError, match=r"No row was written under temperature 0\.5"):
        evaluate_draft(draft, target, tokenizer, dataset=rows, temperatures=[0.5], **QUICK)


def test_the_size_of_a_mixture_of_experts_is_not_what_it_reads():
    """MBSU with all experts counted: 2.7x for a draft that has a fifth of what the target reads for a token."""
    target = tiny_llama()
    target.config.num_experts = 8
    how = {"temperatures": (0.0,), "max_new_tokens": 2, "measure_speed": False, "verify": 0}
    report = evaluate_draft(tiny_llama(), target, tiny_tokenizer(), PROMPTS[:1], **how)
    assert any("mixture of experts" in warning and "MBSU" in warning for warning in report.warnings)


def test_rows_may_be_tensors(pair):
    """`Boolean value of Tensor with more than one value is ambiguous`: rows are given in a training loop's format."""
    rows = generate_alignment_data(pair[1], tiny_tokenizer(), PROMPTS[:2], max_new_tokens=4, temperatures=(0.0,))
    plain = evaluate_draft(*pair, tiny_tokenizer(), dataset=rows, **QUICK)
    tensors = rows.with_format("torch", columns=["prompt_ids", "completion_ids"])
    found = evaluate_draft(*pair, tiny_tokenizer(), dataset=tensors, **QUICK)
    assert (found.settings, found.prompts) == (plain.settings, plain.prompts)
    assert written_texts(tensors) == written_texts(rows)


def test_recorded_answers_that_do_not_fit_are_refused_or_left_out_of_timing(pair):
    """Positions beyond a model's context, met in the middle of the work or silently wrapped."""
    _, target = pair
    rows = generate_alignment_data(target, tiny_tokenizer(), PROMPTS[:3], max_new_tokens=8, temperatures=(0.0,))
    longest = max(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows)
    short = tiny_llama(max_position_embeddings=longest - 1)
    with pytest.raises(ValueError, match=f"longest text has {longest} tokens"):
        evaluate_draft(short, target, tiny_tokenizer(), dataset=rows, **QUICK)
    just = tiny_llama(max_position_embeddings=longest)
    report = evaluate_draft(just, target, tiny_tokenizer(), dataset=rows, num_speed_prompts=3)
    assert report.max_new_tokens == max(map(len, rows["completion_ids"]))
    fitting = [row for row in rows if len(row["prompt_ids"]) + report.max_new_tokens <= longest]
    assert report.settings[0].assisted.num_prompts == len(fitting)


def test_text_recorded_under_a_wrong_setting_gives_no_block_efficiency(pair):
    """Sampled text that claims to be greedy: τ computed from it would be a number about nothing."""
    draft, target = pair
    rows = generate_alignment_data(target, tiny_tokenizer(), PROMPTS[:6], max_new_tokens=16, temperatures=(1.0,))
    rows = rows.remove_columns("temperature").add_column("temperature", [0.0] * len(rows))
    report = evaluate_draft(draft, target, tiny_tokenizer(), dataset=rows, **QUICK)
    (setting,) = report.settings
    assert setting.decoding.temperature == 0
    assert setting.block_efficiency is None
    assert setting.mbsu is None
    assert setting.acceptance_rate.value > 0
    assert any("could have been written by this target" in text for text in report.warnings)


@pytest.mark.parametrize("column", ["target", "target_revision"])
def test_rows_of_several_authors_give_no_block_efficiency(pair, column):
    """Catches data put together from two targets, judged by the author of its first row: any sampled token is
    plausible, so nothing else tells.
    """
    draft, target = pair
    target.config.name_or_path = target.name_or_path = "org/target"
    remember_checkpoint(target, Checkpoint("org/target", "a" * 40, frozenset(), is_local=False))
    rows = generate_alignment_data(target, tiny_tokenizer(), PROMPTS[:6], max_new_tokens=8, temperatures=(1.0,))
    own = evaluate_draft(draft, target, tiny_tokenizer(), dataset=rows, **QUICK)
    assert own.settings[0].block_efficiency
    other = {"target": "org/other", "target_revision": "b" * 40}[column]
    foreign = {column: other, "target_weights": "of another"}
    mixed = rows.map(lambda row, number: foreign if number == 4 else {}, with_indices=True)
    report = evaluate_draft(draft, target, tiny_tokenizer(), dataset=mixed, **QUICK)
    assert report.settings[0].block_efficiency is None
    assert report.settings[0].acceptance_rate == own.settings[0].acceptance_rate
    assert any(other in text and "block efficiencies are not" in text for text in report.warnings)


def test_a_draft_on_another_kind_of_device_is_not_timed(pair):
    """Catches a draft left on the CPU beside a target on a GPU, whose times say that it does not pay."""
    _, target = pair

    class Elsewhere(type(target)):
        device = torch.device("cuda:0")

    elsewhere = Elsewhere(target.config)
    with pytest.raises(ValueError, match=r"is on cuda:0 and the target on cpu.*`draft\.to\('cpu'\)`"):
        evaluate_draft(elsewhere, target, tiny_tokenizer(), PROMPTS[:2])


def test_a_draft_in_a_wider_format_than_its_target_is_said(pair):
    """Catches a float32 draft beside a bfloat16 target whose slow steps are put down to the draft."""
    draft, target = pair
    low = copy.deepcopy(target).to(torch.bfloat16)
    how = {"temperatures": (0.0,), "max_new_tokens": 4, "num_speed_prompts": 1}
    said = "is in float32, the target in bfloat16: load it with `dtype=torch.bfloat16`"
    for wide, narrow in ((draft, low), (copy.deepcopy(draft).to(torch.bfloat16), target)):
        report = evaluate_draft(wide, narrow, tiny_tokenizer(), PROMPTS[:2], **how)
        assert any(said in warning for warning in report.warnings) == (narrow is low)


def test_a_target_that_was_moved_is_known_again(tmp_path, pair):
    """Catches rows that lose their block efficiency because the target lies in another folder than when it wrote."""
    draft, target = pair
    rows = []
    for place in ("here", "there"):
        target.save_pretrained(tmp_path / place)
        moved = load_target(str(tmp_path / place), dtype="float32")
        rows += [generate_alignment_data(moved, tiny_tokenizer(), PROMPTS[:3], max_new_tokens=8)]
    assert rows[0]["target"] != rows[1]["target"]
    reports = [evaluate_draft(draft, moved, tiny_tokenizer(), dataset=each, **QUICK) for each in rows]
    assert reports[0].settings[0].block_efficiency == reports[1].settings[0].block_efficiency is not None


@pytest.mark.parametrize(("name", "reason"), [("tuned", "trained further in place"), ("", "another model")])
def test_rows_of_other_weights_under_the_same_name_give_no_block_efficiency(pair, name, reason):
    """A target trained on in its own folder, and a second one made in code, passed for the one that wrote the rows."""
    draft, target = pair
    target.config.name_or_path = target.name_or_path = name
    rows = generate_alignment_data(target, tiny_tokenizer(), PROMPTS[:3], max_new_tokens=8, temperatures=(1.0,))
    with torch.no_grad():
        target.lm_head.weight.mul_(1.001)
    report = evaluate_draft(draft, target, tiny_tokenizer(), dataset=rows, **QUICK)
    assert report.settings[0].block_efficiency is None
    (warning,) = (text for text in report.warnings if "block efficiencies are not" in text)
    assert reason in warning
    assert "under another name" not in warning  # that would not help


def test_recorded_rows_that_cannot_be_used_are_named(pair):
    """Catches rows left out without a word, and a row without a setting met as a comparison with None."""
    draft, target = pair
    rows = generate_alignment_data(target, tiny_tokenizer(), PROMPTS[:4], max_new_tokens=8, temperatures=(0.0,))
    some = rows.map(lambda row, number: {"ids_source": "retokenized"} if number == 1 else {}, with_indices=True)
    report = evaluate_draft(draft, target, tiny_tokenizer(), dataset=some, **QUICK)
    assert report.settings[0].num_texts == 3
    assert any("1 of 4 rows" in text and "left out" in text for text in report.warnings)
    unknown = rows.map(lambda row, number: {"temperature": None} if number == 1 else {}, with_indices=True)
    with pytest.raises(ValueError, match="does not say how it was decoded: temperature missing"):
        evaluate_draft(draft, target, tiny_tokenizer(), dataset=unknown, **QUICK)
    with pytest.raises(ValueError, match=r"`datasets\.Dataset`, got dict"):
        evaluate_draft(draft, target, tiny_tokenizer(), dataset={"train": rows}, **QUICK)


@pytest.mark.parametrize("kind", ["strings", "messages", "retokenized"])
def test_other_text_gives_acceptance_alone(pair, kind):
    draft, target = pair
    tokenizer = tiny_tokenizer()
    rows = [{"prompt": prompt, "completion": " whatever a person wrote"} for prompt in PROMPTS[:3]]
    if kind == "messages":
        rows = [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["completion"]}],
            }
            for row in rows
        ]
    dataset = Dataset.from_list(rows)
    if kind == "retokenized":
        dataset = generate_alignment_data(target, tokenizer, PROMPTS[:3], max_new_tokens=8, temperatures=(0.0,))
        dataset = dataset.map(lambda row: {"ids_source": "retokenized"})
    report = evaluate_draft(draft, target, tokenizer, dataset=dataset, **QUICK)
    assert [setting.decoding.temperature for setting in report.settings] == [0, 1]
    assert all(setting.block_efficiency is None for setting in report.settings)
    assert all(0 < setting.acceptance_rate.value < 1 for setting in report.settings[1:])
    assert any("only acceptance rates are given" in text for text in report.warnings)


def test_other_conversations_are_read_with_their_tools_and_to_their_end(pair):
    """Catches a conversation with tools refused, and a report that calls the default length the longest measured."""
    draft, target = pair
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + tokenizer.chat_template
    row = {
        "prompt": [{"role": "user", "content": "What is the capital of France?"}],
        "completion": [{"role": "assistant", "content": "The capital of France is Paris."}],
        "tools": [{"name": "sorted"}],
    }
    report = evaluate_draft(draft, target, tokenizer, dataset=Dataset.from_list([row]), temperatures=[1.0], **QUICK)
    answer = tokenizer(row["completion"][0]["content"], add_special_tokens=False)["input_ids"]
    assert report.max_new_tokens == report.settings[0].num_tokens == len(answer) + 1  # the end token is one to draft
    with pytest.raises(ValueError, match="holds no rows"):
        evaluate_draft(draft, target, tokenizer, dataset=Dataset.from_list([row]).select([]), **QUICK)


def test_answers_that_stop_at_the_end_of_turn_are_timed_to_there(monkeypatch):
    """Their target has no such end token: it was timed, and checked, on what it writes behind the answer."""
    draft, target = tiny_pair("llama", eos_scale=0)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("eos_token", "'<|system|>'")
    with torch.no_grad():
        for model in (draft, target):
            model.lm_head.weight[3] *= 3
    talks = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[1:3]]
    monkeypatch.setattr(evaluate, "measure_latency", lambda *_, **__: samples.latency())
    options = {"max_new_tokens": 16, "temperatures": (0.0,), "stop_at_turn_end": True}
    rows = generate_alignment_data(target, tokenizer, talks, **options)
    assert set(rows["finish_reason"]) == {"stop"}
    assert len(set(map(len, rows["completion_ids"]))) == 2, "the shorter one is the one that was run on from"
    report = evaluate_draft(draft, target, tokenizer, dataset=rows, num_speed_prompts=2)
    (setting,) = report.settings
    assert setting.assisted.num_tokens == setting.speculative.num_tokens == setting.num_tokens
    assert setting.assisted.num_identical == setting.speculative.num_identical == 2
    length = setting.assisted.num_assistant_tokens
    assert setting.assisted.mean_acceptance_length == setting.block_efficiency[length].value
    fresh = evaluate_draft(draft, target, tokenizer, talks, **QUICK | {"temperatures": [0.0]})
    said = ["'<|system|>' (id 3), which is no end token" in " ".join(each.warnings) for each in (report, fresh)]
    assert said == [False, True]


def test_a_prompt_without_tokens_is_named(pair):
    """`max() iterable argument is empty`: an empty prompt, and a tokenizer that puts nothing in front of it."""
    rows = [{"prompt": prompt, "completion": " whatever a person wrote"} for prompt in (PROMPTS[0], "")]
    with pytest.raises(ValueError, match=r"prompts of row 1 \(counted from 0\) have no tokens"):
        evaluate_draft(*pair, tiny_tokenizer(), dataset=Dataset.from_list(rows), **QUICK)


@pytest.mark.parametrize("broken", [0, 1])
def test_broken_weights_are_said_before_anything_is_answered(pair, broken):
    """`probability tensor contains either inf, nan or element < 0`, after every greedy answer had been written."""
    with torch.no_grad():
        pair[broken].model.layers[0].mlp.down_proj.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"The logits of 'LlamaForCausalLM' are NaN: .* too large for torch\.float32"):
        evaluate_draft(*pair, tiny_tokenizer(), PROMPTS[:2], **QUICK)


def test_an_id_that_is_no_token_is_named(pair):
    """`OverflowError: can't convert negative int to unsigned`, for completions padded with -100."""
    rows = [{"prompt_ids": [5, 6], "completion_ids": [7, 8]}, {"prompt_ids": [5, 6], "completion_ids": [7, -100]}]
    with pytest.raises(ValueError, match="Text 1 holds -100, which is no token"):
        evaluate_draft(*pair, tiny_tokenizer(), dataset=Dataset.from_list(rows), **QUICK)


def test_the_hash_tells_prompts_apart(pair):
    """Catches equal hashes of other prompts: other tools, or rows of a dataset that were not the ones measured."""
    draft, target = pair
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + tokenizer.chat_template
    talk = [{"role": "user", "content": "What is the capital of France?"}]

    def hashed(*prompts, **options):
        return evaluate_draft(draft, target, tokenizer, *prompts, **QUICK, **options).prompts.sha256

    given = [[{"prompt": talk, "tools": [{"name": name}]}] for name in ("sorted", "reversed")]
    hashes = {hashed(Dataset.from_list(rows), temperatures=[0.0]) for rows in [*given, [{"prompt": talk}]]}
    assert len(hashes) == 3
    texts = [
        generate_alignment_data(target, tokenizer, PROMPTS[part], max_new_tokens=8, temperatures=(temperature,))
        for part, temperature in ((slice(3), 0.0), (slice(3, 6), 1.0))
    ]
    both = concatenate_datasets(texts)
    assert hashed(dataset=both, temperatures=[0.0]) == hashed(dataset=texts[0])
    assert hashed(dataset=both, temperatures=[0.0]) != hashed(dataset=both, temperatures=[1.0])


def test_the_report_names_the_weights_that_were_measured(tmp_path, pair):
    """Catches a checksum of the folder a model was once loaded from, which training has left behind."""
    draft, target = pair
    draft.save_pretrained(tmp_path / "before")
    draft = load_draft(tmp_path / "before")
    quick = QUICK | {"temperatures": (0.0,)}
    report = evaluate_draft(draft, target, tiny_tokenizer(), PROMPTS[:2], baseline=draft, **quick)
    assert report.draft.weights_sha256 == weights_checksum(tmp_path / "before") == report.baseline.draft.weights_sha256
    assert report.draft.dtype == "float32"
    assert report.target.weights_sha256 is None
    with torch.no_grad():
        draft.model.norm.weight += 1
    draft.save_pretrained(tmp_path / "after")
    later = evaluate_draft(draft, target, tiny_tokenizer(), PROMPTS[:2], **quick)
    assert later.draft.name == str(tmp_path / "before")
    assert later.draft.weights_sha256 == weights_checksum(tmp_path / "after") != report.draft.weights_sha256


def test_the_report_says_which_names_were_folders(tmp_path, pair, monkeypatch):
    """Catches `models/draft`, a folder, that nobody can later tell from a repository on the Hub."""
    monkeypatch.chdir(tmp_path)
    Path("models/draft").mkdir(parents=True)
    Path("data").mkdir()
    Path("data/prompts").touch()
    draft, target = pair
    draft.config.name_or_path, target.config.name_or_path = "models/draft", "org/target"
    report = evaluate_draft(draft, target, tiny_tokenizer(), PROMPTS[:4], source="data/prompts", **QUICK)
    assert (report.draft.is_local, report.target.is_local, report.prompts.is_local) == (True, False, True)


def test_only_what_transformers_verifies_is_timed(pair, monkeypatch):
    """Catches minutes of decoding under a setting whose rule is another engine's, thrown away afterwards."""
    draft, target = pair
    timed = []
    real = evaluate.time_decoding

    def record(target, draft, prompts, setting, **options):
        timed.append(setting.temperature)
        return real(target, draft, prompts, setting, **options)

    monkeypatch.setattr(evaluate, "time_decoding", record)
    report = evaluate_draft(
        draft,
        target,
        tiny_tokenizer(),
        PROMPTS[:2],
        verification=["greedy_draft"],
        max_new_tokens=8,
        num_speed_prompts=1,
    )
    assert timed == [0]
    assert [setting.assisted is not None for setting in report.settings] == [True, False]
    assert report.settings[1].recommendation is not None
    assert "temperature 1" not in report.recommendation.reason


def test_a_pair_that_speculative_decoding_refuses_is_timed_without_it(pair, monkeypatch):
    """A model of a kind that only transformers' own loop takes ends the whole evaluation."""
    draft, target = pair

    def refuse(*args, **kwargs):
        raise ValueError("has layers that cannot be served")

    monkeypatch.setattr("hf_draftkd.decoding.speculative.check_models", refuse)
    report = evaluate_draft(
        draft, target, tiny_tokenizer(), PROMPTS[:2], temperatures=[0], max_new_tokens=8, num_speed_prompts=1, verify=1
    )
    assert report.settings[0].assisted is not None
    assert report.settings[0].speculative is None
    assert report.recommendation.way == "assistant_model="
    assert {entry.way for entry in report.self_check.comparisons} == {"assistant_model="}
    (warning,) = [each for each in report.warnings if "SpeculativeDecoding" in each]
    assert "has layers that cannot be served" in warning


def test_a_pair_with_sliding_windows_is_timed_one_by_one():
    """An AttributeError where the draft had read nothing yet; and batches that are refused, after all answers."""
    window = {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}
    draft, target = tiny_pair("qwen3", **window)
    options = {"temperatures": [0.0], "max_new_tokens": 8, "num_speed_prompts": 2, "speed_batch_sizes": [2]}
    report = evaluate_draft(draft, target, tiny_tokenizer(), PROMPTS[:2], **options)
    assert report.settings[0].speculative.num_identical == 2
    assert report.settings[0].speculative_batches is None
    (warning,) = [each for each in report.warnings if each.startswith("No batch was timed")]
    assert "sliding window" in warning


def test_padded_vocabularies_are_aligned_first(tmp_path):
    draft, target = tiny_pair("qwen3", draft_vocab_size=304, target_vocab_size=320, real_vocab_size=300)
    draft.save_pretrained(tmp_path)
    options = {"temperatures": [0.0], "max_new_tokens": 8, "num_speed_prompts": 1, "verify": 1}
    report = evaluate_draft(draft, target, tiny_tokenizer(), PROMPTS[:2], **options)
    assert draft.config.vocab_size == 320
    assert report.draft.weights_sha256 == weights_checksum(tmp_path), "the draft as it lies in its folder"
    assert report.self_check.equal
    assert report.settings[0].assisted.num_identical == 1


def test_other_sampling_settings_say_what_transformers_makes_of_them(pair):
    draft, target = pair
    settings = [DecodingSetting(0.7, top_p=0.9), DecodingSetting(1.0)]
    report = evaluate_draft(draft, target, tiny_tokenizer(), PROMPTS[:6], settings=settings, **QUICK)
    doubled, plain = report.settings
    assert doubled.transformers_block_efficiency is not None
    assert doubled.transformers_block_efficiency[5].value != doubled.block_efficiency[5].value
    assert plain.transformers_block_efficiency is None


def test_what_the_targets_generation_config_carries_is_said(pair):
    draft, target = pair
    target.generation_config.update(do_sample=True, top_p=0.8, top_k=20)
    report = evaluate_draft(draft, target, tiny_tokenizer(), PROMPTS[:3], **QUICK)
    assert any("carries top_p=0.8, top_k=20," in text for text in report.warnings)
    assert report.settings[1].decoding.top_p == 1


def test_all_that_would_have_changed_the_targets_text_is_named_at_once(pair):
    """Switched off without a word, all but a repetition penalty."""
    _, target = pair
    carried = {"no_repeat_ngram_size": 3, "encoder_repetition_penalty": 1.3, "num_beams": 2, "forced_eos_token_id": 1}
    target.generation_config.update(repetition_penalty=1.2, min_p=0.1, **carried)
    report = evaluate_draft(*pair, tiny_tokenizer(), PROMPTS[:2], **QUICK | {"temperatures": [0.0]})
    applied, ignored = (text for text in report.warnings if "generation config carries" in text)
    assert "repetition_penalty=1.2: applied" in applied
    assert all(f"{name}={value}" in ignored for name, value in carried.items())
    assert "min_p" not in ignored, "greedy text has none"


def test_tokens_that_a_draft_may_not_propose_are_said(pair):
    """Catches computed numbers that `generate` never reaches; padded rows, which alignment suppresses, do not count."""
    _, target = pair
    draft = tiny_llama(vocab_size=304, real_vocab_size=300)
    draft.generation_config.suppress_tokens = [7, 8, 302]
    report = evaluate_draft(draft, target, tiny_tokenizer(), PROMPTS[:2], **QUICK)
    assert any("suppresses 2 tokens of the vocabulary (7, ...)" in text for text in report.warnings)
    target.generation_config.suppress_tokens = [7, 8]
    report = evaluate_draft(draft, target, tiny_tokenizer(), PROMPTS[:2], **QUICK)
    assert not any("suppresses" in text for text in report.warnings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": None}, "Give `prompts`"),
        ({"prompts": []}, "empty"),
        ({"prompts": [""]}, "empty"),
        ({"verification": ["greedy_drafts"]}, "Did you mean 'greedy_draft'"),
        ({"verification": []}, "at least one rule"),
        ({"verification": "greedy_draft"}, "must be a list of rules"),
        ({"verification": ["greedy_draft", "greedy_draft"]}, "names a rule twice"),
        ({"verify": -1}, "`verify` must be"),
        ({"batch_size": 0}, "`batch_size` must be"),
        ({"num_assistant_tokens": 3.0}, "from 1 to 16"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 300}, "leaves no room"),
        ({"num_assistant_tokens": 17}, "from 1 to 16"),
        ({"temperatures": [0.0], "settings": [DecodingSetting()]}, "not both"),
        ({"temperatures": [-1.0]}, "temperature"),
        ({"temperatures": []}, "empty"),
        ({"settings": []}, "at least one"),
        ({"prompts": ["long " * 300]}, "longer than"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(pair, monkeypatch, options, message):
    draft, target = pair

    def fail(*args, **kwargs):
        raise AssertionError("the target was asked to work")

    monkeypatch.setattr(target, "generate", fail)
    options = {"prompts": PROMPTS[:2], **options}
    with pytest.raises(ValueError, match=message):
        evaluate_draft(draft, target, tiny_tokenizer(), **options)


@pytest.mark.parametrize("place", ["draft", "list of drafts", "target", "baseline"])
def test_names_in_place_of_models_are_refused(pair, place):
    """The trainer takes names, so people give them here too: letter by letter they were drafts without a config."""
    draft, target = pair
    given = {"draft": "org/x", "list of drafts": [draft, "org/x"]}.get(place, draft)
    baseline = "org/x" if place == "baseline" else None
    with pytest.raises(ValueError, match=r"'org/x' is a name: load the model"):
        evaluate_draft(
            given, "org/x" if place == "target" else target, tiny_tokenizer(), PROMPTS[:2], baseline=baseline, **QUICK
        )


def test_the_cache_is_chosen_here_whatever_the_models_were_published_with(pair):
    """Ended in transformers' own words, after the target had answered every prompt."""
    options = QUICK | {"temperatures": [0.0], "verify": 1}
    plain = evaluate_draft(*pair, tiny_tokenizer(), PROMPTS[:2], **options)
    draft, target = pair
    for model, kind in ((target, "static"), (target, "dynamic"), (draft, "sliding_window")):
        model.generation_config.cache_implementation = kind
        report = evaluate_draft(*pair, tiny_tokenizer(), PROMPTS[:2], **options)
        assert report.self_check.equal, kind
        assert report.settings[0].block_efficiency == plain.settings[0].block_efficiency, kind
        assert model.generation_config.cache_implementation == kind
        model.generation_config.cache_implementation = None


def test_a_context_that_no_timed_pass_fits_is_refused_before_the_work(monkeypatch):
    """An IndexError of GPT-2's positions, after every text had been written and scored."""
    draft, target = tiny_pair("gpt2", max_position_embeddings=17)
    monkeypatch.setattr(evaluate, "take_texts", lambda *_: pytest.fail("the target was asked to work"))
    with pytest.raises(ValueError, match="read 17 tokens at most, but passes over 17"):
        evaluate_draft(draft, target, tiny_tokenizer(), ["The"], max_new_tokens=4)


def test_texts_that_leave_no_prompt_to_time_are_refused_before_the_work(monkeypatch):
    """Greedy answers to long prompts and long answers to short ones: it was said once all had been scored."""
    draft, target = tiny_pair("llama", max_position_embeddings=64)
    rows = [
        generate_alignment_data(target, tiny_tokenizer(), [prompt], max_new_tokens=new, temperatures=(temperature,))
        for prompt, new, temperature in (("x" * 30, 4, 0.0), ("Hi", 40, 1.0))
    ]
    monkeypatch.setattr(evaluate, "score_texts", lambda *_, **__: pytest.fail("the texts were scored"))
    for options in ({}, QUICK | {"verify": 1}):
        with pytest.raises(ValueError, match="No prompt leaves room for 40 new tokens"):
            evaluate_draft(draft, target, tiny_tokenizer(), dataset=concatenate_datasets(rows), **options)


def test_texts_that_differ_from_the_plain_ones_are_said(pair, monkeypatch):
    """A way of decoding that writes something else stood in the JSON alone."""
    draft, target = pair
    real = timing.generate_texts

    def faulty(*given, **options):
        texts, seconds = real(*given, **options)
        decoding = options.get("custom_generate")
        return ([[*texts[0][:-1], 7], *texts[1:]] if decoding and len(texts) > 1 else texts), seconds

    monkeypatch.setattr(timing, "generate_texts", faulty)
    monkeypatch.setattr(evaluate, "measure_latency", lambda *_, **__: samples.latency())
    options = {"max_new_tokens": 4, "num_speed_prompts": 2, "speed_batch_sizes": [2], "temperatures": [0.0]}
    report = evaluate_draft(draft, target, tiny_tokenizer(), PROMPTS[:2], **options)
    (difference,) = report.settings[0].speculative_batches[2].differences
    (said,) = [text for text in report.warnings if "plain ones" in text]
    assert said.startswith("1 of 2 texts that the draft helped to write (greedy, SpeculativeDecoding, batches of 2)")
    assert f"larger by {difference.logit_gap:.2g} at most" in said


def test_a_self_check_that_fails_says_where(pair, monkeypatch):
    numbers = {"computed": Estimate(2.5, 2.4, 2.6), "counted": Estimate(1.5, 1.4, 1.6), "agree": False}
    entry = Comparison(decoding=DecodingSetting(1.0), num_assistant_tokens=3, way="SpeculativeDecoding", **numbers)
    found = SelfCheck(prompts=1, equal=False, comparisons=[replace(entry, agree=True), entry])
    monkeypatch.setattr(evaluate, "self_check", lambda *_, **__: found)
    report = evaluate_draft(*pair, tiny_tokenizer(), PROMPTS[:2], verify=1, **QUICK)
    (said,) = [text for text in report.warnings if "self-check" in text]
    assert "found 1 of 2 computed numbers" in said
    assert "for temperature 1 by SpeculativeDecoding with γ = 3: computed 2.50 [2.40, 2.60], counted 1.50" in said


def test_a_hopeless_draft_raises_no_false_alarm():
    """Nothing was accepted in few texts, and 1.00 [1.00, 1.00] lies below 1.01 [1.0003, 1.04]: "worth reporting"."""
    nothing = Estimate(1.0, 1.0, 1.0)
    assert sampled_agree(Estimate(1.01, 1.0003, 1.04), nothing, 96, 96)
    assert not sampled_agree(Estimate(1.2, 1.1, 1.3), nothing, 96, 96)
    assert not sampled_agree(Estimate(1.0, 1.0, 1.001), Estimate(1.2, 1.1, 1.3), 96, 80)


def test_rows_without_a_domain_are_no_group_of_that_name(pair):
    rows = Dataset.from_list([{"prompt": PROMPTS[0], "domain": "maths"}, {"prompt": PROMPTS[1], "domain": None}])
    report = evaluate_draft(*pair, tiny_tokenizer(), rows, **QUICK | {"temperatures": [0.0]})
    assert list(report.groups) == ["maths"]
    assert report.settings[0].num_texts == 2


def test_a_contradicting_setting_is_refused():
    with pytest.raises(ValueError, match="greedy decoding, which `top_p`"):
        DecodingSetting(0.0, top_p=0.9)


def test_a_draft_with_another_vocabulary_is_refused(pair):
    _, target = pair
    with pytest.raises(ValueError, match="tokens"):
        evaluate_draft(tiny_llama(vocab_size=290), target, tiny_tokenizer(), PROMPTS[:2], **QUICK)


def test_a_draft_with_a_shorter_context_is_refused(pair):
    _, target = pair
    short = tiny_llama(max_position_embeddings=16)
    with pytest.raises(ValueError, match="longer than"):
        evaluate_draft(short, target, tiny_tokenizer(), PROMPTS[:2], **QUICK)
