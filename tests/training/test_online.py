"""A draft that learns while it serves: the text stays the target's, the loss is the one named, nothing is lost."""

import copy
import logging
import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper

from hf_draftkd import OnlineDistillConfig, OnlineDraftDistiller, count_acceptance
from hf_draftkd.data.decoding import DecodingSetting
from hf_draftkd.losses import DIVERGENCES
from hf_draftkd.training import online_state
from hf_draftkd.training.replay import ReplayBuffer
from hf_draftkd.training.serving import ServedRequest, served_setting
from tests.tiny import VOCAB_SIZE, tiny_pair, tiny_prompts

SETTINGS = {"learning_rate": 3e-3, "update_every": 4, "batch_size": 2, "holdout_share": 0.3}
SAMPLED = {"do_sample": True, "temperature": 0.5, "top_k": 20, "top_p": 0.9}
UNFILTERED = {"do_sample": True, "temperature": 1.0, "top_k": 0}


def distiller_for(pair, tokenizer=None, *, on_log=None, **settings):
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
    return [*distiller._buffer.training, *distiller._buffer.held_out]


def target_rows(target, request):
    """[T, V] float64 log p of the tokens after the prompt: position t - 1 speaks of token t."""
    ids = torch.cat([request.prompt_ids, request.completion_ids])
    with torch.no_grad():
        return target(ids[None]).logits[0].double().log_softmax(-1)[len(request.prompt_ids) - 1 : -1]


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
    draft, target = pair
    options = request(tiny_prompts(tokenizer)[0], return_dict_in_generate=True, output_logits=True)
    output = distiller_for(pair).generate(**options)
    wanted = target.generate(assistant_model=draft, **options)
    assert type(output) is type(wanted)
    assert torch.equal(output.sequences, wanted.sequences)
    assert all(torch.equal(a, b) for a, b in zip(output.logits, wanted.logits, strict=True))


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_what_is_kept_are_the_targets_raw_distributions_of_the_written_tokens(any_pair, tokenizer, options):
    """Unshifted logits; rows of rejected tokens; logits that temperature and top-p have been applied to in place."""
    distiller = distiller_for(any_pair, auto_update=False, top_k=VOCAB_SIZE)
    serve(distiller, tokenizer, 3, **options)
    served = kept_by(distiller)
    assert len(served) == 3
    for one in served:
        rows = torch.empty(len(one.completion_ids), VOCAB_SIZE, dtype=torch.float64)
        rows.scatter_(1, one.target.token_ids.long(), one.target.logprobs.double())
        torch.testing.assert_close(rows, target_rows(any_pair[1], one), atol=1e-4, rtol=1e-4)
        assert one.target.tail_logprob.isneginf().all()


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


def test_padding_is_no_part_of_a_prompt(pair, tokenizer):
    """A left-padded request learnt from with its padding."""
    prompt = tiny_prompts(tokenizer)[0]
    padded = torch.nn.functional.pad(prompt, (3, 0), value=2)
    mask = torch.nn.functional.pad(torch.ones_like(prompt), (3, 0))
    distiller = distiller_for(pair, auto_update=False)
    distiller.generate(padded, attention_mask=mask, max_new_tokens=6)
    (one,) = kept_by(distiller)
    assert one.prompt_ids.tolist() == prompt[0].tolist()


def test_bonus_tokens_are_not_counted_as_wrong(tokenizer):
    """A draft that is its own target has every token accepted; the target's own token after them is no rejection."""
    draft, target = tiny_pair("llama", agreement=1.0)
    distiller = distiller_for((draft, target), auto_update=False)
    with pytest.raises(ValueError, match="nested"), count_acceptance(target):
        serve(distiller, tokenizer, 1)
    serve(distiller, tokenizer, 3)
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


def test_the_setting_of_a_request_is_that_of_generate(pair):
    """Text judged under another setting than it was decoded with."""
    _, target = pair
    assert served_setting(target, None, {"max_new_tokens": 4}) == DecodingSetting()
    # transformers' own default of 50.
    assert served_setting(target, None, {"do_sample": True}) == DecodingSetting(1.0, 1.0, 50)
    own = GenerationConfig(do_sample=True, temperature=0.7, top_k=0)
    assert served_setting(target, own, {}) == DecodingSetting(0.7)
    assert served_setting(target, None, {"do_sample": True, "min_p": 0.1}) is None
    processors = LogitsProcessorList([TemperatureLogitsWarper(0.5)])
    assert served_setting(target, None, {"logits_processor": processors}) is None


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
    result = distiller._learner.loss(served)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    for name, parameter in draft.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-3)


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
    learner = distiller._learner
    moments = [value for state in learner._optimizer.state.values() for value in state.values()]
    requests = [
        value
        for one in kept_by(distiller)
        for value in (one.prompt_ids, one.completion_ids, *vars(one.target).values())
    ]
    return [*distiller.draft_model.parameters(), *learner._weights.values(), *moments, *requests]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", SERVERS)
