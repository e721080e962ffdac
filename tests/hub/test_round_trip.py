"""Push, find, load, generate: the whole way, through the real client in its own process, as users go it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.hub import samples
from tests.hub.conftest import WRITER, snapshot
from tests.hub.fake_hub import FakeHub

# huggingface_hub 2.4 sends LFS parts as `data=`, which its own HTTP client deprecates; users upload through Xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


def run(hub: FakeHub, cache: Path, *arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """A child process that knows the Hub only by HF_ENDPOINT."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(cache),
        "HF_TOKEN": WRITER,
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "hf_draftkd", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def published_target(hub: FakeHub, tmp_path: Path, pair, tokenizer) -> str:
    """The draft's target, on the Hub; returns its commit."""
    folder = tmp_path / "target"
    pair[1].save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    files = snapshot(folder) | {"README.md": b"---\nlicense: mit\n---\n"}
    return hub.add(samples.TARGET, files).refs["main"]


def test_push_find_load_generate(
    hub: FakeHub, draft_folder: Path, published_target: str, pair, tokenizer, tmp_path: Path
):
    """Catches a link of the chain that only holds inside one process, or with patched constants."""
    report = (draft_folder / "report.json").read_text().replace(samples.REVISION, published_target)
    (draft_folder / "report.json").write_text(report)
    provenance = (draft_folder / "provenance.json").read_text().replace(samples.REVISION, published_target)
    (draft_folder / "provenance.json").write_text(provenance)
    cache = tmp_path / "cache"

    pushed = run(hub, cache, "push", "--model", str(draft_folder), "--repo_id", "draft")
    assert pushed.returncode == 0, pushed.stderr
    assert f"published: {hub.url}/me/draft/commit/" in pushed.stdout
    assert "license: mit" in hub.repos["me/draft"].files()["README.md"].decode()

    code = f"""
import torch
from hf_draftkd.cli.main import dispatch
assert dispatch(["find", {samples.TARGET!r}]) == 0
from hf_draftkd.hub.find import find_drafts
from hf_draftkd.models.loading import load_draft, load_target, load_tokenizer
[found] = find_drafts({samples.TARGET!r})
draft, target, tokenizer = load_draft(found), load_target({samples.TARGET!r}), load_tokenizer(found)
inputs = tokenizer("The quick brown", return_tensors="pt")
plain = target.generate(**inputs, max_new_tokens=24, do_sample=False)
assisted = target.generate(**inputs, assistant_model=draft, max_new_tokens=24, do_sample=False)
assert torch.equal(plain, assisted)
assert draft.generation_config.num_assistant_tokens == 5
print(assisted.tolist())
"""
    generated = run(hub, cache, code=code)
    assert generated.returncode == 0, generated.stderr
    found, ids = generated.stdout.strip().rsplit("\n", 1)
    assert "me/draft" in found
    assert "0.620" in found
    assert "another revision" not in found
    inputs = tokenizer("The quick brown", return_tensors="pt")
    expected = pair[1].generate(**inputs, max_new_tokens=24, do_sample=False)
    assert ids == str(expected.tolist())


@pytest.fixture
def card_commands(hub: FakeHub, draft_folder: Path, published_target: str, tmp_path: Path) -> list[str]:
    """The Python blocks of a published card, made to name the folders that a reader would have downloaded."""
    from hf_draftkd.hub.push import push_draft

    upload = push_draft(draft_folder, "me/draft", license="mit")
    blocks = re.findall(r"```python\n(.*?)```", upload.card.text, re.DOTALL)
    assert len(blocks) == 3
    blocks = [re.sub(r"    revision=.*\n", "", block).replace(", revision=", ", #") for block in blocks]
    return [
        block.replace(samples.TARGET, str(tmp_path / "target")).replace("me/draft", str(draft_folder))
        for block in blocks
    ]


