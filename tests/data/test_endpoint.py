"""A target behind HTTP: the same rows as the local target, and every fault of a server met."""

import json
import logging
import math
import os
import signal
import socket
import threading
import time
import traceback

import pytest
import torch
from transformers import AutoTokenizer

pytest.importorskip("openai")

from hf_draftkd.data.config import AlignmentDataConfig
from hf_draftkd.data.endpoint import endpoint_backend, prompt_text
from hf_draftkd.data.generation import generate_alignment_data
from hf_draftkd.data.rows import render_prompts
from hf_draftkd.data.server_answers import TokenTexts
from hf_draftkd.data.shards import StoppedError
from hf_draftkd.data.target_cache import cache_target_distributions
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.hub.dataset_card import write_card
from tests.data.server import Handler, serving
from tests.data.small import make_target, make_tokenizer

CHATS = [[{"role": "user", "content": text}] for text in ("the cat", "on", "sat on the mat", "a mat", "cat")]
BROKEN = ("half", "html", "no choices", "no object")
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
    options = {"max_new_tokens": 6, "endpoint": url, **FAST, **options}
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


def test_the_card_of_served_rows_claims_no_more_than_is_known(readable_target, tokenizer, tmp_path):
    """Catches a card that vouches for exact tokens and bare sampling, which only a target on this machine allows."""
    with serving(readable_target, tokenizer) as server:
        rows = ask(server.url, tokenizer, output_dir=tmp_path / "remote")
    write_card(tmp_path / "remote", rows)
    rows = generate_alignment_data(readable_target, tokenizer, CHATS, max_new_tokens=6, output_dir=tmp_path / "local")
    write_card(tmp_path / "local", rows)
    local, remote = (" ".join((tmp_path / name / "README.md").read_text().split()) for name in ("local", "remote"))
    for claim in ("with the exact tokens it read and wrote", "Nothing else steered the sampling"):
        assert claim in local
        assert claim not in remote
    assert "exactly those it wrote where `ids_source` is `generated`" in remote
    assert "This is what the server was asked for." in remote


def test_sampled_answers_differ_and_can_be_asked_for_again(readable_target, tokenizer):
    with serving(readable_target, tokenizer) as server:
        options = {"prompts": CHATS[:2], "temperatures": (1.0,), "num_completions": 3}
        rows = [ask(server.url, tokenizer, seed=seed, **options) for seed in (1, 1, 2)]
    assert rows[0].to_list() == rows[1].to_list()
    assert rows[0]["completion"] != rows[2]["completion"]
    assert len({str(each) for each in rows[0]["completion"][:3]}) == 3


@pytest.mark.parametrize("fault", ["429", "500", "cut"])
def test_passing_faults_are_tried_again(readable_target, tokenizer, fault):
    """Too many requests, an internal error, a connection cut in the middle of an answer."""
    with serving(readable_target, tokenizer) as server:
        expected = ask(server.url, tokenizer)
        before = len(server.requests)
        server.faults = ["none", fault, fault]
        assert ask(server.url, tokenizer)["completion_ids"] == expected["completion_ids"]
        assert len(server.requests) == before + 1 + len(CHATS) + 2


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_answers_stop_the_run_and_not_with_a_bare_error(tmp_path, readable_target, tokenizer, fault):
    """JSONDecodeError, AttributeError, IndexError; what was finished stays and the same call resumes."""
    options = {"output_dir": tmp_path, "batch_size": 1, "shard_size": 1}
    with serving(readable_target, tokenizer) as server:
        server.faults = ["none", "none", fault]
        with pytest.raises(StoppedError, match=r"gave no usable answer: it.* run the same command"):
            ask(server.url, tokenizer, **options)
        assert len(server.requests) == 2 + 1
        assert len(list(tmp_path.glob("data/train-*"))) == 1
        assert len(ask(server.url, tokenizer, **options)) == len(CHATS)