def test_a_server_under_inference_mode_learns_as_one_without_it(tokenizer, tmp_path, mode, dtype):
    """A RuntimeError at each update; tensors of such requests, or of a resumed state, that can never be trained on."""
    pairs = [tiny_pair("llama") for _ in range(3)]
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


def test_requests_served_under_inference_mode_are_learnt_from_outside_it(pair, tokenizer):
    """A server that serves in one block and calls `step` in another."""
    distiller = distiller_for(pair, auto_update=False, holdout_share=0)
    with torch.inference_mode():
        serve(distiller, tokenizer, 4)
    assert distiller.step()["kept"]


def test_what_is_kept_is_no_view_of_the_callers_memory(pair, tokenizer):
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


def test_held_out_requests_are_never_learnt_from(pair, tokenizer):
    """A gate that judges by what was learnt; a question asked twice on both sides."""
    distiller = distiller_for(pair, auto_update=False, holdout_share=0.4)
    for _ in range(2):
        serve(distiller, tokenizer, 8)
    training, held_out = (
        {tuple(one.prompt_ids.tolist()) for one in side}
        for side in (distiller._buffer.training, distiller._buffer.held_out)
    )
    assert training
    assert held_out
    assert not training & held_out
    seen = []
    learn = distiller._learner.learn
    distiller._learner.learn = lambda batches: seen.extend(one for b in batches for one in b) or learn(batches)
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
    assert len(set(chosen) & set(numbers[:4])) > 2, "older ones are drawn anew for each epoch"


def test_an_update_that_lowers_acceptance_is_taken_back(pair, tokenizer):
    """A draft that gets worse while serving; an optimiser that goes on with the moments of a step that was undone."""
    draft, _ = pair
    distiller = distiller_for(pair, auto_update=False)
    serve(distiller, tokenizer, 10, **UNFILTERED)
    assert distiller.step()["kept"]
    state = {name: value.clone() for name, value in distiller._learner.state().items()}
    distiller._learner._optimizer.param_groups[0]["lr"] = 10.0
    serve(distiller, tokenizer, 4, start=10, **UNFILTERED)
    entry = distiller.step()
    assert not entry["kept"]
    assert entry["held_out_acceptance_rate"] < entry["held_out_acceptance_rate_before"]
    assert distiller.num_updates == 1
    assert_same(state, {name: value.clone() for name, value in distiller._learner.state().items()})
    assert not draft.training


def test_numbers_that_are_not_finite_end_an_update_and_not_the_service(pair, tokenizer, caplog):
    """A NaN written into the weights of a draft that is in use."""
    draft, _ = pair
    distiller = distiller_for(pair, auto_update=False, holdout_share=0)
    serve(distiller, tokenizer, 4)
    before = weights_of(draft)
    distiller._buffer.training[-1].target.logprobs[0, 0] = float("nan")
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
    loss, calls = distiller._learner.loss, []

    def fails(batch):
        calls.append(batch)
        if len(calls) == 2:
            raise MemoryError("no room")
        return loss(batch)

    distiller._learner.loss = fails
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
    before, learn = weights_of(draft), distiller._learner.learn
    distiller._learner.learn = out_of_memory
    with caplog.at_level(logging.ERROR):
        outputs = serve(distiller, tokenizer, 4)
    assert torch.equal(outputs[-1], target.generate(**request(tiny_prompts(tokenizer)[3])))
    failure = {"num_requests": 4, "failed": "step", "error": "OutOfMemoryError: no room"}
    assert entries == list(distiller.history) == [failure]
    assert "no room" in caplog.text
    assert_same(before, weights_of(draft))
    assert not draft.training

    # Not with every request from now on, but when the next one is due; its window is the whole time.
    distiller._learner.learn = learn
    serve(distiller, tokenizer, 3, start=4)
    assert len(distiller.history) == 1
    serve(distiller, tokenizer, 1, start=7)
    assert distiller.history[-1]["kept"]
    assert distiller.history[-1]["mean_acceptance_length"] == distiller.counts.mean_acceptance_length
    assert distiller._buffer.num_new == 0


