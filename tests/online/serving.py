"""Servers for tests of drafts that learn online."""

import torch

from hf_draftkd import OnlineDistillConfig, OnlineDraftDistiller
from tests.tiny import tiny_prompts

SETTINGS = {"learning_rate": 3e-3, "update_every": 4, "batch_size": 2, "holdout_share": 0.3}
SAMPLED = {"do_sample": True, "temperature": 0.5, "top_k": 20, "top_p": 0.9}
UNFILTERED = {"do_sample": True, "temperature": 1.0, "top_k": 0}


def distiller_for(pair, tokenizer=None, *, on_log=None, **settings):
    config = getattr(pair[0], "generation_config", None)
    if config is not None:  # the length that pays best depends on the clock, and with it the counts
        config.num_assistant_tokens = config.num_assistant_tokens or 5
    return OnlineDraftDistiller(*pair, tokenizer, args=OnlineDistillConfig(**(SETTINGS | settings)), on_log=on_log)


def request(prompt, **options):
    return {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "max_new_tokens": 12} | options


def serve(distiller, tokenizer, count, start=0, **options):
    return [distiller.generate(**request(p, **options)) for p in tiny_prompts(tokenizer, start + count)[start:]]


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def kept_by(distiller):
    return [*distiller.buffer.training, *distiller.buffer.held_out]


def target_rows(target, request):
    """[T, V] float64 log p of the tokens after the prompt: position t - 1 predicts token t."""
    ids = torch.cat([request.prompt_ids, request.completion_ids])
    with torch.no_grad():
        return target(ids[None]).logits[0].double().log_softmax(-1)[len(request.prompt_ids) - 1 : -1]


def without_seconds(distiller):
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in distiller.history]