def test_answers_of_an_unfinished_shard_are_not_paid_for_twice(tmp_path, readable_target, tokenizer):
    """Their distributions included."""
    options = {"cache_distributions": "top_k=3", "concurrency": 1}
    with serving(readable_target, tokenizer, "ids") as server:
        expected = ask(server.url, tokenizer, **options)
        # The last one fails: after an earlier one the next may be under way already, and its answer is dropped.
        server.faults = ["none", *["none"] * (len(CHATS) - 1), "404"]
        with pytest.raises(StoppedError, match="run the same command again"):
            ask(server.url, tokenizer, output_dir=tmp_path, **options)
        before = len(server.requests)
        resumed = ask(server.url, tokenizer, output_dir=tmp_path, **options)
        assert len(server.requests) == before + 1 + 1
    assert resumed.to_list() == expected.to_list()


@pytest.mark.parametrize("fault", BROKEN)
def test_an_address_that_never_answers_properly_is_said_at_once(readable_target, tokenizer, fault):
    """Without /v1, a server often shows a page: no waiting for it to pass."""
    with serving(readable_target, tokenizer) as server:
        server.faults = [fault]
        with pytest.raises(ValueError, match=r"does not answer as an OpenAI-compatible .* end in /v1\?"):
            ask(server.url, tokenizer)
        assert len(server.requests) == 1


def test_a_token_named_by_no_number_is_no_id(tokenizer):
    """Catches a bare `invalid literal for int()` in the middle of a run."""
    ids_of = TokenTexts(tokenizer)
    assert [ids_of(token) for token in ("token_id:7", "token_id:x", "token_id:")] == [7, None, None]


def test_a_token_beyond_the_vocabulary_is_no_id(tokenizer):
    """Fault: a row held ids that no model has, called exact, where the server's tokenizer is another."""
    assert TokenTexts(tokenizer)("token_id:999999") is None


def test_an_answer_that_no_table_can_hold_is_named_with_its_prompt(readable_target, tokenizer, monkeypatch):
    """Fault: half of a surrogate pair ended the run with a TypeError of the tokenizer."""
    plain = Handler._complete

    def complete(handler, body):
        answer = plain(handler, body)
        if "a mat" in body["prompt"]:
            answer["choices"][0]["text"] = "half \ud83d"
        return answer

    monkeypatch.setattr(Handler, "_complete", complete)
    with serving(readable_target, tokenizer) as server:
        with pytest.raises(StoppedError, match=r"half of a surrogate pair.*asked prompt 3 \(from 0, of 5\), 'a mat'"):
            ask(server.url, tokenizer)
        assert len(ask(server.url, tokenizer, skip_refused=True)) == 4


def test_an_interruption_waits_for_nothing(readable_target, tokenizer):
    """All that was queued was still sent, and waited for: here two of five are in flight, and hang."""
    with serving(readable_target, tokenizer) as server:
        config = AlignmentDataConfig(endpoint=server.url, max_new_tokens=4, concurrency=2)
        backend = endpoint_backend(config, "tiny-target", tokenizer)
        server.faults = ["hang"] * 5
        # A shell without a terminal starts background jobs with Ctrl-C ignored, and a test run may be one.
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupt = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        interrupt.start()
        start = time.monotonic()
        try:
            with pytest.raises(KeyboardInterrupt):
                list(backend(render_prompts(CHATS, tokenizer), DecodingSetting(), 0, frozenset()))
        finally:
            interrupt.cancel()  # or it would end the whole test run
            signal.signal(signal.SIGINT, handler)
        assert time.monotonic() - start < 2.5  # an answer takes three seconds
        assert len(server.requests) == 1 + 2


@pytest.mark.parametrize("reason", ["content_filter", "abort", None, "eos_token"])
def test_a_text_that_the_target_did_not_end_is_no_row(tmp_path, readable_target, tokenizer, reason):
    """It was recorded as `stop`, with an end token that the target never wrote."""
    with serving(readable_target, tokenizer) as server:
        server.finish_reasons = {"a mat": reason}
        message = rf"finish_reason is {reason!r}.*asked prompt 3 \(from 0, of 5\), 'a mat'"
        with pytest.raises(StoppedError, match=message):
            ask(server.url, tokenizer, output_dir=tmp_path, batch_size=1, shard_size=1)
        assert len(server.requests) == 1 + 3 + 1
    assert len(list(tmp_path.glob("data/train-*"))) == 3