@pytest.mark.parametrize("file", ["draft-", "requests"])
def test_an_automatic_saving_that_fails_costs_no_answer_and_is_made_up_for(tokenizer, tmp_path, monkeypatch, file):
    """A full disk; a later saving that takes the draft's file for written; half a file that keeps the disk full."""
    distiller = distiller_for(tiny_pair("llama"), output_dir=str(tmp_path), save_every=4, holdout_share=0)
    write = online_state.save_file

    def full(tensors, path, metadata):
        if file in path.name:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(tensors, path, metadata)

    monkeypatch.setattr(online_state, "save_file", full)
    assert len(serve(distiller, tokenizer, 4)) == 4
    assert distiller.history[0]["kept"]
    assert distiller.history[1]["failed"] == "save"
    assert "No space left" in distiller.history[1]["error"]
    assert not list(tmp_path.glob("_unfinished*"))
    with pytest.raises(OSError, match="No space left"):
        distiller.save()
    monkeypatch.undo()
    # The same draft as in the saving that failed.
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

    distiller._learner.learn = interrupted
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
    masters = distiller._learner.state()
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
    assert all("lora_" in name for name in distiller._learner.state())


# State ---------------------------------------------------------------------------------------------------------------


def without_seconds(distiller):
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in distiller.history]


def test_a_resumed_server_goes_on_as_if_nothing_had_happened(tokenizer, tmp_path):
    """Optimiser, buffer, counters or random state forgotten in a saving."""
    straight = distiller_for(tiny_pair("llama"))
    serve(straight, tokenizer, 12)
    assert {entry["kept"] for entry in straight.history} == {True, False}
    distiller = distiller_for(tiny_pair("llama"), output_dir=str(tmp_path), save_every=3)
    serve(distiller, tokenizer, 8)
    resumed = distiller_for(tiny_pair("llama"), output_dir=str(tmp_path), save_every=3)
    assert resumed.resume()
    assert resumed.num_requests == 6, "a crash loses what came after the last saving"
    serve(resumed, tokenizer, 6, start=6)
    assert without_seconds(resumed) == without_seconds(straight)
    assert resumed.counts == straight.counts
    assert_same(weights_of(resumed.draft_model), weights_of(straight.draft_model))
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}
    assert len(list(tmp_path.glob("draft-*"))) == 1, "drafts of earlier savings are removed"


