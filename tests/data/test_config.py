"""One config for Python and the command line: what it means, and what it refuses before anything is loaded."""

import dataclasses

import pytest
from transformers import ContinuousBatchingConfig

from hf_draftkd.data.config import AlignmentDataConfig
from hf_draftkd.data.generation import generate_alignment_data
from hf_draftkd.data.kept_distributions import CacheOptions
from hf_draftkd.decoding.setting import DecodingSetting


def test_every_field_has_its_help():
    assert all(field.metadata["help"] for field in dataclasses.fields(AlignmentDataConfig))


def test_the_cache_is_written_as_text_or_as_a_dict():
    """Catches a loss temperature or a type that one of the two forms loses, or that is ignored beside a dict."""
    text = AlignmentDataConfig(cache_distributions="sampled=50", cache_loss_temperature=2.0, seed=3)
    assert text.cache == CacheOptions(sampled=50, loss_temperature=2.0, seed=3)
    given = AlignmentDataConfig(cache_distributions={"top_k": 8, "dtype": "float32", "seed": 1})
    assert given.cache == CacheOptions(top_k=8, dtype="float32", seed=1)
    beside = {"cache_loss_temperature": 2.0, "cache_dtype": "float32", "seed": 3}
    given = AlignmentDataConfig(cache_distributions={"top_k": 8}, **beside)
    assert given.cache == CacheOptions(top_k=8, loss_temperature=2.0, dtype="float32", seed=3)
    assert AlignmentDataConfig().cache is None


def test_greedy_decoding_gives_one_completion_and_knows_no_filters():
    config = AlignmentDataConfig(temperatures=[0, 0.7], top_p=0.9, num_completions=3)
    assert config.requests == {DecodingSetting(): 1, DecodingSetting(0.7, 0.9): 3}


def test_one_temperature_is_a_list_of_one():
    """As a YAML file may say it."""
    assert AlignmentDataConfig(temperatures=0.7).temperatures == [0.7]


def test_a_config_and_its_fields_make_the_same_rows(target, tokenizer):
    """Catches an argument beside the config that is not listened to."""
    config = AlignmentDataConfig(max_new_tokens=4, temperatures=[1.0], seed=5)
    rows = generate_alignment_data(target, tokenizer, ["the cat", "on"], config=config)
    fields = {"max_new_tokens": 4, "temperatures": (1.0,), "seed": 5}
    assert rows.to_list() == generate_alignment_data(target, tokenizer, ["the cat", "on"], **fields).to_list()
    other = generate_alignment_data(target, tokenizer, ["the cat", "on"], config=config, seed=6)
    assert other["completion_ids"] != rows["completion_ids"]
    assert config.seed == 5


@pytest.mark.parametrize("scenario", ["queries", "curated", "synthetic"])
def test_a_config_alone_says_where_the_prompts_come_from(tmp_path, target, tokenizer, scenario):
    options = {"scenario": scenario, "max_new_tokens": 3}
    if scenario == "synthetic":
        options |= {"num_prompts": 2, "query_max_new_tokens": 60}
    else:
        (tmp_path / "texts.txt").write_text("the cat sat on the mat, and sat, and sat\n")
        options |= {"dataset": str(tmp_path / "texts.txt")}
    rows = generate_alignment_data(target, tokenizer, config=AlignmentDataConfig(**options))
    assert len(rows) == (2 if scenario == "synthetic" else 1)
    assert set(rows["scenario"]) == {scenario}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperatures": ()}, "empty"),
        ({"temperatures": (1.0, 1.0)}, "repeats"),
        ({"temperatures": (-1.0,)}, "temperature"),
        ({"top_p": 2.0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"num_completions": 0}, "num_completions"),
        ({"batch_size": 0}, "batch_size"),
        ({"shard_size": 0}, "shard_size"),
        ({"max_prompts": 0, "dataset": "x"}, "max_prompts"),
        ({"scenario": "query"}, "Did you mean 'queries'"),
        ({"system_prompt": "Ask about tax."}, "`system_prompt` would do nothing without `scenario synthetic`"),
        ({"timeout": 5.0}, "`timeout` would do nothing without `endpoint`"),
        ({"top_p": 0.9}, "`top_p` would do nothing at temperature 0"),
        ({"top_k": 20, "temperatures": 0}, "`top_k` would do nothing at temperature 0"),
        ({"num_completions": 4}, "`num_completions` would do nothing at temperature 0"),
        ({"cache_distributions": "top=5"}, "top_k=64 or sampled=50"),
        ({"cache_distributions": {"topk": 5}}, "Did you mean 'top_k'"),
        ({"cache_distributions": {"top_k": 5, "sampled": 5}}, "one form"),
        ({"cache_distributions": "sampled=5", "endpoint": "http://localhost/v1"}, "give `top_k` alone"),
        ({"draft_model": "draft", "endpoint": "http://localhost/v1"}, "`draft_model` helps a local target"),
        ({"draft_model": "draft", "continuous_batching": True}, "which `continuous_batching` does not do"),
        ({"continuous_batching": True, "endpoint": "http://localhost/v1"}, "`continuous_batching` would do nothing"),
        ({"repetition_penalty": 1.1, "continuous_batching": True}, "no repetition penalty, got 1.1"),
    ],
)
def test_bad_values_are_refused_when_the_config_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        AlignmentDataConfig(**options)


