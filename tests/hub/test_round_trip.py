"""Drafts and alignment data to the Hub and back: the whole way, through the real clients in processes of their own."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.hub import samples
from tests.hub.conftest import WRITER, snapshot
from tests.hub.fake_hub import FakeHub, User
from tests.tiny import tiny_pair

# huggingface_hub 2.4 sends LFS parts as `data=`, which its own HTTP client deprecates; users upload through Xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


PUBLISH = """
from hf_draftkd.cli.main import dispatch
assert dispatch({push!r}) == 0
assert dispatch({generate!r}) == 0
"""
USE = """
import torch
from datasets import load_dataset
from hf_draftkd.cli.main import dispatch
assert dispatch(["find", {target!r}]) == 0
from hf_draftkd.hub.find import find_drafts
from hf_draftkd.models.loading import load_draft, load_target, load_tokenizer
[found] = find_drafts({target!r})
draft, target, tokenizer = load_draft(found), load_target({target!r}), load_tokenizer(found)
inputs = tokenizer("The quick brown", return_tensors="pt")
plain = target.generate(**inputs, max_new_tokens=24, do_sample=False)
assisted = target.generate(**inputs, assistant_model=draft, max_new_tokens=24, do_sample=False)
assert torch.equal(plain, assisted)
assert draft.generation_config.num_assistant_tokens == 5
print(assisted.tolist())
load_dataset("me/mats", split="train").to_parquet({back!r})
"""


def run(hub: FakeHub, cache: Path, code: str) -> str:
    """What a child process printed that knows the Hub only by HF_ENDPOINT."""
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
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def publish_target(hub: FakeHub, folder: Path, target, tokenizer) -> str:
    """The draft's target, on disk and on the Hub; returns its commit."""
    target.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    files = snapshot(folder) | {"README.md": b"---\nlicense: mit\n---\n"}
    return hub.add(samples.TARGET, files).refs["main"]


@dataclass
class Chain:
    """What two processes, one of which publishes a draft and alignment data and one of which uses them, left."""

    hub: FakeHub
    folder: Path
    published: str
    used: str


@pytest.fixture(scope="module")
def chain(tmp_path_factory, _finished_draft: Path, tokenizer) -> Iterator[Chain]:
    folder = tmp_path_factory.mktemp("chain")
    target, out, draft, prompts = (folder / name for name in ("target", "out", "draft", "prompts.jsonl"))
    prompts.write_text("".join(json.dumps({"prompt": text, "n": n}) + "\n" for n, text in enumerate("abcde")))
    generate = ["generate", "--target_model", str(target), "--dataset", str(prompts), "--output_dir", str(out)]
    generate += ["--max_new_tokens", "6", "--temperatures", "0", "0.7", "--batch_size", "2", "--shard_size", "2"]
    generate += ["--cache_distributions", "top_k=4", "--push_to_hub", "me/mats", "--private"]
    with FakeHub() as hub:
        hub.tokens[WRITER] = User("me")
        commit = publish_target(hub, target, tiny_pair("llama")[1], tokenizer)
        shutil.copytree(_finished_draft, draft)
        for name in ("report.json", "provenance.json"):
            (draft / name).write_text((draft / name).read_text().replace(samples.REVISION, commit))
        push = ["push", "--model", str(draft), "--repo_id", "draft"]
        published = run(hub, folder / "cache", PUBLISH.format(push=push, generate=generate))
        back = str(folder / "back.parquet")
        yield Chain(hub, folder, published, run(hub, folder / "other", USE.format(target=samples.TARGET, back=back)))


def test_push_find_load_generate(chain: Chain, pair, tokenizer):
    """Catches a link of the chain that only holds inside one process, or with patched constants."""
    assert f"published: {chain.hub.url}/me/draft/commit/" in chain.published
    assert "license: mit" in chain.hub.repos["me/draft"].files()["README.md"].decode()
    found, ids = chain.used.strip().rsplit("\n", 1)
    assert "me/draft" in found
    assert "0.620" in found
    assert "another revision" not in found
    inputs = tokenizer("The quick brown", return_tensors="pt")
    expected = pair[1].generate(**inputs, max_new_tokens=24, do_sample=False)
    assert ids == str(expected.tolist())


def test_push_and_load_alignment_data(chain: Chain):
    """Catches a link that holds with a mocked client only, and a number that the way to the Hub and back changes."""
    assert f"Published at {chain.hub.url}/datasets/me/mats" in chain.published
    repo = chain.hub.repos["me/mats"]
    assert repo.private
    shards = [f"data/train-{number:05d}-of-00003.parquet" for number in range(3)]
    assert sorted(repo.files()) == [".gitattributes", "README.md", *shards]
    card = repo.files()["README.md"].decode()
    assert 'load_dataset("me/mats", split="train")' in card
    assert "10 completions of 5 prompts" in card
    assert str(chain.folder) not in card

    here = load_dataset(str(chain.folder / "out"), split="train")
    there = load_dataset("parquet", data_files=str(chain.folder / "back.parquet"), split="train")
    assert there.features == here.features
    # Where the target lies on this machine is the one thing that stays here.
    assert there.remove_columns("target").to_list() == here.remove_columns("target").to_list()
    assert (set(here["target"]), set(there["target"])) == ({str(chain.folder / "target")}, {"path/to/target"})
    assert here.features["target_logprobs"].feature.feature.dtype == "float16"
    assert all(np.shape(row["target_token_ids"]) == (len(row["completion_ids"]), 4) for row in here)


def test_the_commands_on_the_card_run(hub: FakeHub, draft_folder: Path, pair, tokenizer, tmp_path, capsys, monkeypatch):
    """Catches a card whose first line of advice does not work, or runs but decodes without the draft."""
    from transformers.generation import AssistedCandidateGenerator

    from hf_draftkd.hub.push import push_draft

    publish_target(hub, tmp_path / "target", pair[1], tokenizer)
    upload = push_draft(draft_folder, "me/draft", license="mit")
    blocks = re.findall(r"```python\n(.*?)```", upload.card.text, re.DOTALL)
    assert len(blocks) == 3
    # They name the folders that a reader would have downloaded, and ask for a short answer.
    blocks = [re.sub(r"    revision=.*\n", "", block).replace(", revision=", ", #") for block in blocks]
    blocks = [block.replace("max_new_tokens=256", "max_new_tokens=24") for block in blocks]
    generate, speculative, pipeline = (
        block.replace(samples.TARGET, str(tmp_path / "target")).replace("me/draft", str(draft_folder))
        for block in blocks
    )
    used = []
    original = AssistedCandidateGenerator.get_candidates

    def counted(self, *args, **kwargs):
        used.append(self.assistant_model)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AssistedCandidateGenerator, "get_candidates", counted)
    torch.manual_seed(0)
    names: dict = {}  # the second block uses the models of the first
    exec(compile(generate, "first card block", "exec"), names)
    assert used
    assert capsys.readouterr().out.strip()
    exec(compile(speculative, "second card block", "exec"), names)
    used.clear()
    exec(compile(pipeline, "third card block", "exec"), {})
    assert used
    assert capsys.readouterr().out.strip()


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