@pytest.mark.parametrize("dies_at", [0, 1], ids=["draft", "requests"])
def test_dying_in_mid_save_leaves_the_state_before(tokenizer, tmp_path, monkeypatch, dies_at):
    """Weights of one saving beside the buffer of another."""
    distiller = distiller_for(tiny_pair("llama"), output_dir=str(tmp_path), save_every=100, holdout_share=0)
    serve(distiller, tokenizer, 5)
    distiller.save()
    saved = {name: value.clone() for name, value in distiller._learner.state().items()}
    serve(distiller, tokenizer, 5, start=5)
    assert distiller.num_updates > 1

    calls, replace = [], os.replace

    def dies(source, destination):
        calls.append(destination)
        if len(calls) == dies_at + 1:
            raise KeyboardInterrupt
        replace(source, destination)

    monkeypatch.setattr(online_state.os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        distiller.save()
    monkeypatch.undo()
    again = distiller_for(tiny_pair("llama"), output_dir=str(tmp_path), holdout_share=0)
    assert again.resume()
    assert again.num_requests == 5
    assert_same(saved, {name: value.clone() for name, value in again._learner.state().items()})
    # What the interrupted saving left behind goes with the next one.
    again.save()
    assert len(list(tmp_path.glob("draft-*"))) == 1


def test_an_earlier_run_is_not_overwritten(pair, tokenizer, tmp_path):
    """A server that is restarted by a script that forgets to resume."""
    first = distiller_for(pair, output_dir=str(tmp_path), save_every=1)
    assert not first.resume(), "there is nothing yet"
    serve(first, tokenizer, 1)
    second = distiller_for(tiny_pair("llama"), output_dir=str(tmp_path), save_every=1)
    with pytest.raises(ValueError, match="Call `resume"):
        serve(second, tokenizer, 1)
    with pytest.raises(ValueError, match="Call `resume"):
        second.save()


@pytest.mark.parametrize("resumed", [False, True], ids=["started", "resumed"])
def test_two_servers_on_one_directory_do_not_overwrite_each_other(tokenizer, tmp_path, resumed):
    """The second removes the first one's draft, the first writes requests that name it: nothing could be resumed."""
    if resumed:
        distiller_for(tiny_pair("llama"), output_dir=str(tmp_path)).save()
    first, second = (
        distiller_for(tiny_pair("llama"), output_dir=str(tmp_path), save_every=1, update_every=2, holdout_share=0)
        for _ in range(2)
    )
    assert [first.resume(), second.resume()] == [resumed, resumed]
    if not resumed:  # both found nothing, and serve
        first._claim_output_dir()
        second._claim_output_dir()
    serve(first, tokenizer, 3)
    serve(second, tokenizer, 1)
    assert "Another process has saved" in second.history[-1]["error"]
    with pytest.raises(ValueError, match="Another process has saved"):
        second.save()
    second.save(str(tmp_path / "elsewhere"))
    first.save()
    again = distiller_for(tiny_pair("llama"), output_dir=str(tmp_path))
    assert again.resume()
    assert (again.num_requests, again.num_updates) == (3, 1)


def test_a_directory_emptied_under_a_server_is_filled_again(tokenizer, tmp_path):
    """Requests alone, naming a draft that was taken to be there."""
    distiller = distiller_for(tiny_pair("llama"), output_dir=str(tmp_path), save_every=100)
    serve(distiller, tokenizer, 1)
    distiller.save()
    for path in tmp_path.iterdir():
        path.unlink()
    distiller.save()
    assert distiller_for(tiny_pair("llama"), output_dir=str(tmp_path)).resume()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "target="),
        ({"num_layers": 1}, "another draft: model.layers.1"),
        ({"top_k": 8}, "top_k=64, and here it is 8"),
        ({"temperature": 2.0}, "temperature=1.0, and here it is 2.0"),
    ],
    ids=["target", "draft", "top_k", "temperature"],
)
def test_a_state_of_something_else_is_refused(tokenizer, tmp_path, change, message):
    """Distributions of another target, or at another temperature, learnt from without a word."""
    distiller_for(tiny_pair("llama"), output_dir=str(tmp_path)).save()
    draft, target = tiny_pair("llama", **{name: change[name] for name in ("seed",) if name in change})
    if "num_layers" in change:
        draft = tiny_pair("llama", num_layers=1)[0]
    settings = {name: change[name] for name in ("top_k", "temperature") if name in change}
    other = distiller_for((draft, target), output_dir=str(tmp_path), **settings)
    with pytest.raises(ValueError, match=message):
        other.resume()


def test_a_broken_state_is_named(pair, tmp_path):
    distiller_for(pair, output_dir=str(tmp_path)).save()
    next(tmp_path.glob("draft-*")).unlink()
    again = distiller_for(pair, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="cannot be read"):
        again.resume()
    (tmp_path / "requests.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be read"):
        again.resume()


# What is refused -----------------------------------------------------------------------------------------------------


def test_requests_that_cannot_be_served_are_refused(pair, tokenizer):
    prompt = tiny_prompts(tokenizer)[0]
    distiller = distiller_for(pair)
    with pytest.raises(ValueError, match="one request at a time"):
        distiller.generate(prompt.repeat(2, 1))
    with pytest.raises(ValueError, match="token ids"):
        distiller.generate(inputs_embeds=torch.zeros(1, 2, 16))
    with pytest.raises(ValueError, match="leave it out"):
        distiller.generate(prompt, assistant_model=pair[0])
    with pytest.raises(ValueError, match="output_dir"):
        distiller.save()
    assert distiller.num_requests == 0


def test_decoding_that_the_draft_has_no_part_in_is_refused(pair, tokenizer):
    """Beams leave the draft unused, which was found when the answer was written, and lost it; guidance has the target
    read the text without its prompt, and what it said there was learnt from.
    """
    prompt = tiny_prompts(tokenizer)[0]
    distiller = distiller_for(pair)
    for options in ({"num_beams": 2}, {"generation_config": GenerationConfig(num_beams=2, max_new_tokens=4)}):
        with pytest.raises(ValueError, match="decodes by beam search, in which a draft has no part"):
            distiller.generate(**request(prompt, **options))
    with pytest.raises(ValueError, match="guidance_scale"):
        distiller.generate(**request(prompt, guidance_scale=1.5))
    assert distiller.num_requests == 0
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
    with pytest.raises(ValueError, match="can be trained"):
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
        ({"divergence": "cross_entropy", "temperature": 2.0}, "no temperature"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_values_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        OnlineDistillConfig(**settings)