def test_without_any_prompts_there_is_nothing_to_answer(target, tokenizer):
    with pytest.raises(ValueError, match="needs a `dataset`"):
        generate_alignment_data(target, tokenizer)


def test_given_prompts_are_read_with_the_options_for_prompts(target, tokenizer):
    """They passed the config's checks, and did nothing: the last answer stood there, the empty prompt was refused."""
    chats = [
        [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "an old answer"}],
        [{"role": "user", "content": ""}],
    ]
    options = {"prompt_column": "question", "drop_last_answer": True, "skip_invalid": True, "max_new_tokens": 2}
    rows = generate_alignment_data(target, tokenizer, [{"question": chat} for chat in chats], **options)
    assert rows["prompt"] == [chats[0][:1]]


@pytest.mark.parametrize(
    "options", [{"dataset": "org/other"}, {"scenario": "synthetic", "num_prompts": 3}, {"max_prompts": 3}]
)
def test_what_says_where_prompts_come_from_is_refused_beside_prompts(target, tokenizer, options):
    """A `dataset` beside `prompts` was dropped without a word."""
    with pytest.raises(ValueError, match=f"`{list(options)[-1]}` would do nothing"):
        generate_alignment_data(target, tokenizer, ["the cat"], max_new_tokens=2, **options)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"endpoint_options": {"extra_body": {"min_p": 0.1}}}, "endpoint"),
        ({"continuous_batching_config": ContinuousBatchingConfig(num_blocks=32)}, "continuous_batching"),
    ],
)
def test_options_of_a_way_of_answering_that_is_not_used_are_refused(target, tokenizer, options, wanted):
    """They were dropped without a word: an `extra_body` that was to steer the sampling steered nothing."""
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` would do nothing without `{wanted}`"):
        generate_alignment_data(target, tokenizer, ["the cat"], max_new_tokens=2, **options)


def test_a_loaded_target_is_not_behind_an_endpoint(target, tokenizer):
    """The endpoint was ignored, and the model at hand answered."""
    with pytest.raises(ValueError, match=r"An `endpoint` answers .* got a LlamaForCausalLM"):
        generate_alignment_data(target, tokenizer, ["the cat"], max_new_tokens=2, endpoint="http://localhost/v1")


@pytest.mark.parametrize("name", ["endpoint", "continuous_batching"])
def test_a_draft_that_could_not_help_is_refused_as_an_argument_too(target, tokenizer, name):
    """Only the config's draft was: the manifest then named one that had not helped."""
    options = {name: "http://localhost/v1" if name == "endpoint" else True}
    answering = "served" if name == "endpoint" else target
    with pytest.raises(ValueError, match=f"`draft_model` helps .* which `{name}` does not do"):
        generate_alignment_data(answering, tokenizer, ["the cat"], draft_model=target, **options)