def test_a_server_of_other_finish_reasons_is_refused_before_any_work(tmp_path, readable_target, tokenizer):
    with serving(readable_target, tokenizer) as server:
        server.finish_reasons = {"Hello": "eos_token"}
        with pytest.raises(ValueError, match=r"finish_reason is 'eos_token', neither 'stop' nor 'length'\.$"):
            ask(server.url, tokenizer, output_dir=tmp_path / "out")


def test_the_prompt_of_one_of_several_completions_is_named(readable_target, tokenizer):
    """The server counts requests, the user rows."""
    with serving(readable_target, tokenizer) as server:
        server.finish_reasons = {"sat on": "content_filter"}
        with pytest.raises(StoppedError, match=r"asked prompt 2 \(from 0, of 5\), 'sat on the mat'"):
            ask(server.url, tokenizer, temperatures=(1.0,), num_completions=3)


def test_tokens_whose_end_is_hidden_are_not_called_exact(readable_target, tokenizer):
    """Rows were `stop` and `generated` without the end token; those that a server shows whole stay exact."""
    readable_target.lm_head.bias[1] = 2.5
    with serving(readable_target, tokenizer, logprobs="ids") as server:
        whole = ask(server.url, tokenizer, cache_distributions={"top_k": 5}, max_new_tokens=6)
        server.hides_end = True
        rows = ask(server.url, tokenizer, cache_distributions={"top_k": 5}, max_new_tokens=6)
    assert set(rows["finish_reason"]) == {"stop", "length"}
    for row, shown in zip(rows, whole, strict=True):
        hidden = row["finish_reason"] == "stop"
        assert shown["ids_source"] == "generated"
        assert row["ids_source"] == ("retokenized" if hidden else "generated")
        assert row["completion_ids"] == (shown["completion_ids"][:-1] if hidden else shown["completion_ids"])
        assert len(row["target_logprobs"]) == len(row["completion_logprobs"]) == len(row["completion_ids"])


def test_what_answers_lack_is_said_once_a_run(readable_target, tokenizer, caplog):
    """It was said for each shard and setting, with counts of these alone."""
    with serving(make_target(), tokenizer, logprobs="text") as server:
        for _ in range(2):
            caplog.clear()
            options = {"cache_distributions": {"top_k": 5}, "batch_size": 1, "shard_size": 1}
            rows = ask(server.url, tokenizer, CHATS[:3], **options)
            assert sum(row is None for row in rows["target_logprobs"]) > 1
            assert caplog.text.count("usable log-probabilities") == 1


def test_the_vocabulary_is_decoded_only_where_tokens_come_as_text(readable_target, tokenizer, monkeypatch):
    """Seconds for each endpoint, whether log-probabilities were asked for or not."""
    monkeypatch.setattr("hf_draftkd.data.server_answers.tokenizer_size", None)
    with serving(readable_target, tokenizer) as server:
        assert len(ask(server.url, tokenizer)) == len(CHATS)


def test_an_end_token_alone_and_hidden_is_no_lack_of_log_probabilities(readable_target, tokenizer):
    """It leaves empty lists: nothing to complain of in the first answer, and a row of the end token alone."""
    readable_target.lm_head.bias[1] = 4.0
    with serving(readable_target, tokenizer, logprobs="ids") as server:
        server.hides_end = True
        rows = ask(server.url, tokenizer, cache_distributions={"top_k": 5})
    assert rows["completion_ids"][0] == [1]
    assert rows["ids_source"][0] == "retokenized"
    assert rows["target_logprobs"][0] is None


