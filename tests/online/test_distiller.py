"""A draft that learns while it serves: the text stays the target's, the loss is the one named, nothing is lost."""

import copy
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper

from hf_draftkd import OnlineDraftDistiller, count_acceptance
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.losses import DIVERGENCES
from hf_draftkd.models.draft_length import store_draft_settings
from hf_draftkd.online import state as online_state
from hf_draftkd.online.buffer import ReplayBuffer, ServedRequest
from tests.online.serving import (
    SAMPLED,
    UNFILTERED,
    assert_same,
    distiller_for,
    kept_by,
    request,
    serve,
    target_rows,
    weights_of,
    without_seconds,
)
from tests.tiny import VOCAB_SIZE, tiny_pair, tiny_prompts

# Serving -------------------------------------------------------------------------------------------------------------


def test_the_answer_is_the_targets_own_before_and_after_learning(any_pair, tokenizer):
    """Served text that depends on the draft, or an update that reaches it."""
    draft, target = any_pair
    distiller = distiller_for(any_pair, holdout_share=0)
    before = weights_of(draft)
    for prompt in tiny_prompts(tokenizer, 6):
        assert torch.equal(distiller.generate(**request(prompt)), target.generate(**request(prompt)))
    assert distiller.num_updates == 1
    assert any(not torch.equal(value, before[name]) for name, value in draft.state_dict().items())


def test_a_call_returns_what_generate_returns(pair, tokenizer):
    """A wrapper that swallows the output's other fields."""
    _, target = pair
    options = request(tiny_prompts(tokenizer)[0], return_dict_in_generate=True, output_logits=True)
    output = distiller_for(pair).generate(**options)
    wanted = target.generate(**options)
    assert type(output) is type(wanted)
    assert torch.equal(output.sequences, wanted.sequences)
    for logits, expected in zip(output.logits, wanted.logits, strict=True):
        torch.testing.assert_close(logits, expected)


def test_texts_of_a_batch_are_requests_by_themselves(any_pair, tokenizer):
    """Padding learned from, distributions of another row, or a batch counted as one request."""
    prompts = tiny_prompts(tokenizer, 3)
    longest = max(prompt.shape[1] for prompt in prompts)
    padding = [(longest - prompt.shape[1], 0) for prompt in prompts]
    ids = torch.cat([torch.nn.functional.pad(p, pad, value=2) for p, pad in zip(prompts, padding, strict=True)])
    mask = torch.cat(
        [torch.nn.functional.pad(torch.ones_like(p), pad) for p, pad in zip(prompts, padding, strict=True)]
    )
    alone = distiller_for(any_pair, auto_update=False, holdout_share=0)
    serve(alone, tokenizer, 3)
    together = distiller_for(any_pair, auto_update=False, holdout_share=0)
    together.generate(ids, attention_mask=mask, max_new_tokens=12)
    assert together.num_requests == 3
    for one, other in zip(kept_by(together), kept_by(alone), strict=True):
        assert torch.equal(one.prompt_ids, other.prompt_ids)
        assert torch.equal(one.completion_ids, other.completion_ids)
        torch.testing.assert_close(one.target.logprobs, other.target.logprobs, atol=1e-4, rtol=1e-4)


def test_several_answers_to_one_prompt_are_kept_with_it(pair, tokenizer):
    """`num_return_sequences` repeats the prompt inside `generate` only."""
    prompt = tiny_prompts(tokenizer)[0]
    distiller = distiller_for(pair, auto_update=False, holdout_share=0)
    output = distiller.generate(**request(prompt, num_return_sequences=2, **UNFILTERED))
    assert distiller.num_requests == len(output) == 2
    for one, row in zip(kept_by(distiller), output, strict=True):
        assert one.prompt_ids.tolist() == prompt[0].tolist()
        assert row[prompt.shape[1] :].tolist()[: len(one.completion_ids)] == one.completion_ids.tolist()


