import math

import pytest
import torch
from transformers import GenerationConfig

from hf_draftkd.decoding.setting import DecodingSetting, end_token_ids, settings_at
from tests.data.small import make_target

# What a model could be published with, and what would change its text if it leaked.
LEAKS = {
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[token] for token in range(10, 260, 2)],
    "sequence_bias": [[[65], -100.0]],
    "min_new_tokens": 12,
    "exponential_decay_length_penalty": (1, 3.0),
    "begin_suppress_tokens": list(range(6, 100)),
    "forced_eos_token_id": 7,
}
SAMPLING_LEAKS = {"do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.1, "min_p": 0.9, "typical_p": 0.1}


END = 22  # what the tiny target writes greedily at position 8, so that its text ends there


def ending_target():
    model = make_target()
    model.generation_config.eos_token_id = END
    return model


def room(leak):
    # A forced end token acts at the length limit only, which the text must therefore reach.
    return 5 if leak == "forced_eos_token_id" else 12


def generate(model, setting, max_new_tokens=12, **overrides):
    ids = torch.tensor([[0, 7, 8, 9]])
    torch.manual_seed(5)
    config = setting.generation_config(model, max_new_tokens, **overrides)
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0].tolist()


@pytest.mark.parametrize("setting", [DecodingSetting(), DecodingSetting(temperature=1.0)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("leak", [*LEAKS, "sampling defaults"])
def test_nothing_leaks_in_from_the_models_own_generation_config(setting, leak):
    """Fault 5 of the field: text said to be plain greedy or plain sampling was written under the model's defaults."""
    plain, published = ending_target(), ending_target()
    values = SAMPLING_LEAKS if leak == "sampling defaults" else {leak: LEAKS[leak]}
    for name, value in values.items():
        setattr(published.generation_config, name, value)
    assert generate(published, setting, room(leak)) == generate(plain, setting, room(leak))


@pytest.mark.parametrize("leak", LEAKS)
def test_the_leaks_above_would_change_the_text(leak):
    """Guards the test above: each of these values does change what this target writes by default."""
    model = ending_target()
    ids = torch.tensor([[0, 7, 8, 9]])
    plain = model.generate(ids, max_new_tokens=room(leak), do_sample=False).tolist()
    setattr(model.generation_config, leak, LEAKS[leak])
    assert model.generate(ids, max_new_tokens=room(leak), do_sample=False).tolist() != plain


def test_sampling_takes_the_settings_own_temperature_and_filters():
    """A temperature that never reaches the sampler is the fault of GKD's loss, one step earlier."""
    model = make_target()
    assert generate(model, DecodingSetting(temperature=1.0, top_k=1)) == generate(model, DecodingSetting())
    assert generate(model, DecodingSetting(temperature=1e-4)) == generate(model, DecodingSetting())
    assert generate(model, DecodingSetting(temperature=50.0)) != generate(model, DecodingSetting())
    assert generate(model, DecodingSetting(repetition_penalty=5.0)) != generate(model, DecodingSetting())


def test_suppressed_ids_of_the_model_stay_suppressed():
    """The padded rows of an aligned draft are named in its `suppress_tokens`; assisted decoding must still see them."""
    model = make_target()
    first = generate(model, DecodingSetting())[4]
    model.generation_config.suppress_tokens = [first]
    assert first not in generate(model, DecodingSetting())[4:]
    assert generate(model, DecodingSetting(), suppress_tokens=[])[4] == first


@pytest.mark.parametrize("eos", [None, 3, [3, 1]])
def test_end_tokens_may_be_none_one_or_several(eos):
    model = make_target()
    model.generation_config.eos_token_id = eos
    config = DecodingSetting().generation_config(model, 4)
    assert config.eos_token_id == eos
    assert end_token_ids(model) == {None: set(), 3: {3}}.get(eos if isinstance(eos, int | None) else 0, {3, 1})


def test_the_end_token_stops_generation():
    model = make_target()
    third = generate(model, DecodingSetting())[6]
    model.generation_config.eos_token_id = [third]
    assert generate(model, DecodingSetting())[-1] == third
    assert len(generate(model, DecodingSetting())) <= 7


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_p": 1.01},
        {"temperature": 1.0, "top_k": -1},
        {"temperature": 1.0, "top_k": 1.5},
        {"temperature": 1.0, "top_k": math.nan},
        {"repetition_penalty": 0.0},
        {"top_p": 0.9},
        {"top_k": 5},
    ],
)
def test_values_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match=r"must|greedy"):
        DecodingSetting(**values)


def test_a_setting_survives_the_way_through_a_row():
    setting = DecodingSetting(temperature=0.7, top_p=0.95, top_k=20, repetition_penalty=1.1)
    assert DecodingSetting.from_row({"prompt": "x", **setting.to_dict()}) == setting


def test_a_row_without_a_setting_says_which_columns_are_missing():
    with pytest.raises(ValueError, match="top_p, top_k, repetition_penalty missing"):
        DecodingSetting.from_row({"prompt": "x", "temperature": 0.0})


def test_the_setting_of_a_generation_config_is_what_generate_would_do():
    """`top_k` is 50 when sampling unless told otherwise, and sampling values mean nothing without `do_sample`."""
    assert DecodingSetting.from_generation_config(GenerationConfig(do_sample=True)) == DecodingSetting(1.0, 1.0, 50)
    config = GenerationConfig(repetition_penalty=1.2)
    config.temperature, config.top_k, config.min_p = 0.3, 7, 0.2
    assert DecodingSetting.from_generation_config(config) == DecodingSetting(repetition_penalty=1.2)


def test_a_generation_config_that_a_setting_cannot_express_is_refused():
    with pytest.raises(ValueError, match=r"min_p=0\.1"):
        DecodingSetting.from_generation_config(GenerationConfig(do_sample=True, min_p=0.1))
    with pytest.raises(ValueError, match="num_beams=4"):
        DecodingSetting.from_generation_config(GenerationConfig(num_beams=4))


def test_sampling_filters_leave_greedy_decoding_alone():
    greedy, sampled = settings_at((0, 0.7), top_p=0.9, top_k=5)
    assert (greedy.top_p, greedy.top_k, sampled.top_p, sampled.top_k) == (1.0, 0, 0.9, 5)


@pytest.mark.parametrize(
    ("setting", "words", "suffix"),
    [
        (DecodingSetting(), "greedy", "_t0"),
        (DecodingSetting(repetition_penalty=1.1), "greedy, repetition penalty 1.1", "_t0_r1.1"),
        (DecodingSetting(0.7, top_p=0.95), "temperature 0.7, top-p 0.95", "_t0.7_p0.95"),
        (DecodingSetting(1.0, top_k=50), "temperature 1, top-k 50", "_t1_k50"),
    ],
)
def test_a_setting_in_words_and_in_names_of_metrics(setting, words, suffix):
    """Two settings that read alike, in a table or in a log."""
    assert str(setting) == words
    assert setting.log_suffix == suffix


@pytest.mark.parametrize(("temperatures", "message"), [(0.7, "must be a list"), ((), "empty"), ((1.0, 1.0), "repeats")])
def test_temperatures_that_make_no_list_of_settings(temperatures, message):
    with pytest.raises(ValueError, match=message):
        settings_at(temperatures)