@pytest.mark.parametrize("kind", ["generation", "model"])
def test_every_end_token_of_the_target_ends_its_text(tmp_path, readable_target, tokenizer, kind):
    """Llama 3 names three: a text that ends with another than the tokenizer's is whole, and exact."""
    letter = tokenizer.convert_tokens_to_ids("a")
    readable_target.generation_config.eos_token_id = [1, letter]
    readable_target.config.eos_token_id = [1, letter]
    (readable_target.generation_config if kind == "generation" else readable_target.config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    beside = AutoTokenizer.from_pretrained(tmp_path)
    assert beside.eos_token_id == 1
    with serving(readable_target, tokenizer, logprobs="ids") as server:
        server.end_ids = {1, letter}
        expected, rows = (
            ask(server.url, each, cache_distributions={"top_k": 5}, max_new_tokens=40) for each in (tokenizer, beside)
        )
    ended = [number for number, ids in enumerate(rows["completion_ids"]) if ids[-1] == letter]
    assert ended
    assert {rows["ids_source"][number] for number in ended} == {"generated"}
    assert {expected["ids_source"][number] for number in ended} == {"retokenized"}


def test_a_server_that_hangs_is_tried_again(readable_target, tokenizer):
    with serving(readable_target, tokenizer) as server:
        server.faults = ["hang"]
        rows = ask(server.url, tokenizer, CHATS[:1], max_retries=2, timeout=1)
    assert len(rows) == 1


def test_a_server_that_dies_loses_nothing_that_was_finished(tmp_path, readable_target, tokenizer):
    options = {"output_dir": tmp_path, "batch_size": 1, "shard_size": 1}
    with serving(readable_target, tokenizer) as server:
        expected = ask(server.url, tokenizer)
        port, server.die_after = server.server_port, len(server.requests) + 1 + 3
        with pytest.raises(RuntimeError, match=r"stopped answering .* run the same command again"):
            ask(server.url, tokenizer, **options, max_retries=1)
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


@pytest.mark.parametrize("options", [{"sampled": 5}, {"top_k": 5, "loss_temperature": 2.0}, {}])
def test_what_a_server_cannot_cache_is_refused_without_a_request(tokenizer, options):
    with pytest.raises(ValueError, match="server returns"):
        ask("http://127.0.0.1:9/v1", tokenizer, cache_distributions=options)


def test_a_refused_connection_is_said_before_any_work(tmp_path, tokenizer):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ValueError, match="does not answer"):
        ask(url, tokenizer, output_dir=tmp_path / "out", max_retries=0)
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


@pytest.mark.parametrize(
    ("login", "sent"), [("me:sk%2Dsecret", "bWU6c2stc2VjcmV0"), ("sk-secret", "c2stc2VjcmV0Og==")], ids=["both", "key"]
)
def test_a_password_in_the_address_is_sent_and_shown_nowhere(readable_target, tokenizer, tmp_path, caplog, login, sent):
    """It stood in the manifest, in every message about the server, and in the HTTP client's log of addresses."""
    caplog.set_level("DEBUG")
    with serving(readable_target, tokenizer) as server:
        url = server.url.replace("127", f"{login}@127")
        server.key = f"Basic {sent}"
        assert len(ask(url, tokenizer, output_dir=tmp_path)) == len(CHATS)
        server.key, server.repeats_key = "right", True
        with pytest.raises(ValueError, match=r"127.0.0.1.* refuses the API key.*Basic \*\*\*") as error:
            ask(url, tokenizer)
    assert json.loads((tmp_path / "manifest.json").read_text())["endpoint"] == server.url
    shown = "".join(traceback.format_exception(error.value)).split("ValueError: ")[-1] + caplog.text
    assert not [secret for secret in ("secret", sent) if secret in shown]


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
        rows = ask(server.url, tokenizer, send_ids=True)
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
    """A refusal is not an outage: no talk of retries, but which prompt, and what the server said in its own form."""
    with serving(readable_target, tokenizer) as server:
        server.longest_prompt = len("<|user|>sat on the mat<|end|><|assistant|>") - 1
        with pytest.raises(
            RuntimeError, match=r"refused the prompt: .*too long for me.*prompt 2 .*'sat on the mat'"
        ) as error:
            ask(server.url, tokenizer, output_dir=tmp_path, batch_size=1, shard_size=1)
    assert "retries" not in str(error.value)
    assert len(list(tmp_path.glob("data/train-*"))) == 2