def test_stop_strings_use_the_distillers_tokenizer(pair, tokenizer):
    """`generate` hands its `tokenizer=` to no callable, so that a server's stop strings ended in an error."""
    prompt = tiny_prompts(tokenizer)[0]
    distiller = distiller_for(pair, tokenizer, auto_update=False)
    text = tokenizer.decode(pair[1].generate(**request(prompt))[0, prompt.shape[1] :])
    options = request(prompt, stop_strings=[text[4:7]], tokenizer=tokenizer)
    assert torch.equal(distiller.generate(**options), pair[1].generate(**options))


def assert_kept_is_said(one, target):
    rows = torch.empty(len(one.completion_ids), VOCAB_SIZE, dtype=torch.float64)
    rows.scatter_(1, one.target.token_ids.long(), one.target.logprobs.double())
    torch.testing.assert_close(rows, target_rows(target, one), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_what_is_kept_are_the_targets_raw_distributions_of_the_written_tokens(any_pair, tokenizer, options):
    """Unshifted logits; rows of rejected tokens; logits that temperature and top-p have been applied to in place."""
    distiller = distiller_for(any_pair, auto_update=False, top_k=VOCAB_SIZE)
    serve(distiller, tokenizer, 3, **options)
    served = kept_by(distiller)
    assert len(served) == 3
    for one in served:
        assert_kept_is_said(one, any_pair[1])
        assert one.target.tail_logprob.isneginf().all()


def test_requests_of_several_threads_are_learned_from_as_they_were_served(pair, tokenizer):
    """The distributions of one request kept with the text of another, or an update in the middle of a request."""
    distiller = distiller_for(pair, top_k=VOCAB_SIZE, holdout_share=0)
    prompts = tiny_prompts(tokenizer, 4)
    with ThreadPoolExecutor(4) as threads:
        outputs = list(threads.map(lambda k: distiller.generate(**request(prompts[k % 4])), range(8)))
    assert (distiller.num_requests, len(distiller.history)) == (8, 2)
    assert all(torch.equal(output, outputs[k % 4]) for k, output in enumerate(outputs))
    assert len(kept_by(distiller)) == 8
    for one in kept_by(distiller):
        assert_kept_is_said(one, pair[1])


def test_what_is_kept_equals_output_logits(pair, tokenizer):
    """Our own way to the logits, beside the one that transformers documents."""
    distiller = distiller_for(pair, auto_update=False, top_k=8)
    output = distiller.generate(
        **request(tiny_prompts(tokenizer)[1], return_dict_in_generate=True, output_logits=True, **SAMPLED)
    )
    (one,) = kept_by(distiller)
    logprobs = torch.cat(output.logits).log_softmax(-1)
    kept, ids = logprobs.topk(8)
    assert torch.equal(one.target.token_ids, ids.int())
    torch.testing.assert_close(one.target.logprobs, kept)
    tail = logprobs.scatter(-1, ids, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(one.target.tail_logprob, tail)


@pytest.mark.parametrize("place", ["draft", "target"])
def test_a_name_in_place_of_a_model_is_refused(pair, place):
    draft, target = pair
    models = {"draft": ("org/x", target), "target": (draft, "org/x")}[place]
    with pytest.raises(ValueError, match="'org/x' is a name: load the model"):
        OnlineDraftDistiller(*models)


@pytest.mark.parametrize("has_mask", [True, False])
def test_padding_is_not_part_of_a_prompt(pair, tokenizer, has_mask):
    """A left-padded request learned from with its padding, of which `generate` makes a mask itself if none is given."""
    prompt = tiny_prompts(tokenizer)[0]
    padded = torch.nn.functional.pad(prompt, (3, 0), value=2)
    mask = torch.nn.functional.pad(torch.ones_like(prompt), (3, 0))
    distiller = distiller_for(pair, auto_update=False)
    distiller.generate(padded, max_new_tokens=6, **({"attention_mask": mask} if has_mask else {}))
    (one,) = kept_by(distiller)
    assert one.prompt_ids.tolist() == prompt[0].tolist()


def test_bonus_tokens_are_not_counted_as_wrong(tokenizer):
    """A draft that is its own target has every token accepted; the target's own token after them is not a rejection."""
    draft, target = tiny_pair("llama", agreement=1.0)
    distiller = distiller_for((draft, target), auto_update=False)
    with count_acceptance(target) as counts:
        serve(distiller, tokenizer, 3)
    assert counts == distiller.counts
    assert distiller.counts.draft_acceptance_rate == 1
    assert distiller.counts.num_tokens == sum(len(one.completion_ids) for one in kept_by(distiller))


def test_long_requests_are_cut_or_served_without_learning(pair, tokenizer):
    """Memory bounded in requests alone, however long they are."""
    distiller = distiller_for(pair, auto_update=False, max_length=16)
    prompts = tiny_prompts(tokenizer, 8)
    shorter = next(p for p in prompts if 8 < p.shape[1] < 16)
    distiller.generate(**request(shorter))
    (one,) = kept_by(distiller)
    assert len(one.prompt_ids) + len(one.completion_ids) == 16
    assert len(one.target.token_ids) == len(one.completion_ids)
    longer = next(p for p in prompts if p.shape[1] >= 16)
    distiller.generate(**request(longer))
    assert (distiller.num_requests, len(kept_by(distiller))) == (2, 1)


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({}, DecodingSetting()),
        ({"do_sample": True}, DecodingSetting(1.0, 1.0, 50)),  # transformers' own default of 50
        ({"generation_config": GenerationConfig(do_sample=True, temperature=0.7, top_k=0)}, DecodingSetting(0.7)),
        ({"do_sample": True, "min_p": 0.1}, None),
        ({"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.5)])}, None),
    ],
)
def test_the_setting_of_a_request_is_that_of_generate(pair, tokenizer, options, setting):
    """Text judged under another setting than it was decoded with."""
    distiller = distiller_for(pair, auto_update=False)
    serve(distiller, tokenizer, 1, **options)
    (one,) = kept_by(distiller)
    assert one.setting == setting


# Learning ------------------------------------------------------------------------------------------------------------


def reference_loss(draft, target, served, divergence):
    """Mean over completion tokens, written from the definitions in float64."""
    values = []
    for one in served:
        ids = torch.cat([one.prompt_ids, one.completion_ids])
        q = draft(ids[None]).logits[0].double().softmax(-1)[len(one.prompt_ids) - 1 : -1]
        p = target_rows(target, one).exp()
        if divergence == "forward_kl":
            values.append((p * (p / q).log()).sum(-1))
        else:
            m = 0.1 * p + 0.9 * q
            values.append(0.1 * (p * (p / m).log()).sum(-1) + 0.9 * (q * (q / m).log()).sum(-1))
    return torch.cat(values).mean()


@pytest.mark.parametrize(
    ("divergence", "options"), [("forward_kl", {}), ("generalized_jsd", {"beta": 0.1})], ids=["kl", "jsd"]
)
def test_the_loss_is_the_one_that_was_named(any_pair, tokenizer, divergence, options):
    """Logits one position off; a "JSD" that is a weighted sum of two KLs; texts of unequal length in one batch."""
    draft, target = any_pair
    distiller = distiller_for(
        any_pair, auto_update=False, top_k=VOCAB_SIZE, divergence=divergence, divergence_options=options
    )
    serve(distiller, tokenizer, 3)
    served = kept_by(distiller)
    wanted = reference_loss(draft, target, served, divergence)
    wanted.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in draft.named_parameters()}
    draft.zero_grad()
    result = distiller.learner.loss(served)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    for name, parameter in draft.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-3)


