"""Publishing against a Hub that answers, and against one that fails."""

import dataclasses
import json
import logging
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, parse_eval_result_entries
from safetensors.torch import load_file, save_file

from hf_draftkd.cli import push as push_command
from hf_draftkd.cli.errors import UsageError
from hf_draftkd.hub.card import DraftModelCard
from hf_draftkd.hub.publishing import push_draft
from hf_draftkd.hub.summary import Provenance
from hf_draftkd.models.loading import load_draft
from hf_draftkd.models.weights import count_parameters, loaded_checksum, weights_checksum
from tests.hub import fake_hub, samples
from tests.hub.conftest import READER, WRITER, replaced, snapshot, write_report
from tests.hub.fake_hub import FakeHub

# huggingface_hub 2.4 sends LFS parts as `data=`, which its own HTTP client deprecates; users upload through Xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

ID = "me/draft"
PUBLISHED = {
    "README.md",
    "report.json",
    "provenance.json",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "generation_config.json",
    "plots/block_efficiency.png",
}


def push(folder: Path, **options):
    return push_draft(folder, options.pop("repo_id", ID), **({"license": "mit"} | options))


class TestOneCommit:
    def test_only_the_list_is_published(self, hub: FakeHub, draft_folder: Path):
        """Catches pickles, notes, code, checkpoints and false images in a public repository."""
        upload = push(draft_folder)
        files = hub.repos[ID].files()
        assert set(files) - {".gitattributes"} == PUBLISHED
        assert len(hub.repos[ID].messages) == 2, "one commit beside the Hub's own first one"
        assert upload.commit == hub.repos[ID].refs["main"]
        for path, body in files.items():
            # How pickles of protocol 2 and above, and torch's zipped ones, begin.
            assert not body.startswith((b"\x80", b"PK")), path
            assert not path.endswith((".bin", ".pt", ".pkl", ".py"))

    def test_weights_arrive_as_they_are(self, hub: FakeHub, draft_folder: Path):
        push(draft_folder)
        assert hub.repos[ID].files()["model.safetensors"] == (draft_folder / "model.safetensors").read_bytes()

    def test_the_tuned_length_is_in_the_generation_config(self, hub: FakeHub, draft_folder: Path):
        """Catches a draft that is published without what makes it fast; the folder itself stays as it is."""
        before = snapshot(draft_folder)
        push(draft_folder)
        held = json.loads(hub.repos[ID].files()["generation_config.json"])
        assert held["num_assistant_tokens"] == 5
        assert held["num_assistant_tokens_schedule"] == "constant"
        assert held["assistant_confidence_threshold"] == 0.0
        assert snapshot(draft_folder) == before

    def test_a_length_set_by_hand_wins(self, hub: FakeHub, draft_folder: Path):
        path = draft_folder / "generation_config.json"
        own = {
            "num_assistant_tokens": 2,
            "num_assistant_tokens_schedule": "constant",
            "assistant_confidence_threshold": 0.0,
        }
        path.write_text(json.dumps(json.loads(path.read_text()) | own))
        push(draft_folder)
        assert json.loads(hub.repos[ID].files()["generation_config.json"])["num_assistant_tokens"] == 2

    def test_the_same_command_again_changes_nothing(self, hub: FakeHub, draft_folder: Path):
        """Catches a card that is different every time, and so a commit for nothing."""
        first = push(draft_folder)
        assert push(draft_folder).commit == first.commit
        assert len(hub.repos[ID].messages) == 2

    def test_stale_weights_go_in_the_same_commit(self, hub: FakeHub, draft_folder: Path):
        """Catches old shards, or an old single file that transformers would prefer, beside the new weights."""
        hub.add(
            ID,
            {
                "README.md": "---\ntags: [draft-model]\n---\n",
                "model-00001-of-00002.safetensors": b"old",
                "model.safetensors.index.json": "{}",
                "plots/old.png": b"old",
                "CITATION.cff": "kept",
            },
        )
        upload = push(draft_folder)
        assert set(upload.deleted) == {
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "plots/old.png",
        }
        assert set(hub.repos[ID].files()) == PUBLISHED | {"CITATION.cff"}

    def test_sharded_weights(self, hub: FakeHub, draft_folder: Path, pair):
        before = weights_checksum(draft_folder)
        (draft_folder / "model.safetensors").unlink()
        pair[0].save_pretrained(draft_folder, max_shard_size="20KB")
        assert len(list(draft_folder.glob("model-*.safetensors"))) > 1
        assert weights_checksum(draft_folder) == before, "the checksum must not depend on sharding"
        push(draft_folder)
        assert "model.safetensors.index.json" in hub.repos[ID].files()

    def test_private_branch_and_pull_request(self, hub: FakeHub, draft_folder: Path):
        push(draft_folder, private=True)
        assert hub.repos[ID].private
        push(draft_folder, revision="v2", tags=["second"])
        assert "second" in DraftModelCard(hub.repos[ID].files("v2")["README.md"].decode()).data.tags
        assert "second" not in DraftModelCard(hub.repos[ID].files("main")["README.md"].decode()).data.tags
        upload = push(draft_folder, create_pr=True, tags=["third"])
        assert upload.url.endswith("/discussions/1")
        assert "third" in hub.repos[ID].files("refs/pr/1")["README.md"].decode()
        with pytest.raises(ValueError, match="pull request"):
            push(draft_folder, create_pr=True, revision="v2")

    @pytest.mark.parametrize("create_pr", [False, True])
    def test_a_wish_for_privacy_never_ends_in_public(self, hub: FakeHub, draft_folder: Path, create_pr: bool):
        """Catches `--private` that uploads to a public repository and prints "private"."""
        push(draft_folder)
        before = hub.repos[ID].files()
        for dry_run in (True, False):
            with pytest.raises(ValueError, match=r"me/draft exists and is public.*Make it private in its settings"):
                push(draft_folder, private=True, tags=["new"], create_pr=create_pr, dry_run=dry_run)
        assert hub.repos[ID].files() == before
        assert set(hub.repos[ID].refs) == {"main"}

    def test_nor_where_the_repository_appears_meanwhile(self, hub: FakeHub, draft_folder: Path, monkeypatch):
        """Catches a check that is made once, long before the upload."""
        original = HfApi.create_repo

        def meanwhile(self, repo_id, **options):
            hub.add(repo_id, {})
            return original(self, repo_id, **options)

        monkeypatch.setattr(HfApi, "create_repo", meanwhile)
        with pytest.raises(ValueError, match="exists and is public"):
            push(draft_folder, private=True)
        assert hub.repos[ID].files() == {}
        assert not hub.objects

    def test_the_visibility_that_is_shown_is_the_real_one(self, hub: FakeHub, draft_folder: Path):
        """Catches "public" for a repository that is private already, and "private" as a mere echo of the option."""
        assert "me/draft, new, public or private as its owner's default says:" in str(push(draft_folder, dry_run=True))
        assert str(push(draft_folder)).startswith("commit to me/draft, public:")
        push(draft_folder, repo_id="me/own", private=True)
        for private in (None, False, True):
            for dry_run in (True, False):
                upload = push(draft_folder, repo_id="me/own", private=private, dry_run=dry_run)
                assert str(upload).startswith("commit to me/own, private:")
        assert hub.repos["me/own"].private

    def test_a_bare_name_is_the_users_own(self, hub: FakeHub, draft_folder: Path):
        assert push(draft_folder, repo_id="mine").repo_id == "me/mine"
        assert "me/mine" in hub.repos

    def test_dry_run_shows_exactly_what_would_happen(self, hub: FakeHub, draft_folder: Path):
        """Catches a plan that differs from the deed, and a dry run that writes."""
        plan = push(draft_folder, dry_run=True)
        assert hub.repos == {}
        assert not [method for method, path in hub.requests if method in ("POST", "PUT")]
        done = push(draft_folder)
        files = hub.repos[ID].files()
        assert {file.path: file.read() for file in plan.files} == {
            path: body for path, body in files.items() if path != ".gitattributes"
        }
        assert str(plan).splitlines()[1:] == str(done).splitlines()[1:]
        assert "model.safetensors" in str(plan)

    def test_dry_run_needs_neither_login_nor_network(self, hub: FakeHub, draft_folder: Path, monkeypatch):
        monkeypatch.delenv("HF_TOKEN")
        assert push(draft_folder, dry_run=True).remarks == ()
        hub.fail("GET", "/api/models", times=9, cut=True)
        [remark] = push(draft_folder, dry_run=True).remarks
        assert "cannot be reached" in remark

    def test_a_leaderboard_result_only_where_it_applies(self, hub: FakeHub, draft_folder: Path, pair):
        """Catches a result filed under a benchmark that was not the one measured."""
        push(draft_folder, benchmark_task="function_calling")
        entries = yaml.safe_load(hub.repos[ID].files()[".eval_results/draftkd.yaml"])
        [entry] = parse_eval_result_entries(entries)
        assert (entry.dataset_id, entry.task_id, entry.value) == ("org/prompts", "function_calling", 2.5)
        assert "greedy" in entry.notes
        upload = push(draft_folder)
        assert upload.deleted == (".eval_results/draftkd.yaml",), "a leaderboard's figure of other weights"
        assert ".eval_results/draftkd.yaml" not in hub.repos[ID].files()
        write_report(draft_folder, pair, prompts={"source": "prompts.jsonl", "count": 3, "sha256": "0"})
        with pytest.raises(ValueError, match="need prompts from a benchmark on the Hub"):
            push(draft_folder, benchmark_task="function_calling")