def test_a_prompt_that_the_server_refuses_can_be_left_out(tmp_path, readable_target, tokenizer, caplog):
    """A content filter on one prompt of ten thousand, and every answer that was paid for is asked for again."""
    with serving(readable_target, tokenizer) as server:
        server.longest_prompt = len("<|user|>sat on the mat<|end|><|assistant|>") - 1
        options = {"output_dir": tmp_path, "batch_size": 1, "shard_size": 1, "concurrency": 1}
        with pytest.raises(StoppedError):
            ask(server.url, tokenizer, **options)
        asked = len(server.requests)
        rows = ask(server.url, tokenizer, **options, skip_refused=True)
        left = len(server.requests) - asked
    assert [prompt[0]["content"] for prompt in rows["prompt"]] == ["the cat", "on", "a mat", "cat"]
    assert left < len(CHATS) + 2  # what was written is kept; one request tries the server out
    assert "refused the prompt" in caplog.text


def test_a_server_that_refuses_every_prompt_leaves_no_riddle(tmp_path, readable_target, tokenizer):
    """Fault: `Instruction "train" corresponds to no data!`, and the same again from the finished folder."""
    with serving(readable_target, tokenizer) as server:
        server.finish_reasons = {"mat": "content_filter"}
        for _ in range(2):
            with pytest.raises(StoppedError, match=r"Every prompt was refused and left out: .* holds no rows"):
                ask(server.url, tokenizer, ["a mat", "the mat"], output_dir=tmp_path, skip_refused=True)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_prompt_does_not_send_the_user_into_the_same_refusal(readable_target, tokenizer, status):
    """`run the same command again` stopped at the same prompt for ever."""
    with serving(readable_target, tokenizer) as server:
        server.faults = ["none", str(status)]
        with pytest.raises(StoppedError, match="with `skip_refused` it goes on") as error:
            ask(server.url, tokenizer, concurrency=1)
    assert "asked prompt 0 (from 0, of 5), 'the cat'" in str(error.value)
    assert "`skip_too_long` with the server's `context_length`" in str(error.value)
    assert "run the same command again" not in str(error.value)


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_what_is_wrong_with_the_account_is_not_blamed_on_a_prompt(readable_target, tokenizer, status):
    with serving(readable_target, tokenizer) as server:
        server.faults = ["none", "none", str(status)]
        with pytest.raises(StoppedError, match=r"no longer serves 'tiny-target' .* run the same command again"):
            ask(server.url, tokenizer)


def test_the_context_of_the_config_beside_the_tokenizer_is_kept(tmp_path, readable_target, tokenizer):
    """The server refuses a prompt that is too long only when its turn comes, hours later."""
    readable_target.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    beside = AutoTokenizer.from_pretrained(tmp_path)
    chats = [*CHATS, [{"role": "user", "content": "the cat sat " * 20}]]
    with serving(readable_target, tokenizer) as server:
        with pytest.raises(ValueError, match=r"row 5 .*context 128"):
            ask(server.url, beside, chats)
        assert not server.requests
        assert len(ask(server.url, beside, chats, skip_too_long=True)) == len(CHATS)
        assert len(ask(server.url, beside, chats, context_length=1000)) == len(CHATS) + 1  # the user knows better


def test_a_context_may_be_given(readable_target, tokenizer):
    with serving(readable_target, tokenizer) as server:
        with pytest.raises(ValueError, match=r"rows 0, 2 .*context 14"):
            ask(server.url, tokenizer, context_length=14)
        assert not server.requests
        rows = ask(server.url, tokenizer, context_length=14, skip_too_long=True)
    assert len(rows) == len(CHATS) - 2