def test_a_draft_vocabulary_is_learned_and_judged_on(pair, tokenizer):
    """Loss and gate over all tokens while a head cut to a list served: an update that served worse could be kept."""
    draft, target = pair
    listed = list(range(3, 250))
    store_draft_settings(draft, {"draft_vocabulary": listed})
    distiller = distiller_for(pair, auto_update=False, top_k=VOCAB_SIZE, num_epochs=4)
    serve(distiller, tokenizer, 10, **UNFILTERED)
    training, held_out = distiller.buffer.training, distiller.buffer.held_out

    @torch.no_grad()
    def loss_and_acceptance(requests):
        values = []
        for one in requests:
            ids = torch.cat([one.prompt_ids, one.completion_ids])
            q = draft(ids[None]).logits[0, len(one.prompt_ids) - 1 : -1, listed].double().softmax(-1)
            p = target_rows(target, one)[:, listed].exp()
            values.append(torch.stack([p * (p / q).log(), torch.minimum(p, q)]).sum(-1))
        return torch.cat(values, 1).mean(1).tolist()

    assert distiller.learner.loss(training).loss.item() == pytest.approx(loss_and_acceptance(training)[0], rel=1e-4)
    before = loss_and_acceptance(held_out)[1]
    entry = distiller.step()
    assert entry["kept"]
    assert entry["held_out_acceptance_rate_before"] == pytest.approx(before, rel=1e-4)
    assert entry["held_out_acceptance_rate"] == pytest.approx(loss_and_acceptance(held_out)[1], rel=1e-4)


