from hf_draftkd.models.context import context_length
from tests.tiny import ARCHITECTURES


def test_the_context_is_what_the_config_says_whoever_is_asked():
    model = ARCHITECTURES["llama"]()
    assert context_length(model) == context_length(model.config) == model.config.max_position_embeddings


def test_a_model_without_a_limit_has_none():
    model = ARCHITECTURES["llama"]()
    model.config.max_position_embeddings = None
    assert context_length(model) is None