@pytest.mark.parametrize("blocks", [[0, 1], [2]], ids=["generate, SpeculativeDecoding", "pipeline"])
def test_the_commands_on_the_card_run(card_commands: list[str], capsys, blocks: list[int]):
    """Catches a card whose first line of advice does not work."""
    torch.manual_seed(0)
    names: dict = {}  # the second block uses the models of the first
    for index in blocks:
        exec(compile(card_commands[index], f"card block {index}", "exec"), names)
    assert capsys.readouterr().out.strip()


def test_the_first_command_is_assisted(card_commands: list[str], monkeypatch):
    """Catches a block that runs, but decodes without the draft."""
    used = []
    from transformers.generation import AssistedCandidateGenerator

    original = AssistedCandidateGenerator.get_candidates

    def counted(self, *args, **kwargs):
        used.append(self.assistant_model)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AssistedCandidateGenerator, "get_candidates", counted)
    exec(compile(card_commands[0], "card block", "exec"), {})
    assert used


def test_a_downloaded_draft_is_the_one_that_was_pushed(hub: FakeHub, draft_folder: Path, pair, tmp_path: Path):
    """Catches weights or tokenizer that change on the way."""
    from hf_draftkd.hub.push import push_draft

    push_draft(draft_folder, "me/draft", license="mit")
    draft = AutoModelForCausalLM.from_pretrained("me/draft", use_safetensors=True)
    for name, tensor in pair[0].state_dict().items():
        assert torch.equal(draft.state_dict()[name], tensor), name
    tokenizer = AutoTokenizer.from_pretrained("me/draft")
    assert tokenizer.chat_template is not None


class TestDraftsFromStrangers:
    """`load_draft(find_drafts(target)[0])`, where the repository holds more, or other things, than a draft."""

    def found(self, hub: FakeHub, files: dict[str, bytes]):
        from hf_draftkd import find_drafts

        hub.add(samples.TARGET, {"README.md": b"# big\n"})
        tag = f"draft-for:{samples.TARGET}"
        card = f"---\ntags: [speculative-decoding, draft-model, '{tag}']\n---\n# A draft\n"
        hub.add("evil/draft", files | {"README.md": card.encode()})
        [draft] = find_drafts(samples.TARGET)
        return draft

    def asked_for(self, hub: FakeHub) -> str:
        """Files that were downloaded or asked about; the listing of a repository is not a download."""
        return "\n".join(str(request) for request in hub.requests if "resolve" in str(request))

    def test_only_expected_files_are_downloaded(self, hub: FakeHub, draft_folder: Path):
        """Catches a snapshot of the whole repository: pickles, code and whatever else a stranger put there."""
        from hf_draftkd import load_draft

        extra = {"pytorch_model.bin": b"a pickle", "../../outside": b"x", ".bashrc": b"x"}
        load_draft(self.found(hub, snapshot(draft_folder) | extra))
        asked = self.asked_for(hub)
        assert "model.safetensors" in asked
        for name in ("pytorch_model", "training_args.bin", "optimizer.pt", "modeling_evil", "outside", ".bashrc"):
            assert name not in asked

    def test_pickled_weights_are_refused_unread(self, hub: FakeHub, draft_folder: Path):
        from hf_draftkd import load_draft

        (draft_folder / "model.safetensors").rename(draft_folder / "pytorch_model.bin")
        files = {path: body for path, body in snapshot(draft_folder).items() if "/" not in path}
        with pytest.raises(ValueError, match="only as pickle"):
            load_draft(self.found(hub, files))
        assert "pytorch_model.bin" not in self.asked_for(hub)

    def test_code_is_refused_unread(self, hub: FakeHub, draft_folder: Path):
        """Catches `auto_map` of a downloaded config being followed."""
        from hf_draftkd import load_draft

        config = json.loads((draft_folder / "config.json").read_text())
        config |= {"model_type": "evil", "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
        config["auto_map"]["AutoConfig"] = "modeling_evil.EvilConfig"
        (draft_folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="trust_remote_code"):
            load_draft(self.found(hub, snapshot(draft_folder)))
        assert "modeling_evil" not in self.asked_for(hub)