@pytest.mark.parametrize("listed", [None, list(range(3, 200))], ids=["all", "list"])
def test_an_update_leaves_what_was_measured_of_draft_lengths(pair, tokenizer, listed):
    """After each update "auto" tried all its lengths afresh, plain decoding among them. A cut head is cut again."""
    draft, _ = pair
    if listed is not None:
        store_draft_settings(draft, {"draft_vocabulary": listed})
    distiller = distiller_for(pair, auto_update=False, holdout_share=0)
    serve(distiller, tokenizer, 4)
    length = distiller._decoding.length
    assert distiller.step()["kept"]
    assert distiller._decoding.length is length
    head = distiller._decoding._proposing_model.get_output_embeddings().weight
    assert torch.equal(head, draft.lm_head.weight if listed is None else draft.lm_head.weight[listed])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_learns_from_what_is_kept(pair, tokenizer, divergence):
    """A loss that needs the whole vocabulary fails with the first update, hours into serving."""
    distiller = distiller_for(pair, divergence=divergence, top_k=16, holdout_share=0)
    serve(distiller, tokenizer, 4)
    (entry,) = distiller.history
    assert entry["kept"]
    assert entry["num_tokens"] > 0


def test_acceptance_rises_and_nothing_else_changes(pair, tokenizer):
    """A target that is written to; a draft left in training mode, with gradients, or with another generation config."""
    draft, target = pair
    draft.generation_config.num_assistant_tokens = 3
    before = weights_of(target)
    config = draft.generation_config.to_dict()
    entries = []
    distiller = distiller_for(pair, on_log=entries.append, num_epochs=4)
    torch.manual_seed(7)
    wanted = torch.rand(3)
    distiller.args.auto_update = False
    serve(distiller, tokenizer, 10, **UNFILTERED)
    assert distiller.update_due
    torch.manual_seed(7)
    entry = distiller.step()
    assert torch.equal(torch.rand(3), wanted), "the caller's random numbers changed"
    assert entry["kept"]
    assert entry["held_out_acceptance_rate"] > entry["held_out_acceptance_rate_before"]
    assert entries == list(distiller.history) == [entry]
    assert not distiller.update_due
    assert distiller.step() is None, "nothing new has arrived"
    assert_same(before, weights_of(target))
    assert all(parameter.grad is None for model in pair for parameter in model.parameters())
    assert not any(module.training for model in pair for module in model.modules())
    assert draft.generation_config.to_dict() == config


SERVERS = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad}


