"""What an online draft refuses: requests, pairs, values."""

import copy

import pytest
import torch
from transformers import GenerationConfig

from hf_draftkd import OnlineDistillConfig
from tests.online.serving import distiller_for, request
from tests.tiny import tiny_pair, tiny_prompts


def test_requests_that_cannot_be_served_are_refused(pair, tokenizer):
    prompt = tiny_prompts(tokenizer)[0]
    distiller = distiller_for(pair)
    with pytest.raises(ValueError, match="token ids"):
        distiller.generate(inputs_embeds=torch.zeros(1, 2, 16))
    with pytest.raises(ValueError, match="leave it out"):
        distiller.generate(prompt, assistant_model=pair[0])
    with pytest.raises(ValueError, match="output_dir"):
        distiller.save()
    assert distiller.num_requests == 0


def test_decoding_that_does_not_use_the_draft_is_refused(pair, tokenizer):
    """Beams leave the draft unused; guidance has the target read the text without its prompt, and what it said there
    must not be learned from.
    """
    prompt = tiny_prompts(tokenizer)[0]
    distiller = distiller_for(pair)
    for options in ({"num_beams": 2}, {"generation_config": GenerationConfig(num_beams=2, max_new_tokens=4)}):
        with pytest.raises(ValueError, match="beam_search"):
            distiller.generate(**request(prompt, **options))
    with pytest.raises(ValueError, match="guidance_scale"):
        distiller.generate(**request(prompt, guidance_scale=1.5))
    assert distiller.num_requests == distiller.counts.num_spec_steps == 0
    distiller.generate(**request(prompt, num_beams=1, guidance_scale=1))
    assert distiller.num_requests == 1


def test_pairs_that_cannot_learn_are_refused(pair):
    draft, target = pair
    with pytest.raises(ValueError, match="share weights"):
        distiller_for((target, target))
    tied = copy.deepcopy(draft)
    tied.set_input_embeddings(target.get_input_embeddings())
    with pytest.raises(ValueError, match="share weights"):
        distiller_for((tied, target))
    with pytest.raises(ValueError, match="training mode"):
        distiller_for((draft, copy.deepcopy(target).train()))
    with pytest.raises(ValueError, match="float16"):
        distiller_for((copy.deepcopy(draft).half(), target))
    with pytest.raises(ValueError, match="no trainable parameter"):
        distiller_for((copy.deepcopy(draft).requires_grad_(False), target))
    with torch.inference_mode():
        made_there = tiny_pair("llama")[0]
    with pytest.raises(ValueError, match=r"made under `torch.inference_mode\(\)`"):
        distiller_for((made_there, target))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"update_every": 0}, "update_every"),
        ({"buffer_size": 2.5}, "buffer_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"holdout_share": 0.9}, "holdout_share"),
        ({"replay_ratio": float("nan")}, "replay_ratio"),
        ({"divergence": "forward_k"}, "Did you mean"),
        ({"divergence_options": {"beta": 0.1}}, "beta"),
        ({"divergence": "cross_entropy", "loss_temperature": 2.0}, "no temperature"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_values_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        OnlineDistillConfig(**settings)
