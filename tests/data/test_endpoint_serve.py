"""A real server: `transformers serve` with the demo target, on a loopback port."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_draftkd.data.generation import generate_alignment_data
from hf_draftkd.models.demo import demo_path
from hf_draftkd.models.loading import load_target, load_tokenizer
from tests.data.serve import transformers_serve

TARGET = demo_path("target")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with transformers_serve(TARGET, tmp_path_factory.mktemp("serve") / "log.txt") as address:
        yield address


@pytest.fixture
def prompts() -> list[object]:
    lines = Path(demo_path("test.jsonl")).read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines[:4]]


def ask(url: str, prompts: list[object], **options: object):
    options = {"max_new_tokens": 80, "endpoint": url, **options}
    return generate_alignment_data(str(TARGET), load_tokenizer(TARGET), prompts, **options)


def test_greedy_text_equals_that_of_the_local_pipeline(url, prompts):
    """Our prompt text reaches the model as the very ids the local target reads; its answer comes back whole."""
    remote = ask(url, prompts)
    target = load_target(TARGET, dtype="float32")
    local = generate_alignment_data(target, load_tokenizer(TARGET), prompts, max_new_tokens=80)
    assert "stop" in local["finish_reason"]
    for name in ("prompt_ids", "completion", "completion_ids", "finish_reason"):
        assert remote[name] == local[name], name
    assert set(remote["ids_source"]) == {"retokenized"}


def test_it_ignores_the_wish_for_log_probabilities(url, prompts):
    """It answers 200 without them: found out by the answer."""
    with pytest.raises(ValueError, match="returns none"):
        ask(url, prompts, cache_distributions={"top_k": 5})


def test_it_takes_a_temperature_and_does_not_sample(url, prompts):
    """The demo target's generation config says greedy, which it follows: greedy text must not pass for sampled."""
    with pytest.raises(ValueError, match="does not sample"):
        ask(url, prompts, temperatures=(0.0, 0.7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"send_ids": True}, "prompt must be a string"),
        ({"repetition_penalty": 1.2}, "Unexpected fields .*repetition_penalty"),
    ],
)
def test_what_it_does_not_take_is_said_before_any_work(url, prompts, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ask(url, prompts, output_dir=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_another_name_than_it_serves_is_refused(url, prompts):
    with pytest.raises(ValueError, match="Server is pinned to"):
        generate_alignment_data("org/other", load_tokenizer(TARGET), prompts, max_new_tokens=2, endpoint=url)