def all_tensors(distiller):
    learner = distiller.learner
    moments = [value for state in learner._optimizer.state.values() for value in state.values()]
    requests = [
        value
        for one in kept_by(distiller)
        for value in (one.prompt_ids, one.completion_ids, *vars(one.target).values())
    ]
    return [*distiller.draft_model.parameters(), *learner._weights.values(), *moments, *requests]


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [("inference_mode", torch.float32), ("inference_mode", torch.bfloat16), ("no_grad", torch.bfloat16)],
)
def test_a_server_under_inference_mode_learns_as_one_without_it(tokenizer, tmp_path, mode, dtype):
    """A RuntimeError at each update; tensors of such requests, or of a resumed state, that can never be trained on."""
    pairs = [tiny_pair("llama", num_layers=1) for _ in range(3)]
    for draft, _ in pairs:
        draft.to(dtype)
    straight = distiller_for(pairs[0])
    serve(straight, tokenizer, 12)
    with SERVERS[mode]():
        distiller = distiller_for(pairs[1], output_dir=str(tmp_path), save_every=3)
        serve(distiller, tokenizer, 9)
        assert not any(tensor.is_inference() for tensor in all_tensors(distiller))
        resumed = distiller_for(pairs[2], output_dir=str(tmp_path), save_every=3)
        assert resumed.resume()
        serve(resumed, tokenizer, 3, start=9)
        assert not any(tensor.is_inference() for tensor in all_tensors(resumed))
    assert all(parameter.requires_grad for parameter in resumed.draft_model.parameters())
    assert resumed.num_updates > 0
    assert without_seconds(resumed) == without_seconds(straight)
    assert_same(weights_of(resumed.draft_model), weights_of(straight.draft_model))


def test_requests_served_under_inference_mode_are_learned_from_outside_it(pair, tokenizer):
    """A server that serves in one block and calls `step` in another."""
    distiller = distiller_for(pair, auto_update=False, holdout_share=0)
    with torch.inference_mode():
        serve(distiller, tokenizer, 4)
    assert distiller.step()["kept"]


def test_what_is_kept_is_not_a_view_of_the_callers_memory(pair, tokenizer):
    """A server that reads every prompt into the same tensor would teach the draft from the last one alone."""
    distiller = distiller_for(pair, auto_update=False)
    prompt = tiny_prompts(tokenizer)[0].clone()
    wanted = prompt[0].tolist()
    output = distiller.generate(prompt, max_new_tokens=6)
    written = output[0, prompt.shape[1] :].tolist()
    prompt.zero_()
    output.zero_()
    (one,) = kept_by(distiller)
    assert (one.prompt_ids.tolist(), one.completion_ids.tolist()) == (wanted, written)


def test_a_window_reports_its_own_requests(tokenizer):
    """Rates of the whole past hide that acceptance has moved."""
    distiller = distiller_for(tiny_pair("llama"), auto_update=False, holdout_share=0)
    serve(distiller, tokenizer, 3)
    distiller.step()
    before = copy.deepcopy(distiller.counts)
    serve(distiller, tokenizer, 3, start=3)
    distiller.step()
    first, second = distiller.history
    assert (first["num_requests"], second["num_requests"]) == (3, 6)
    assert first["draft_acceptance_rate"] == before.draft_acceptance_rate
    tokens, calls = (getattr(distiller.counts, n) - getattr(before, n) for n in ("num_tokens", "num_spec_steps"))
    assert second["mean_acceptance_length"] == tokens / calls != distiller.counts.mean_acceptance_length


def test_held_out_requests_are_never_learned_from(pair, tokenizer):
    """A gate that judges by what was learned; a question asked twice on both sides."""
    distiller = distiller_for(pair, auto_update=False, holdout_share=0.4)
    for _ in range(2):
        serve(distiller, tokenizer, 8)
    training, held_out = (
        {tuple(one.prompt_ids.tolist()) for one in side}
        for side in (distiller.buffer.training, distiller.buffer.held_out)
    )
    assert training
    assert held_out
    assert not training & held_out
    seen = []
    learn = distiller.learner.learn
    distiller.learner.learn = lambda batches: seen.extend(one for b in batches for one in b) or learn(batches)
    distiller.step()
    assert {tuple(one.prompt_ids.tolist()) for one in seen} == training