def test_a_server_that_comes_back_elsewhere_goes_on(tmp_path, readable_target, tokenizer):
    """Another port was another setting, and nothing that was finished could be kept; another model still is."""
    options = {"output_dir": tmp_path, "batch_size": 1, "shard_size": 1}
    with serving(readable_target, tokenizer) as server:
        expected = ask(server.url, tokenizer)
        server.die_after = len(server.requests) + 1 + 3
        with pytest.raises(StoppedError):
            ask(server.url, tokenizer, **options, max_retries=0)
        assert json.loads((tmp_path / "manifest.json").read_text())["endpoint"] == server.url
    with serving(readable_target, tokenizer) as other:
        assert other.url != server.url
        rows = ask(other.url, tokenizer, **options)
        assert len(other.requests) == 1 + 2
    assert rows["completion_ids"] == expected["completion_ids"]
    with pytest.raises(ValueError, match="backend"):
        generate_alignment_data(readable_target, tokenizer, CHATS, max_new_tokens=6, **options)


def test_fields_of_each_request_decide_the_rows(readable_target, tokenizer, tmp_path):
    """Catches a run that resumes under another `min_p`, of which the manifest knew nothing."""
    with serving(readable_target, tokenizer) as server:
        for extra in ({"min_p": 0.1}, {"min_p": 0.1}):
            ask(server.url, tokenizer, output_dir=tmp_path, endpoint_options={"extra_body": extra})
        with pytest.raises(ValueError, match=r'extra_body: \{"min_p": 0.1\} there, not set now'):
            ask(server.url, tokenizer, output_dir=tmp_path)


def test_a_server_that_never_samples_is_found_out(readable_target, tokenizer):
    """As `transformers serve` for a model whose generation config is greedy: it must not be recorded as sampled."""
    with serving(readable_target, tokenizer) as server:
        server.always_greedy = True
        with pytest.raises(ValueError, match="does not sample"):
            ask(server.url, tokenizer, temperatures=(0.7,))
        assert len(ask(server.url, tokenizer, temperatures=(0.0,))) == len(CHATS)


SILENT = {"min_p": 0.0, "repeat_last_n": -1, "frequency_penalty": 0.0, "presence_penalty": 0.0}


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_what_the_rows_claim_is_sent_even_where_it_changes_nothing(readable_target, tokenizer, temperature):
    """Where a request is silent, vLLM takes penalty, top-k and min-p from the model's generation config: the rows said
    that there were none. The penalty has another name in llama.cpp, which ignored it.
    """
    with serving(readable_target, tokenizer) as server:
        ask(server.url, tokenizer, temperatures=[temperature])
        for request in server.requests[-len(CHATS) :]:
            expected = {"top_k": -1, "repetition_penalty": 1.0, "repeat_penalty": 1.0, **SILENT}
            assert {name: request.get(name) for name in expected} == expected
        sampled = {"temperatures": [0.7], "top_k": 5, "top_p": 0.9}
        own = {"endpoint_options": {"extra_body": {"min_p": 0.1}}}  # the user's word counts, and stands in the manifest
        ask(server.url, tokenizer, repetition_penalty=1.1, **sampled, **own)
        expected = {"top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1, "repeat_penalty": 1.1, **SILENT, "min_p": 0.1}
        assert {name: server.requests[-1].get(name) for name in expected} == expected


def test_a_server_of_openais_fields_alone_is_asked_for_these_and_its_defaults_are_said(
    readable_target, tokenizer, caplog
):
    """Catches OpenAI and `transformers serve` locked out by fields that change nothing, and rows that hide whose
    defaults they were written under.
    """
    with serving(readable_target, tokenizer) as server:
        server.refused_fields = {"top_k", "min_p", "repetition_penalty", "repeat_penalty", "repeat_last_n", "samplers"}
        with caplog.at_level(logging.WARNING, "hf_draftkd"):
            rows = ask(server.url, tokenizer, temperatures=[0.0, 0.7])
        assert len(rows) == 2 * len(CHATS)
        said = [record.getMessage() for record in caplog.records if "OpenAI's protocol" in record.msg]
        assert len(said) == 1
        assert "(Error code: 400" in said[0]
        with pytest.raises(ValueError, match=r"refuses a request for one token: .*top_k"):
            ask(server.url, tokenizer, temperatures=[0.7], top_k=5)