class TestCardOnTheHub:
    def test_prose_written_on_the_hub_survives_and_figures_change(self, hub: FakeHub, draft_folder: Path, pair):
        push(draft_folder)
        card = hub.repos[ID].files()["README.md"].decode()
        edited = card.replace("It is not meant to be used by itself.", "Made with love.").replace(
            "license: mit", "license: apache-2.0\nthumbnail: mine.png"
        )
        hub.repos[ID].commit(hub.repos[ID].files() | {"README.md": edited.encode()}, "edit on the Hub")
        better = samples.report()["settings"]
        better[0]["acceptance_rate"] = samples.estimate(0.8125, 0.01)
        write_report(draft_folder, pair, settings=better)
        upload = push(draft_folder, license=None)
        text = hub.repos[ID].files()["README.md"].decode()
        assert "Made with love." in text
        assert "thumbnail: mine.png" in text
        assert "license: apache-2.0" in text
        assert "0.812" in text
        assert "0.710" not in text
        assert "the words on the Hub kept" in str(upload)

    def test_prose_in_the_folder_is_published(self, hub: FakeHub, draft_folder: Path):
        push(draft_folder)
        text = hub.repos[ID].files()["README.md"].decode()
        (draft_folder / "README.md").write_text(text.replace("by itself.", "by itself, says the author."))
        push(draft_folder)
        assert "says the author." in hub.repos[ID].files()["README.md"].decode()

    def test_words_on_both_sides_are_never_chosen_silently(self, hub: FakeHub, draft_folder: Path):
        push(draft_folder)
        text = hub.repos[ID].files()["README.md"].decode()
        (draft_folder / "README.md").write_text(text.replace("by itself.", "by itself. LOCAL"))
        hub.repos[ID].commit(
            hub.repos[ID].files() | {"README.md": text.replace("by itself.", "by itself. REMOTE").encode()}, "edit"
        )
        with pytest.raises(ValueError, match="prose='hub'"):
            push(draft_folder)
        push(draft_folder, prose="hub")
        assert "REMOTE" in hub.repos[ID].files()["README.md"].decode()
        push(draft_folder, prose="local")
        assert "LOCAL" in hub.repos[ID].files()["README.md"].decode()

    def test_a_title_chosen_on_the_hub_is_kept(self, hub: FakeHub, draft_folder: Path):
        push(draft_folder)
        text = hub.repos[ID].files()["README.md"].decode().replace(f"# {ID}\n", "# A fast one\n")
        hub.repos[ID].commit(hub.repos[ID].files() | {"README.md": text.encode()}, "rename")
        push(draft_folder, tags=["new"])
        assert "# A fast one" in hub.repos[ID].files()["README.md"].decode()

    def test_a_broken_card_is_not_replaced(self, hub: FakeHub, draft_folder: Path):
        """Catches words that are lost because the metadata above them does not parse."""
        card = b"---\ntags: [draft-model\n---\n# mine\n"
        hub.add(ID, {"README.md": card})
        with pytest.raises(ValueError, match=r"metadata of the card of me/draft cannot be read"):
            push(draft_folder)
        assert hub.repos[ID].files()["README.md"] == card

    def test_an_edit_in_between_is_not_lost(self, hub: FakeHub, draft_folder: Path, monkeypatch):
        """Catches a push that overwrites what somebody wrote after the card was read."""
        push(draft_folder)
        original = HfApi.create_repo

        def meanwhile(self, *args, **kwargs):
            hub.repos[ID].commit(hub.repos[ID].files() | {"README.md": b"# edited meanwhile\n"}, "edit")
            return original(self, *args, **kwargs)

        monkeypatch.setattr(HfApi, "create_repo", meanwhile)
        with pytest.raises(ValueError, match="at the same time"):
            push(draft_folder, tags=["new"])
        assert hub.repos[ID].files()["README.md"] == b"# edited meanwhile\n"

    def test_what_was_a_folder_is_no_repository_elsewhere(
        self, hub: FakeHub, draft_folder: Path, pair, tmp_path: Path, monkeypatch
    ):
        """Catches a card that, pushed from another folder, links to a stranger and takes over their licence."""
        for name in ("models/draft0", "models/target", "data/prompts", "data/rows"):
            hub.add(name, {"README.md": "---\nlicense: stolen\n---\n", "config.json": "{}"})
        training = samples.training(
            draft="models/draft0",
            target="models/target",
            dataset="data/rows",
            draft_is_local=True,
            target_is_local=True,
            dataset_is_local=True,
            draft_revision=None,
            target_revision=None,
        )
        replaced(draft_folder, training=training)
        parts = {"revision": None, "is_local": True, "num_parameters": pair[1].num_parameters()}
        target = {key: value for key, value in parts.items() if value is not None} | {"name": "models/target"}
        prompts = {"source": "data/prompts", "is_local": True, "count": 3, "sha256": "0"}
        report = write_report(draft_folder, pair, target=target, prompts=prompts)
        report["draft"] |= {"name": "models/new", "is_local": True}
        (draft_folder / "report.json").write_text(json.dumps(report))
        monkeypatch.chdir(tmp_path)
        hub.requests.clear()
        with pytest.raises(ValueError, match="does not start from a model on the Hub"):
            push(draft_folder, license=None)
        assert not [path for _, path in hub.requests if "models/target" in path], "a stranger's config was read"
        upload = push(draft_folder)
        for file in upload.files:
            if file.path in ("README.md", "provenance.json", "report.json"):
                text = file.read().decode()
                assert not re.search(r"(?<!path/to/)(models|data)/(draft0|target|prompts|rows|new)", text), file.path
        assert "path/to/draft0" in upload.card.text
        assert upload.card.data.get("base_model") is None
        with pytest.raises(ValueError, match="need prompts from a benchmark on the Hub"):
            push(draft_folder, benchmark_task="function_calling")

    def test_what_was_a_repository_is_none_of_the_folders_here(
        self, hub: FakeHub, draft_folder: Path, tmp_path, monkeypatch
    ):
        """Catches a base model that gets lost where a folder of its name happens to lie."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "org" / "stock-draft").mkdir(parents=True)
        replaced(draft_folder, training=samples.training())
        assert push(draft_folder, dry_run=True).card.data.base_model == samples.TARGET, "an old record: looked up here"
        replaced(draft_folder, training=samples.training(draft_is_local=False))
        assert push(draft_folder, dry_run=True).card.data.base_model == "org/stock-draft"

    def test_licence_is_inherited_or_asked_for(self, hub: FakeHub, draft_folder: Path):
        with pytest.raises(ValueError, match=r"Which licence.*Pass `license`"):
            push(draft_folder, license=None)
        hub.add(samples.TARGET, {"README.md": "---\nlicense: gemma\n---\n"})
        push(draft_folder, license=None)
        assert "license: gemma" in hub.repos[ID].files()["README.md"].decode()

    def test_a_licence_of_its_own_is_inherited_with_its_name(self, hub: FakeHub, draft_folder: Path):
        """Catches `license: other` alone, which tells nobody what they may do."""
        named = "license: other\nlicense_name: research\nlicense_link: https://huggingface.co/org/x/blob/main/LICENSE\n"
        hub.add(samples.TARGET, {"README.md": f"---\n{named}---\n"})
        data = push(draft_folder, license=None, dry_run=True).card.data.to_dict()
        assert named == "".join(f"{key}: {data[key]}\n" for key in ("license", "license_name", "license_link"))

    def test_metadata_that_the_client_cannot_take_is_no_crash(self, hub: FakeHub, draft_folder: Path, monkeypatch):
        """Catches a TypeError of huggingface_hub about tags that are a number, in the base's card or one's own."""
        info_of = fake_hub._Handler.info_of
        odd = {"cardData": {"license": "mit", "tags": 3}}
        monkeypatch.setattr(fake_hub._Handler, "info_of", lambda *asked: info_of(*asked) | odd)
        hub.add(samples.TARGET, {"README.md": "x"})
        hub.add(ID, {"README.md": "my words"})
        with pytest.raises(ValueError, match=f"Which licence. The metadata of {samples.TARGET} cannot be read"):
            push(draft_folder, license=None)
        assert "my words" in push(draft_folder).card.text

    def test_metadata_the_hub_refuses_is_said_before_anything_is_uploaded(self, hub: FakeHub, draft_folder: Path):
        hub.fail("POST", "/api/validate-yaml", status=400)
        with pytest.raises(ValueError, match=r"(?s).*"):
            push(draft_folder)
        assert not hub.objects


TEMPORARY = [
    ("POST", "/commit/", {"status": 500}, "failed \\(500\\)"),
    ("POST", "/preupload/", {"status": 500}, "failed \\(500\\)"),
    ("POST", "/objects/batch", {"status": 503}, "failed \\(503\\)"),
    ("PUT", "/lfs/", {"status": 500}, "failed \\(500\\)"),
    ("PUT", "/lfs/", {"cut": True}, "connection broke|cannot be reached"),
    ("POST", "/commit/", {"cut": True}, "connection broke|cannot be reached"),
    ("POST", "/api/repos/create", {"cut": True}, "cannot be reached"),
    ("GET", f"/api/models/{ID}", {"cut": True}, "cannot be reached"),
    ("POST", "/api/repos/create", {"status": 429, "headers": {"Retry-After": "17"}}, "try again in 17 seconds"),
    ("POST", "/commit/", {"status": 429, "headers": {"Retry-After": "17"}}, "try again in 17 seconds"),
]


class TestFaults:
    @pytest.mark.parametrize(("method", "path", "fault", "message"), TEMPORARY)
    def test_a_lasting_failure_loses_nothing_and_the_second_try_succeeds(
        self, hub: FakeHub, draft_folder: Path, method: str, path: str, fault: dict, message: str
    ):
        """Catches half-uploaded repositories, changed folders and messages that say nothing."""
        before = snapshot(draft_folder)
        hub.fail(method, path, times=20, **fault)
        with pytest.raises(ConnectionError, match=message) as caught:
            push(draft_folder)
        assert "the same command" in str(caught.value)
        assert set(hub.repos.get(ID, hub.add("x/y", {})).files()) <= {".gitattributes"}
        assert snapshot(draft_folder) == before
        hub.faults.clear()
        push(draft_folder)
        assert set(hub.repos[ID].files()) >= PUBLISHED

    @pytest.mark.parametrize(
        ("method", "path", "fault"),
        [
            ("POST", "/preupload/", {"status": 500}),
            ("PUT", "/lfs/", {"cut": True}),
            ("POST", "/objects/batch", {"status": 429, "headers": {"Retry-After": "1"}}),
            ("PUT", "/lfs/", {"after": 0.5}),
        ],
    )
    def test_a_passing_failure_is_not_even_noticed(self, hub: FakeHub, draft_folder: Path, method, path, fault):
        hub.fail(method, path, times=2, **fault)
        push(draft_folder)
        assert set(hub.repos[ID].files()) >= PUBLISHED

    @pytest.mark.parametrize(
        ("token", "repo_id", "message"),
        [
            (READER, "guest/draft", "no right"),
            (WRITER, "other/draft", "no right"),
            ("hf_" + "x" * 34, ID, "does not accept the token"),
        ],
    )
    def test_no_right_to_write(self, hub: FakeHub, draft_folder: Path, monkeypatch, token, repo_id, message):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(ValueError, match=message) as caught:
            push(draft_folder, repo_id=repo_id)
        assert "hf auth login" in str(caught.value)
        assert token not in str(caught.value)

    def test_nobody_logged_in(self, hub: FakeHub, draft_folder: Path, monkeypatch):
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(ValueError, match=r"Nobody is logged in.*hf auth login"):
            push(draft_folder)
        assert hub.requests == []

    def test_conflict(self, hub: FakeHub, draft_folder: Path):
        hub.fail("POST", "/commit/", status=409)
        with pytest.raises(ValueError, match="at the same time"):
            push(draft_folder)

    def test_offline(self, hub: FakeHub, draft_folder: Path, monkeypatch):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
            push(draft_folder)


class TestBadInput:
    def test_names(self, hub: FakeHub, draft_folder: Path):
        for name in ("a/b/c", "me/dr aft", "", "me/-draft-", "me/x.git"):
            with pytest.raises(ValueError, match="user/name"):
                push(draft_folder, repo_id=name)
        assert hub.requests == []

    def test_a_repository_that_holds_something_else(self, hub: FakeHub, draft_folder: Path):
        """Catches a slip of the keyboard that overwrites the target with its draft."""
        hub.add("me/target", {"model.safetensors": b"precious", "README.md": "# big\n"})
        with pytest.raises(ValueError, match="not a draft"):
            push(draft_folder, repo_id="me/target")
        assert hub.repos["me/target"].files()["model.safetensors"] == b"precious"

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda folder: (folder / "config.json").unlink(), "no config.json"),
            (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
            (lambda folder: [p.unlink() for p in folder.glob("tokenizer*")], "no tokenizer"),
            (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "damaged"),
            (lambda folder: (folder / "report.json").write_text("{"), "not valid JSON"),
            (lambda folder: (folder / "report.json").write_text('{"schema_version": 99}'), "schema_version 99"),
            (lambda folder: (folder / "provenance.json").write_text('{"x": 1}'), "unknown key `x`"),
        ],
    )
    def test_a_folder_without_a_whole_draft(self, hub: FakeHub, draft_folder: Path, spoil, message):
        spoil(draft_folder)
        with pytest.raises(ValueError, match=message):
            push(draft_folder)
        assert hub.requests == [], "all of this is seen before the Hub is asked"

    def test_no_folder(self, hub: FakeHub):
        with pytest.raises(ValueError, match="There is no folder 'nowhere'"):
            push(Path("nowhere"))

    def test_pickled_weights_only(self, hub: FakeHub, draft_folder: Path):
        (draft_folder / "model.safetensors").rename(draft_folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match="pickle"):
            push(draft_folder)

    def test_an_adapter_that_is_not_merged(self, hub: FakeHub, tmp_path: Path, draft_folder: Path, pair):
        """Catches both forms: the adapter alone, and adapter weights inside a whole model."""
        from peft import LoraConfig, get_peft_model

        wrapped = get_peft_model(pair[0], LoraConfig(target_modules=["q_proj"], r=2))
        wrapped.save_pretrained(tmp_path / "adapter")
        with pytest.raises(ValueError, match="not merged"):
            push(tmp_path / "adapter")
        tensors = {key: value.contiguous() for key, value in wrapped.base_model.model.state_dict().items()}
        save_file(tensors, draft_folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match="not merged"):
            push(draft_folder)

    def test_quantised_weights(self, draft_folder: Path):
        import torch

        tensors = load_file(draft_folder / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
        save_file(tensors, draft_folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match="quantised"):
            count_parameters(draft_folder)

    def test_an_index_that_leads_out_of_the_folder(self, draft_folder: Path):
        """Catches `../../.ssh/id_rsa` in a weight map."""
        (draft_folder / "model.safetensors").rename(draft_folder.parent / "secret.safetensors")
        (draft_folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
        with pytest.raises(ValueError, match="not a weight file"):
            push(draft_folder)


class TestMismatch:
    """A report about something else is refused; if it must be published, the card says so."""

    def refused_then_allowed(self, folder: Path, hub: FakeHub, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            push(folder)
        assert hub.requests == []
        push(folder, allow_mismatch=True)
        card = hub.repos[ID].files()["README.md"].decode()
        assert "Published although" in card

    def test_another_draft(self, hub: FakeHub, draft_folder: Path, pair):
        write_report(draft_folder, pair, draft={"name": "org/other", "num_parameters": 999_999})
        self.refused_then_allowed(draft_folder, hub, "999,999 parameters")

    def test_a_report_of_another_folder(self, hub: FakeHub, draft_folder: Path, pair, tmp_path: Path):
        """A copy of the same weights is the same draft; a folder of the same size with other weights is not."""
        other = tmp_path / "other"
        pair[0].save_pretrained(other)
        size = pair[0].num_parameters()
        write_report(draft_folder, pair, draft={"name": str(other), "num_parameters": size})
        push(draft_folder, repo_id="me/copy")
        pair[0].model.norm.weight.data += 1
        pair[0].save_pretrained(other)
        hub.requests.clear()
        self.refused_then_allowed(draft_folder, hub, "whose weights are others")

    def test_another_target(self, hub: FakeHub, draft_folder: Path, pair):
        size = pair[1].num_parameters()
        other = {"name": "org/other", "revision": samples.REVISION, "num_parameters": size}
        write_report(draft_folder, pair, target=other)
        self.refused_then_allowed(draft_folder, hub, "target 'org/target-7b', the report is about 'org/other'")

    def test_another_revision_of_the_target(self, hub: FakeHub, draft_folder: Path, pair):
        size = pair[1].num_parameters()
        other = {"name": samples.TARGET, "revision": "a" * 40, "num_parameters": size}
        write_report(draft_folder, pair, target=other)
        self.refused_then_allowed(draft_folder, hub, "target revision")

    def test_weights_that_changed_since(self, hub: FakeHub, draft_folder: Path):
        tensors = load_file(draft_folder / "model.safetensors")
        tensors["model.norm.weight"] += 1
        save_file(tensors, draft_folder / "model.safetensors", {"format": "pt"})
        self.refused_then_allowed(draft_folder, hub, "not those from when provenance.json was written")

    def test_a_report_that_measured_other_weights(self, hub: FakeHub, draft_folder: Path, pair):
        """Catches a draft of the same name and size whose figures are another's: only the checksum can tell."""
        draft, target = pair
        about = {"name": "org/draft", "num_parameters": draft.num_parameters(), "dtype": "float32"}
        write_report(draft_folder, pair, draft=about | {"weights_sha256": loaded_checksum(draft)})
        push(draft_folder, repo_id="me/same")
        hub.requests.clear()
        write_report(draft_folder, pair, draft=about | {"weights_sha256": loaded_checksum(target)})
        self.refused_then_allowed(draft_folder, hub, "not those from when the report's draft was measured")

    def test_weights_measured_in_another_number_format_are_the_same_draft(self, hub: FakeHub, draft_folder: Path, pair):
        """Catches a refusal of every draft that is trained in float32 and measured in bfloat16."""
        measured = load_draft(draft_folder, dtype="bfloat16")
        about = {"name": "elsewhere/draft", "num_parameters": 1, "dtype": "bfloat16"}
        write_report(draft_folder, pair, draft=about | {"weights_sha256": loaded_checksum(measured)})
        push(draft_folder)
        assert "Published although" not in hub.repos[ID].files()["README.md"].decode()

    def test_a_neighbours_report_is_passed_over(self, hub: FakeHub, draft_folder: Path, pair):
        """Catches a report beside the folder that is about another draft: nobody named it, so nobody needs telling."""
        (draft_folder / "report.json").unlink()
        draft, target = pair
        about = {"name": "org/other", "num_parameters": draft.num_parameters(), "dtype": "float32"}
        write_report(draft_folder.parent, pair, draft=about | {"weights_sha256": loaded_checksum(target)})
        upload = push(draft_folder)
        assert "beside the folder is left out" in str(upload)
        assert "report.json" not in hub.repos[ID].files()
        with pytest.raises(ValueError, match="was measured"):
            push(draft_folder, report=draft_folder.parent / "report.json")
        write_report(draft_folder.parent, pair, draft=about | {"weights_sha256": loaded_checksum(draft)})
        assert "report.json" in {file.path for file in push(draft_folder, dry_run=True).files}

    def test_pictures_beside_the_folder_stay_at_home(self, hub: FakeHub, draft_folder: Path, pair):
        """Catches a holiday in public: the folder above a draft may be anybody's home, and nobody named it."""
        (draft_folder / "report.json").unlink()
        above = draft_folder.parent
        write_report(above, pair)
        (above / "plots").mkdir()
        for name in ("holiday.png", "plots/speed.png"):
            (above / name).write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(9))
        plots = {"plots/block_efficiency.png", "plots/speed.png"}
        assert {file.path for file in push(draft_folder, dry_run=True).files if file.path.endswith(".png")} == plots

    def test_one_folder_has_many_paths(self, hub: FakeHub, draft_folder: Path, pair, monkeypatch):
        """Catches `./target` in training and its absolute path in evaluation taken for two targets."""
        folder = draft_folder.parent / "target"
        folder.mkdir()
        monkeypatch.chdir(folder.parent)
        stored = Provenance.load(draft_folder)
        replaced(draft_folder, training=dataclasses.replace(stored.training, target="target", target_revision=None))
        write_report(draft_folder, pair, target={"name": str(folder), "num_parameters": pair[1].num_parameters()})
        assert push(draft_folder).commit

    def test_what_does_not_fit_is_said_without_paths_of_this_machine(self, hub: FakeHub, draft_folder: Path, pair):
        """Catches a home directory in the very sentence that admits a mismatch, or in a warning of the report."""
        private = draft_folder.parent / "secret-place"
        about = {"name": str(private / "target"), "num_parameters": pair[1].num_parameters()}
        warning = f"The texts were written by {private}/other, the target here is org/x."
        ranked = [{"draft": {"name": str(private / "one"), "num_parameters": 1}, "settings": []}]
        write_report(draft_folder, pair, target=about, warnings=[warning], drafts=ranked)
        replaced(draft_folder, command=f"draftkd train --output_dir {private}/draft")
        push(draft_folder, allow_mismatch=True)
        files = hub.repos[ID].files()
        assert [path for path, body in files.items() if b"secret-place" in body] == []
        assert "Published although" in files["README.md"].decode()
        assert "written by path/to/other, the target" in files["report.json"].decode()
        assert "--output_dir path/to/draft" in files["provenance.json"].decode()