def test_the_buffer_is_bounded_and_new_requests_come_in_every_epoch():
    """Memory that grows with traffic; new requests drowned among old ones."""
    buffer = ReplayBuffer(size=6, holdout_size=2, holdout_share=0.3, seed=0)

    def fake(number):
        return ServedRequest(torch.tensor([number]), torch.tensor([1]), None, None)

    for number in range(40):
        buffer.add(fake(number))
    assert (len(buffer.training), len(buffer.held_out), buffer.num_new) == (6, 2, 6)
    buffer.num_new = 2
    numbers = [int(one.prompt_ids) for one in buffer.training]
    batches = buffer.batches(3, 5, 1.0, torch.Generator().manual_seed(0))
    chosen = [int(one.prompt_ids) for batch in batches for one in batch]
    assert len(chosen) == 5 * (2 + 2)
    assert [chosen.count(number) for number in numbers[-2:]] == [5, 5]
    for epoch in range(5):
        assert len(set(chosen[4 * epoch : 4 * epoch + 4])) == 4
    assert len(set(chosen) & set(numbers[:4])) > 2, "older ones are drawn again for each epoch"


def test_an_update_that_lowers_acceptance_is_taken_back(pair, tokenizer):
    """A draft that gets worse while serving; an optimiser that continues with the moments of a step that was undone."""
    draft, _ = pair
    distiller = distiller_for(pair, auto_update=False)
    serve(distiller, tokenizer, 10, **UNFILTERED)
    assert distiller.step()["kept"]
    state = {name: value.clone() for name, value in distiller.learner.state().items()}
    distiller.learner._optimizer.param_groups[0]["lr"] = 10.0
    serve(distiller, tokenizer, 4, start=10, **UNFILTERED)
    entry = distiller.step()
    assert not entry["kept"]
    assert entry["held_out_acceptance_rate"] < entry["held_out_acceptance_rate_before"]
    assert distiller.num_updates == 1
    assert_same(state, {name: value.clone() for name, value in distiller.learner.state().items()})
    assert not draft.training


def test_numbers_that_are_not_finite_end_an_update_and_not_the_service(pair, tokenizer, caplog):
    """A NaN written into the weights of a draft that is in use."""
    draft, _ = pair
    distiller = distiller_for(pair, auto_update=False, holdout_share=0)
    serve(distiller, tokenizer, 4)
    before = weights_of(draft)
    distiller.buffer.training[-1].target.logprobs[0, 0] = float("nan")
    with caplog.at_level(logging.WARNING):
        assert not distiller.step()["kept"]
    assert "discarded" in caplog.text
    assert_same(before, weights_of(draft))
    serve(distiller, tokenizer, 1)


def test_an_error_in_an_update_leaves_the_draft_as_it_was(pair, tokenizer):
    """Out of memory in the second gradient step: half an update stays, in training mode."""
    draft, _ = pair
    distiller = distiller_for(pair, auto_update=False)
    serve(distiller, tokenizer, 6)
    before = weights_of(draft)
    loss, calls = distiller.learner.loss, []

    def fails(batch):
        calls.append(batch)
        if len(calls) == 2:
            raise MemoryError("no room")
        return loss(batch)

    distiller.learner.loss = fails
    window = copy.deepcopy(distiller._window)
    with pytest.raises(MemoryError):
        distiller.step()
    assert_same(before, weights_of(draft))
    assert not draft.training
    assert (distiller._window, len(distiller.history)) == (window, 0)


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("no room")


def test_an_automatic_update_that_fails_costs_no_answer(pair, tokenizer, caplog):
    """Out of memory while learning: the user's finished text is lost with it, and so are the requests to learn from."""
    draft, target = pair
    entries = []
    distiller = distiller_for(pair, holdout_share=0, on_log=entries.append)
    before, learn = weights_of(draft), distiller.learner.learn
    distiller.learner.learn = out_of_memory
    with caplog.at_level(logging.ERROR):
        outputs = serve(distiller, tokenizer, 4)
    assert torch.equal(outputs[-1], target.generate(**request(tiny_prompts(tokenizer)[3])))
    failure = {"num_requests": 4, "failed": "step", "error": "OutOfMemoryError: no room"}
    assert entries == list(distiller.history) == [failure]
    assert "no room" in caplog.text
    assert_same(before, weights_of(draft))
    assert not draft.training

    # Not with every request from now on, but when the next one is due; its window is the whole time.
    distiller.learner.learn = learn
    serve(distiller, tokenizer, 3, start=4)
    assert len(distiller.history) == 1
    serve(distiller, tokenizer, 1, start=7)
    assert distiller.history[-1]["kept"]
    assert distiller.history[-1]["mean_acceptance_length"] == distiller.counts.mean_acceptance_length
    assert distiller.buffer.num_new == 0


