from transformers import PretrainedConfig

from hf_draftkd.models.context import context_length
from tests.tiny import ARCHITECTURES


def test_the_context_is_what_the_config_says_whoever_is_asked():
    model = ARCHITECTURES["llama"]()
    assert context_length(model) == context_length(model.config) == model.config.max_position_embeddings


def test_a_config_that_names_no_limit_has_none():
    assert context_length(PretrainedConfig()) is None