class TestSecrets:
    def test_no_token_leaves_the_machine(self, hub: FakeHub, draft_folder: Path, caplog):
        """Catches the token in the recorded command, a log or the plan."""
        with caplog.at_level(logging.DEBUG):
            upload = push(draft_folder)
        everything = b"".join(hub.repos[ID].files().values()) + str(upload).encode() + caplog.text.encode()
        assert WRITER.encode() not in everything
        assert "hf_***" in hub.repos[ID].files()["provenance.json"].decode()

    def test_a_token_in_a_file_stops_the_push(self, hub: FakeHub, draft_folder: Path):
        (draft_folder / "LICENSE").write_text("MIT\nhf_abcdefghijklmnopqrstuvwxyz012345\n")
        with pytest.raises(ValueError, match="LICENSE holds what looks like an access token") as caught:
            push(draft_folder)
        assert "abcdefghij" not in str(caught.value)
        assert ID not in hub.repos

    def test_a_token_with_a_line_break_is_not_printed(self, hub: FakeHub, draft_folder: Path):
        """Catches the HTTP client's error, which quotes the header it refuses."""
        with pytest.raises(ValueError, match="no token has") as caught:
            push(draft_folder, token=WRITER + "\nX: y")
        assert WRITER not in str(caught.value)

    def test_no_traceback_holds_a_token(self, hub: FakeHub, draft_folder: Path):
        """The server repeats the token in its answer; neither message nor chained exceptions may."""
        import traceback

        hub.fail("POST", "/api/repos/create", status=500, headers={"X-Error-Message": f"bad token {WRITER}"}, times=9)
        with pytest.raises(ConnectionError) as caught:
            push(draft_folder)
        assert WRITER not in "".join(traceback.format_exception(caught.value))

    def test_no_path_of_this_machine_is_published(self, hub: FakeHub, draft_folder: Path):
        replaced(draft_folder, command="draftkd train --output_dir ~/x")
        config = json.loads((draft_folder / "config.json").read_text()) | {"_name_or_path": str(draft_folder)}
        (draft_folder / "config.json").write_text(json.dumps(config))
        push(draft_folder)
        for path, body in hub.repos[ID].files().items():
            assert str(draft_folder.parent).encode() not in body, path

    def test_code_in_the_config_is_refused(self, hub: FakeHub, draft_folder: Path):
        """Catches a repository that only loads with `trust_remote_code`."""
        config = json.loads((draft_folder / "config.json").read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
        (draft_folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"auto_map|trust_remote_code|code"):
            push(draft_folder)


class TestCommand:
    def test_dry_run_and_push(self, hub: FakeHub, draft_folder: Path, capsys):
        arguments = ["--model", str(draft_folder), "--repo_id", ID, "--license", "mit"]
        assert push_command.run([*arguments, "--dry_run"]) == 0
        shown = capsys.readouterr().out
        assert "model.safetensors" in shown
        assert "## How much it helps" in shown
        assert "nothing was uploaded" in shown
        assert hub.repos == {}
        assert push_command.run([*arguments, "--private", "--language", "en", "de"]) == 0
        assert f"published: {hub.url}/{ID}/commit/" in capsys.readouterr().out
        assert hub.repos[ID].private
        assert DraftModelCard(hub.repos[ID].files()["README.md"].decode()).data.language == ["en", "de"]

    def test_exit_codes(self, hub: FakeHub, draft_folder: Path, capsys):
        """Bad usage is 2 (raised for the dispatcher), a failing Hub is 1."""
        with pytest.raises(UsageError, match="missing: --repo_id"):
            push_command.run(["--model", str(draft_folder)])
        with pytest.raises(UsageError, match="There is no folder"):
            push_command.run(["--model", "nowhere", "--repo_id", ID])
        hub.fail("POST", "/api/repos/create", status=500, times=9)
        assert push_command.run(["--model", str(draft_folder), "--repo_id", ID, "--license", "mit"]) == 1
        assert "the same command tries again" in capsys.readouterr().err