def test_an_automatic_save_that_fails_costs_no_answer_and_is_made_up_for(tokenizer, tmp_path, monkeypatch):
    """A full disk; half a file that keeps the disk full."""
    distiller = distiller_for(tiny_pair("llama"), output_dir=str(tmp_path), save_every=4, holdout_share=0)

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(online_state, "save_file", full)
    assert len(serve(distiller, tokenizer, 4)) == 4
    assert distiller.history[0]["kept"]
    assert distiller.history[1]["failed"] == "save"
    assert "No space left" in distiller.history[1]["error"]
    assert not [path for path in tmp_path.iterdir() if path.read_bytes() == b"half"]
    with pytest.raises(OSError, match="No space left"):
        distiller.save()
    monkeypatch.undo()
    # The same draft as in the save that failed.
    distiller.args.auto_update = False
    serve(distiller, tokenizer, 4, start=4)
    again = distiller_for(tiny_pair("llama"), output_dir=str(tmp_path))
    assert again.resume()
    assert (again.num_requests, again.num_updates) == (8, 1)
    assert_same(weights_of(again.draft_model), weights_of(distiller.draft_model))


def test_a_log_that_raises_costs_no_answer(pair, tokenizer, caplog):
    """A tracking service that is down; its error counted as one of the update, which is kept."""

    def unreachable(entry):
        raise ConnectionError("tracking is down")

    distiller = distiller_for(pair, holdout_share=0, on_log=unreachable)
    with caplog.at_level(logging.ERROR):
        assert len(serve(distiller, tokenizer, 4)) == 4
    assert distiller.num_updates == 1
    assert [entry.get("failed") for entry in distiller.history] == [None, "step"]
    assert "tracking is down" in caplog.text


def test_an_interruption_goes_through(pair, tokenizer):
    """Ctrl-C swallowed by what must not fail."""
    distiller = distiller_for(pair)

    def interrupted(batches):
        raise KeyboardInterrupt

    distiller.learner.learn = interrupted
    with pytest.raises(KeyboardInterrupt):
        serve(distiller, tokenizer, 4)
    assert not distiller.history


def test_a_bfloat16_draft_learns_in_float32(tokenizer):
    """Updates smaller than a bfloat16 step of the weight: lost for good where bfloat16 weights are trained."""
    draft, target = tiny_pair("llama")
    draft.to(torch.bfloat16)
    before = weights_of(draft)
    distiller = distiller_for((draft, target), holdout_share=0, learning_rate=1e-5)
    serve(distiller, tokenizer, 8)
    masters = distiller.learner.state()
    name = "lm_head.weight"
    moved = masters[f"weights.{name}"] - before[name].float()
    assert 0 < moved.abs().max() < 1e-3
    assert draft.dtype == torch.bfloat16
    assert_same(
        weights_of(draft), {key: masters[f"weights.{key}"].to(torch.bfloat16).detach() for key in weights_of(draft)}
    )


def test_an_adapter_learns_and_its_base_does_not(pair, tokenizer):
    """A wrapped draft: served through its wrapper, trained where it is trainable, saved without its base."""
    draft, target = pair
    wrapped = get_peft_model(draft, LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    frozen = {name: p.clone() for name, p in wrapped.named_parameters() if not p.requires_grad}
    distiller = distiller_for((wrapped, target), holdout_share=0)
    outputs = serve(distiller, tokenizer, 4)
    assert torch.equal(outputs[0], target.generate(**request(tiny_prompts(tokenizer)[0])))
    assert distiller.num_updates == 1
    now = dict(wrapped.named_parameters())
    assert_same(frozen, {name: now[name] for name in frozen})
    assert all("lora_" in name for name in distiller.learner.state())
