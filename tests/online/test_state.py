"""What an online draft saves and resumes from: whole states, each by one process."""

from pathlib import Path

import pytest

from tests.online.serving import assert_same, distiller_for, serve, weights_of, without_seconds
from tests.tiny import tiny_pair


def test_a_resumed_server_continues_as_if_nothing_had_happened(tokenizer, tmp_path):
    """Optimiser, buffer, counters or random state forgotten in a save."""
    straight = distiller_for(tiny_pair("llama"))
    serve(straight, tokenizer, 12)
    assert {entry["kept"] for entry in straight.history} == {True, False}
    distiller = distiller_for(tiny_pair("llama"), output_dir=str(tmp_path), save_every=3)
    serve(distiller, tokenizer, 8)
    resumed = distiller_for(tiny_pair("llama"), output_dir=str(tmp_path), save_every=3)
    assert resumed.resume()
    assert resumed.num_requests == 6, "a crash loses what came after the last save"
    serve(resumed, tokenizer, 6, start=6)
    assert without_seconds(resumed) == without_seconds(straight)
    assert resumed.counts == straight.counts
    assert_same(weights_of(resumed.draft_model), weights_of(straight.draft_model))
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_dying_in_mid_save_leaves_the_state_before(tokenizer, tmp_path, monkeypatch):
    """Weights of one save beside the buffer of another."""
    distiller = distiller_for(tiny_pair("llama"), output_dir=str(tmp_path), save_every=100, holdout_share=0)
    serve(distiller, tokenizer, 5)
    distiller.save()
    saved = {name: value.clone() for name, value in distiller.learner.state().items()}
    serve(distiller, tokenizer, 5, start=5)
    assert distiller.num_updates > 1

    def dies(source, destination):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        distiller.save()
    monkeypatch.undo()
    again = distiller_for(tiny_pair("llama"), output_dir=str(tmp_path), holdout_share=0)
    assert again.resume()
    assert again.num_requests == 5
    assert_same(saved, {name: value.clone() for name, value in again.learner.state().items()})
    again.save()
    assert len(list(tmp_path.iterdir())) == 1


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


def test_a_directory_emptied_under_a_server_is_filled_again(tokenizer, tmp_path):
    """A state that was taken to be there."""
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
        ({"loss_temperature": 2.0}, "loss_temperature=1.0, and here it is 2.0"),
    ],
    ids=["target", "draft", "top_k", "loss_temperature"],
)
def test_a_state_of_something_else_is_refused(tokenizer, tmp_path, change, message):
    """Distributions of another target, or at another temperature, learned from without a word."""
    distiller_for(tiny_pair("llama"), output_dir=str(tmp_path)).save()
    draft, target = tiny_pair("llama", **{name: change[name] for name in ("seed",) if name in change})
    if "num_layers" in change:
        draft = tiny_pair("llama", num_layers=1)[0]
    settings = {name: change[name] for name in ("top_k", "loss_temperature") if name in change}
    other = distiller_for((draft, target), output_dir=str(tmp_path), **settings)
    with pytest.raises(ValueError, match=message):
        other.resume()


def test_a_broken_state_is_named(pair, tmp_path):
    distiller_for(pair, output_dir=str(tmp_path)).save()
    again = distiller_for(pair, output_dir=str(tmp_path))
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-9])
    with pytest.raises(ValueError, match="cannot be read"):
        again.resume()
    state.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be read"):
        again.resume()


def test_two_servers_do_not_share_a_directory(tokenizer, tmp_path, caplog):
    """Workers of one web server: each wrote over what the other had learned."""
    first, second = (distiller_for(tiny_pair("llama"), output_dir=str(tmp_path)) for _ in range(2))
    serve(first, tokenizer, 2)
    first.save()
    with pytest.raises(ValueError, match="Another process has saved its state"):
        second.save()
    second.save(str(tmp_path / "own"))
    first.save()
    again = distiller_for(tiny_pair("llama"), output_dir=str(tmp_path))
    assert again.resume()
    assert again.num_requests == 2
    again.save()


def test_a_directory_that_cannot_be_is_refused(pair, tmp_path):
    """Each save failed, in a log that nobody read, until the server was stopped."""
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"`output_dir=.*cannot be a directory: .*file is a file"):
        distiller_for(pair, output_dir=str(tmp_path / "file" / "online"))
