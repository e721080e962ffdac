"""A target behind HTTP: the same rows as the local target, and every fault of a server met."""

import math
import socket
import traceback

import pytest
import torch

pytest.importorskip("openai")

from hf_draftkd.data.endpoint import prompt_text
from hf_draftkd.data.generation import generate_alignment_data
from hf_draftkd.data.prompts import render_prompts
from hf_draftkd.data.target_cache import cache_target_distributions
from tests.data.server import serving
from tests.data.small import make_target, make_tokenizer

CHATS = [[{"role": "user", "content": text}] for text in ("the cat", "on", "sat on the mat", "a mat", "cat")]
FAST = {"max_retries": 3, "timeout": 20.0}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """Back-off as the client does it, without its seconds; and no key from the machine the tests run on."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def readable_target():
    """A target that writes plain letters only, so that its text can be tokenised again without a change."""
    target, tokenizer = make_target(), make_tokenizer()
    letters = tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz"))
    keep = torch.zeros(264, dtype=torch.bool)
    keep[[*letters, 1]] = True
    bias = torch.where(keep, 0.0, -1e4)
    target.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return target


def ask(url, tokenizer, prompts=CHATS, **options):
    options = {"max_new_tokens": 6, "endpoint": url, "endpoint_options": FAST, **options}
    return generate_alignment_data("tiny-target", tokenizer, prompts, **options)


def test_greedy_rows_equal_those_of_the_local_target(readable_target, tokenizer):
    """Nothing added on the way: no second beginning-of-text token, no chat parser, no lost end."""
    with serving(readable_target, tokenizer) as server:
        remote = ask(server.url, tokenizer)
    local = generate_alignment_data(readable_target, tokenizer, CHATS, max_new_tokens=6)
    for name in ("prompt", "prompt_ids", "completion", "completion_ids", "finish_reason", "temperature"):
        assert remote[name] == local[name], name
    assert set(remote["ids_source"]) == {"retokenized"}
    assert set(remote["target"]) == {"tiny-target"}


def test_sampled_answers_differ_and_can_be_asked_for_again(readable_target, tokenizer):
    with serving(readable_target, tokenizer) as server:
        rows = [ask(server.url, tokenizer, temperatures=(1.0,), num_completions=3, seed=seed) for seed in (1, 1, 2)]
    assert rows[0].to_list() == rows[1].to_list()
    assert rows[0]["completion"] != rows[2]["completion"]
    assert len({str(each) for each in rows[0]["completion"][:3]}) == 3


@pytest.mark.parametrize("fault", ["429", "500", "cut"])
def test_passing_faults_are_tried_again(readable_target, tokenizer, fault):
    """Too many requests, an internal error, and a connection cut in the middle of an answer."""
    with serving(readable_target, tokenizer) as server:
        expected = ask(server.url, tokenizer)
        before = len(server.requests)
        server.faults = [fault, fault]
        assert ask(server.url, tokenizer)["completion_ids"] == expected["completion_ids"]
        assert len(server.requests) == before + 1 + len(CHATS) + 2


def test_a_server_that_hangs_is_tried_again(readable_target, tokenizer):
    with serving(readable_target, tokenizer) as server:
        server.faults = ["hang"]
        rows = ask(server.url, tokenizer, endpoint_options={"max_retries": 2, "timeout": 0.5})
    assert len(rows) == len(CHATS)


def test_a_server_that_dies_loses_nothing_that_was_finished(tmp_path, readable_target, tokenizer):
    options = {"output_dir": tmp_path, "batch_size": 1, "shard_size": 1}
    with serving(readable_target, tokenizer) as server:
        expected = ask(server.url, tokenizer)
        port, server.die_after = server.server_port, len(server.requests) + 1 + 3
        with pytest.raises(RuntimeError, match=r"stopped answering .* run the same command again"):
            ask(server.url, tokenizer, **options, endpoint_options={"max_retries": 1})
        finished = len(list(tmp_path.glob("data/train-*")))
        assert finished == 3
        server.die_after, asked = None, len(server.requests)
        resumed = ask(f"http://127.0.0.1:{port}/v1", tokenizer, **options)
        assert len(server.requests) - asked == 1 + len(CHATS) - finished
    assert resumed["completion_ids"] == expected["completion_ids"]


@pytest.mark.parametrize("names", ["ids", "text"])
def test_log_probabilities_become_the_cache(readable_target, tokenizer, names):
    """They must equal what the local target's cache holds, tail included."""
    with serving(readable_target, tokenizer, logprobs=names) as server:
        remote = ask(server.url, tokenizer, cache_distributions={"top_k": 5})
    local = cache_target_distributions(
        generate_alignment_data(readable_target, tokenizer, CHATS, max_new_tokens=6), readable_target, top_k=5
    )
    assert remote["completion_ids"] == local["completion_ids"]
    assert set(remote["ids_source"]) == {"generated"}
    assert remote["target_token_ids"] == local["target_token_ids"]
    assert remote.features["target_logprobs"] == local.features["target_logprobs"]
    for name in ("completion_logprobs", "target_tail_logprob"):
        for theirs, ours in zip(remote[name], local[name], strict=True):
            torch.testing.assert_close(torch.tensor(theirs), torch.tensor(ours), atol=2e-2, rtol=2e-3)
    first = zip(remote["target_tail_logprob"][0], remote["target_logprobs"][0], strict=True)
    total = [math.exp(tail) + sum(map(math.exp, top)) for tail, top in first]
    assert total == pytest.approx([1.0] * len(total), abs=2e-3)


def test_tokens_written_alike_are_not_guessed(tokenizer):
    """Byte fragments all decode to the same replacement sign: such an answer has no usable log-probabilities."""
    with serving(make_target(), tokenizer, logprobs="text") as server:
        rows = ask(server.url, tokenizer, cache_distributions={"top_k": 5})
    for row in rows:
        if row["target_logprobs"] is None:
            assert row["ids_source"] == "retokenized"
        else:
            assert len(row["target_logprobs"]) == len(row["completion_ids"])
    assert any(row["target_logprobs"] is None for row in rows)


def test_a_server_without_log_probabilities_is_found_out_by_its_answer(readable_target, tokenizer):
    """It answers 200 and ignores the wish, as `transformers serve` does."""
    with serving(readable_target, tokenizer) as server:
        with pytest.raises(ValueError, match="returns none"):
            ask(server.url, tokenizer, cache_distributions={"top_k": 5})
        assert len(server.requests) == 1


@pytest.mark.parametrize("options", [{"sampled": 5}, {"top_k": 5, "temperature": 2.0}, {}])
def test_what_a_server_cannot_cache_is_refused_without_a_request(tokenizer, options):
    with pytest.raises(ValueError, match="server returns"):
        ask("http://127.0.0.1:9/v1", tokenizer, cache_distributions=options)


def test_a_refused_connection_is_said_before_any_work(tmp_path, tokenizer):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ValueError, match="does not answer"):
        ask(url, tokenizer, output_dir=tmp_path / "out", endpoint_options={"max_retries": 0})
    assert not (tmp_path / "out").exists()


def test_a_refused_key(readable_target, tokenizer):
    with serving(readable_target, tokenizer) as server:
        server.key = "right"
        with pytest.raises(ValueError, match="refuses the API key"):
            ask(server.url, tokenizer)
        assert len(ask(server.url, tokenizer, endpoint_options={"api_key": "right"})) == len(CHATS)


def test_a_key_from_a_file_is_sent_without_its_line_break(readable_target, tokenizer, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    with serving(readable_target, tokenizer) as server:
        server.key = "sk-secret"
        assert len(ask(server.url, tokenizer)) == len(CHATS)


@pytest.mark.parametrize("key", ["sk-secret\nsk-more", "sk secret", "sk-secr\u00e9t", "\n"])
def test_a_key_that_no_header_takes_is_refused_unseen(tokenizer, key):
    """The HTTP client would quote it: `Illegal header value b'Bearer sk-...'`."""
    with pytest.raises(ValueError, match="The API key") as error:
        ask("http://127.0.0.1:9/v1", tokenizer, endpoint_options={"api_key": key})
    assert "sk" not in "".join(traceback.format_exception(error.value)).split("ValueError: ")[-1]


def test_a_server_that_repeats_the_key_does_not_bring_it_into_the_message(readable_target, tokenizer):
    with serving(readable_target, tokenizer) as server:
        server.key, server.repeats_key = "right", True
        with pytest.raises(ValueError, match=r"refuses the API key.*Bearer \*\*\*") as error:
            ask(server.url, tokenizer, endpoint_options={"api_key": "sk-secret"})
    assert "Bearer sk-secret" not in "".join(traceback.format_exception(error.value))


def test_an_unknown_model_names_the_nearest(readable_target, tokenizer):
    with serving(readable_target, tokenizer) as server, pytest.raises(ValueError, match="Did you mean 'tiny-target'"):
        generate_alignment_data("tiny-taget", tokenizer, CHATS, endpoint=server.url, max_new_tokens=2)


def test_token_ids_are_sent_if_asked(readable_target, tokenizer):
    with serving(readable_target, tokenizer) as server:
        rows = ask(server.url, tokenizer, endpoint_options={**FAST, "send_ids": True})
        assert sorted(request["prompt"] for request in server.requests[1:]) == sorted(rows["prompt_ids"])


def test_a_prompt_is_sent_as_the_text_that_gives_its_tokens(tokenizer):
    """A rendered template brings `<s>`, and the server's tokenizer adds it again unless the text goes without."""
    (ids,) = render_prompts([CHATS[0]], tokenizer)
    assert prompt_text(ids, tokenizer) == "<|user|>the cat<|end|><|assistant|>"
    t = tokenizer.convert_tokens_to_ids("t")
    unmerged = [0, t, *tokenizer.convert_tokens_to_ids(["h", "e"])]
    with pytest.raises(ValueError, match="other tokens"):
        prompt_text(unmerged, tokenizer)


def test_a_name_without_an_endpoint_is_no_target(tokenizer):
    with pytest.raises(ValueError, match="load_target"):
        generate_alignment_data("tiny-target", tokenizer, CHATS, max_new_tokens=2)


def test_a_prompt_that_the_server_refuses_is_named(tmp_path, readable_target, tokenizer):
    """A refusal is no outage: no talk of retries, but which prompt, and what the server said in its own form."""
    with serving(readable_target, tokenizer) as server:
        server.longest_prompt = len("<|user|>sat on the mat<|end|><|assistant|>") - 1
        with pytest.raises(RuntimeError, match=r"refused the prompt '<\|user\|>sat on.*too long for me") as error:
            ask(server.url, tokenizer, output_dir=tmp_path, batch_size=1, shard_size=1)
    assert "retries" not in str(error.value)
    assert len(list(tmp_path.glob("data/train-*"))) == 2


def test_a_server_that_never_samples_is_found_out(readable_target, tokenizer):
    """As `transformers serve` for a model whose generation config is greedy: it must not be recorded as sampled."""
    with serving(readable_target, tokenizer) as server:
        server.always_greedy = True
        with pytest.raises(ValueError, match="does not sample"):
            ask(server.url, tokenizer, temperatures=(0.7,))
        assert len(ask(server.url, tokenizer, temperatures=(0.0,))) == len(CHATS)
